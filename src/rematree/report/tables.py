"""Plans, frontiers and verifications as tables: columns for every reader, colours for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rematree.plans import TABLE_HEADERS, TABLE_RIGHT, Plan
from rematree.table import render_table
from rematree.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rematree.verification import Verification


@dataclass(frozen=True)
class Columns:
    """A table that is not drawn yet.

    Attributes:
        headers: One a column.
        rows: Cells, as many a row as headers.
        right: Columns that are aligned to the right.
        above: Lines in front of the table.
        below: Lines behind it.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()
    above: Sequence[str] = field(default_factory=tuple[str, ...])
    below: Sequence[str] = field(default_factory=tuple[str, ...])

    def plain(self) -> str:
        """For a pipe or a file: aligned with spaces, never cut or wrapped."""
        table = render_table(self.headers, self.rows, right=self.right)
        return "\n".join([*self.above, *[""] * bool(self.above), table, *[""] * bool(self.below), *self.below])

    def rich(self) -> Table:
        """For a terminal: wrapped to its width; what is recomputed stands out."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column, header in enumerate(self.headers):
            right = column in self.right
            # Numbers are not broken; a decision or a list of layers may be.
            table.add_column(header, justify="right" if right else "left", no_wrap=right, overflow="fold")
        for row in self.rows:
            table.add_row(*row, style=_style(row))
        return table


def _style(row: Sequence[str]) -> str:
    if row[0] == "sum":
        return "bold"
    return "yellow" if len(row) > 1 and row[1].startswith("recompute") else ""


def plan_columns(plan: Plan) -> Columns:
    """The folded table of a plan."""
    above = [plan.title()]
    if plan.region_prefix:
        above.append(f"regions inside {plan.region_prefix}")
    below = [plan.summary(), *(f"note: {note}" for note in plan.notes)]
    return Columns(TABLE_HEADERS, plan.cells(), TABLE_RIGHT, above, below)


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The folded table of a plan as JSON values."""
    return {
        "model_class": plan.fingerprint.model_class,
        "device": plan.fingerprint.device,
        "batch": {name: list(shape) for name, shape, _ in plan.fingerprint.batch},
        "budget_bytes": plan.budget_bytes,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "headroom_bytes": plan.headroom_bytes,
        "predicted_step_seconds": plan.predicted_step_seconds,
        "extra_seconds": plan.extra_seconds,
        "bound_seconds": plan.bound_seconds,
        "gap_seconds": plan.gap_seconds,
        "loss_chunk_rows": plan.loss_chunk_rows,
        "groups": [list(group) for group in plan.groups],
        "exact": plan.exact,
        "region_prefix": plan.region_prefix,
        "rows": [asdict(row) for row in plan.folded_rows()],
        "notes": list(plan.notes),
    }


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One amount of memory and the fastest step in it.

    Attributes:
        budget_bytes: What was asked for; None for a point the planner chose.
        plan: The plan, or None when nothing fits the budget.
    """

    budget_bytes: int | None
    plan: Plan | None


@dataclass(frozen=True, slots=True)
class PlainStep:
    """The step without any plan, as it was simulated.

    Attributes:
        peak_bytes: Its peak.
        step_seconds: Its time.
    """

    peak_bytes: int
    step_seconds: float


def frontier_columns(points: Sequence[FrontierPoint], plain: PlainStep, room: tuple[str, int] | None = None) -> Columns:
    """Peak and time of every point, against the plain step; `room` is a device and what may be taken of it."""
    asked = any(point.budget_bytes is not None for point in points)
    rows: list[list[str]] = []
    for point in points:
        budget = "" if point.budget_bytes is None else format_bytes(point.budget_bytes)
        plan = point.plan
        if plan is None:
            rows.append([budget, "does not fit", "", "", "", ""])
            continue
        chunk = "whole" if plan.loss_chunk_rows is None else str(plan.loss_chunk_rows)
        rows.append([budget, *_step(plan.predicted_peak_bytes, plan.predicted_step_seconds, plain), chunk])
    rows.append(["", *_step(plain.peak_bytes, plain.step_seconds, plain), "plain step"])
    headers = ["budget", "peak", "of plain", "step", "of plain", "loss rows"]
    if not asked:
        headers, rows = headers[1:], [row[1:] for row in rows]
    below: list[str] = []
    if room is not None:
        device, usable = room
        fitting = sum(point.plan is not None and point.plan.predicted_peak_bytes <= usable for point in points)
        below.append(f"{device}: {format_bytes(usable)} may be taken, {fitting} of {len(points)} points fit")
    return Columns(headers, rows, frozenset(range(len(headers))), below=below)


def _step(peak_bytes: int, seconds: float, plain: PlainStep) -> list[str]:
    ratio = f"{seconds / plain.step_seconds:.2f}x" if plain.step_seconds else "-"
    share = f"{peak_bytes / plain.peak_bytes:.0%}" if plain.peak_bytes else "-"
    return [format_bytes(peak_bytes), share, format_seconds(seconds), ratio]


def frontier_facts(
    points: Sequence[FrontierPoint], plain: PlainStep, room: tuple[str, int] | None = None
) -> dict[str, Any]:
    """The frontier as JSON values; `room` is a device and the bytes that may be taken of it."""
    return {
        "device": None if room is None else room[0],
        "usable_bytes": None if room is None else room[1],
        "plain": asdict(plain),
        "points": [
            {
                "budget_bytes": point.budget_bytes,
                "fits": point.plan is not None and (room is None or point.plan.predicted_peak_bytes <= room[1]),
                "predicted_peak_bytes": point.plan.predicted_peak_bytes if point.plan else None,
                "predicted_step_seconds": point.plan.predicted_step_seconds if point.plan else None,
                "loss_chunk_rows": point.plan.loss_chunk_rows if point.plan else None,
            }
            for point in points
        ],
    }


def verification_columns(result: "Verification") -> Columns:
    """Predicted beside measured, and the gradients."""
    peak_error = result.predicted_peak_bytes / max(1, result.measured_peak_bytes) - 1
    time_error = result.predicted_step_seconds / max(1e-12, result.measured_step_seconds) - 1
    rows = [
        [
            "peak",
            format_bytes(result.predicted_peak_bytes),
            format_bytes(result.measured_peak_bytes),
            f"{peak_error:+.1%}",
            "-" if result.plain_peak_bytes is None else format_bytes(result.plain_peak_bytes),
        ],
        [
            "step",
            format_seconds(result.predicted_step_seconds),
            format_seconds(result.measured_step_seconds),
            f"{time_error:+.1%}",
            "-" if result.plain_step_seconds is None else format_seconds(result.plain_step_seconds),
        ],
    ]
    if result.gradients_equal:
        verdict = f"loss and {result.num_gradients} gradients equal the plain model's bit for bit"
    else:
        verdict = (
            f"loss and {result.num_gradients} gradients are within rounding of the plain model's: largest difference "
            f"{result.largest_difference:.2g} of a gradient's largest entry"
        )
    below = [verdict, f"loss: plain {result.loss_plain:.6f}, under the plan {result.loss_planned:.6f}"]
    headers = ("", "predicted", "measured", "difference", "plain model")
    return Columns(headers, rows, frozenset({1, 2, 3, 4}), below=below)
