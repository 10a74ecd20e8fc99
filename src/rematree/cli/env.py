"""`rematree env`: the versions a bug report needs, and what a budget may be here."""

from rematree.cli import options
from rematree.cli.output import emit_json, emit_table
from rematree.report.tables import Columns


def env(as_json: options.Json = False) -> None:
    """Print versions, device, memory and the largest budget that makes sense here."""
    import torch

    from rematree.finetune.model import preferred_dtype
    from rematree.report.machine import describe_machine

    machine = describe_machine(bfloat16=preferred_dtype() is torch.bfloat16)
    if as_json:
        emit_json(machine.facts())
    else:
        emit_table(Columns(("name", "value"), machine.rows()))
