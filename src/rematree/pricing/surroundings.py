"""What an op costs more inside a step than alone: operands that left the caches, and the calls that lead to it.

Both rates are measured on this CPU, in a fraction of a second. Caches are modelled as one, which forgets what was
touched longest ago; whether an operand is still in it follows from how many bytes the step has touched since.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import nn

from rematree.units import MIB

_PROBE: Final = MIB  # bytes of each of the three operands
_USUAL_CACHE: Final = 32 * MIB
_LARGEST_CACHE: Final = 64 * MIB
_RUNS: Final = 6
_LAYERS: Final = 12
_MADE_PER_LAYER: Final = 11  # as a dispatch mode counts those that return no view
# transformers' layers run more Python for each op than the small module of the probe; see LOG.md.
_PYTHON_OF_A_MODEL: Final = 2.5


def cache_bytes() -> int:
    """Size of the last cache before memory, as the system tells it."""
    name = "SC_LEVEL3_CACHE_SIZE"
    known = os.sysconf(name) if name in getattr(os, "sysconf_names", {}) else 0
    return min(known, _LARGEST_CACHE) if known > 0 else _USUAL_CACHE


def measure_cold_rate() -> float:
    """Seconds a byte that come on top when an op's operands are in memory instead of a cache."""
    with torch.no_grad():
        ring = torch.ones(2 * cache_bytes() // torch.float32.itemsize)
        parts = ring.split(3 * _PROBE // ring.itemsize)
        triples = [part.chunk(3) for part in parts if part.nbytes == 3 * _PROBE]
        a, b, out = triples[0]
        warm = _fastest(lambda: torch.mul(a, b, out=out), _RUNS)
        passes = [
            [_seconds(functools.partial(torch.mul, t[0], t[1], out=t[2])) for t in triples] for _ in range(_RUNS // 2)
        ]
    cold = statistics.median(min(times) for times in zip(*passes, strict=True))
    return max(0.0, cold - warm) / (3 * _PROBE)


class Recency:
    """Says of every op how many bytes it finds in no cache, and what they cost.

    Args:
        rate: Seconds a byte, as `measure_cold_rate` returns it.
        capacity: Bytes that a cache holds; default: this machine's.
    """

    def __init__(self, rate: float, capacity: int | None = None) -> None:
        self._rate = rate
        self._capacity = cache_bytes() if capacity is None else capacity
        self._traffic = 0
        self._touched: dict[int, int] = {}

    def touch(self, inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> float:
        """Seconds on top for an op that reads `inputs` and writes `outputs`; call it in the order of the step.

        What an op writes anew is cold: the allocator hands out what was freed long ago, or never used.
        """
        cold = total = 0
        here: set[int] = set()
        for known, tensors in ((True, inputs), (False, outputs)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key in here:
                    continue
                here.add(key)
                size = min(tensor.numel() * tensor.element_size(), storage.nbytes())
                last = self._touched.get(key) if known else None
                total += size
                if last is None or self._traffic - last > self._capacity:
                    cold += size
        self._traffic += total
        for key in here:
            self._touched[key] = self._traffic
        return cold * self._rate * self._share(total)

    def _share(self, total: int) -> float:
        """How much of `total` bytes the op found in a cache when it ran alone: all, down to nothing at its capacity."""
        return min(1.0, max(0.0, 1.5 * (1 - total / self._capacity)))


class _Residual(nn.Module):
    """A layer of as many views and small ops as those of a real model have around a matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.linear(x).view(1, 8, 8).transpose(1, 2).contiguous()


def measure_overhead() -> float:
    """Seconds an op of a model's training step takes on top of the op itself: Python, views, autograd."""
    x = torch.ones(1, 8, 8)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        model = nn.Sequential(*(_Residual() for _ in range(_LAYERS)))

        def step() -> None:
            model.zero_grad(set_to_none=True)
            model(x).sum().backward()

        each = _fastest(step, _RUNS) / (_LAYERS * _MADE_PER_LAYER)
    with torch.no_grad():
        alone = _fastest(lambda: torch.mul(x, x), 2 * _RUNS)
    return _PYTHON_OF_A_MODEL * max(0.0, each - alone)


def _fastest(run: Callable[[], object], times: int) -> float:
    return min(_seconds(run) for _ in range(times))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
