"""One HTML file about a run: everything that is printed in it is put into words here, the script only draws and picks.

The file has no external resource and no framework. Numbers are the same words as on the terminal (`units`); every
picture has a table beside it, and patterns and labels say what colours say.
"""

import html
import importlib.resources
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rematree.plans import WHOLE_MODEL
from rematree.report.stored_frontier import Kind, Step, StoredFrontier
from rematree.table import common_prefix, fold_rows
from rematree.units import GIB, KIB, MIB, format_bytes, format_seconds

_POSITIONS: Final = 120  # of the slider, beside those that are exactly a plan's peak or the budget
_BELOW_LEAST: Final = 0.95  # the slider begins where nothing fits
_IN_SIGHT: Final = 1.25  # a budget far above every peak would press the pictures flat
_TICKS: Final = 5
_WORDS: Final[Mapping[Kind, tuple[str, str]]] = {
    Kind.SAVE: ("saved", "keeps everything for the backward pass"),
    Kind.PART: ("recomputed in part", "keeps what is dear, runs the rest again"),
    Kind.RECOMPUTE: ("recomputed", "keeps its input alone and runs again"),
    Kind.GROUP: ("recomputed in a group", "its input is not kept either"),
    Kind.COMPILED: ("compiled", "its compiler chooses what is kept"),
}


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step of the run.

    Attributes:
        number: From 1.
        seconds: How long it took; None where it was not timed.
        peak_bytes: Most that was allocated in it; None where that was not measured.
    """

    number: int
    seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """What the page tells.

    Attributes:
        title: The run.
        facts: Name and value of what was asked for and where it ran.
        budget_bytes: The budget of the run.
        frontier: What can be had for which memory.
        passes: Forward and backward passes in one step of the run; the frontier is of one.
        predicted_allocated_bytes: What the measured peaks are compared with; None: the peak of the plan in force.
        steps: What was measured.
        compared: Rows of the table of predicted and measured.
        notes: Lines about where the numbers are from.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    budget_bytes: int
    frontier: StoredFrontier
    passes: int = 1
    predicted_allocated_bytes: int | None = None
    steps: Sequence[MeasuredStep] = ()
    compared: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def render(page: Page) -> str:
    """The whole file."""
    source = importlib.resources.files("rematree.report")
    # Within a script element only "<" can end it or begin a comment.
    data = json.dumps(page_data(page), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(page.title),
        "style": (source / "page.css").read_text(encoding="ascii"),
        "script": (source / "page.js").read_text(encoding="ascii"),
        "data": data,
    }
    template = (source / "page.html").read_text(encoding="ascii")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def page_data(page: Page) -> dict[str, Any]:
    """JSON values that the script reads."""
    frontier, budget = page.frontier, page.budget_bytes
    every = [frontier.plain, *frontier.plans]
    highest = max(step.peak_bytes for step in every)
    longest = max(sum(part.seconds for part in step.timeline) for step in every)
    budgets = slider_budgets(frontier, budget)
    top = max(highest, budget) if budget <= _IN_SIGHT * highest else highest
    used = {kind for step in every for kind in step.kinds}
    times = [step.step_seconds for step in every]
    measured = [step for step in page.steps if step.seconds is not None or step.peak_bytes is not None]
    predicted = frontier.plans[frontier.in_force]
    seconds = predicted.step_seconds * page.passes
    allocated = page.predicted_allocated_bytes or predicted.peak_bytes
    return {
        "title": page.title,
        "facts": [list(fact) for fact in page.facts],
        "notes": list(page.notes),
        "compared": [list(row) for row in page.compared],
        "kinds": [[kind.value, *words] for kind, words in _WORDS.items() if kind in used],
        "scale": {
            "bytes": top * 1.08,
            "byteTicks": byte_ticks(top),
            "seconds": longest,
            "ticks": _second_ticks(longest),
        },
        "stepScale": _span(times),
        "before": _step(frontier.plain, frontier.plain),
        "plans": [_step(step, frontier.plain) for step in frontier.plans],
        "front": _front(frontier),
        "inForce": frontier.in_force,
        "budgets": [[size, format_bytes(size), frontier.best_within(size)] for size in budgets],
        "start": budgets.index(budget),
        "least": format_bytes(frontier.plans[0].peak_bytes),
        "run": {
            "steps": [_measured(step) for step in measured],
            "seconds": _series([step.seconds for step in measured], seconds, None, _second_ticks, format_seconds),
            "bytes": _series([step.peak_bytes for step in measured], allocated, budget, byte_ticks, format_bytes),
        },
    }


def page_facts(page: Page) -> dict[str, Any]:
    """What the page begins with, as JSON values: bytes, and seconds of a step of the run.

    `measured_peak_bytes` is to be compared with `predicted_allocated_bytes`, as in the page.
    """
    plain, own = page.frontier.plain, page.frontier.plans[page.frontier.in_force]
    measured = [step.peak_bytes for step in page.steps if step.peak_bytes is not None]
    return {
        "title": page.title,
        "budget_bytes": page.budget_bytes,
        "predicted_peak_bytes": own.peak_bytes,
        "predicted_allocated_bytes": page.predicted_allocated_bytes or own.peak_bytes,
        "measured_peak_bytes": max(measured, default=None),
        "predicted_step_seconds": own.step_seconds * page.passes,
        "plain_peak_bytes": plain.peak_bytes,
        "plain_step_seconds": plain.step_seconds * page.passes,
        "steps": len(page.steps),
        "plans": len(page.frontier.plans),
        "notes": list(page.notes),
    }


