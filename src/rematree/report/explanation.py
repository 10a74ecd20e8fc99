"""Why a plan costs what it costs: the peak by category, each kind of block by region, and what more memory would buy.

Everything is read from the plan; the model is not needed.
"""

from dataclasses import asdict, dataclass
from typing import Any

from rematree.plans import WHOLE_MODEL, Action, BlockRow, Plan
from rematree.table import fold_paths, render_table
from rematree.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class BlockExplanation:
    """Blocks with the same decisions.

    Attributes:
        regions: Their paths, folded.
        count: How many they are.
        saved: Regions inside that are not run again; their saved tensors stay. Empty when the whole block is saved.
        stashed: Those of `saved` whose output is kept too, because the recomputation around them reads it.
        recomputed: Whether the block is run again, but for `saved`.
        saved_bytes: What one block keeps until its backward.
        extra_seconds: What one block adds to the step.
        grouped: Whether it is recomputed together with others.
    """

    regions: str
    count: int
    saved: tuple[str, ...]
    stashed: tuple[str, ...]
    recomputed: bool
    saved_bytes: int
    extra_seconds: float
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """What more memory would buy next, estimated from blocks of the plan that decided differently.

    Attributes:
        block: Block that could do as `like` does.
        like: Block that keeps more and recomputes less.
        more_bytes: Additional bytes.
        fewer_seconds: Time it would take off the step.
    """

    block: str
    like: str
    more_bytes: int
    fewer_seconds: float


def explain_blocks(plan: Plan) -> list[BlockExplanation]:
    """One entry for every kind of decision among the blocks."""
    cut = len(plan.region_prefix) + 1 if plan.region_prefix else 0
    groups: dict[tuple[Any, ...], list[BlockRow]] = {}
    together = {path for group in plan.groups for path in group}
    for row in plan.rows:
        own = plan.decisions.get(row.path)
        inner = {
            path.removeprefix(row.path).lstrip("."): decision
            for path, decision in plan.decisions.items()
            if path.startswith((row.path + ".", row.path + "#"))
        }
        saved = tuple(name for name, decision in inner.items() if decision.action is Action.SAVE)
        stashed = tuple(name for name in saved if inner[name].stash)
        recomputed = own is not None and own.action is Action.RECOMPUTE
        key = (saved, stashed, recomputed, row.saved_bytes, row.path in together)
        groups.setdefault(key, []).append(row)
    return [
        BlockExplanation(
            ", ".join(fold_paths([row.path[cut:] for row in rows])),
            len(rows),
            saved,
            stashed,
            recomputed,
            saved_bytes,
            sum(row.extra_seconds for row in rows) / len(rows),
            grouped,
        )
        for (saved, stashed, recomputed, saved_bytes, grouped), rows in groups.items()
    ]


def next_exchange(plan: Plan) -> Exchange | None:
    """The smallest further memory that would take time off the step, as far as the plan itself tells.

    A block may do what another block of the same list already does. None when all decide alike: then only planning
    again tells.
    """
    best: Exchange | None = None
    for row in plan.rows:
        for other in plan.rows:
            more, fewer = other.saved_bytes - row.saved_bytes, row.extra_seconds - other.extra_seconds
            if more <= 0 or fewer <= 0 or len(fold_paths([row.path, other.path])) != 1:
                continue
            found = Exchange(row.path, other.path, more, fewer)
            if best is None or (found.more_bytes, -found.fewer_seconds) < (best.more_bytes, -best.fewer_seconds):
                best = found
    return best


def explain_text(plan: Plan) -> str:
    """The explanation for a reader."""
    peak = max(1, plan.predicted_peak_bytes)
    ledger = [
        (line.category, format_bytes(line.num_bytes), f"{line.num_bytes / peak:.1%}", line.obtained)
        for line in plan.ledger
    ]
    lines = [plan.title(), "", f"At the peak, {format_bytes(plan.predicted_peak_bytes)}:"]
    if ledger:
        lines += _indented(render_table(("what", "bytes", "share", "how"), ledger, right={1, 2}))
    lines += ["", "Blocks" + (f", inside {plan.region_prefix}:" if plan.region_prefix else ":")]
    for block in explain_blocks(plan):
        each = " each" if block.count > 1 else ""
        lines.append(
            f"  {block.regions or WHOLE_MODEL}: keeps {format_bytes(block.saved_bytes)}{each}, "
            f"adds {format_seconds(block.extra_seconds)}{each}"
        )
        lines += [f"    {text}" for text in _decisions(block)]
    if plan.groups:
        lines += ["", "Recomputed together:", *(f"  {text}" for text in _groups(plan))]
    lines += ["", "Loss:", f"  {_loss(plan)}", "", "Budget:"]
    lines += [f"  {text}" for text in _budget(plan)]
    if plan.notes:
        lines += ["", "Notes:", *(f"  {note}" for note in plan.notes)]
    return "\n".join(lines)


