"""Least seconds of running a group of blocks again, for every run of blocks and every number of bytes.

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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rematree.solve.chain import Advance, ChainProblem
from rematree.solve.groups import Group

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
            last = advance_at(self.problem, stop - 1)
            peak = last.forward
            if stop - start > 1:
                before = advance_at(self.problem, stop - 2)
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
        gradient = advance_at(self.problem, block).gradient
        best, pick = self._empty()
        for index, option in enumerate(self.problem.stages[block]):
            need = max(option.backward, option.forward + gradient if option.fill else 0)
            cost = self.shifted(np.zeros(self.states), 0, need) + (option.fill + option.seconds)
            _keep_better(best, pick, cost, index)
        return _Table(best, pick)

    def _run(self, start: int, stop: int) -> _Table:
        problem = self.problem
        beside = advance_at(problem, stop - 1).gradient
        best, pick = self._empty()
        rest = self.group(start + 1, stop).seconds
        later = sum(problem.gradients[start + 1 : stop])
        own = advance_at(problem, start).seconds
        for index, option in enumerate(problem.stages[start]):
            need = max(option.forward + beside, option.backward + later)
            _keep_better(best, pick, self.shifted(rest, option.kept, need) + (own + option.seconds), index)
        seconds = own
        for middle in range(start + 2, stop):
            last = advance_at(problem, middle - 1)
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
                kept, start = advance_at(problem, middle - 1).output, middle
            state = min(state - -(-kept // self.quantum), self.states - 1)


def beside_of(problem: ChainProblem, start: int, stop: int) -> int:
    """Bytes that a group of blocks start..stop-1 leaves beside its output."""
    return sum(advance_at(problem, block).beside for block in range(start, stop))


def advance_at(problem: ChainProblem, block: int) -> Advance:
    """That of a block which a group may hold."""
    advance = problem.advances[block]
    assert advance is not None
    return advance


def _keep_better(best: Floats, pick: npt.NDArray[np.int16], cost: Floats, index: int) -> None:
    better = cost < best
    if better.any():
        np.copyto(best, cost, where=better)
        np.copyto(pick, index, where=better)


def runs_of(problem: ChainProblem) -> Iterator[Group]:
    """Every run of at least two blocks that can be a group."""
    for start in range(len(problem.advances)):
        stop = start
        while stop < len(problem.advances) and problem.advances[stop] is not None:
            stop += 1
            if stop - start > 1:
                yield start, stop
