"""Which storages are live, by category, from mark to mark of a step: the ledger's books.

Nothing here looks at ops. Whoever sees them (`rematree.memory.ledger`, and the engines of the referee) says which
tensors there are; a storage leaves by itself when its last tensor goes.
"""

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rematree.memory.accounts import ROUNDING, WORKSPACE
from rematree.memory.allocator import Recorder, rounded
from rematree.trace import Segment

_MOVED: Final = -1  # in the place of a storage's number: events that are not told again


@dataclass(slots=True)
class Entry:
    """One live storage.

    Attributes:
        uid: A number that no other storage of the step has.
        num_bytes: Its size, 0 if it is on another device.
        category: What it counts as.
        padding: Bytes that a GPU's allocator adds.
        number: What that allocator knows it by.
        reference: Gives the storage, or None when it is gone.
    """

    uid: int
    num_bytes: int
    category: str
    padding: int
    number: int
    reference: Callable[[], torch.UntypedStorage | None]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that the books were told.

    Attributes:
        born: Number of a storage that is new, 0 if none is.
        gone: Number of a storage that is gone, 0 if none is.
        num_bytes: Of the new storage, or a workspace.
        category: Of the new storage, or the line of the workspace.
        seconds: Of what has run.
    """

    born: int = 0
    gone: int = 0
    num_bytes: int = 0
    category: str = ""
    seconds: float = 0.0


def leaves_only(events: Sequence[Event], left: int) -> bool:
    """Whether of all storages that `events` are about the one numbered `left` is there afterwards, and no other."""
    there: set[int] = set()
    for event in events:
        if event.born:
            there.add(event.born)
        elif event.gone:
            if event.gone not in there:
                return False
            there.remove(event.gone)
    return there == {left}


def _nowhere() -> None:
    """The reference of a storage that no tensor has."""


class Storages:
    """Live bytes by category, their peak, and the segments between marks.

    Args:
        device_type: Only storages on such a device count ("cpu", "cuda"); others weigh nothing.
        caches: Sizes are rounded and segments counted as a GPU's allocator does.
    Attributes:
        allocator: Is told what is counted, if it caches.
        category: What a storage counts as that is seen for the first time.
        label: The latest mark.
        segments: Those that have ended.
    """

    def __init__(self, device_type: str, caches: bool) -> None:
        super().__init__()
        self.allocator = Recorder() if caches else None
        self._device_type = device_type
        self._entries: dict[int, Entry] = {}
        self._next_uid = 0
        self.label = "start"
        self._segment_live, self._segment_peak, self._segment_seconds = 0, 0, 0.0
        self._segment_start: dict[str, int] = {}
        self._segment_at_peak: dict[str, int] = {}
        self._segment_turn: dict[str, int] = {}
        self.segments: list[Segment] = []
        self.category = "other"
        self.live_bytes = 0
        self.peak_bytes = 0
        self.by_category: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.seconds = 0.0
        self._noted: list[Event] | None = None  # everything told, while it is written down

    # -- storages ---------------------------------------------------------------------------------------------------

    def adopt(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count tensors that no op has made here: what exists before the step (weights, state), what engines make."""
        with torch._C.DisableTorchFunction():  # a function mode is for code above, and would see every look at a tensor
            for tensor in tensors:
                self._entry(tensor, category)
        self.ran(0.0, 0)

    def move(self, tensor: torch.Tensor, category: str) -> None:
        """Change the category of a live tensor's storage (a gradient is known as one only once it is accumulated)."""
        entry = self._entry(tensor, category)
        if self._noted is not None:
            self._noted.append(Event(gone=_MOVED))
        if entry.category != category:
            self.by_category[entry.category] -= entry.num_bytes
            self.by_category[category] = self.by_category.get(category, 0) + entry.num_bytes
            entry.category = category

    def size(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(uid, bytes) of the storage of `tensor`; two tensors with one uid share memory."""
        entry = self._entry(tensor, self.category)
        return entry.uid, entry.num_bytes

    def ran(self, seconds: float, workspace_bytes: int, line: str = WORKSPACE) -> None:
        """Count what ran without an op to show for it: its time, and its most bytes beyond what is live now."""
        if self._noted is not None:
            self._noted.append(Event(num_bytes=workspace_bytes, category=line, seconds=seconds))
        self.seconds += seconds
        self._segment_seconds += seconds
        self._raise_peak(workspace_bytes, line)

    @contextlib.contextmanager
    def noting(self) -> Generator[list[Event]]:
        """Everything that is told inside, in order; storages are numbered from there on."""
        first, self._noted = self._next_uid, []
        noted = list[Event]()
        try:
            yield noted
        finally:
            told, self._noted = self._noted, None
            noted += [
                replace(e, born=e.born and e.born - first, gone=e.gone and e.gone - first) if e.born or e.gone else e
                for e in told
            ]

    def tell_again(self, events: Iterable[Event], left: int, result: torch.Tensor) -> None:
        """Count what `noting` gave once more; the new storage number `left` is that of `result`."""
        there: dict[int, Entry] = {}
        for event in events:
            if event.born == left:
                self._entry(result, event.category)
            elif event.born:
                there[event.born] = self._born(event.num_bytes, event.category)
            elif event.gone:
                self._left(there.pop(event.gone))
            else:
                self.ran(event.seconds, event.num_bytes, event.category)

    def known(self) -> list[int]:
        """Uids of all live storages."""
        return [entry.uid for entry in self._entries.values()]

    def _entry(self, tensor: torch.Tensor, category: str) -> Entry:
        storage = tensor.untyped_storage()
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is not None and entry.reference() is not None:
            return entry
        device: torch.device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        num_bytes = storage.nbytes() if device.type == self._device_type else 0
        entry = self._entries[key] = self._born(num_bytes, category)
        entry.reference = weakref.ref(storage, lambda _: self._free(key))
        return entry

    def _born(self, num_bytes: int, category: str) -> Entry:
        """Count a new storage."""
        self._next_uid += 1
        if self._noted is not None:
            self._noted.append(Event(born=self._next_uid, num_bytes=num_bytes, category=category))
        padding = number = 0
        if self.allocator is not None:
            padding, number = rounded(num_bytes) - num_bytes, self.allocator.allocate(num_bytes)
        self.live_bytes += num_bytes + padding
        self.by_category[category] = self.by_category.get(category, 0) + num_bytes
        if padding:
            self.by_category[ROUNDING] = self.by_category.get(ROUNDING, 0) + padding
        return Entry(self._next_uid, num_bytes, category, padding, number, _nowhere)

    def _free(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._left(entry)

    def _left(self, entry: Entry) -> None:
        """Count a storage no more."""
        if self._noted is not None:
            self._noted.append(Event(gone=entry.uid))
        self.live_bytes -= entry.num_bytes + entry.padding
        self.by_category[entry.category] -= entry.num_bytes
        if self.allocator is not None:
            self.allocator.release(entry.number)
            if entry.padding:
                self.by_category[ROUNDING] -= entry.padding
        self._gone(entry)

    def _gone(self, entry: Entry) -> None:
        """The storage of `entry` has been freed."""

    def _raise_peak(self, workspace: int, line: str = WORKSPACE) -> None:
        padding = 0
        if workspace and self.allocator is not None:
            padding = rounded(workspace) - workspace
            self.allocator.release(self.allocator.allocate(workspace))
        here = self.live_bytes + workspace + padding
        if here > self._segment_peak:
            self._segment_peak = here
            self._segment_at_peak = {**self.by_category}
            for name, more in ((line, workspace), (ROUNDING, padding)):
                self._segment_at_peak[name] = self._segment_at_peak.get(name, 0) + more
            if here > self.peak_bytes:
                self.peak_bytes, self.at_peak = here, self._segment_at_peak

    # -- time line --------------------------------------------------------------------------------------------------

    def mark(self, label: str) -> None:
        """End the current segment and begin one called `label`."""
        self.segments.append(
            Segment(
                self.label,
                self._segment_live,
                self._segment_peak,
                self._segment_seconds,
                self._segment_start,
                self._segment_at_peak,
                self._segment_turn,
            )
        )
        if self.allocator is not None:
            self.allocator.mark()
        self.label, self._segment_live, self._segment_peak = label, self.live_bytes, self.live_bytes
        self._segment_start = self._segment_at_peak = dict(self.by_category)
        self._segment_seconds, self._segment_turn = 0.0, {}

    def turn(self) -> None:
        """The forward pass is over, the backward pass begins."""
        self._segment_turn = dict(self.by_category)

    def since_mark(self) -> tuple[dict[str, int], int]:
        """What is live now and was not at the latest mark, by category; and the most bytes since then beyond that."""
        change = {name: size - self._segment_start.get(name, 0) for name, size in self.by_category.items()}
        return change, self._segment_peak - self._segment_live
