"""What a GPU's allocator holds over a whole step, also where most of its blocks were not simulated.

Segments that are in use hold more than was asked for: they are rounded, and split in pieces that fit nothing. Each
block leaves some of that behind, so it cannot be read off a step that has three blocks in the place of eighty. What the
allocator was asked for in the simulated blocks is asked for again for every block, in the order of the whole step.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rematree.memory.allocator import CachingAllocator, Recorder, rounded
from rematree.referee.folding import Fold
from rematree.referee.marks import HEAD
from rematree.trace import Segment

_FORWARD: Final = "forward"
_BACKWARD: Final = "backward"


class Held:
    """Segments in use over one step; counted when they are first asked for.

    Args:
        recorder: What was asked for in the simulated step, mark by mark.
        labels: Of these marks.
        between: Of them the one at which gradients of left-out blocks are made up, which are not counted; or nothing.
        peak_bytes: Of the simulated step.
        chain: Which blocks were simulated.
        timeline: Of the whole step: every segment but that one.
    Cost:
        Some microseconds for each request of the whole step.
    """

    def __init__(
        self,
        recorder: Recorder,
        labels: Sequence[str],
        between: str,
        peak_bytes: int,
        chain: Fold,
        timeline: Sequence[Segment],
    ) -> None:
        self._requests = recorder.requests
        self._labels = labels
        self._between = between
        self._simulated_peak = peak_bytes
        self._chain = chain
        self._live = {segment.label: segment.live_bytes for segment in timeline}
        self._peak = max(segment.peak_bytes for segment in timeline)

    @functools.cached_property
    def slack_bytes(self) -> int:
        """Most that the segments in use held, beyond the most that was allocated."""
        held = self._replayed() if self._chain.left_out else None
        # Nothing was left out; or a block asks for other pieces than its image, and what was simulated must do.
        slack = self._recorded() - self._simulated_peak if held is None else held - self._peak
        self._requests = []  # thousands, and not needed again
        self.__dict__.pop("_born", None)
        return max(0, slack)

    def _order(self) -> Iterator[tuple[str, int, int | None]]:
        """Label, number of the simulated segment, and number of the block, for all segments of the whole step."""
        number = {label: place for place, label in enumerate(self._labels)}
        blocks = [place for label, place in number.items() if label.startswith((_FORWARD, _BACKWARD))]
        for label in self._labels[: min(blocks)]:
            yield label, number[label], None
        images = self._chain.images
        for block, image in enumerate(images):
            yield f"{_FORWARD} {block}", number[f"{_FORWARD} {image}"], block
        yield HEAD, number[HEAD], len(images)
        for block in reversed(range(len(images))):
            if (place := number.get(f"{_BACKWARD} {images[block]}")) is not None:
                yield f"{_BACKWARD} {block}", place, block
        for label in self._labels[max(*blocks, number[HEAD]) + 1 :]:
            yield label, number[label], None

    def _recorded(self) -> int:
        """Most bytes of segments in use over the simulated step."""
        heap, there = CachingAllocator(), dict[int, Any]()
        for number, num_bytes in itertools.chain.from_iterable(self._requests):
            if number > 0:
                there[number] = heap.allocate(num_bytes)
            else:
                heap.release(there.pop(-number))
        return heap.peak_held_bytes

    def _replayed(self) -> int | None:
        """The same over the whole step; None if what is allocated is not what the timeline has."""
        heap, live, unit = CachingAllocator(), 0, self._unit
        requests = [self._named(segment) for segment in range(len(self._labels))]
        there: dict[int, tuple[int, Any]] = {}
        for label, segment, block in self._order():
            if live != self._live.get(label, live):
                return None
            offset = 0 if block is None else block * unit
            for is_new, name, moves, num_bytes in requests[segment]:
                key = name + offset if moves else name
                if is_new:
                    there[key] = num_bytes, heap.allocate(num_bytes)
                    live += num_bytes
                else:
                    size, piece = there.pop(key, (0, None))
                    heap.release(piece)
                    live -= size
        return heap.peak_held_bytes

    @functools.cached_property
    def _born(self) -> dict[int, tuple[int, int]]:
        """In which segment each piece of memory was asked for, and as the how many-eth."""
        asked = [[number for number, _ in each if number > 0] for each in self._requests]
        return {number: (segment, order) for segment, each in enumerate(asked) for order, number in enumerate(each)}

    @property
    def _unit(self) -> int:
        """Names that each block has: as many for forward and for backward as there are requests at all."""
        return 2 * len(self._born)

    def _named(self, segment: int) -> list[tuple[bool, int, bool, int]]:
        """Requests of a simulated segment: whether new, a name, whether that is within its block, and rounded bytes.

        A piece of a block is told by the block, by phase and by order, so that it is found in whatever block does the
        same. Between backward and optimizer gradients of left-out blocks are made up; they are there in a whole step.
        """
        places, here = self._places, self._places.get(segment)
        named: list[tuple[bool, int, bool, int]] = []
        for number, num_bytes in self._requests[segment]:
            is_new = number > 0
            origin, order = self._born[abs(number)]
            there = None if self._labels[origin] == HEAD else places.get(origin)
            if is_new and self._labels[segment] == self._between:
                continue
            if there is None or here is None:
                named.append((is_new, -abs(number), False, rounded(num_bytes)))
            else:
                phase = self._labels[origin].startswith(_BACKWARD)
                name = (there - here) * self._unit + phase * len(self._born) + order
                named.append((is_new, name, True, rounded(num_bytes)))
        return named

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        """Number of each segment of a block to its place in the simulated chain; the head stands behind all."""
        kept = {block: place for place, block in enumerate(self._chain.kept)}
        found: dict[int, int] = {}
        for segment, label in enumerate(self._labels):
            phase, _, block = label.partition(" ")
            if phase in (_FORWARD, _BACKWARD) and block.isdecimal():
                found[segment] = kept[int(block)]
            elif label == HEAD:
                found[segment] = len(kept)
        return found
