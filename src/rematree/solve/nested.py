"""Groups: runs of blocks of which only the first one's input is kept, recomputed as one, and nested in each other.

One kept input a block is not the least a step can do with. A group keeps one for a run of blocks; when backward
reaches its end, the run is computed again from there, and what was said of the whole chain can be said of it: each of
its blocks takes one of its options, or some of them form a smaller group. By then everything behind the group is freed,
so the same bytes are worth more there; and the price is one more forward of its blocks for every level of nesting.

What a group takes is read off `tables`, where the recursion stands.
"""

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np

from rematree.solve.chain import ChainChoice, ChainProblem
from rematree.solve.groups import Group
from rematree.solve.tables import Floats, Tables, advance_at, runs_of

_STATES: Final = 3000  # of the tables, at most: limits above that are counted in coarser quanta
_INFINITY: Final = float("inf")


def quantum_for(problem: ChainProblem, limit: int, finer: int = 1) -> int:
    """Bytes of one state: the tables up to `limit` are as fine as is quickly solved.

    If possible it divides what a group keeps, the least that there is, so that nothing is lost where blocks keep little
    else: near the smallest peak, where one output more or less is a whole forward.

    Args:
        problem: With what groups keep.
        limit: Bytes.
        finer: How many times as fine.
    """
    finest = max(1, -(-(limit - problem.base + 1) // (_STATES * finer)))
    outputs = [advance.output for advance in problem.advances if advance is not None and advance.output]
    unit = min(outputs, default=0)
    parts = next((parts for parts in range(unit // finest, unit // (2 * finest), -1) if unit % parts == 0), None)
    return finest if parts is None else unit // parts


def solve_groups(problem: ChainProblem, limit: int, quantum: int) -> ChainChoice | None:
    """The fastest choice of options and nested groups whose every position stays within `limit` bytes, or None.

    As `rematree.solve.chain.solve_chain`, with groups as further steps from block to block: what a group takes in
    backward depends on what is live when it begins, which is the state of that dynamic program.

    Args:
        problem: With advances for the blocks that groups may hold.
        limit: Bytes.
        quantum: Bytes of one state. What is kept is rounded up to it, so that a choice is within the limit exactly.

    Cost:
        O(runs * blocks * states) with `runs` the number of different runs of blocks: as many as there are blocks if
        they are all alike, at most their square.
    Source:
        As in the module's description.
    """
    if limit < problem.base:
        return None
    sweep = _Sweep(problem, limit, quantum, optimistic=False)
    seconds, head, state = sweep.end()
    if not np.isfinite(seconds):
        return None
    blocks, groups = sweep.choices(state)
    return ChainChoice(tuple(blocks), head, seconds, tuple(sorted(groups, key=lambda group: (group[0], -group[1]))))


def seconds_at_least(problem: ChainProblem, limit: int, quantum: int) -> tuple[float, Tables | None]:
    """Seconds that no choice within `limit` goes below: what is kept is rounded down to quanta, what is free up.

    Infinite when there is no choice. The tables it read are given, too, if groups may be formed.

    Cost:
        As of `solve_groups`.
    """
    if limit < problem.base:
        return _INFINITY, None
    sweep = _Sweep(problem, limit, quantum, optimistic=True)
    return sweep.end()[0], sweep.tables if problem.advances else None


class _Sweep:
    """Least seconds up to each block, by quanta live there, and how to get there.

    Attributes:
        tables: Of groups. Optimistic ones have a state more than there can be bytes: the last stands for any number.
    """

    def __init__(self, problem: ChainProblem, limit: int, quantum: int, *, optimistic: bool) -> None:
        self._problem, self._quantum = problem, quantum
        self._room = limit - problem.base
        self._up = 0 if optimistic else quantum - 1  # added before dividing what is kept
        self.tables = Tables(problem, quantum, self._room // quantum + 1 + 2 * optimistic, optimistic=optimistic)
        self._states = self._room // quantum + 1
        count = len(problem.stages)
        self._later = [sum(problem.gradients[block + 1 :]) for block in range(count)]
        self._beside = [0, *itertools.accumulate(a.beside if a is not None else 0 for a in problem.advances)]
        self._best = [np.full(self._states, _INFINITY) for _ in range(count + 1)]
        # Block, option (or -1: a group) and state that the best way to each state comes from.
        self._came = [np.full((3, self._states), -1, dtype=np.int32) for _ in range(count + 1)]
        self._best[0][0] = 0.0
        spans: dict[int, list[int]] = {}
        for start, stop in runs_of(problem):
            spans.setdefault(start, []).append(stop)
        for start in range(count):
            if np.isfinite(self._best[start]).any():
                self._leave(start, spans.get(start, []))

    def _leave(self, start: int, stops: Sequence[int]) -> None:
        """All ways on from block `start`: its options, and groups that end before `stops`."""
        problem, here = self._problem, self._best[start]
        for index, option in enumerate(problem.stages[start]):
            need = max(option.forward, option.backward + self._later[start])
            self._go(start, start + 1, index, here + option.seconds, option.kept, need)
        for stop in stops:
            rerun = _from(self.tables.group(start, stop).seconds, self._free(start, stop), self._states)
            kept = advance_at(problem, stop - 1).output + self._beside[stop] - self._beside[start]
            self._go(start, stop, -1, here + rerun, kept, self.tables.forward_peak(start, stop))

    def _free(self, start: int, stop: int) -> int:
        """Quanta for the rerun of a group if nothing were live at its start."""
        free = self._room - self._later[stop - 1] - self._beside[stop] + self._beside[start]
        return (free + self._quantum - 1 - self._up) // self._quantum

    def _go(self, start: int, stop: int, index: int, seconds: Floats, kept: int, need: int) -> None:
        """One way on; `seconds` by state at its start."""
        states = self._states
        fit = min(states, (self._room - need) // self._quantum + 1) if need <= self._room else 0
        step = (kept + self._up) // self._quantum
        low, high = max(0, -step), min(fit, states - max(step, 0))
        if high <= low:
            return
        cost = seconds[low:high]
        target = slice(low + step, high + step)
        better = cost < self._best[stop][target]
        np.copyto(self._best[stop][target], cost, where=better)
        origin = self._came[stop][:, target]
        origin[0][better], origin[1][better] = start, index
        origin[2][better] = np.arange(low, high)[better]

    def end(self) -> tuple[float, int, int]:
        """(least seconds with the head, its option, state behind the last block)."""
        found = (_INFINITY, 0, 0)
        for index, head in enumerate(self._problem.heads):
            if head.peak <= self._room:
                reachable = self._best[-1][: (self._room - head.peak) // self._quantum + 1]
                at = int(np.argmin(reachable))
                found = min(found, (float(reachable[at]) + head.seconds, index, at))
        return found

    def choices(self, state: int) -> tuple[list[int], list[Group]]:
        """Options and groups on the way to `state` behind the last block."""
        stop = len(self._problem.stages)
        blocks, groups = [0] * stop, list[Group]()
        while stop > 0:
            start, index, before = (int(value) for value in self._came[stop][:, state])
            if index >= 0:
                blocks[start] = index
            else:
                groups.append((start, stop))
                self.tables.choose(start, stop, self._free(start, stop) - before, blocks, groups)
            stop, state = start, before
        return blocks, groups


def _from(seconds: Floats, free: int, states: int) -> Floats:
    """Entry `free` of `seconds` and those before it, one a state; beyond the last that one, before the first none."""
    more = min(max(0, free - len(seconds) + 1), states)  # states in which more is free than there are entries
    known = seconds[: max(0, free - more + 1)][::-1][: states - more]
    return np.concatenate((np.full(more, seconds[-1]), known, np.full(states - more - len(known), _INFINITY)))


def least_grouped_peak(problem: ChainProblem, quantum: int, high: int, most: float = _INFINITY) -> int:
    """Smallest limit, to within `quantum` and the coarser one used there, at which `solve_groups` finds a choice.

    Args:
        problem: With advances.
        quantum: Bytes.
        high: A limit at which there is a choice.
        most: Seconds that a choice may take.
    """
    low = problem.base - 1
    while high - low > quantum:
        middle = (low + high) // 2
        choice = solve_groups(problem, middle, quantum_for(problem, middle))
        if choice is None or choice.seconds > most:
            low = middle
        else:
            high = middle
    return high
