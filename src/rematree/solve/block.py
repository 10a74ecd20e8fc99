"""The frontier of one block: which regions to save when the block is recomputed.

A Save set is a set of regions, none inside another. Its price in bytes is what the saved regions keep, plus their
outputs where the rerun reads them; its price in seconds is what is left to rerun, up to the op that refills the last
saved tensor. The empty set is plain recomputation; the whole block is no recomputation at all.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from rematree.regions import parent_path
from rematree.trace import BlockTrace

_BEAM: Final = 48
_BEAM_OF_AN_OPTION: Final = 12  # where few options are asked for
_MOST_WORK: Final = 2_000_000  # regions^2 * ops: some seconds. The largest block with one layer, Gemma 3n's, has 1.6


@dataclass(frozen=True, slots=True)
class BlockOption:
    """One way to run a block.

    Attributes:
        saved: Regions (relative paths) saved inside the recomputed block; `("",)` saves the whole block.
        stashed: Those of them whose output is kept because the rerun reads it.
        kept_bytes: Predicted bytes kept between forward and backward, block input not counted.
        rerun_seconds: Predicted seconds of the rerun.
        lean: Whether the block's adapters, and norms, keep one input each.
        sliced: Whether the block's attention is computed in slices of its queries.
        compiled: Share of its saved bytes that the compiler of the block may keep, or None when it is not compiled.
    """

    saved: tuple[str, ...]
    stashed: frozenset[str]
    kept_bytes: int
    rerun_seconds: float
    lean: bool = False
    sliced: bool = False
    compiled: float | None = None

    @property
    def saves_all(self) -> bool:
        """True when the block is not recomputed."""
        return self.saved == ("",)


Lineage = dict[str, tuple[str, ...]]


def lineage(trace: BlockTrace) -> Lineage:
    """Every region of `trace` with itself and all regions around it, innermost first."""
    found: Lineage = {}
    for region in {op.region for op in trace.ops} | set(trace.regions) | {save.region for save in trace.saves}:
        line, outer = [], region
        while outer:
            line.append(outer)
            outer = parent_path(outer)
        found[region] = tuple(line)
    return found


def evaluate(trace: BlockTrace, saved: Iterable[str], lines: Lineage | None = None) -> BlockOption:
    """Price one Save set on `trace`; `lines` is its lineage, if known."""
    chosen = frozenset(saved)
    if "" in chosen:
        return BlockOption(
            ("",), frozenset(), sum(trace.sizes.get(s, 0) for s in {x.storage for x in trace.saves}), 0.0
        )
    owner: dict[str, str | None] = {}
    for region, line in (lineage(trace) if lines is None else lines).items():
        owner[region] = None
        if not chosen.isdisjoint(line):
            owner[region] = next(outer for outer in line if outer in chosen)
    kept = {save.storage for save in trace.saves if owner[save.region] is not None}
    refilled = [save for save in trace.saves if owner[save.region] is None]
    last = max((save.op for save in refilled), default=0)
    needed = {save.storage for save in refilled}
    stashed: set[str] = set()
    packed: dict[int, int] = {}
    seconds = 0.0
    for op in reversed(trace.ops[:last]):
        region = owner[op.region]
        if region is None:
            seconds += op.seconds
            if not op.writes.isdisjoint(needed):
                needed |= op.reads
        elif not op.writes.isdisjoint(needed):
            stashed.add(region)
            if region in trace.packed:
                packed.update(dict.fromkeys((op.writes & needed) - kept, trace.packed[region]))
            else:
                kept |= op.writes & needed
    kept_bytes = sum(trace.sizes.get(storage, 0) for storage in kept) + sum(packed.values())
    return BlockOption(tuple(sorted(chosen)), frozenset(stashed), kept_bytes, seconds)


def enumerate_options(trace: BlockTrace, limit: int) -> list[BlockOption]:
    """At most `limit` Pareto-optimal options, from least bytes to no recomputation.

    Save sets grow from the empty one by one region at a time; only sets no other one beats in both bytes and seconds
    grow further (a beam of 48, or of 12 for each option asked for). Mixing options over identical blocks can only use
    the lower convex hull, so that is what remains, filled up with the points nearest to it.

    Of a block with many layers in it (a stage of Funnel, a level of HRM) only the outermost regions are looked at.

    Cost:
        O(beam * regions^2 * ops), regions^2 * ops at most 2 million.
    """
    everything = evaluate(trace, ("",))
    lines = lineage(trace)
    beam = min(_BEAM, limit * _BEAM_OF_AN_OPTION)
    regions = _outermost(trace, lines)
    seen: dict[frozenset[str], BlockOption] = {frozenset(): evaluate(trace, (), lines)}
    front = list(seen.values())
    expanded: set[tuple[str, ...]] = set()
    while True:
        grown: list[BlockOption] = []
        for option in front:
            if option.saved in expanded:
                continue
            expanded.add(option.saved)
            have = frozenset(option.saved)
            for region in regions:
                if have.isdisjoint(lines[region]):
                    bigger = frozenset([region, *(other for other in have if region not in lines[other])])
                    if bigger not in seen:
                        seen[bigger] = evaluate(trace, bigger, lines)
                        grown.append(seen[bigger])
        new_front = pareto([*front, *grown], key_limit=beam)
        if {o.saved for o in new_front} == {o.saved for o in front}:
            break
        front = new_front
    front = [o for o in pareto([*front, everything], key_limit=beam) if o.saves_all or o.rerun_seconds > 0]
    if everything not in front:  # a set that keeps no more and reruns nothing: the same thing with more machinery
        front.append(everything)
    return _thin(front, limit)


def _outermost(trace: BlockTrace, lines: Lineage) -> list[str]:
    """As many regions as there is time for, in their own order."""
    most = math.isqrt(_MOST_WORK // max(1, len(trace.ops)))
    inside = [region for region in trace.regions if region]
    chosen = set(sorted(inside, key=lambda region: len(lines[region]))[:most])
    return [region for region in inside if region in chosen]


def pareto(options: Iterable[BlockOption], key_limit: int) -> list[BlockOption]:
    """Options no other one beats, sorted by bytes; ties go to the smaller set. Thinned to `key_limit` if more."""
    best: list[BlockOption] = []
    for option in sorted(options, key=lambda o: (o.kept_bytes, o.rerun_seconds, len(o.saved), o.saved)):
        if not best or option.rerun_seconds < best[-1].rerun_seconds - 1e-12:
            best.append(option)
    return best if len(best) <= key_limit else _thin(best, key_limit)


def _thin(front: list[BlockOption], limit: int) -> list[BlockOption]:
    hull: list[BlockOption] = []
    for point in front:
        while len(hull) >= 2 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    if len(hull) > limit:
        step = (len(hull) - 1) / (limit - 1)
        return [hull[round(i * step)] for i in range(limit)]
    rest = [o for o in front if o not in hull]
    rest.sort(key=lambda o: _excess(o, hull))
    return sorted([*hull, *rest[: limit - len(hull)]], key=lambda o: (o.kept_bytes, -o.rerun_seconds))


def _above(a: BlockOption, b: BlockOption, c: BlockOption) -> bool:
    """Whether b lies on or above the line from a to c."""
    run_ac, run_ab = c.kept_bytes - a.kept_bytes, b.kept_bytes - a.kept_bytes
    return (b.rerun_seconds - a.rerun_seconds) * run_ac >= (c.rerun_seconds - a.rerun_seconds) * run_ab


def _excess(option: BlockOption, hull: list[BlockOption]) -> float:
    """Seconds above the hull at the same bytes."""
    for left, right in itertools.pairwise(hull):
        if left.kept_bytes <= option.kept_bytes <= right.kept_bytes and right.kept_bytes > left.kept_bytes:
            share = (option.kept_bytes - left.kept_bytes) / (right.kept_bytes - left.kept_bytes)
            return option.rerun_seconds - (left.rerun_seconds + share * (right.rerun_seconds - left.rerun_seconds))
    return float("inf")