def slider_budgets(frontier: StoredFrontier, budget: int) -> list[int]:
    """Budgets that the slider stops at, smallest first: in equal steps, at every plan's peak and at the run's own."""
    peaks = [step.peak_bytes for step in frontier.plans]
    low = int(peaks[0] * _BELOW_LEAST)
    high = max(*peaks, frontier.plain.peak_bytes)
    even = [low + (high - low) * index // _POSITIONS for index in range(_POSITIONS + 1)]
    return sorted({*even, *peaks, budget})


def byte_ticks(top: float) -> list[tuple[float, str]]:
    """Round sizes from 0 to `top`, at most a handful."""
    unit = GIB if top >= 2 * GIB else MIB if top >= 2 * MIB else KIB
    return [(tick * unit, f"{tick:g} {format_bytes(unit).split()[1]}") for tick in _round_steps(top / unit)]


def _second_ticks(top: float) -> list[tuple[float, str]]:
    factor = 1.0 if top >= 1 else 1e3 if top >= 1e-3 else 1e6
    unit = {1.0: "s", 1e3: "ms", 1e6: "us"}[factor]
    return [(tick / factor, f"{tick:g} {unit}") for tick in _round_steps(top * factor)]


def _round_steps(top: float) -> list[float]:
    if top <= 0:
        return [0.0]
    rough = top / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    return [round(step * index, 9) for index in range(math.floor(top / step + 1e-9) + 1)]


def _span(values: Sequence[float]) -> dict[str, Any]:
    """An axis that begins near the smallest value."""
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or high * 0.1 or 1.0
    bottom = max(0.0, low - room)
    ticks = [tick for tick in _second_ticks(high + room) if tick[0] >= bottom]
    return {"low": bottom, "high": high + room, "ticks": ticks}


def _front(frontier: StoredFrontier) -> list[int]:
    """Plans that are faster than every smaller one: the staircase."""
    front: list[int] = []
    for index, step in enumerate(frontier.plans):
        if not front or step.step_seconds < frontier.plans[front[-1]].step_seconds:
            front.append(index)
    return front


def _step(step: Step, plain: Step) -> dict[str, Any]:
    prefix = common_prefix([row.path for row in step.rows])
    rows = [
        [
            row.regions or WHOLE_MODEL,
            row.option,
            ("" if row.count == 1 else f"{row.count} x ") + format_bytes(row.saved_bytes),
            format_seconds(row.extra_seconds),
        ]
        for row in fold_rows(step.rows, prefix)
    ]
    if step.loss_chunk_rows is not None:
        rows.append(["head", f"chunked loss, {step.loss_chunk_rows} rows at a time", "", ""])
    share = step.recompute_seconds / step.step_seconds if step.step_seconds else 0.0
    return {
        "bytes": step.peak_bytes,
        "seconds": step.step_seconds,
        "peak": format_bytes(step.peak_bytes),
        "step": format_seconds(step.step_seconds),
        "extra": _against(step.step_seconds, plain.step_seconds),
        "recompute": f"{format_seconds(step.recompute_seconds)}, {share:.1%} of the step",
        "exact": "yes, bit for bit" if step.exact else "within rounding",
        "prefix": prefix,
        "rows": rows,
        "scale": [step.peak_bytes * _IN_SIGHT, byte_ticks(step.peak_bytes * _IN_SIGHT)],
        "floor": min(part.live_bytes for part in step.timeline) + step.beside_bytes,
        "timeline": [_part(part.label, part.live_bytes, part.peak_bytes, part.seconds, step) for part in step.timeline],
    }


def _part(label: str, live_bytes: int, peak_bytes: int, seconds: float, step: Step) -> list[Any]:
    """Name, kind, height and width for the picture, then the cells of its table."""
    phase, _, number = label.partition(" ")
    block = phase in ("forward", "backward") and number.isdecimal()
    kind: str = step.kinds[int(number)].value if block else "rest"
    words = _WORDS[Kind(kind)][0] if block else ""
    highest = peak_bytes + step.beside_bytes
    name = f"{phase} of block {number}" if block else label
    cells = [name, words, format_bytes(live_bytes + step.beside_bytes), format_bytes(highest), format_seconds(seconds)]
    return [phase, kind, highest, seconds, cells]


def _against(seconds: float, plain: float) -> str:
    """The difference to the plain step in words."""
    more = seconds - plain
    if not plain or format_seconds(abs(more)) == "0 s":
        return "none"
    return f"{format_seconds(abs(more))} {'more' if more > 0 else 'less'} ({more / plain:+.1%})"


def _measured(step: MeasuredStep) -> list[Any]:
    return [
        step.number,
        step.seconds,
        step.peak_bytes,
        "not timed" if step.seconds is None else format_seconds(step.seconds),
        "not measured" if step.peak_bytes is None else format_bytes(step.peak_bytes),
    ]


def _series(
    values: Sequence[float | None], predicted: float, limit: int | None, ticks: Any, words: Any
) -> dict[str, Any] | None:
    """An axis from 0 for what was measured and its prediction; None if nothing was."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    top = max(*known, predicted)
    if limit is not None and limit <= _IN_SIGHT * top:
        top = max(top, limit)
    shown = limit is not None and limit <= top
    return {
        "high": top * 1.15,
        "ticks": ticks(top * 1.1),
        "predicted": [predicted, f"predicted {words(predicted)}"],
        "limit": [limit, f"budget {words(limit)}"] if shown else None,
    }
