"""`rematree report`: a run as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from rematree.cli.output import check_writable, hint
from rematree.errors import UsageError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Output directory of rematree train.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="File for the page; by default report.html in RUN.", show_default=False),
]


def report(run: Run, output: Output = None) -> None:
    """Write one self-contained HTML page about a run: memory over the step, before and after; what else could be had.

    No weights are read, and the page needs no network: it can be opened from a file, mailed or archived. It can be made
    while the run is going on. Standard output is the page's path.
    """
    from rematree.finetune.run_page import run_page
    from rematree.finetune.storage import write_text
    from rematree.report.page import render

    page = run_page(run, hint)
    target = run / "report.html" if output is None else output
    check_writable(target)
    try:
        write_text(target, render(page))
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}", remedies=["another --output"]) from error
    typer.echo(str(target))
