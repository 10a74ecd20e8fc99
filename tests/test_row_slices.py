"""Wide casts made in slices: the same products up to rounding, from casts of a few rows, and only where meant."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from rematree.execute import row_slices
from rematree.execute.row_slices import slice_casts

ROWS, COLUMNS = 70, 32
_CAST = torch.ops.prims.convert_element_type.default
_PRODUCT = torch.ops.aten.mm.default


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 20 rows, also of a small cast."""
    monkeypatch.setattr(row_slices, "_SLICE", 20 * COLUMNS * 4)
    monkeypatch.setattr(row_slices, "_LARGE", 20 * COLUMNS * 4)


def products(x: torch.Tensor, narrow: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[2, T/2, C] in 16 bits with [N, C] and [T, N]: as an adapter's input is read, and as a gradient is."""
    wide = torch.ops.prims.convert_element_type(x, torch.float32)
    flat = wide.view(ROWS, COLUMNS)
    scaled = (wide * 2.0).view(ROWS, COLUMNS)
    return flat.mm(narrow.t()), rows.t().mm(flat), scaled.t().mm(rows)


def inputs(terms: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, ROWS // 2, COLUMNS).bfloat16(), torch.randn(terms, COLUMNS), torch.randn(ROWS, terms)


def graph_of(run: Any, *tensors: torch.Tensor) -> Any:
    return make_fx(run, tracing_mode="fake")(*tensors)


def test_all_three_products_of_an_adapter_are_made_in_slices() -> None:
    tensors = inputs()
    graph = graph_of(products, *tensors)
    assert slice_casts(graph.graph) == 3
    graph.graph.lint()
    graph.graph.eliminate_dead_code()
    graph.recompile()
    casts = [node.meta["val"].shape[0] for node in graph.graph.nodes if node.target is _CAST]
    # Two of the products share their casts; the third has a factor.
    assert sorted(casts) == sorted(2 * [18, 18, 18, 16])
    assert sum(node.target is _PRODUCT for node in graph.graph.nodes) == 3 * 4
    assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
    for found, plain in zip(graph(*tensors), products(*tensors), strict=True):
        assert found.shape == plain.shape
        assert (found - plain).norm() <= 1e-6 * plain.norm()


def not_a_cast(x: torch.Tensor, narrow: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (torch.ops.prims.convert_element_type(x, torch.float32).view(ROWS, COLUMNS) + 1.0).mm(narrow.t())


def turned(x: torch.Tensor, narrow: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    wide = torch.ops.prims.convert_element_type(x.transpose(0, 1), torch.float32)
    return wide.reshape(ROWS, COLUMNS).mm(narrow.t())


@pytest.mark.parametrize("run", [not_a_cast, turned])
def test_what_is_made_whole(run: Any) -> None:
    assert slice_casts(graph_of(run, *inputs()).graph) == 0


def test_small_casts_and_wide_products_are_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slice_casts(graph_of(products, *inputs(terms=65)).graph) == 0
    monkeypatch.setattr(row_slices, "_LARGE", ROWS * COLUMNS * 4 + 1)
    assert slice_casts(graph_of(products, *inputs()).graph) == 0


def test_as_many_slices_as_the_compiler_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_slices, "_SLICE", 4)
    graph = graph_of(products, *inputs())
    assert slice_casts(graph.graph) == 3
    assert sum(node.target is _PRODUCT for node in graph.graph.nodes) == 3 * 14  # of 5 rows each: at most 16
