"""`rematree export`: a stored plan as the nearest settings of another trainer."""

from typing import Annotated

import typer

from rematree.catalogue.shapes import find_shape
from rematree.cli import options
from rematree.cli.output import emit_json, hint, read_plan
from rematree.report.export import export_plan

To = Annotated[str, typer.Option("--to", help="trl or axolotl.", show_default=False)]


def export(plan: options.PlanFile, to: To, as_json: options.Json = False) -> None:
    """Print a stored plan as the nearest settings of TRL or axolotl, in YAML.

    What those settings do not express is said on standard error, and in comments of the YAML.
    """
    stored = read_plan(plan)
    model = stored.run.get("model", "")
    shape = find_shape(model)
    differs = shape is not None and shape.partial and not shape.is_id(model)
    found = export_plan(stored, to, shape.hub if shape else None, shape.note if shape and differs else "")
    if as_json:
        emit_json(found.facts())
        return
    for line in found.lost:
        hint(f"not expressed: {line}")
    typer.echo(found.yaml())
