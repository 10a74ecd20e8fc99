"""`rematree explain`: why a stored plan costs what it costs."""

import typer

from rematree.cli import options
from rematree.cli.output import emit_json, read_plan
from rematree.report.explanation import explain_facts, explain_text


def explain(plan: options.PlanFile, as_json: options.Json = False) -> None:
    """Say where the bytes of a stored plan are at its peak, and why a region is saved or recomputed.

    Prints the ledger at the peak, for each kind of block what it saves and recomputes and what that costs, the
    headroom, and what more memory would buy.
    """
    stored = read_plan(plan)
    if as_json:
        emit_json(explain_facts(stored))
    else:
        typer.echo(explain_text(stored))
