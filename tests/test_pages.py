"""Fresh pages: exact where it is a model; where it is a measurement, what the system counts."""

import mmap
import platform

import pytest
import torch

from rematree.pricing import cost, pages
from rematree.pricing.cost import Measured, Roofline
from rematree.pricing.pages import Pages, measure_pages, page_faults
from rematree.units import KIB, MIB

ADD_ = torch.ops.aten.add_.Tensor
CLONE = torch.ops.aten.clone.default
GLIBC = platform.libc_ver()[0] == "glibc"


def test_only_what_is_above_the_threshold_is_mapped_anew() -> None:
    known = Pages(2.0, 4 * KIB, threshold=MIB)
    assert known.fresh_bytes([MIB - 1, MIB, 3 * MIB]) == 4 * MIB
    assert known.missing_seconds([MIB - 1], faults=0) == 0


def test_faults_that_an_op_met_alone_are_in_its_time_already() -> None:
    known = Pages(2.0, 4 * KIB, threshold=MIB)
    assert known.missing_seconds([MIB], faults=0) == 2.0 * MIB
    assert known.missing_seconds([MIB], faults=56) == 2.0 * (MIB - 56 * 4 * KIB)
    assert known.missing_seconds([MIB], faults=256) == known.missing_seconds([MIB], faults=1000) == 0


@pytest.mark.skipif(not GLIBC, reason="another allocator")
def test_the_system_counts_a_fault_for_each_page_that_is_touched_first() -> None:
    found = measure_pages()
    assert found is not None
    assert found.seconds_per_byte >= 0
    assert found.bytes_per_fault >= 4 * KIB
    before = page_faults()
    with mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        mapped.write(bytes(4 * MIB))
    assert page_faults() > before


def test_the_threshold_is_the_one_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert pages._threshold() == 32 * MIB
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    assert pages._threshold() == 256 * KIB


@pytest.mark.parametrize(("libc", "preload"), [("", ""), ("glibc", "/usr/lib/libjemalloc.so.2")])
def test_nothing_is_known_of_another_allocator(libc: str, preload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setenv("LD_PRELOAD", preload)
    assert measure_pages() is None


def priced(func: object, *args: torch.Tensor, monkeypatch: pytest.MonkeyPatch, threshold: int, faults: int = 0) -> int:
    """Bytes of fresh pages in the price of an op that met `faults` when it ran alone, in each of its runs."""
    taken = iter(range(0, 10**9, faults) if faults else [0] * 100)
    monkeypatch.setattr(cost, "page_faults", lambda: next(taken))
    made = Measured(torch.device("cpu"), fallback=Roofline(1e12, 1e11))
    made._recency, made._overhead_seconds = None, 0.0
    made._pages = Pages(1.0, 4 * KIB, threshold)
    seconds = made.price(func, args, {}, [torch.empty_like(args[0])]).seconds
    assert seconds % 1 < 0.9  # of the op itself
    return int(seconds)


def test_an_op_is_priced_with_the_pages_of_its_output_and_of_what_it_allocates_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total, grad = torch.ones(64 * KIB), torch.ones(64 * KIB, dtype=torch.bfloat16)
    assert priced(CLONE, total, monkeypatch=monkeypatch, threshold=256 * KIB) == 256 * KIB
    # The fp32 copy of the 16-bit operand, as a chunk of the loss adds its gradient of the head.
    assert priced(ADD_, total, grad, monkeypatch=monkeypatch, threshold=256 * KIB) == 256 * KIB
    assert priced(ADD_, total, total, monkeypatch=monkeypatch, threshold=256 * KIB) == 0
    assert priced(CLONE, total, monkeypatch=monkeypatch, threshold=256 * KIB + 1) == 0
    assert priced(CLONE, total, monkeypatch=monkeypatch, threshold=256 * KIB, faults=60) == 16 * KIB


def test_an_op_too_large_to_run_is_priced_with_pages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_LARGEST_CPU_PROBE", 0)
    x = torch.ones(64 * KIB)
    assert priced(CLONE, x, monkeypatch=monkeypatch, threshold=256 * KIB) == 256 * KIB
    assert priced(ADD_, x, x, monkeypatch=monkeypatch, threshold=256 * KIB) == 0


def test_nothing_is_added_on_another_device() -> None:
    made = Measured(torch.device("meta"), fallback=Roofline(1e12, 1e11))
    assert made._pages is None
