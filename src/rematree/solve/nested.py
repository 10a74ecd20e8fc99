"""Groups: runs of blocks of which only the first one's input is kept, recomputed as one, and nested in each other.

One kept input a block is not the least a step can do with. A group keeps one for a run of blocks; when backward
reaches its end, the run is computed again from there, and what was said of the whole chain can be said of it: each of
its blocks takes one of its options, or some of them form a smaller group. By then everything behind the group is freed,
so the same bytes are worth more there; and the price is one more forward of its blocks for every level of nesting.

With P(i, j, m) the least seconds of running blocks i to j again and through backward within m bytes, and f the seconds
of a forward,
    P(i, j, m) = min over options o of i:           f(i) + seconds(o) + P(i + 1, j, m - kept(o))
                 min over groups i to k - 1, k <= j: f(i..k-1) + P(i, k - 1, m) + P(k, j, m - output(k - 1))
    P(j, j, m) = min over options o of j:           fill(o) + seconds(o)
where every term is infinite unless its forward and its backward fit into m; the last block's forward only has to bring
back what it keeps. This is the recursion of rotor (Beaumont, Eyraud-Dubois, Hermann, Joly, Shilova 2019, arXiv
1911.13214) with several options a stage; with one option that keeps its input only, and blocks that are all alike, it
is that of Revolve (Griewank and Walther 2000), whose operation counts it reproduces (`treeverse_advances`); Siskind and
Pearlmutter 2018 prove the latter for programs in general.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rematree.solve.chain import Advance, ChainChoice, ChainProblem
from rematree.solve.groups import Group

_STATES: Final = 3000  # of the tables, at most: limits above that are counted in coarser quanta
_INFINITY: Final = float("inf")

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Table:
    """P of one run of blocks, for every number of quanta.

    Attributes:
        seconds: Least seconds by quanta available.
        pick: What the first block does: an option, or minus the number of blocks of the group it begins.
    """

    seconds: Floats
    pick: npt.NDArray[np.int16]


class Tables:
    """P(i, j, m) for every run of blocks, made when asked for; runs of equal blocks share one.

    Args:
        problem: With advances.
        quantum: Bytes of one state.
        states: Number of states.
        optimistic: What blocks keep is rounded down to quanta and what is available up, so that no choice takes less
            than the table says. Else the other way round: the table's choices fit.
    """

    def __init__(self, problem: ChainProblem, quantum: int, states: int, *, optimistic: bool = False) -> None:
        self.problem = problem
        self.quantum = quantum
        self.states = states
        self._optimistic = optimistic
        numbers: dict[object, int] = {}
        keys = zip(
            problem.stages, problem.gradients, problem.advances, strict=False
        )  # no advances: no group is asked for
        self._ids = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
        self._tables: dict[tuple[int, ...], _Table] = {}
        self._by_place: dict[Group, _Table] = {}
        self._peaks: dict[Group, int] = {}

    def group(self, start: int, stop: int) -> _Table:
        """P of blocks start..stop-1."""
        table = self._by_place.get((start, stop))
        if table is None:
            key = self._ids[start:stop]
            if key not in self._tables:
                self._tables[key] = self._single(start) if stop - start == 1 else self._run(start, stop)
            table = self._by_place[start, stop] = self._tables[key]
        return table

    def forward_peak(self, start: int, stop: int) -> int:
        """Largest bytes while blocks start..stop-1 run and nothing is kept."""
        peak = self._peaks.get((start, stop))
        if peak is None:
            last = _known(self.problem.advances[stop - 1])
            peak = last.forward
            if stop - start > 1:
                before = _known(self.problem.advances[stop - 2])
                peak = max(self.forward_peak(start, stop - 1), before.output + last.forward)
            self._peaks[start, stop] = peak
        return peak

    def shifted(self, seconds: Floats, kept: int, need: int) -> Floats:
        """`seconds` behind something that keeps `kept` bytes, infinite where fewer than `need` are available."""
        step = kept // self.quantum if self._optimistic else -(-kept // self.quantum)
        out = np.full(self.states, _INFINITY)
        first = max(0, -(-need // self.quantum), step)
        if first < self.states:
            out[first:] = seconds[-1]  # as after the last entry, where the step is below 0
            known = seconds[first - step : self.states - step]
            out[first : first + len(known)] = known
        if self._optimistic:
            out[-1] = seconds[-1]  # the last state stands for any number of bytes
        return out

    def _single(self, block: int) -> _Table:
        gradient = _known(self.problem.advances[block]).gradient
        best, pick = self._empty()
        for index, option in enumerate(self.problem.stages[block]):
            need = max(option.backward, option.forward + gradient if option.fill else 0)
            cost = self.shifted(np.zeros(self.states), 0, need) + (option.fill + option.seconds)
            _keep_better(best, pick, cost, index)
        return _Table(best, pick)

    def _run(self, start: int, stop: int) -> _Table:
        problem = self.problem
        beside = _known(problem.advances[stop - 1]).gradient
        best, pick = self._empty()
        rest = self.group(start + 1, stop).seconds
        later = sum(problem.gradients[start + 1 : stop])
        own = _known(problem.advances[start]).seconds
        for index, option in enumerate(problem.stages[start]):
            need = max(option.forward + beside, option.backward + later)
            _keep_better(best, pick, self.shifted(rest, option.kept, need) + (own + option.seconds), index)
        seconds = own
        for middle in range(start + 2, stop):
            last = _known(problem.advances[middle - 1])
            seconds += last.seconds
            inner = self.shifted(self.group(start, middle).seconds, sum(problem.gradients[middle:stop]), 0)
            outer = self.shifted(
                self.group(middle, stop).seconds, last.output, self.forward_peak(start, middle) + beside
            )
            _keep_better(best, pick, inner + outer + seconds, start - middle)
        return _Table(best, pick)

    def _empty(self) -> tuple[Floats, npt.NDArray[np.int16]]:
        return np.full(self.states, _INFINITY), np.zeros(self.states, dtype=np.int16)

    def choose(self, start: int, stop: int, state: int, blocks: list[int], groups: list[Group]) -> None:
        """Write the choice behind P of blocks start..stop-1 at `state` into `blocks` and `groups`."""
        problem = self.problem
        while start < stop:
            picked = int(self.group(start, stop).pick[state])
            if picked >= 0:
                blocks[start] = picked
                kept, start = problem.stages[start][picked].kept, start + 1
            else:
                middle = start - picked
                groups.append((start, middle))
                inside = state + -sum(problem.gradients[middle:stop]) // self.quantum
                self.choose(start, middle, inside, blocks, groups)
                kept, start = _known(problem.advances[middle - 1]).output, middle
            state = min(state - -(-kept // self.quantum), self.states - 1)


def beside_of(problem: ChainProblem, start: int, stop: int) -> int:
    """Bytes that a group of blocks start..stop-1 leaves beside its output."""
    return sum(_known(problem.advances[block]).beside for block in range(start, stop))


def _known(advance: Advance | None) -> Advance:
    assert advance is not None
    return advance


def _keep_better(best: Floats, pick: npt.NDArray[np.int16], cost: Floats, index: int) -> None:
    better = cost < best
    if better.any():
        np.copyto(best, cost, where=better)
        np.copyto(pick, index, where=better)


def _from(seconds: Floats, free: int, states: int) -> Floats:
    """Entry `free` of `seconds` and those before it, one a state; beyond the last that one, before the first none."""
    more = min(max(0, free - len(seconds) + 1), states)  # states in which more is free than there are entries
    known = seconds[: max(0, free - more + 1)][::-1][: states - more]
    return np.concatenate((np.full(more, seconds[-1]), known, np.full(states - more - len(known), _INFINITY)))


# -- the whole chain --------------------------------------------------------------------------------------------------


def runs_of(problem: ChainProblem) -> Iterator[Group]:
    """Every run of at least two blocks that can be a group."""
    for start in range(len(problem.advances)):
        stop = start
        while stop < len(problem.advances) and problem.advances[stop] is not None:
            stop += 1
            if stop - start > 1:
                yield start, stop


def quantum_for(problem: ChainProblem, limit: int) -> int:
    """Bytes of one state: the tables up to `limit` are as fine as is quickly solved.

    If possible it divides what a group keeps, the least that there is, so that nothing is lost where blocks keep little
    else: near the smallest peak, where one output more or less is a whole forward.
    """
    finest = max(1, -(-(limit - problem.base + 1) // _STATES))
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
            kept = _known(problem.advances[stop - 1]).output + self._beside[stop] - self._beside[start]
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


def least_grouped_peak(problem: ChainProblem, quantum: int, high: int) -> int:
    """Smallest limit, to within `quantum` and the coarser one used there, at which `solve_groups` finds a choice.

    Args:
        problem: With advances.
        quantum: Bytes.
        high: A limit at which there is a choice.
    """
    low = problem.base - 1
    while high - low > quantum:
        middle = (low + high) // 2
        if solve_groups(problem, middle, quantum_for(problem, middle)) is None:
            low = middle
        else:
            high = middle
    return high
