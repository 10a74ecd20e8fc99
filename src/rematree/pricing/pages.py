"""Fresh pages: memory that the C library asks the system for anew every time, and gives back when it is freed.

glibc keeps what is freed for the next request of that size, but for requests above a threshold, which it never raises
beyond 32 MiB: those are mapped and unmapped each time, and every page of them is found missing when it is first
written. An op that runs alone over and over may be spared this, by a hole in the heap that happens to be large enough.
"""

import mmap
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from rematree.units import MIB

_HIGHEST_THRESHOLD: Final = 32 * MIB  # DEFAULT_MMAP_THRESHOLD_MAX of glibc's malloc on 64 bits
_PROBE: Final = 48 * MIB
_RUNS: Final = 5


@dataclass(frozen=True, slots=True)
class Pages:
    """What fresh pages cost on this machine.

    Attributes:
        seconds_per_byte: To map, to touch first, and to unmap.
        bytes_per_fault: Size of a page, or of a huge one.
        threshold: Requests of at least so many bytes are mapped anew.
    """

    seconds_per_byte: float
    bytes_per_fault: int
    threshold: int = _HIGHEST_THRESHOLD

    def fresh_bytes(self, requests: Iterable[int]) -> int:
        """Bytes of `requests`, the sizes of allocations, that are mapped anew."""
        return sum(size for size in requests if size >= self.threshold)

    def missing_seconds(self, requests: Iterable[int], faults: int) -> float:
        """Seconds that an op takes longer where all large `requests` are mapped anew than when it met `faults`."""
        return max(0, self.fresh_bytes(requests) - faults * self.bytes_per_fault) * self.seconds_per_byte


def page_faults() -> int:
    """How many pages of this process were found missing so far, and did not have to be read from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure_pages() -> Pages | None:
    """What fresh pages cost here; None where memory does not come from glibc.

    Cost:
        About a fifth of a second.
    """
    if platform.libc_ver()[0] != "glibc" or "malloc" in os.environ.get("LD_PRELOAD", ""):
        return None
    seconds: list[float] = []
    faults: list[int] = []
    for _ in range(_RUNS):
        before, start = page_faults(), time.perf_counter()
        mapped = mmap.mmap(-1, _PROBE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = torch.frombuffer(mapped, dtype=torch.uint8)
        block.zero_()
        middle = time.perf_counter()
        block.zero_()
        again = time.perf_counter()
        del block
        mapped.close()
        seconds.append((time.perf_counter() - again) + (middle - start) - (again - middle))
        faults.append(page_faults() - before)
    return Pages(
        # Whatever else the machine does can only add: the same page has cost 1.6 and 3.8 microseconds within a minute.
        max(0.0, min(seconds)) / _PROBE,
        _PROBE // max(1, statistics.median_low(faults)),
        _threshold(),
    )


def _threshold() -> int:
    told = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return int(told) if told.isdecimal() else _HIGHEST_THRESHOLD
