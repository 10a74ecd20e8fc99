"""How a CUDA device is asked, as far as that can be told without one; what it answers: test_gpu.py."""

from typing import Any

import pytest
import torch

from rematree.pricing import on_cuda
from rematree.units import GIB, MIB

DEVICE = torch.device("cuda", 0)


class Stream:
    """A device that runs what it is handed later; time stands still but for launches and for waiting."""

    def __init__(self, launch: float, kernel: float) -> None:
        self.launch, self.kernel = launch, kernel
        self.now = self.done = 0.0
        self.runs = 0

    def run(self) -> None:
        self.runs += 1
        self.now += self.launch
        self.done = max(self.done, self.now) + self.kernel

    def synchronize(self, device: Any = None) -> None:
        self.now = max(self.now, self.done) + 1e-5  # what it takes to wait


@pytest.mark.parametrize(
    ("launch", "kernel", "expected"),
    [(5e-6, 2e-6, 5e-6), (5e-6, 2e-4, 2e-4), (5e-6, 0.02, 0.02)],
    ids=["launch", "kernel", "long"],
)
def test_an_op_takes_its_kernel_or_its_launch_and_no_wait(
    launch: float, kernel: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(launch, kernel)
    monkeypatch.setattr(torch.cuda, "synchronize", stream.synchronize)
    monkeypatch.setattr(on_cuda.time, "perf_counter", lambda: stream.now)
    assert on_cuda.seconds_of(stream.run, DEVICE) == pytest.approx(expected, rel=0.02)
    assert stream.runs <= 2 + 3 * 400
    assert kernel < 0.004 or stream.runs == 5


def test_requests_are_counted_where_the_allocator_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = {
        "requested_bytes.all.current": 1000,
        "requested_bytes.all.peak": 3000,
        "allocated_bytes.all.current": 1024,
        "allocated_bytes.all.peak": 4096,
    }
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: counters)
    assert (on_cuda.requested_bytes(DEVICE), on_cuda.requested_peak_bytes(DEVICE)) == (1000, 3000)
    del counters["requested_bytes.all.current"]
    counters["requested_bytes.all.peak"] = 0
    assert (on_cuda.requested_bytes(DEVICE), on_cuda.requested_peak_bytes(DEVICE)) == (1024, 4096)


def test_what_an_op_allocates_is_counted_in_its_second_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first one cuBLAS allocates the workspace that it keeps."""
    live = {"now": 7 * MIB, "peak": 0}
    ran: list[int] = []

    def op(*_: Any, **__: Any) -> None:
        kept = 0 if ran else 32 * MIB
        ran.append(kept)
        live["now"] += kept
        live["peak"] = max(live["peak"], live["now"] + 3 * MIB)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: live.update(peak=live["now"]))
    monkeypatch.setattr(on_cuda, "requested_bytes", lambda device: live["now"])
    monkeypatch.setattr(on_cuda, "requested_peak_bytes", lambda device: live["peak"])
    assert on_cuda.workspace_of(op, (), {}, DEVICE) == 3 * MIB


@pytest.mark.parametrize(
    ("free", "share", "expected"),
    [(10, 1.0, 7), (60, 1.0, 8), (60, 0.1, 3), (0, 1.0, 2), (60, 0.01, 0)],
    ids=["half", "no more than 8", "of what the process may take", "blocks held back", "nothing"],
)
def test_a_probe_takes_half_of_what_is_free(
    free: int, share: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    assert on_cuda.probe_bytes(DEVICE) == expected * GIB
