"""`rematree show`: a stored plan as a table."""

from rematree.cli import options
from rematree.cli.output import emit_json, emit_table, read_plan
from rematree.report.tables import plan_columns, plan_facts


def show(plan: options.PlanFile, as_json: options.Json = False) -> None:
    """Print a stored plan as a folded table: region, decision, saved bytes, added time."""
    stored = read_plan(plan)
    if as_json:
        emit_json(plan_facts(stored))
    else:
        emit_table(plan_columns(stored))
