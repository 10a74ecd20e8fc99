"""Plans for batches of a few lengths from one survey, so that a short batch does not pay for the longest one.

The lengths at which to plan are chosen from how long the batches of the data are. Up to some length everything can be
kept and nothing need be recomputed; those batches share one plan. Above it, the share of the step that must be
recomputed grows with the length, and a batch pays for the rung it falls on, not for its own length: the rungs are where
the sum of that over the data is smallest. One rung less is taken where it costs next to nothing, but for the one of the
batches that fit whole.

Letters: T tokens of a row, of the batch's longest example.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rematree.errors import InfeasibleBudgetError
from rematree.execute.selection import covers
from rematree.planning.planner import Planner
from rematree.plans import Fingerprint, Plan
from rematree.table import render_table
from rematree.units import format_bytes, format_seconds

MOST_RUNGS: Final = 6
MOST_GROWN: Final = 8  # with those for batches that came larger than planned
MOST_APART: Final = 24  # of batches none of which covers another
_TRIED: Final = 2  # lengths for the longest that fits whole
_CANDIDATES: Final = 48  # lengths that rungs are chosen among
_WORTH_A_RUNG: Final = 0.005  # of the tokens computed in a run

HEADERS: Final = ("batches of up to", "recomputed blocks", "peak", "step", "of it recomputation")


@dataclass(frozen=True)
class Ladder:
    """Planners of one model for batches of a few sizes, the smallest first.

    Where batches differ in more than their length (pictures), a larger one need not cover a smaller one.
    """

    planners: tuple[Planner, ...]

    def plans(self, limit: int, must: int = -1) -> tuple[Plan, ...]:
        """A plan for each, without those that a longer batch's plan makes superfluous.

        A planner that finds nothing within `limit` gives its smallest plan: no batch of that length has failed yet.

        Args:
            limit: Bytes.
            must: Number of the planner that has to stay within `limit`.
        Raises:
            InfeasibleBudgetError: it cannot.
        """
        found = [self.planners[must].plan(limit)]
        required = self.planners[must]
        plans = [found[0] if planner is required else _within_or_least(planner, limit) for planner in self.planners]
        return tuple(
            plan for plan, longer in itertools.zip_longest(plans, plans[1:]) if longer is None or differ(plan, longer)
        )

    def extended(self, planner: Planner) -> "Ladder":
        """With a planner for another batch, in its place by size.

        Of more than `MOST_GROWN`, one goes whose batches the next one covers: the one that is nearest to it. Where none
        covers another there are `MOST_APART`, and the smallest goes.
        """
        same = planner.fingerprint.batch
        planners = sorted(
            [each for each in self.planners if each.fingerprint.batch != same] + [planner],
            key=lambda each: _size(each.fingerprint),
        )
        made_for = [each.fingerprint for each in planners]
        spared = [
            (_size(more) / _size(less), n)
            for n, (less, more) in enumerate(itertools.pairwise(made_for))
            if covers(more, less) and planners[n] is not planner
        ]
        if len(planners) > MOST_GROWN and spared:
            del planners[min(spared)[1]]
        elif len(planners) > MOST_APART:
            del planners[planners[0] is planner]
        return Ladder(tuple(planners))

    def number_for(self, made_for: Fingerprint) -> int:
        """Number of the planner whose plans have this fingerprint."""
        return next(n for n, planner in enumerate(self.planners) if planner.fingerprint.batch == made_for.batch)


def _size(fingerprint: Fingerprint) -> int:
    """Elements of all tensors of a batch."""
    return sum(math.prod(shape) for _, shape, _ in fingerprint.batch)


def _within_or_least(planner: Planner, limit: int) -> Plan:
    try:
        return planner.plan(limit)
    except InfeasibleBudgetError:
        return planner.plan(planner.min_peak_bytes())


def differ(plan: Plan, longer: Plan) -> bool:
    """Whether `plan` does something else than `longer` does, or covers batches that it does not."""
    if not covers(longer.fingerprint, plan.fingerprint):
        return True
    return plan.levers != longer.levers and plan.fingerprint.batch != longer.fingerprint.batch


def build_ladder(
    planner: Planner,
    budget: int,
    weights: Mapping[int, float],
    batch_of: Callable[[int], Mapping[str, Any]],
    *,
    most: int = MOST_RUNGS,
) -> Ladder:
    """The ladder of `planner`, which is for the longest batch.

    Args:
        planner: For the longest batch.
        budget: Bytes of the peak of a step.
        weights: Share of the batches of a run that are padded to each length; the longest is among them.
        batch_of: A batch of a length.
        most: Rungs.
    Raises:
        InfeasibleBudgetError: the longest batch does not fit.
    Cost:
        Two plans of `planner`, and up to two of shorter batches; the others are made when they are asked for.
    """
    planner.plan(budget)
    lengths = rung_lengths(weights, _free_length(planner, budget, weights, batch_of), most)
    return Ladder((*(planner.for_batch(batch_of(length)) for length in lengths[:-1]), planner))


def _free_length(
    planner: Planner, budget: int, weights: Mapping[int, float], batch_of: Callable[[int], Mapping[str, Any]]
) -> float:
    """The length up to which the fastest plan fits, nearly.

    First on the line through what there is before the step and the peak of the longest batch; if that does not fit, on
    the line through the peaks of two lengths.
    """
    longest = max(weights, default=0)
    most = planner.plan(None).predicted_peak_bytes
    if most <= budget:
        return longest
    before = planner.bytes_before()
    free = longest * (budget - before) / (most - before)
    for _ in range(_TRIED):
        length = max((each for each in weights if each <= free), default=0)
        if length in (0, longest):
            break
        peak = planner.for_batch(batch_of(length)).plan(None).predicted_peak_bytes
        if peak <= budget or peak >= most:
            break
        free = length - (peak - budget) * (longest - length) / (most - peak)
    return max(free, 1.0)


def rung_lengths(weights: Mapping[int, float], free: float, most: int) -> tuple[int, ...]:
    """Lengths to plan for, rising; the longest is the last.

    A batch of length t on the rung T computes t * (1 + (1 - free/T)) tokens: of what its rung keeps too little for,
    it recomputes that share. Exact for up to 48 lengths, by dynamic programming; longer lists are binned.

    Args:
        weights: How often batches of each length are, in any unit.
        free: The length up to which nothing need be recomputed.
        most: Rungs.
    """
    if not weights:
        return (0,)
    binned = _binned(weights, free)
    lengths = sorted(binned)
    total = sum(binned.values())
    # best[k][j]: the least that batches up to length j recompute on k rungs, the last of them at j
    share = [max(0.0, 1 - free / length) for length in lengths]
    sums = [0.0, *itertools.accumulate(binned[length] for length in lengths)]
    best = [[share[j] * sums[j + 1] for j in range(len(lengths))]]
    came: list[list[int]] = [[-1] * len(lengths)]
    for _ in range(1, min(most, len(lengths))):
        row, origin = [math.inf] * len(lengths), [-1] * len(lengths)
        for j in range(1, len(lengths)):
            row[j], origin[j] = min((best[-1][i] + share[j] * (sums[j + 1] - sums[i + 1]), i) for i in range(j))
        best.append(row)
        came.append(origin)
    lowest = min(row[-1] for row in best)
    rungs = next(k for k, row in enumerate(best) if row[-1] <= lowest + _WORTH_A_RUNG * total)
    chosen, at = [lengths[-1]], len(lengths) - 1
    while rungs > 0:
        at = came[rungs][at]
        rungs -= 1
        chosen.append(lengths[at])
    whole = max((length for length in lengths if length <= free), default=0)
    if whole and chosen[-1] > free and len(chosen) < most:
        chosen.append(whole)  # a batch that fits recomputes nothing, however few of them there are
    return tuple(reversed(chosen))


def _binned(weights: Mapping[int, float], free: float) -> dict[int, float]:
    """Tokens of all batches that are not longer than a length and longer than the next smaller one of the result."""
    lengths = sorted(weights)
    kept = [length for length in lengths if length > free]
    step = max(1, math.ceil(len(kept) / _CANDIDATES))
    ends = {*kept[::-step]} | {lengths[-1]}
    within = [length for length in lengths if length <= free]
    if within:
        ends.add(within[-1])
    binned: dict[int, float] = dict.fromkeys(sorted(ends), 0.0)
    remaining = iter(sorted(ends))
    end = next(remaining)
    for length in lengths:
        while length > end:
            end = next(remaining)
        binned[end] += weights[length] * length
    return binned


def batch_weights(lengths: Sequence[int], size: int) -> dict[int, float]:
    """Share of the batches of `size` examples, drawn at random, whose longest has each of `lengths`."""
    weights: dict[int, float] = {}
    ordered, count = sorted(lengths), len(lengths)
    for place, length in enumerate(ordered, 1):
        share = (place / count) ** size - ((place - 1) / count) ** size
        weights[length] = weights.get(length, 0.0) + share
    return weights


def table(plans: Sequence[Plan]) -> str:
    """The plans of a ladder, one line each."""
    cells = [
        (
            shape_of(plan),
            f"{sum(row.extra_seconds > 0 for row in plan.rows) if plan.recomputes else 0} of {len(plan.rows)}",
            format_bytes(plan.predicted_peak_bytes),
            format_seconds(plan.predicted_step_seconds),
            f"{plan.extra_seconds / plan.predicted_step_seconds:.0%}" if plan.predicted_step_seconds else "0%",
        )
        for plan in plans
    ]
    return render_table(HEADERS, cells, right=frozenset({1, 2, 3, 4}))


def shape_of(plan: Plan) -> str:
    """Rows and tokens that `plan` is for, as "2 x 512 tokens"."""
    shape = max((shape for _, shape, _ in plan.fingerprint.batch if len(shape) == 2), key=math.prod, default=())
    return f"{' x '.join(map(str, shape))} tokens" if shape else "one batch"
