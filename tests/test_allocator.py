"""The caching allocator's rules, exact."""

from hypothesis import given
from hypothesis import strategies as st

from rematree.memory.allocator import CachingAllocator, rounded, segment_bytes
from rematree.units import KIB, MIB


def test_requests_are_rounded_to_512_bytes() -> None:
    assert [rounded(count) for count in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_segments_by_size_of_the_request() -> None:
    assert segment_bytes(512) == 2 * MIB
    assert segment_bytes(MIB) == 2 * MIB
    assert segment_bytes(MIB + 512) == 20 * MIB
    assert segment_bytes(10 * MIB - 512) == 20 * MIB
    assert segment_bytes(10 * MIB) == 10 * MIB
    assert segment_bytes(11 * MIB) == 12 * MIB


def test_small_requests_share_a_segment() -> None:
    heap = CachingAllocator()
    blocks = [heap.allocate(MIB // 2) for _ in range(4)]
    assert (heap.allocated_bytes, heap.held_bytes) == (2 * MIB, 2 * MIB)
    heap.allocate(1)
    assert (heap.allocated_bytes, heap.held_bytes) == (2 * MIB + 512, 4 * MIB)
    for block in blocks:
        heap.release(block)
    assert (heap.allocated_bytes, heap.held_bytes, heap.reserved_bytes) == (512, 2 * MIB, 4 * MIB)
    assert heap.peak_held_bytes == 4 * MIB


def test_a_large_block_is_split_only_when_more_than_a_mebibyte_is_left() -> None:
    heap = CachingAllocator()
    block = heap.allocate(12 * MIB)
    heap.release(block)
    heap.allocate(11 * MIB)  # the rest is exactly 1 MiB: handed out with it
    assert (heap.allocated_bytes, heap.reserved_bytes) == (12 * MIB, 12 * MIB)
    other = CachingAllocator()
    other.release(other.allocate(12 * MIB))
    other.allocate(11 * MIB - 512)
    assert other.allocated_bytes == 11 * MIB - 512


def test_the_smallest_free_block_that_fits_is_taken_and_neighbours_are_joined() -> None:
    heap = CachingAllocator()
    first, second, third, _ = (heap.allocate(4 * MIB) for _ in range(4))
    assert heap.reserved_bytes == 20 * MIB
    heap.release(first)
    heap.release(third)
    heap.release(second)  # 12 MiB in a row now
    heap.allocate(12 * MIB)
    assert (heap.allocated_bytes, heap.reserved_bytes) == (16 * MIB, 20 * MIB)


def test_what_is_left_of_fragments_counts_as_held() -> None:
    heap = CachingAllocator()
    blocks = [heap.allocate(5 * MIB) for _ in range(4)]
    for block in blocks[:3]:
        heap.release(block)
    assert (heap.allocated_bytes, heap.held_bytes) == (5 * MIB, 20 * MIB)
    heap.allocate(16 * MIB)  # does not fit into the 15 MiB that are free
    assert heap.held_bytes == 36 * MIB


@given(st.lists(st.tuples(st.integers(0, 30 * MIB), st.booleans()), max_size=40))
def test_nothing_is_lost(steps: list[tuple[int, bool]]) -> None:
    heap = CachingAllocator()
    live = []
    for size, release in steps:
        live.append(heap.allocate(size))
        if release:
            heap.release(live.pop(0))
        assert heap.allocated_bytes <= heap.held_bytes <= heap.reserved_bytes
    for block in live:
        heap.release(block)
    assert (heap.allocated_bytes, heap.held_bytes) == (0, 0)
    reserved = heap.reserved_bytes
    if reserved >= 20 * MIB:
        heap.allocate(2 * KIB)
        assert heap.reserved_bytes - reserved in (0, 2 * MIB)
