"""`rematree report`: a run as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from rematree.cli import options
from rematree.cli.output import check_writable, emit_json, hint, write_output

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Output directory of rematree train.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File for the page; by default report.html in RUN.", show_default=False),
]


def report(run: Run, output: Output = None, as_json: options.Json = False) -> None:
    """Write one self-contained HTML page about a run: memory over the step, before and after; what else could be had.

    No weights are read, and the page needs no network: it can be opened from a file, mailed or archived. It can be made
    while the run is going on. Standard output is the page's path, or with --json also figures of it.
    """
    from rematree.finetune.run_page import run_page
    from rematree.report.page import page_facts, render

    target = run / "report.html" if output is None else output
    if run.is_dir():  # else there is no run either, and that is what is said
        check_writable(target)
    page = run_page(run, hint)
    write_output(target, render(page))
    if as_json:
        emit_json({"page": str(target), "run": str(run), **page_facts(page)})
    else:
        typer.echo(str(target))
