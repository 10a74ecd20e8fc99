"""The frontier of a run with the timeline of each of its plans, as plain data that is kept beside the run.

It is made while the planner is there, so that the page about the run shows the prices the plan was chosen by, and
reading it needs neither the model nor torch.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Self

from rematree.errors import UsageError
from rematree.plans import Action, BlockRow, Plan
from rematree.typed_json import read_typed

if TYPE_CHECKING:
    from rematree.planning.planner import Planner
    from rematree.referee.simulation import Simulation

FRONTIER_FORMAT: Final = 1
POINTS: Final = 8  # each costs a solved chain and a simulated step before training begins


class Kind(StrEnum):
    """What a plan does with a block, in a word."""

    SAVE = "save"
    PART = "part"
    RECOMPUTE = "recompute"
    GROUP = "group"
    COMPILED = "compiled"


@dataclass(frozen=True, slots=True)
class Interval:
    """One part of the simulated step.

    Attributes:
        label: What ran: "embedding", "forward 3", "head", "backward 3", "optimizer".
        live_bytes: Live when it began.
        peak_bytes: Most that was live within it.
        seconds: How long it takes.
    """

    label: str
    live_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """One way to run the step, as it was predicted.

    Attributes:
        peak_bytes: Peak of all that the device must have.
        step_seconds: Time of one forward and backward, with the optimizer.
        beside_bytes: Of the peak, what is not in the timeline: libraries, allocator slack, context.
        kinds: One for each block.
        rows: What the plan does with each block, in words, and what that keeps and costs.
        timeline: Parts of the step in order of time.
        loss_chunk_rows: Rows of logits formed at a time; None for the model's own loss.
        exact: Whether gradients are the plain model's bit for bit.
    """

    peak_bytes: int
    step_seconds: float
    beside_bytes: int
    kinds: tuple[Kind, ...]
    rows: tuple[BlockRow, ...]
    timeline: tuple[Interval, ...]
    loss_chunk_rows: int | None = None
    exact: bool = True

    @property
    def recompute_seconds(self) -> float:
        """Of the step, what is run a second time."""
        return sum(row.extra_seconds for row in self.rows)


@dataclass(frozen=True, slots=True)
class StoredFrontier:
    """What can be had for which memory.

    Attributes:
        plain: The step that recomputes nothing.
        plans: Plans by peak, smallest first; each is the fastest of those that need no more, but for the one in force.
        in_force: Which of them the run has.
    """

    plain: Step
    plans: tuple[Step, ...]
    in_force: int

    def best_within(self, budget: int) -> int | None:
        """Number of the fastest plan that fits `budget`; of equally fast ones the smaller. None: nothing fits."""
        fitting = [index for index, step in enumerate(self.plans) if step.peak_bytes <= budget]
        return min(fitting, key=lambda index: (self.plans[index].step_seconds, index), default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` gives an equal frontier back."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return {"format": FRONTIER_FORMAT, **plain}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave.

        Raises:
            UsageError: it is no frontier, or one of another format.
        """
        entries = {**data}
        if entries.pop("format", None) != FRONTIER_FORMAT:
            raise UsageError(f"not a frontier of format {FRONTIER_FORMAT}")
        try:
            found = read_typed(cls, entries, "")
        except ValueError as error:
            raise UsageError(f"not a frontier: {error}") from error
        if not 0 <= found.in_force < len(found.plans):
            raise UsageError("not a frontier: the plan in force is none of its plans")
        return found


def stored_frontier(planner: "Planner", plan: Plan, points: int = POINTS) -> StoredFrontier:
    """The frontier that `planner` sees, `plan` among its plans.

    Cost:
        A simulated step for each point that is not known yet.
    """
    others = [other for other in planner.frontier(points) if other.levers != plan.levers]
    ordered = sorted([plan, *others], key=lambda each: (each.predicted_peak_bytes, each.predicted_step_seconds))
    peak_bytes, seconds = planner.plain_step()
    simulated = planner.survey.plain
    paths = planner.survey.chain.blocks
    plain = Step(
        peak_bytes,
        seconds,
        peak_bytes - simulated.peak_bytes,
        (Kind.SAVE,) * len(paths),
        tuple(BlockRow(path, "save all", _kept(simulated, index), 0.0) for index, path in enumerate(paths)),
        _timeline(simulated),
    )
    return StoredFrontier(plain, tuple(_step(planner, each) for each in ordered), ordered.index(plan))


def _step(planner: "Planner", plan: Plan) -> Step:
    simulated = planner.simulation(plan)
    return Step(
        plan.predicted_peak_bytes,
        plan.predicted_step_seconds,
        max(0, plan.predicted_peak_bytes - simulated.peak_bytes),
        tuple(_kind(plan, row.path) for row in plan.rows),
        plan.rows,
        _timeline(simulated),
        plan.loss_chunk_rows,
        plan.exact,
    )


def _kept(simulated: "Simulation", block: int) -> int:
    """What the forward of a block leaves behind: the difference between its beginning and that of what follows."""
    labels = [segment.label for segment in simulated.segments]
    at = labels.index(f"forward {block}")
    return max(0, simulated.segments[at + 1].live_bytes - simulated.segments[at].live_bytes)


def _timeline(simulated: "Simulation") -> tuple[Interval, ...]:
    return tuple(
        Interval(each.label, each.live_bytes, each.peak_bytes, each.seconds)
        for each in simulated.segments
        if each.label != "start"
    )


def _kind(plan: Plan, path: str) -> Kind:
    if path in plan.compiled:
        return Kind.COMPILED
    if any(path in group for group in plan.groups):
        return Kind.GROUP
    decision = plan.decisions.get(path)
    if decision is None or decision.action is Action.SAVE:
        return Kind.SAVE
    inside: Sequence[str] = [name for name in plan.decisions if name.startswith((f"{path}.", f"{path}#"))]
    return Kind.PART if any(plan.decisions[name].action is Action.SAVE for name in inside) else Kind.RECOMPUTE
