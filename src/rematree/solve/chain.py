"""The chain: an option for every block and one for the head, so that no position of the step exceeds the budget.

With E(i) the bytes live when block i begins its forward (everything static, and what blocks before it keep), the
positions that can be the peak are
  forward of block i:   E(i) + forward_i(option)
  head:                 E(L) + head(option)
  backward of block i:  E(i) + backward_i(option) + gradients of the blocks after it.
Later blocks' saved tensors are gone when block i's backward runs: only what comes before counts, which is why the same
option is cheaper to hold at the end of the chain than at its start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class StageOption:
    """Measured profile of one option of one block. All in bytes, relative to what is live when the block begins.

    Attributes:
        kept: Stay from its forward to its backward, its output included.
        forward: Largest during its forward.
        backward: Largest during its backward, without the gradients of later blocks.
        seconds: Extra seconds over running it without recomputation.
        fill: Seconds of running the block again, as the last of a group, until everything is back that it keeps.
    """

    kept: int
    forward: int
    backward: int
    seconds: float
    fill: float = 0.0


@dataclass(frozen=True, slots=True)
class Advance:
    """One block run as part of a group: nothing of it is kept, not even its input.

    Attributes:
        output: Bytes of its output, which is all that is left if it is the last of its group.
        forward: Largest during its forward, above what is live when it begins, its input included there.
        gradient: Bytes of gradients that are live while a group that ends with it is run again: that of its output, and
            what is computed from it before a saved tensor is needed.
        seconds: Of its forward.
        beside: Bytes that stay all the same, from its forward to the backward of the outermost group around it: random
            state, choices of experts.
    """

    output: int
    forward: int
    gradient: int
    seconds: float
    beside: int = 0


@dataclass(frozen=True, slots=True)
class HeadOption:
    """Head with one choice of loss.

    Attributes:
        peak: Bytes above what is live when the head begins.
        seconds: Of head and loss, forward and backward.
    """

    peak: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ChainProblem:
    """All stages of one step.

    Attributes:
        base: Bytes live when the first block begins.
        stages: Options of each block, in chain order.
        gradients: Gradient bytes each block's backward leaves behind.
        heads: Options of the head.
        advances: Each block as part of a group; None for one that cannot be, empty when no group may be formed.
    """

    base: int
    stages: tuple[tuple[StageOption, ...], ...]
    gradients: tuple[int, ...]
    heads: tuple[HeadOption, ...]
    advances: tuple[Advance | None, ...] = ()


@dataclass(frozen=True, slots=True)
class ChainChoice:
    """Index of the option chosen for each block and for the head, with the predicted extra seconds (head included).

    Attributes:
        groups: Runs of blocks recomputed as one: first block and the one behind the last. They nest, outer ones first.
    """

    blocks: tuple[int, ...]
    head: int
    seconds: float
    groups: tuple[tuple[int, int], ...] = ()


def position_peak(problem: ChainProblem, blocks: Sequence[int], head: int) -> int:
    """Largest bytes at any position for given choices, by the additive model above."""
    live, peak = problem.base, problem.base
    later = sum(problem.gradients)
    for stage, chosen, gradient in zip(problem.stages, blocks, problem.gradients, strict=True):
        option = stage[chosen]
        later -= gradient
        peak = max(peak, live + option.forward, live + option.backward + later)
        live += option.kept
    return max(peak, live + problem.heads[head].peak)


def in_runs(problem: ChainProblem, choice: ChainChoice, limit: int) -> ChainChoice:
    """`choice` with the options of blocks that are alike in order of what they keep, if that stays within `limit`.

    The seconds are the same, and the earlier blocks keep less, of which all later ones have the use. What it is for:
    blocks of equal options side by side, which a simulated step folds (`folding.py`) and a reader sees as one.
    """
    if choice.groups:
        return choice
    alike: dict[tuple[tuple[StageOption, ...], int], list[int]] = {}
    for block, of in enumerate(zip(problem.stages, problem.gradients, strict=True)):
        alike.setdefault(of, []).append(block)
    blocks = list(choice.blocks)
    for (stage, _), places in alike.items():
        chosen = sorted((choice.blocks[place] for place in places), key=lambda index: (stage[index].kept, index))
        for place, index in zip(places, chosen, strict=True):
            blocks[place] = index
    return replace(choice, blocks=tuple(blocks)) if position_peak(problem, blocks, choice.head) <= limit else choice


def solve_chain(problem: ChainProblem, limit: int, quantum: int) -> ChainChoice | None:
    """The fastest choice whose every position stays within `limit` bytes, or None.

    Dynamic program over (block, kept bytes so far in units of `quantum`, rounded up). Because of the rounding,
    a choice it returns is within the limit exactly; because the rounding does not depend on `limit`, the seconds never
    fall when the limit shrinks.

    Cost:
        O(blocks * options * (limit - base) / quantum), vectorised over the last factor.
    Source:
        Bellman; the position constraints are design section 6.2.
    """
    width = (limit - problem.base) // quantum + 1
    if limit < problem.base:
        return None
    best: npt.NDArray[np.float64] = np.full(width, np.inf)
    best[0] = 0.0
    picks: list[npt.NDArray[np.int16]] = []
    later = sum(problem.gradients)
    for stage, gradient in zip(problem.stages, problem.gradients, strict=True):
        later -= gradient
        new: npt.NDArray[np.float64] = np.full(width, np.inf)
        pick: npt.NDArray[np.int16] = np.full(width, -1, dtype=np.int16)
        for index, option in enumerate(stage):
            step = -(-option.kept // quantum)
            room = limit - problem.base - max(option.forward, option.backward + later)
            if room < 0 or step >= width:
                continue
            states = min(room // quantum + 1, width - max(step, 0))
            if step < 0:  # a block that frees more than it keeps
                source, target = best[-step:states], slice(0, max(0, states + step))
            else:
                source, target = best[:states], slice(step, step + states)
            candidate = source + option.seconds
            better = candidate < new[target]
            new[target] = np.where(better, candidate, new[target])
            pick[target] = np.where(better, index, pick[target])
        picks.append(pick)
        best = new
    choice: ChainChoice | None = None
    end = -1
    for index, head in enumerate(problem.heads):
        room = limit - problem.base - head.peak
        if room < 0:
            continue
        reachable = best[: room // quantum + 1]
        state = int(np.argmin(reachable))
        seconds = float(reachable[state]) + head.seconds
        if np.isfinite(seconds) and (choice is None or seconds < choice.seconds):
            choice, end = ChainChoice((), index, seconds), state
    if choice is None:
        return None
    blocks: list[int] = []
    for stage, pick in zip(reversed(problem.stages), reversed(picks), strict=True):
        index = int(pick[end])
        blocks.append(index)
        end -= -(-stage[index].kept // quantum)
    return ChainChoice(tuple(reversed(blocks)), choice.head, choice.seconds)


def least_peak(problem: ChainProblem, quantum: int) -> int:
    """Smallest limit, to within `quantum`, for which `solve_chain` finds a choice. Binary search."""
    low, high = problem.base - 1, problem.base
    high += sum(max(o.kept for o in stage) for stage in problem.stages) + sum(problem.gradients)
    high += max(max(o.forward, o.backward) for stage in problem.stages for o in stage) if problem.stages else 0
    high += max(head.peak for head in problem.heads) + (len(problem.stages) + 1) * quantum
    while high - low > quantum:
        middle = (low + high) // 2
        if solve_chain(problem, middle, quantum) is None:
            low = middle
        else:
            high = middle
    return high
