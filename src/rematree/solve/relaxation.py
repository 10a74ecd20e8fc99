"""The linear program of `bound.py`: paths through the chain that split into shares, with HiGHS.

Nothing that it returns is believed there: its multipliers only say where a byte is worth how much.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import linprog

from rematree.solve.chain import ChainProblem

_PENALTY: Final = 100.0  # seconds for the whole limit once more, in units of all seconds there are

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Span:
    """One way to pass blocks start..stop-1: bytes as of `StageOption`, gradients of later blocks in `backward`."""

    start: int
    stop: int
    kept: int
    forward: int
    backward: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds a byte at each position.

    Attributes:
        forward: In the forward of each block.
        backward: In its backward.
        head: In the head.
    """

    forward: Floats
    backward: Floats
    head: float


def relaxation(problem: ChainProblem, columns: Sequence[Span], limit: int) -> tuple[float, Prices, Floats]:
    """Value of the LP over `columns`, its multipliers, and the potential of every position between blocks.

    Variables: share of every column, share of every head, bytes live in front of every position, and how far the limit
    is exceeded (so that there is always a solution). Bytes are in units of what is above the base.
    """
    count, room = len(problem.stages), max(1, limit - problem.base)
    heads = problem.heads
    first_head, first_live = len(columns), len(columns) + len(heads)
    excess = first_live + count + 1
    equal, most = _Rows(), _Rows()
    for position in range(count):  # what leaves a position has arrived there
        equal.right.append(1.0 if position == 0 else 0.0)
    for number, c in enumerate(columns):
        equal.put(c.start, number, 1.0)
        if c.stop < count:
            equal.put(c.stop, number, -1.0)
        equal.put(count + c.stop, number, c.kept / room)
        for block in range(c.start, c.stop):
            most.put(2 * block, number, c.forward / room)
            most.put(2 * block + 1, number, c.backward / room)
    for position in range(count + 1):  # live bytes are those of before and what the columns that end here keep
        equal.right.append(0.0)
        equal.put(count + position, first_live + position, -1.0)
        if position:
            equal.put(count + position, first_live + position - 1, 1.0)
    equal.right.append(1.0)
    for number, head in enumerate(heads):
        equal.put(2 * count + 1, first_head + number, 1.0)
        most.put(2 * count, first_head + number, head.peak / room)
    for row in range(2 * count + 1):
        most.right.append(1.0)
        most.put(row, first_live + row // 2, 1.0)
        most.put(row, excess, -1.0)
    seconds = [c.seconds for c in columns] + [h.seconds for h in heads]
    penalty = _PENALTY * (1e-9 + sum(max((o.seconds for o in s), default=0.0) for s in problem.stages) + max(seconds))
    bounds = [(0, None)] * first_live + [(None, None)] * (count + 1) + [(0, None)]
    solved: Any = linprog(
        np.array([*seconds, *[0.0] * (count + 1), penalty]),
        A_ub=most.matrix(excess + 1),
        b_ub=most.right,
        A_eq=equal.matrix(excess + 1),
        b_eq=equal.right,
        bounds=bounds,
        method="highs",
    )
    if solved.ineqlin.marginals is None or not math.isfinite(solved.fun or math.nan):
        return math.inf, Prices(np.zeros(count), np.zeros(count), 0.0), np.zeros(count + 1)
    multipliers = np.maximum(0.0, -np.asarray(solved.ineqlin.marginals, dtype=np.float64)) / room
    potentials = np.concatenate((np.asarray(solved.eqlin.marginals, dtype=np.float64)[:count], [0.0]))
    prices = Prices(multipliers[0:-1:2], multipliers[1:-1:2], float(multipliers[-1]))
    return float(solved.fun), prices, potentials


class _Rows:
    """Sparse rows under construction."""

    def __init__(self) -> None:
        self.right: list[float] = []
        self._entries: list[tuple[int, int, float]] = []

    def put(self, row: int, column: int, value: float) -> None:
        """Set one entry."""
        self._entries.append((row, column, value))

    def matrix(self, width: int) -> Any:
        """All of them, with `width` columns."""
        rows, columns, values = zip(*self._entries, strict=True)
        return sparse.csr_matrix((values, (rows, columns)), shape=(len(self.right), width))
