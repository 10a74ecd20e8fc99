"""`rematree calibrate`: measure the device that is here."""

from pathlib import Path
from typing import Annotated

import typer

from rematree.cli import options
from rematree.cli.output import check_writable, emit_table, hint, write_output

Output = Annotated[Path, typer.Option("--output", "-o", help="File for the profile, as JSON.")]


def calibrate(output: Output = Path("profile.json"), as_json: options.Json = False) -> None:
    """Measure the device that is here, and store a profile that can be carried to another machine.

    Matmuls in each dtype, attention, bandwidth, gathers, dropout, 4-bit weights if bitsandbytes is installed, launches
    and memory. Wherever the name of a device is asked for, the path of the profile may be given.
    """
    check_writable(output)
    import torch

    from rematree.calibration import calibrate as measure
    from rematree.report.devices import figure_columns
    from rematree.report.machine import describe_machine

    machine = describe_machine(bfloat16=False)
    hint(f"measuring {machine.device}: {machine.name}")
    profile = measure(torch.device(machine.device), machine.total_bytes, report=hint)
    text = profile.to_json()
    write_output(output, text + "\n")
    hint(f"stored in {output}; use it as --device {output}")
    if as_json:
        typer.echo(text)
    else:
        emit_table(figure_columns(profile))
