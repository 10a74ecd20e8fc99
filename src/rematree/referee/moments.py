"""Bytes by category at moments of a segment, and a segment whose peak is the highest of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rematree.trace import Segment

Bytes = Mapping[str, int]


def plus(one: Bytes, other: Bytes) -> dict[str, int]:
    """The sum, category by category."""
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def with_moments(segment: Segment, always: Bytes, moments: Sequence[tuple[Bytes, Bytes]]) -> Segment:
    """`segment` with `always` added, and its peak the highest of `moments` (bytes by category, what is added)."""
    live = plus(segment.live, always)
    found = [plus(at, plus(always, more)) for at, more in moments]
    at_peak = max(found, key=lambda at: sum(at.values()))
    live_bytes = segment.live_bytes + sum(always.values())
    return replace(segment, live_bytes=live_bytes, live=live, peak_bytes=sum(at_peak.values()), at_peak=at_peak)
