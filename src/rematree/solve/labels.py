"""The fastest choice exactly, by labels: (bytes live, seconds) of every way up to a block that may still be the best.

A dynamic program in quanta rounds, and what it rounds is lost; a label keeps bytes as they are. There would be far too
many of them, but two things leave a few hundred: of two labels at one block, one that has no fewer bytes and no fewer
seconds is dropped; and with a byte priced at every position, what is left of the chain cannot take less than its
cheapest path at these prices does (`bound.py`), so that a label which cannot beat what is known already is dropped.

What a group takes while it is run again is read off tables that round in its favour. A choice without groups is exact;
seconds with some are not above those of any choice there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rematree.solve.chain import ChainChoice, ChainProblem
from rematree.solve.tables import Tables, beside_of

_MOST: Final = 50_000  # labels at a block; with more, nothing is said

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Remaining:
    """What a path from a block to the end takes at the least when bytes are priced, from Lagrangian duality.

    Attributes:
        behind: Seconds for a byte that is live from each block on.
        least: Seconds of the cheapest path from each block to the end, with the bytes that it takes itself.
        groups: For each block, the groups that begin there: the block behind, and the seconds of that alone.
    """

    behind: Floats
    least: Sequence[float]
    groups: Sequence[Sequence[tuple[int, float]]]


@dataclass(frozen=True, slots=True)
class _Labels:
    """Ways up to a block: bytes above the base, seconds, and where each comes from: label, option (-1: a group)."""

    live: Integers
    seconds: Floats
    came: Integers
    option: Integers


@dataclass(frozen=True, slots=True)
class Settled:
    """The answer.

    Attributes:
        seconds: Of the fastest choice there is, or of one below it; infinite if nothing beats what was known.
        choice: That choice; None if it holds groups.
    """

    seconds: float
    choice: ChainChoice | None


def settle(
    problem: ChainProblem, limit: int, below: float, remaining: Remaining, tables: Tables | None
) -> Settled | None:
    """The fastest choice within `limit` that takes less than `below`; None if there are too many to look at.

    Args:
        problem: Options, and advances if groups may be formed.
        limit: Bytes at any position.
        below: Seconds; of a choice that is known, as low as can be.
        remaining: At any prices; good ones leave few labels.
        tables: Optimistic ones; None where no group may be formed.
    Cost:
        O(blocks * options * labels); milliseconds where prices are those of the linear program.
    Source:
        Labels with completion bounds: Desrosiers, Dumas, Solomon, Soumis 1995, for shortest paths with resources.
    """
    count, room = len(problem.stages), limit - problem.base
    later = [sum(problem.gradients[block + 1 :]) for block in range(count)]
    arrived: list[list[_Labels]] = [[] for _ in range(count + 1)]
    arrived[0] = [_labels(np.zeros(1, dtype=np.int64), np.zeros(1), np.full(1, -1, dtype=np.int64), -1)]
    kept: list[_Labels] = []
    for block in range(count + 1):
        here = _undominated(arrived[block])
        if len(here.live) > _MOST:
            return None
        kept.append(here)
        if block == count or not len(here.live):
            continue
        for index, option in enumerate(problem.stages[block]):
            fits = np.flatnonzero(here.live <= room - max(option.forward, option.backward + later[block]))
            live, seconds = here.live[fits] + option.kept, here.seconds[fits] + option.seconds
            _arrive(arrived[block + 1], live, seconds, fits, index, room, below, remaining, block + 1)
        floor = float(np.min(here.seconds + (here.live - room) * remaining.behind[block]))
        for stop, cost in remaining.groups[block] if tables is not None else ():
            if floor + cost + remaining.least[stop] >= below:
                continue
            assert tables is not None
            advance, beside = problem.advances[stop - 1], beside_of(problem, block, stop)
            assert advance is not None
            free = room - later[stop - 1] - beside - here.live
            fits = np.flatnonzero((free >= 0) & (here.live <= room - tables.forward_peak(block, stop)))
            inside = tables.group(block, stop).seconds
            rerun = inside[np.minimum(-(-free[fits] // tables.quantum), len(inside) - 1)]
            live, seconds = here.live[fits] + advance.output + beside, here.seconds[fits] + rerun
            _arrive(arrived[stop], live, seconds, fits, -1, room, below, remaining, stop)
    return _best(problem, room, kept)


def _labels(live: Integers, seconds: Floats, came: Integers, option: int) -> _Labels:
    return _Labels(live, seconds, came, np.full(len(live), option, dtype=np.int64))


def _arrive(
    into: list[_Labels],
    live: Integers,
    seconds: Floats,
    came: Integers,
    option: int,
    room: int,
    below: float,
    remaining: Remaining,
    block: int,
) -> None:
    """Those of some ways to `block` from which less than `below` can still come."""
    worth = seconds + remaining.least[block] + (live - room) * remaining.behind[block] < below
    if worth.any():
        into.append(_labels(live[worth], seconds[worth], came[worth], option))


def _undominated(parts: Sequence[_Labels]) -> _Labels:
    """All labels of `parts` but those that another one has no more bytes and no more seconds than."""
    live = np.concatenate([part.live for part in parts]) if parts else np.zeros(0, dtype=np.int64)
    seconds = np.concatenate([part.seconds for part in parts]) if parts else np.zeros(0)
    order = np.lexsort((seconds, live))
    before = np.concatenate(([np.inf], np.minimum.accumulate(seconds[order])[:-1]))[: len(order)]
    order = order[seconds[order] < before]
    came = np.concatenate([part.came for part in parts]) if parts else live
    option = np.concatenate([part.option for part in parts]) if parts else live
    return _Labels(live[order], seconds[order], came[order], option[order])


def _best(problem: ChainProblem, room: int, kept: Sequence[_Labels]) -> Settled:
    last = kept[-1]
    found, at = Settled(float("inf"), None), (0, 0)
    for head, option in enumerate(problem.heads):
        reachable = np.flatnonzero(last.live <= room - option.peak)
        if not len(reachable):
            continue
        label = int(reachable[-1])  # seconds fall where bytes rise
        seconds = float(last.seconds[label]) + option.seconds
        if seconds < found.seconds:
            found, at = Settled(seconds, None), (head, label)
    if found.seconds == float("inf"):
        return found
    (head, label), blocks = at, list[int]()
    for labels in reversed(kept[1:]):
        if labels.option[label] < 0:
            return found
        blocks.append(int(labels.option[label]))
        label = int(labels.came[label])
    return Settled(found.seconds, ChainChoice(tuple(reversed(blocks)), head, found.seconds))
