"""torch's caching allocator for GPUs, as far as it decides how many bytes are held: rounding, pools, segments, splits.

After c10/cuda/CUDACachingAllocator.cpp with its default settings: requests are rounded up to 512 bytes; those up to
1 MiB come from segments of 2 MiB, those under 10 MiB from segments of 20 MiB, larger ones from segments of their own,
rounded up to 2 MiB; a free block is split when enough is left of it. A segment of which nothing is in use is given back
when memory runs short, so what counts against a device is the segments in use, not all that were ever reserved.
"""

import bisect
from dataclasses import dataclass, field
from typing import Final

from rematree.units import KIB, MIB

GRANULARITY: Final = 512
_SMALL: Final = 1 * MIB  # largest request of the small pool, and least remainder of a large block that is split
_SMALL_SEGMENT: Final = 2 * MIB
_LARGE: Final = 10 * MIB
_LARGE_SEGMENT: Final = 20 * MIB
_SEGMENT_UNIT: Final = 2 * MIB
_LEAST_SMALL_REST: Final = KIB // 2


def rounded(num_bytes: int) -> int:
    """What a request of `num_bytes` takes up; nothing for an empty tensor."""
    return -(-num_bytes // GRANULARITY) * GRANULARITY


def segment_bytes(num_bytes: int) -> int:
    """Size of the segment that is reserved for a rounded request when no free block fits."""
    if num_bytes <= _SMALL:
        return _SMALL_SEGMENT
    if num_bytes < _LARGE:
        return _LARGE_SEGMENT
    return -(-num_bytes // _SEGMENT_UNIT) * _SEGMENT_UNIT


@dataclass(eq=False, slots=True)
class _Segment:
    size: int
    used: int = 0


@dataclass(eq=False, slots=True)
class _Block:
    segment: _Segment
    size: int
    small: bool
    free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None
    key: tuple[int, int] = (0, 0)


@dataclass
class CachingAllocator:
    """Serves requests the way torch would.

    Attributes:
        allocated_bytes: In use, rounded.
        held_bytes: Of the segments with anything in use.
        peak_held_bytes: Largest `held_bytes` so far.
        reserved_bytes: Of all segments, used or not.
    """

    allocated_bytes: int = 0
    held_bytes: int = 0
    peak_held_bytes: int = 0
    reserved_bytes: int = 0
    _free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _by_key: dict[tuple[int, int], _Block] = field(default_factory=dict[tuple[int, int], _Block])
    _next: int = 0

    def allocate(self, num_bytes: int) -> _Block | None:
        """A block for `num_bytes`; None for none."""
        size = rounded(num_bytes)
        if size == 0:
            return None
        small = size <= _SMALL
        block = self._best_fit(size, small) or self._reserve(size, small)
        rest = block.size - size
        if rest >= _LEAST_SMALL_REST if small else rest > _SMALL:
            self._split(block, size)
        block.free = False
        segment = block.segment
        if segment.used == 0:
            self.held_bytes += segment.size
            self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)
        segment.used += block.size
        self.allocated_bytes += block.size
        return block

    def release(self, block: _Block | None) -> None:
        """Give a block back."""
        if block is None:
            return
        segment = block.segment
        self.allocated_bytes -= block.size
        segment.used -= block.size
        if segment.used == 0:
            self.held_bytes -= segment.size
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take(neighbour)
                block = self._join(*((neighbour, block) if neighbour is block.before else (block, neighbour)))
        block.free = True
        self._offer(block)

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        free = self._free[small]
        position = bisect.bisect_left(free, (size, -1))
        if position == len(free):
            return None
        block = self._by_key[free[position]]
        self._take(block)
        return block

    def _reserve(self, size: int, small: bool) -> _Block:
        segment = _Segment(segment_bytes(size))
        self.reserved_bytes += segment.size
        return _Block(segment, segment.size, small)

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.segment, block.size - size, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._offer(rest)

    def _join(self, first: _Block, second: _Block) -> _Block:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        return first

    def _offer(self, block: _Block) -> None:
        self._next += 1  # among equals the one that has been free the longest
        block.key = (block.size, self._next)
        self._by_key[block.key] = block
        bisect.insort(self._free[block.small], block.key)

    def _take(self, block: _Block) -> None:
        free = self._free[block.small]
        del free[bisect.bisect_left(free, block.key)]
        del self._by_key[block.key]


Request = tuple[int, int]  # number of a piece of memory and its bytes; of one that is given back, the number negative


class Recorder:
    """What an allocator is asked for, between marks; most simulated steps are never asked what it would hold.

    Attributes:
        requests: By mark.
    """

    def __init__(self) -> None:
        self.requests: list[list[Request]] = [[]]
        self._count = 0

    def allocate(self, num_bytes: int) -> int:
        """What `release` is to be given."""
        self._count += 1
        self.requests[-1].append((self._count, num_bytes))
        return self._count

    def release(self, number: int) -> None:
        """Give it back."""
        self.requests[-1].append((-number, 0))

    def mark(self) -> None:
        """What comes now is apart from what was before."""
        self.requests.append([])
