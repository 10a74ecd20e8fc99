"""Narrow products of one operand as one product: the same numbers, and only where none needs another's result."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rematree.execute.joined_products import join_products

ROWS, COLUMNS = 100, 72
_PRODUCT = torch.ops.aten.mm.default


def inputs(dtype: torch.dtype = torch.float32, narrow: int = 8) -> tuple[torch.Tensor, ...]:
    """[T, I], two adapters [N, I], two gradients [T, N]."""
    torch.manual_seed(0)
    shapes = ((ROWS, COLUMNS), (narrow, COLUMNS), (3, COLUMNS), (ROWS, narrow), (ROWS, 3))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def adapters(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor) -> Any:
    first = x.mm(a.t()).relu()  # read before the second is made
    second = x.mm(b.t())
    return first.sum() + second.sum(), of_a.t().mm(x), of_b.t().mm(x)


def in_a_row(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor) -> Any:
    return x.mm(a.t().mm(x.mm(a.t()).t().mm(of_a)))


def once(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, of_a: torch.Tensor, of_b: torch.Tensor) -> Any:
    return x.mm(a.t()), of_b.t().mm(x)


def graph_of(run: Any, *tensors: torch.Tensor) -> Any:
    return make_fx(run, tracing_mode="fake")(*tensors)


def test_adapters_of_one_input_are_multiplied_at_once() -> None:
    tensors = inputs()
    graph = graph_of(adapters, *tensors)
    assert join_products(graph.graph) == 4
    graph.graph.lint()
    graph.recompile()
    assert sum(node.target is _PRODUCT for node in graph.graph.nodes) == 2
    assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
    found = graph(*tensors)
    for joined, plain in zip(found, adapters(*tensors), strict=True):
        assert joined.shape == plain.shape
        assert (joined - plain).norm() <= 1e-5 * plain.norm()
    assert len({gradient.untyped_storage().data_ptr() for gradient in found[1:]}) == 2
    assert all(gradient.is_contiguous() for gradient in found[1:])


@pytest.mark.parametrize("narrow", [65, 64])
def test_what_is_wide_reads_enough_for_itself(narrow: int) -> None:
    assert join_products(graph_of(adapters, *inputs(narrow=narrow)).graph) == (4 if narrow == 64 else 0)


def test_only_in_full_precision() -> None:
    assert join_products(graph_of(adapters, *inputs(torch.bfloat16)).graph) == 0


@pytest.mark.parametrize("run", [in_a_row, once])
def test_what_stays_alone(run: Any) -> None:
    assert join_products(graph_of(run, *inputs()).graph) == 0
