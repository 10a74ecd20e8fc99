"""Whether recomputation is needed at all for a model, a batch and a budget, and what it would cost.

The rule of thumb people carry in their heads ("if it runs out of memory, switch checkpointing on, it costs 20 to 30 %")
computed for the case at hand: the plain step, the same with the loss in chunks, every layer checkpointed, and the plan.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.units import format_bytes, format_seconds

Verdict = Literal["nothing needed", "chunked loss is enough", "recomputation needed"]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make the step.

    Attributes:
        name: What it is.
        peak_bytes: Predicted, with the slack every prediction has.
        seconds: Predicted, of one forward and backward pass and the optimizer.
        fits: Whether the peak is within the budget.
    """

    name: str
    peak_bytes: int
    seconds: float
    fits: bool


@dataclass(frozen=True, slots=True)
class Advice:
    """The answer.

    Attributes:
        budget_bytes: What it was asked for.
        verdict: In three words.
        ways: The plain step, nothing recomputed and the loss in chunks (where that is possible), every layer
            checkpointed, the plan for the budget.
        plan: That plan.
    """

    budget_bytes: int
    verdict: Verdict
    ways: tuple[Way, ...]
    plan: Plan

    def lines(self) -> tuple[str, ...]:
        """The answer in sentences."""
        plain, every, planned = self.ways[0], self.ways[-2], self.ways[-1]
        budget, taken = format_bytes(self.budget_bytes), format_bytes(plain.peak_bytes)
        match self.verdict:
            case "nothing needed":
                first = f"No recomputation is needed: the plain step takes {taken} of {budget}."
            case "chunked loss is enough":
                first = (
                    f"No recomputation is needed if the loss is computed in chunks: that step takes "
                    f"{format_bytes(self.ways[1].peak_bytes)} of {budget}, the plain one would take {taken}."
                )
            case "recomputation needed":
                first = (
                    f"Recomputation is needed: the plain step would take {taken} of {budget}. "
                    f"The plan takes {format_bytes(planned.peak_bytes)} and {_against(planned, plain)}."
                )
        fits = "" if every.fits else ", which is more than there is"
        second = (
            f"Checkpointing every layer would take {format_bytes(every.peak_bytes)}{fits}, and "
            f"{_against(every, plain)}."
        )
        return first, second

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "budget_bytes": self.budget_bytes,
            "verdict": self.verdict,
            "ways": [asdict(way) for way in self.ways],
            "text": list(self.lines()),
        }


def _against(way: Way, plain: Way) -> str:
    change = (way.seconds / plain.seconds - 1) * 100 if plain.seconds else 0.0
    than = f"{abs(change):.0f} % {'longer' if change >= 0 else 'less'} than it"
    return f"{format_seconds(way.seconds)} a step, {than}"


def advise(planner: Planner, budget: int) -> Advice:
    """What a step of the planner's model needs to stay within `budget` bytes.

    Raises:
        InfeasibleBudgetError: nothing fits; carries the smallest reachable peak.
    Cost:
        Three simulated steps beyond those of a plan.
    """
    plan = planner.plan(budget)
    chunked = planner.chunked_step(budget)

    def way(name: str, peak_bytes: int, seconds: float) -> Way:
        return Way(name, peak_bytes, seconds, peak_bytes <= budget)

    ways = [way("plain", *planner.plain_step())]
    if chunked is not None:
        ways.append(way("loss in chunks", *chunked))
    ways.append(way("every layer checkpointed", *planner.every_layer_step()))
    ways.append(way("plan", plan.predicted_peak_bytes, plan.predicted_step_seconds))
    verdict: Verdict = "recomputation needed"
    if ways[0].fits:
        verdict = "nothing needed"
    elif ways[1].name == "loss in chunks" and ways[1].fits:
        verdict = "chunked loss is enough"
    return Advice(budget, verdict, tuple(ways), plan)
