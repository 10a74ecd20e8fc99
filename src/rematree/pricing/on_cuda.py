"""Single ops on a CUDA device that is here: their time, their hidden bytes, and how much memory a probe may take.

A step hands its kernels to the device ahead of time, so an op costs what its kernel runs, or what it takes to launch it
where that is longer. Waiting for the device after each op would add some ten microseconds that no step has.
"""

import time
from collections.abc import Callable
from typing import Any, Final

import torch

from rematree.pricing.roofline import Rates, Roofline
from rematree.units import GIB, MIB

_ENOUGH_SECONDS: Final = 0.004  # of one launch after another, for the wait at the end to be less than a hundredth
_MOST_LAUNCHES: Final = 400
_REPETITIONS: Final = 3
_MOST_PROBED: Final = 8 * GIB  # other processes may want the rest
_SIDE: Final = 4096
_COPIED: Final = 256 * MIB
_RATES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one `run`, launched again and again; the fastest of three series.

    Cost:
        Some 15 ms, or five runs of what takes longer than 4.
    """
    _series(run, 1, device)  # loads the kernel
    once = _series(run, 1, device)
    count = max(1, min(_MOST_LAUNCHES, int(_ENOUGH_SECONDS / once)))
    return min(_series(run, count, device) for _ in range(_REPETITIONS))


def _series(run: Callable[[], Any], count: int, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


def workspace_of(func: Any, args: Any, kwargs: Any, device: torch.device) -> int:
    """Most bytes live at once inside `func(*args, **kwargs)` that it allocated, outputs included.

    From the allocator's counter of the peak, which begins anew. The first run is not counted: in it libraries allocate
    what they keep.
    """
    func(*args, **kwargs)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = requested_bytes(device)
    func(*args, **kwargs)
    return requested_peak_bytes(device) - before


def requested_bytes(device: torch.device) -> int:
    """Live on `device`, as it was asked for: what it takes up depends on the free blocks that the allocator finds."""
    return _counted("requested_bytes.all.current", "allocated_bytes.all.current", device)


def requested_peak_bytes(device: torch.device) -> int:
    """Most of it since the counters of the peak began."""
    return _counted("requested_bytes.all.peak", "allocated_bytes.all.peak", device)


def _counted(name: str, otherwise: str, device: torch.device) -> int:
    counters = torch.cuda.memory_stats(device)
    return counters.get(name) or counters.get(otherwise, 0)  # not every allocator counts requests


def probe_bytes(device: torch.device) -> int:
    """How much a probe may take: half of what is free to this process, as its gradients take as much again; 8 GiB."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    held = reserved - torch.cuda.memory_allocated(device)
    return max(0, min((min(free, allowed) + held) // 2, _MOST_PROBED))


def fitted_roofline(device: torch.device) -> Roofline:
    """A roofline through one matmul of each dtype and one copy, measured here; efficiency is in the numbers already."""
    rates: dict[str, float] = {}
    for name, dtype in _RATES.items():
        try:
            factor = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
            rates[name] = 2 * _SIDE**3 / seconds_of(lambda factor=factor: factor @ factor, device)
        except RuntimeError:  # no kernel for this dtype
            continue
    source = torch.ones(max(MIB, min(_COPIED, probe_bytes(device) // 2)), dtype=torch.uint8, device=device)
    bandwidth = 2 * source.numel() / seconds_of(source.clone, device)
    return Roofline.of(Rates(rates, bandwidth, launch_seconds=launch_seconds(device), overlaps=True))


def launch_seconds(device: torch.device) -> float:
    """Of an op too small for anything but its launch to count."""
    one = torch.ones(1, device=device)
    return seconds_of(lambda: one * one, device)
