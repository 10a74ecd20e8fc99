"""What is here: versions, device, memory, and what a budget may be."""

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rematree.pricing.devices import CONTEXT_BYTES
from rematree.units import KIB, MIB, format_bytes

_LIBRARIES: Final = ("rematree", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets")
# What a process needs besides the tensors that a budget counts: libraries, pages of the heap, the page cache of its
# data.
_RESERVE_BYTES: Final = 512 * MIB
_CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """The device that training would use.

    Attributes:
        device: "cuda" or "cpu".
        name: Of the GPU, or the CPU's architecture.
        threads: That torch computes with on the CPU.
        total_bytes: Memory of the device; on a CPU what this process may use.
        free_bytes: Of that, not in use now.
        bfloat16: Whether the device computes in it rather than emulates it.
        versions: Of Python and the libraries; "not installed" for those that are not.
    """

    device: str
    name: str
    threads: int
    total_bytes: int
    free_bytes: int
    bfloat16: bool
    versions: dict[str, str]

    @property
    def largest_budget_bytes(self) -> int:
        """What a budget may be now, in whole MiB.

        On a CPU the free memory less what a process needs beside it. On a GPU a budget holds all that, its context too,
        which this process has and has not free.
        """
        if self.device == "cuda":
            return min(self.total_bytes, self.free_bytes + CONTEXT_BYTES) // MIB * MIB
        return max(0, self.free_bytes - _RESERVE_BYTES) // MIB * MIB

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "largest_budget_bytes": self.largest_budget_bytes}

    def rows(self) -> list[tuple[str, str]]:
        """Name and value, for a table."""
        budget = self.largest_budget_bytes
        return [
            *self.versions.items(),
            ("device", f"{self.device}: {self.name}"),
            ("CPU threads", str(self.threads)),
            ("memory", f"{format_bytes(self.total_bytes)}, free {format_bytes(self.free_bytes)}"),
            ("bfloat16", "yes" if self.bfloat16 else "no: float32 is faster here"),
            ("largest budget now", f"{budget // MIB}MiB" if budget else "none: free some memory first"),
        ]


def describe_machine(*, bfloat16: bool) -> Machine:
    """Look around.

    Args:
        bfloat16: Whether the device computes in it.
    """
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        device, name = "cuda", torch.cuda.get_device_name()
    else:
        total, free = host_memory()
        device, name = "cpu", platform.machine()
    return Machine(device, name, torch.get_num_threads(), total, free, bfloat16, installed_versions())


def installed_versions() -> dict[str, str]:
    """Versions of Python and of what a run depends on or can use."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def host_memory(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """(total, free) bytes this process may use: the machine's, or less in a container that is limited."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = _available() or os.sysconf("SC_AVPHYS_PAGES") * page
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is not None and limit < total:
        total = limit
        free = min(free, max(0, limit - (used or 0)))
    return total, free


def _available() -> int:
    """What the kernel could give without swapping; the plain count of free pages leaves out the page cache."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * KIB for line in lines if line.startswith("MemAvailable:")), 0)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
