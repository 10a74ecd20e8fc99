"""Seconds and hidden bytes of an op, measured on the device that is here.

A step of a transformer is made of a few hundred different ops, repeated in every block, so each is measured once,
alone, on tensors of the same layout.
"""

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch.autograd.profiler import ProfilerConfig, ProfilerState
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from rematree.pricing import on_cuda
from rematree.pricing.contents import with_values
from rematree.pricing.pages import Pages, measure_pages, page_faults
from rematree.pricing.price import Cost, Free, OpPrice, num_bytes, price_key, tensors_in
from rematree.pricing.roofline import Roofline
from rematree.pricing.surroundings import Recency, measure_cold_rate, measure_overhead
from rematree.units import MIB

__all__ = ["Cost", "Free", "Measured", "OpPrice", "Roofline", "present_device", "tensors_in"]

_MAX_REPETITIONS: Final = 5
_ENOUGH_SECONDS: Final = 0.05
_LARGEST_CPU_PROBE: Final = 1024 * MIB


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a real tensor needs to be like for an op to take the same time on it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Measured:
    """Runs each distinct op alone on `device` and remembers the fastest of its runs.

    Alone, an op finds its operands in the caches and nothing around it. On a CPU three things are added that it has in
    a step: reading from memory what was last touched long ago, the fresh pages of what it allocates
    (`rematree.pricing.pages`), and the calls from Python and autograd that lead to it. Their rates are measured once.

    Args:
        device: Where the step will run.
        fallback: Prices ops too large to probe and ops that cannot run alone. Default: a roofline fitted to a matmul
            and a copy on the device.
    Cost:
        At most five runs of each distinct op (50 ms of them), on CUDA some 15 ms or seven runs of it, once in the life
        of this object. On CUDA the allocator's counter of the peak begins anew.
    Not covered:
        Ops whose time depends on values (routing is priced as balanced); pages of tensors below 32 MiB that the heap
        gave back and maps again.
    """

    def __init__(self, device: torch.device, fallback: Cost | None = None) -> None:
        self._device = device
        self._prices: dict[Any, OpPrice] = {}
        self._stated = fallback
        self._recency: Recency | None = None
        self._pages: Pages | None = None
        self._overhead_seconds = 0.0
        if device.type == "cpu":
            with _disable_current_modes():
                self._recency = Recency(measure_cold_rate())
                self._overhead_seconds = measure_overhead()
                self._pages = measure_pages()

    @functools.cached_property
    def _fallback(self) -> Cost:
        """Fitted when it is first asked: on a GPU it takes memory, and most models need none."""
        return self._stated or _fitted_roofline(self._device)

    def __len__(self) -> int:
        return len(self._prices)

    def price(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        """Measured price, from the table if this op was seen before, in the surroundings it has here."""
        alone = self._alone(func, args, kwargs, outputs)
        seconds = alone.seconds + self._overhead_seconds
        if self._recency is not None:
            seconds += self._recency.touch(tensors_in(args, kwargs), outputs)
        return OpPrice(seconds, alone.workspace_bytes)

    def _alone(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        key = price_key(func, args, kwargs)
        price = self._prices.get(key)
        if price is None:
            layouts = tree_map_only(torch.Tensor, _layout, (args, kwargs))
            if num_bytes(tensors_in(args, kwargs)) + 2 * num_bytes(outputs) > probe_bytes(self._device):
                price = self._by_fallback(func, args, kwargs, outputs)
            else:
                with _disable_current_modes(), torch.no_grad():
                    try:
                        price = self._measure(func, *layouts)
                    except (RuntimeError, IndexError, TypeError, NotImplementedError):
                        price = None  # cannot run on made-up values
                if price is None:
                    price = self._by_fallback(func, args, kwargs, outputs)
            self._prices[key] = price
        return price

    def _by_fallback(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        price = self._fallback.price(func, args, kwargs, outputs)
        if self._pages is None or func._schema.is_mutable:
            return price
        pages = self._pages.missing_seconds((num_bytes([each]) for each in outputs), 0)
        return OpPrice(price.seconds + pages, price.workspace_bytes)

    def _measure(self, func: Any, args: Any, kwargs: Any) -> OpPrice:
        cuda = self._device.type == "cuda"
        with torch.random.fork_rng(devices=[self._device] if cuda else []):
            args, kwargs = tree_map_only(_Layout, self._materialise, (args, kwargs))
            args = with_values(func, args)
            if cuda:
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": self._device}
                workspace = on_cuda.workspace_of(func, args, kwargs, self._device)
                return OpPrice(on_cuda.seconds_of(lambda: func(*args, **kwargs), self._device), workspace)
            requests: list[int] = []
            workspace = _cpu_workspace(func, args, kwargs, requests)
            times: list[float] = []
            while len(times) < _MAX_REPETITIONS and (len(times) < 2 or sum(times) < _ENOUGH_SECONDS):
                faults, start = page_faults(), time.perf_counter()
                func(*args, **kwargs)
                times.append(time.perf_counter() - start)
                if self._pages is not None:
                    times[-1] += self._pages.missing_seconds(requests, page_faults() - faults)
        return OpPrice(min(times), workspace)  # whatever else the machine does can only add

    def _materialise(self, layout: _Layout) -> torch.Tensor:
        tensor = unexpanded(layout.shape, layout.stride, layout.dtype, self._device)
        if layout.dtype.is_floating_point:
            tensor.uniform_(0.1, 0.9)
        else:
            tensor.fill_(layout.dtype is torch.bool)  # a mask of False would hide everything
        return tensor.expand(layout.shape)


def unexpanded(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor of which `expand(shape)` is laid out by `stride`.

    A dimension of stride 0 is one element seen many times. The others keep their strides: attention takes 300 times as
    long for a mask that is not laid out row by row.
    """
    own = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
    return torch.empty_strided(own, list(stride), dtype=dtype, device=device)


def _layout(tensor: torch.Tensor) -> _Layout:
    return _Layout(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _cpu_workspace(func: Any, args: Any, kwargs: Any, requests: list[int]) -> int:
    """Largest sum of live bytes the op allocated; the size of each allocation is added to `requests`.

    From the allocation events of the thread-local profiler: thirty times cheaper to start than the kineto one, which
    matters for hundreds of small probes; CPU kernels allocate in the calling thread.
    """
    nothing: Any = getattr(torch._C, "_profiler")._ExperimentalConfig()  # noqa: B009 (absent from the stubs)
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, nothing)  # only profile_memory
    _enable_profiler_legacy(config)
    try:
        out = func(*args, **kwargs)
    finally:
        threads = _disable_profiler_legacy()
    live = peak = 0
    events: list[Any] = [event for thread in threads for event in thread]
    for event in events:
        if event.kind() == "memory_alloc":
            size = event.cpu_memory_usage()  # negative where memory is freed
            if size > 0:
                requests.append(size)
            live += size
            peak = max(peak, live)
    del out
    return peak


def probe_bytes(device: torch.device) -> int:
    """How much may be taken to find out what something costs: the price must not be what runs out of memory."""
    return on_cuda.probe_bytes(device) if device.type == "cuda" else _LARGEST_CPU_PROBE


def _fitted_roofline(device: torch.device) -> Roofline:
    """A roofline through one matmul and one copy, measured here; efficiency is in the numbers already."""
    side, copies = 512, 3
    with _disable_current_modes(), torch.no_grad():
        if device.type == "cuda":
            return on_cuda.fitted_roofline(device)
        a, big = torch.ones(side, side, device=device), torch.ones(4 * 1024 * 1024, device=device)

        def best(run: Any) -> float:
            times: list[float] = []
            for _ in range(copies):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            return min(times)

        matmul, copy = best(lambda: a @ a), best(lambda: big.clone())
    return Roofline(2 * side**3 / matmul, 2 * num_bytes([big]) / copy, efficiency=1.0)


def present_device(tensors: Iterable[torch.Tensor]) -> torch.device:
    """Device of the first tensor that is not on `meta`; the CPU without any."""
    return next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