def explain_facts(plan: Plan) -> dict[str, Any]:
    """The explanation as JSON values."""
    exchange = next_exchange(plan)
    return {
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "ledger": {line.category: line.num_bytes for line in plan.ledger},
        "obtained": {line.category: line.obtained for line in plan.ledger},
        "blocks": [asdict(block) for block in explain_blocks(plan)],
        "loss_chunk_rows": plan.loss_chunk_rows,
        "budget_bytes": plan.budget_bytes,
        "headroom_bytes": plan.headroom_bytes,
        "predicted_step_seconds": plan.predicted_step_seconds,
        "extra_seconds": plan.extra_seconds,
        "bound_seconds": plan.bound_seconds,
        "gap_seconds": plan.gap_seconds,
        "groups": [list(group) for group in plan.groups],
        "next_exchange": None if exchange is None else asdict(exchange),
        "notes": list(plan.notes),
    }


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _decisions(block: BlockExplanation) -> list[str]:
    if block.grouped:
        return ["recomputed with its group; within that " + "; ".join(_alone(block))]
    return _alone(block)


def _alone(block: BlockExplanation) -> list[str]:
    if not block.recomputed:
        return ["saved whole: nothing is run again"]
    if not block.saved:
        return ["recomputed whole: only its input is kept"]
    plain = [name for name in block.saved if name not in block.stashed]
    lines = [f"saved, not run again: {', '.join(plain)}"] if plain else []
    if block.stashed:
        lines.append(f"saved with their output, which the recomputation reads: {', '.join(block.stashed)}")
    return [*lines, "recomputed: everything else in the block"]


def _groups(plan: Plan) -> list[str]:
    """One line a group that is in no other, with how many are in it."""
    cut = len(plan.region_prefix) + 1 if plan.region_prefix else 0
    outer = [g for g in plan.groups if not any(set(g) < set(other) for other in plan.groups)]
    lines: list[str] = []
    for group in outer:
        inner = sum(set(other) < set(group) for other in plan.groups)
        named = ", ".join(fold_paths([path[cut:] for path in group]))
        lines.append(
            f"{named}: only the first one's input is kept" + (f"; {inner} smaller groups inside" if inner else "")
        )
    return lines


def _loss(plan: Plan) -> str:
    if plan.loss_chunk_rows is None:
        return "the model's own, all logits at once"
    return f"in chunks of {plan.loss_chunk_rows} rows: gradients differ from the plain model's by rounding"


def _budget(plan: Plan) -> list[str]:
    step, extra = plan.predicted_step_seconds, plan.extra_seconds
    lines: list[str] = []
    if plan.budget_bytes is not None and plan.headroom_bytes is not None:
        lines.append(f"{format_bytes(plan.headroom_bytes)} of {format_bytes(plan.budget_bytes)} are left")
    else:
        lines.append("the plan is a point of the frontier, made for no budget")
    share = extra / step if step > 0 else 0.0
    lines.append(
        f"recomputation is {format_seconds(extra)} ({share:.1%}) of the {format_seconds(step)} step; "
        "no larger budget can take off more than that from the blocks"
    )
    if plan.bound_seconds is not None and plan.gap_seconds is not None:
        gap = plan.gap_seconds / step if step > 0 else 0.0
        lines.append(
            f"certified: no choice of these options takes less than {format_seconds(plan.bound_seconds)} there; "
            f"this plan is {format_seconds(plan.gap_seconds)} ({gap:.2%} of the step) from it"
        )
    exchange = next_exchange(plan)
    if exchange is not None:
        lines.append(
            f"about {format_bytes(exchange.more_bytes)} more would let {exchange.block} do as {exchange.like} does: "
            f"about {format_seconds(exchange.fewer_seconds)} less"
        )
    return lines
