"""A certified lower bound on the seconds of any choice within a limit.

Choices are paths: a block is passed alone, under one of its options, or together with its neighbours as a group. The LP
lets a path split into shares; a position's bytes are those of the shares that are there. What comes back from HiGHS is
not the bound. Its multipliers, whatever their error, price a byte at every position, and with bytes priced the limits
can be left out: the cheapest path is found exactly, and its price minus that of the bytes there are is below every
choice within the limit (Lagrangian duality holds for any multipliers that are not negative). Only the rounding of this
last sum is left, and what it can amount to is subtracted.

Near the smallest peak shares of a path say little. There the dynamic program itself is the better witness, run a second
time with everything rounded in favour of the choices: what it returns is below all of them as well, and closer in finer
quanta. Elsewhere what a path split into shares wins is closed by looking at the whole paths that are left between the
bound and the fastest choice known (`labels.py`); they are few.

Groups, of which there are thousands, enter the LP only when that cheapest path takes them (column generation). What a
group takes and costs is read off tables that round in its favour, so that the bound holds for nested ones as well.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rematree.solve.chain import ChainChoice, ChainProblem, solve_chain
from rematree.solve.labels import Remaining, settle
from rematree.solve.nested import quantum_for, seconds_at_least
from rematree.solve.relaxation import Prices, Span, relaxation
from rematree.solve.tables import Tables, beside_of, runs_of

_ROUNDS: Final = 12  # of column generation
_CLOSE: Final = 1e-4  # of the bound: closer to the LP's value it cannot get by more groups
_STATES: Final = 400  # of the tables for groups: coarser ones only lower the bound
_FINER: Final = (2, 4, 8)  # times, what a bound is looked for with that is not close enough
_WORTH_LOOKING: Final = 1e-3  # of the bound: what is closer is close enough
_CHEAPEST: Final = 40  # groups taken in at a time, beside those on the cheapest path

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Certified:
    """What is known of every choice within a limit.

    Attributes:
        seconds: None takes less, head included.
        choice: The fastest one without groups, if it takes less than what was known before.
    """

    seconds: float
    choice: ChainChoice | None = None


def certify(problem: ChainProblem, limit: int, quantum: int, known: float = math.inf) -> Certified:
    """Seconds that no choice within `limit` goes below, head included: options, and groups where there are advances.

    Args:
        problem: Options, and advances if groups may be formed.
        limit: Bytes at any position.
        quantum: Of the dynamic program without groups that finds a choice to begin with.
        known: Seconds of the fastest choice that is known. It need not be within the limit: no more is claimed than
            that what is below it was looked for.
    Cost:
        A few sparse linear programs of blocks * options columns and two more runs of the dynamic program; about a
        second for 80 blocks with groups.
    Source:
        Dantzig and Wolfe 1960 for the column generation, Geoffrion 1974 for the bound.
    """
    later = [sum(problem.gradients[block + 1 :]) for block in range(len(problem.stages))]
    columns = [
        Span(block, block + 1, o.kept, o.forward, o.backward + later[block], o.seconds)
        for block, stage in enumerate(problem.stages)
        for o in stage
    ]
    fine = quantum_for(problem, limit)
    swept, tables = seconds_at_least(problem, limit, fine)
    if not math.isfinite(swept):
        return Certified(swept)  # nothing fits
    rounding = _rounding(problem, swept)
    alone = solve_chain(problem, limit, quantum)
    if alone is not None:
        known = min(known, alone.seconds)
    best, remaining = swept - rounding, None
    if known - best <= _CLOSE * abs(best):
        return Certified(best)
    groups = _Groups(problem, limit, fine, later)
    for _ in range(_ROUNDS):
        value, prices, potentials = relaxation(problem, columns, limit)
        found, path, least = _cheapest(problem, columns, groups, prices, limit)
        if remaining is None or found > best:
            remaining = least
        best = max(best, found)
        if value - best <= _CLOSE * abs(best):
            break
        seen = {(c.start, c.stop, c.backward) for c in columns}
        fresh = [s for s in (*path, *groups.below(prices, potentials)) if (s.start, s.stop, s.backward) not in seen]
        if not fresh:
            break
        columns += dict.fromkeys(fresh)
    assert remaining is not None
    settled = settle(problem, limit, known + rounding, remaining, None) if math.isfinite(known) else None
    if settled is None:
        return Certified(best)
    better = settled.choice if settled.seconds < known else None
    if tables is not None:
        settled = settle(problem, limit, min(known, settled.seconds) + rounding, remaining, tables)
        if settled is None:
            return Certified(best, better)
    known = min(known, settled.seconds, math.inf if better is None else better.seconds)
    return Certified(max(best, known - rounding), better)


def tightened(problem: ChainProblem, limit: int, best: float, known: float) -> float:
    """A bound of `best` seconds, or what the dynamic program says in finer quanta, until it is what is `known`.

    Near the smallest peak, what a quantum gives away of each thing that is kept can be room for one thing more, which
    is a whole forward less.

    Args:
        problem: As of `certify`.
        limit: Bytes at any position.
        best: What `certify` found.
        known: Seconds of the fastest choice within `limit` that is known.
    Cost:
        Nothing where they are close; at most three more runs of the dynamic program, the last in quanta of an eighth.
    """
    for finer in _FINER:
        if known - best <= _WORTH_LOOKING * abs(best):
            break
        swept, _ = seconds_at_least(problem, limit, quantum_for(problem, limit, finer))
        best = max(best, swept - _rounding(problem, swept))
    return best


def _rounding(problem: ChainProblem, swept: float) -> float:
    """What `swept` can be off by, as a sum of fewer terms than there are options."""
    size = abs(swept) + sum(max(abs(o.seconds) + o.fill for o in stage) for stage in problem.stages)
    size += max(abs(head.seconds) for head in problem.heads)
    return float((8 * sum(map(len, problem.stages)) + 64) * np.finfo(np.float64).eps) * size


# -- groups -----------------------------------------------------------------------------------------------------------


class _Groups:
    """Every group there is, each at the corners of its convex frontier of bytes and seconds, as arrays."""

    def __init__(self, problem: ChainProblem, limit: int, quantum: int, later: Sequence[int]) -> None:
        room = max(0, limit - problem.base)
        while room // quantum + 3 > _STATES:
            quantum *= 2
        tables = Tables(problem, quantum, room // quantum + 3, optimistic=True) if problem.advances else None
        rows: list[tuple[int, int, int, int, int, float]] = []
        corners: dict[int, list[tuple[int, float]]] = {}
        for start, stop in runs_of(problem) if tables is not None else ():
            assert tables is not None
            table = tables.group(start, stop).seconds
            if id(table) not in corners:
                corners[id(table)] = _corners(table, quantum)
            advance = problem.advances[stop - 1]
            assert advance is not None
            peak, beside = tables.forward_peak(start, stop), beside_of(problem, start, stop)
            more = beside + later[stop - 1]
            rows += [(start, stop, advance.output + beside, peak, n + more, s) for n, s in corners[id(table)]]
        array = np.array(rows, dtype=np.float64).reshape(-1, 6)
        self._spans = rows
        self.start, self.stop = array[:, 0].astype(np.int64), array[:, 1].astype(np.int64)
        self._bytes, self._seconds = array[:, 2:5], array[:, 5]
        self.cost: Floats = self._seconds

    def priced(self, forward: Floats, backward: Floats, behind: Floats) -> Floats:
        """Price of every group, given sums of prices up to each position and from each position on."""
        kept, peak, need = self._bytes.T
        inside_forward = forward[self.stop] - forward[self.start]
        inside_backward = backward[self.stop] - backward[self.start]
        self.cost = self._seconds + kept * behind[self.stop] + peak * inside_forward + need * inside_backward
        return self.cost

    def span(self, index: int) -> Span:
        """Group number `index`."""
        return Span(*self._spans[index])

    def below(self, prices: Prices, potentials: Floats) -> Iterable[Span]:
        """Those that cost least against the potentials of the LP; call after `priced` with the same `prices`."""
        if not len(self.cost):
            return []
        reduced = self.cost - (potentials[self.start] - potentials[self.stop])
        cheapest = np.argsort(reduced)[:_CHEAPEST]
        return [self.span(int(index)) for index in cheapest if reduced[index] < 0]


def _corners(seconds: Floats, quantum: int) -> list[tuple[int, float]]:
    """Lower convex hull of (bytes that are not enough for less, seconds)."""
    hull: list[tuple[int, float]] = []
    falls = np.flatnonzero(np.isfinite(seconds) & (seconds < np.concatenate(([np.inf], seconds[:-1]))))
    for state in falls:
        # One quantum fewer than this state: with exactly that many bytes the seconds before still hold.
        point = (max(0, (int(state) - 1) * quantum), float(seconds[state]))
        while len(hull) >= 2 and _right_of(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _right_of(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


# -- the cheapest path at given prices --------------------------------------------------------------------------------


def _cheapest(
    problem: ChainProblem, options: Sequence[Span], groups: _Groups, prices: Prices, limit: int
) -> tuple[float, list[Span], Remaining]:
    """The bound at `prices`, the groups on the path behind it, and the same from every block on."""
    count, room = len(problem.stages), limit - problem.base
    forward = np.concatenate(([0.0], np.cumsum(prices.forward)))
    backward = np.concatenate(([0.0], np.cumsum(prices.backward)))
    behind = forward[-1] - forward + backward[-1] - backward + prices.head  # of what is kept from a position on
    alone = np.full(count, np.inf)
    for o in options:
        if o.stop - o.start == 1:
            paid = o.kept * behind[o.stop] + o.forward * prices.forward[o.start] + o.backward * prices.backward[o.start]
            alone[o.start] = min(alone[o.start], o.seconds + paid)
    cost = groups.priced(forward, backward, behind)
    starts: list[list[tuple[int, float, int]]] = [[] for _ in range(count)]
    if len(cost):
        order = np.argsort(cost, kind="stable")
        _, first = np.unique(groups.start[order] * (count + 1) + groups.stop[order], return_index=True)
        for index in order[first]:
            starts[int(groups.start[index])].append((int(groups.stop[index]), float(cost[index]), int(index)))
    head = min(h.seconds + h.peak * prices.head for h in problem.heads)
    least, goes = [head] * (count + 1), [-1] * (count + 1)
    for start in reversed(range(count)):
        least[start] = float(alone[start]) + least[start + 1]
        for stop, price, index in starts[start]:
            if price + least[stop] < least[start]:
                least[start], goes[start] = price + least[stop], index
    path: list[Span] = []
    start = 0
    while start < count:
        if goes[start] >= 0:
            path.append(groups.span(goes[start]))
        start = start + 1 if goes[start] < 0 else int(groups.stop[goes[start]])
    total = float(forward[-1] + backward[-1]) + prices.head
    # Every number above is a sum of at most 4 * count + 8 terms of one sign, or a difference of two such sums.
    error = (8 * count + 64) * np.finfo(np.float64).eps * (abs(least[0]) + abs(head) + 2 * abs(room) * total)
    from_each = [value - float(error) for value in least]
    remaining = Remaining(behind, from_each, [[(stop, price) for stop, price, _ in each] for each in starts])
    return least[0] - room * total - float(error), path, remaining
