"""Measured peak of a real step, in the same bytes the plan predicts.

On a GPU the allocator counts. On a CPU torch has no such counters, so the profiler's allocation events are summed on
top of what is known to be live when the step begins. That costs time: a profiled step must not be timed.
"""

import gc
import resource
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from rematree.engines import local_part, parts_of
from rematree.pricing.on_cuda import requested_bytes, requested_peak_bytes
from rematree.quantised import hidden_tensors
from rematree.units import KIB


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`; views and tied weights count once, shards as what is here."""
    parts = [local_part(t) for t in tensors]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in parts}.values())


def resident_peak_bytes() -> int:
    """Largest resident size of this process so far (VmHWM): weights, allocator slack, libraries, everything."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


class PeakMeter:
    """Context manager around one training step.

    Args:
        model: The model that steps.
        optimizer: Its optimizer, for the state; None when the step has none. Of ZeRO-3 its own, which has the parts.
        batch: Counted with what is live when the step begins.
        hidden: There is memory that no tensor shows (DDP's buckets), which the caller has measured and adds: on a CPU
            the end of whatever any meter saw begin counts.
    Attributes:
        peak_bytes: After the block: largest bytes live at once. On a CPU what torch allocated for model, optimizer
            and step; on a GPU what everything in this process asked its allocator for. `max_memory_allocated` is
            more: a free block of which at most 1 MiB would be left is given whole.
        start_bytes: Live when the step began.
        end_bytes: Live when it was over.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        batch: Mapping[str, Any] | None = None,
        *,
        hidden: bool = False,
    ) -> None:
        self._measured: tuple[nn.Module, torch.optim.Optimizer | None, Mapping[str, Any] | None] | None
        self._measured = model, optimizer, batch
        self._profiler: profile | None = None
        self._known: set[int] | None = None
        self._hidden = hidden
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.start_bytes = 0
        self.peak_bytes = 0
        self.end_bytes = 0

    def _live(self) -> Iterator[torch.Tensor]:
        assert self._measured is not None
        model, optimizer, batch = self._measured
        for parameter in model.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from model.buffers()
        yield from hidden_tensors(model)
        if optimizer is not None:
            yield from parts_of(optimizer)
            for group in optimizer.param_groups:  # the model's, or master weights that an engine makes of them
                yield from group["params"]
            for state in optimizer.state.values():
                yield from (t for t in state.values() if isinstance(t, torch.Tensor))
        yield from (t for t in tree_leaves(batch) if isinstance(t, torch.Tensor))

    def __enter__(self) -> Self:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.start_bytes = requested_bytes(self._device)
        else:
            live = list(self._live())
            self.start_bytes = storage_bytes(live)
            if not self._hidden:
                self._known = {local_part(tensor).untyped_storage().data_ptr() for tensor in live}
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._measured = None  # a meter that is kept keeps no model
        if self._profiler is None:
            torch.cuda.synchronize(self._device)
            self.peak_bytes = requested_peak_bytes(self._device)
            self.end_bytes = requested_bytes(self._device)
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(kind, error, trace)
        live = peak = self.start_bytes
        for change in allocation_changes(profiler, self._known):
            live += change
            peak = max(peak, live)
        self.peak_bytes, self.end_bytes = peak, live


def allocation_changes(profiler: Any, known: Collection[int] | None = None) -> list[int]:
    """Signed bytes of CPU allocations and frees, in order of time.

    Args:
        profiler: Of torch, at its end.
        known: Addresses of what is counted as live at the beginning. The end of anything else from before is left out:
            the profiler also reports what an earlier profile saw begin, as what a cache has held since then. None:
            nothing is left out.
    """
    found: list[tuple[int, int, int]] = []
    rest = list(profiler.profiler.kineto_results.experimental_event_tree())
    while rest:
        event = rest.pop()
        rest += event.children
        fields = event.extra_fields
        if event.tag == _EventType.Allocation and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.alloc_size, fields.ptr))
    counted = None if known is None else set(known)
    changes: list[int] = []
    for _, size, address in sorted(found, key=lambda event: event[0]):
        if counted is not None:
            if size > 0:
                counted.add(address)
            elif address in counted:
                counted.remove(address)
            else:
                continue
        changes.append(size)
    return changes
