"""What `Measured` adds to an op that ran alone: exact where it is a model, only its sign where it is a measurement."""

import functools
from typing import Any

import pytest
import torch

from rematree.planning.pace import made_up
from rematree.pricing.contents import with_values
from rematree.pricing.cost import Measured, Roofline, _layout
from rematree.pricing.surroundings import Recency, cache_bytes, measure_cold_rate, measure_overhead
from rematree.units import KIB, MIB


def tensor(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def test_what_was_never_touched_is_cold_and_what_was_just_touched_is_not() -> None:
    recency = Recency(rate=1.0, capacity=100 * KIB)
    a, out = tensor(4 * KIB), tensor(2 * KIB)
    assert recency.touch([a], [out]) == 6 * KIB
    assert recency.touch([a, out], []) == 0


def test_a_new_output_is_cold_and_a_changed_operand_is_no_output() -> None:
    recency = Recency(rate=1.0, capacity=100 * KIB)
    a, out = tensor(4 * KIB), tensor(2 * KIB)
    recency.touch([a], [out])
    assert recency.touch([a], [tensor(3 * KIB)]) == 3 * KIB
    assert recency.touch([a], [a]) == 0


def test_an_operand_is_forgotten_when_more_than_the_cache_holds_was_touched_since() -> None:
    recency = Recency(rate=1.0, capacity=20 * KIB)
    a = tensor(2 * KIB)
    others = [tensor(5 * KIB) for _ in range(5)]
    recency.touch([a], [])
    for other in others[:4]:
        recency.touch([other], [])
    assert recency.touch([a], []) == 0  # 20 KiB since: just held
    for other in others:
        recency.touch([other], [])
    assert recency.touch([a], []) == 2 * KIB


def test_views_of_one_storage_count_once_and_an_expanded_tensor_counts_what_it_has() -> None:
    recency = Recency(rate=1.0, capacity=100 * KIB)
    a = tensor(4 * KIB)
    assert recency.touch([a, a[: 2 * KIB], a.view(2, -1)], []) == 4 * KIB
    assert recency.touch([tensor(1).expand(4 * KIB)], []) == 1


@pytest.mark.parametrize(("size", "share"), [(10, 1.0), (50, 0.75), (75, 0.375), (100, 0.0), (200, 0.0)])
def test_an_op_too_large_for_the_cache_was_cold_alone_already(size: int, share: float) -> None:
    recency = Recency(rate=1.0, capacity=100 * KIB)
    assert recency.touch([tensor(size * KIB)], []) == size * KIB * share


def test_the_rates_are_those_of_a_machine() -> None:
    assert MIB <= cache_bytes() <= 64 * MIB
    assert 0 <= measure_cold_rate() < 1e-6
    assert 0 < measure_overhead() < 1e-2


def test_an_op_costs_more_where_its_operands_are_far() -> None:
    cost = Measured(torch.device("cpu"))
    a, b = torch.ones(MIB // 4), torch.ones(MIB // 4)
    add = torch.ops.aten.add.Tensor
    first = cost.price(add, (a, b), {}, [a + b])
    cost._recency = Recency(1e-9, 100 * MIB)
    far = cost.price(add, (a, b), {}, [a + b])
    near = cost.price(add, (a, b), {}, [a + b])
    assert len(cost) == 1
    assert first.workspace_bytes == far.workspace_bytes == near.workspace_bytes == MIB
    assert far.seconds - near.seconds == pytest.approx(2 * MIB * 1e-9)


@pytest.mark.parametrize(
    ("a", "b"), [((64, 32), (4, 32, 16)), ((4, 16, 32), (32, 64)), ((16, 64), (64, 32))], ids=["2x3", "3x2", "2x2"]
)
def test_a_grouped_matmul_is_priced_on_groups_of_one_size(
    a: tuple[int, ...], b: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def spy(func: Any, args: Any) -> Any:
        args = with_values(func, args)
        seen.append(args[2].tolist())
        return args

    monkeypatch.setattr("rematree.pricing.cost.with_values", spy)
    args = (torch.ones(a), torch.ones(b), torch.tensor([16, 32, 48, 64], dtype=torch.int32))
    out = torch.ops.aten._grouped_mm.default(*args)
    Measured(torch.device("cpu")).price(torch.ops.aten._grouped_mm.default, args, {}, [out])
    assert seen == [[16, 32, 48, 64]]


def test_rows_that_are_added_up_are_priced_as_spread() -> None:
    aten = torch.ops.aten
    zeros = functools.partial(torch.zeros, 64, dtype=torch.int64)
    for func, args in (
        (aten.embedding_dense_backward.default, (torch.ones(64, 4), zeros(), 1000, -1, False)),
        (aten.index_add.default, (torch.ones(1000, 4), 0, zeros(), torch.ones(64, 4))),
        (aten.scatter_add.default, (torch.ones(1000), 0, zeros(), torch.ones(64))),
    ):
        with_values(func, args)
        index = next(a for a in args if isinstance(a, torch.Tensor) and a.dtype is torch.int64)
        assert len(index.unique()) > 32
        func(*args)  # none of them is out of range
    rows, columns = zeros(), zeros()
    target, values = torch.ones(1000, 3), torch.ones(64)
    with_values(aten.index_put.default, (target, [rows, columns], values, True))
    assert len(rows.unique()) > 32
    assert len(columns.unique()) == 3
    aten.index_put.default(target, [rows, columns], values, True)


def test_contents_of_expanded_indices_and_behind_masks() -> None:
    """The backward of a gather adds along an index that is one number seen many times."""
    aten = torch.ops.aten
    index = torch.zeros(8, 1, 16, dtype=torch.int64).expand(8, 6, 16)
    target = torch.ones(8, 6, 1000)
    with_values(aten.scatter_add.default, (target, 2, index, torch.ones(8, 6, 16)))
    assert len(index.unique()) > 64
    aten.scatter_add.default(target, 2, index, torch.ones(8, 6, 16))
    target, mask, behind = torch.ones(10, 4, 3), torch.ones(10, 4, dtype=torch.bool), torch.full((40,), 9)
    with_values(aten.index_put.default, (target, [mask, behind], torch.ones(40), True))
    assert set(behind.tolist()) == {0, 1, 2}  # the mask stands for two dimensions
    aten.index_put.default(target, [mask, behind], torch.ones(40), True)


def test_the_seeds_of_memory_efficient_attention_come_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward reads them there; given a GPU's address it ends the process."""
    came: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (came.append(self), torch.tensor(7))[1])
    query, seed, offset = torch.ones(2, 3), torch.tensor(1), torch.tensor(2)
    func = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    args = with_values(func, (query, seed, offset, 0.1, None))
    assert came == [seed, offset]
    assert args[0] is query
    assert [int(a) for a in args[1:3]] == [7, 7]
    assert args[3:] == (0.1, None)


def test_an_op_is_priced_on_tensors_laid_out_as_in_the_step() -> None:
    # Attention takes 300 times as long for a mask whose rows are not laid out as rows.
    mask = torch.zeros(2, 1, 8, 8).expand(2, 4, 8, 8)
    hidden = torch.ones(1, 8, dtype=torch.bool).expand(3, 8)
    cost = Measured(torch.device("cpu"), fallback=Roofline(1e12, 1e11))
    for like in (mask, hidden, mask.transpose(2, 3)):
        made = cost._materialise(_layout(like))
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
        run = made_up(like, torch.device("cpu"))  # what a block is run on for its time
        assert (run.shape, run.stride(), run.dtype) == (like.shape, like.stride(), like.dtype)
    assert cost._materialise(_layout(hidden)).all()  # a mask that hides everything is another op
