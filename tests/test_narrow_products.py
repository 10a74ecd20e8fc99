"""Products that are turned in compiled blocks: the same result, and only where it is meant."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from rematree.execute.narrow_products import turn_narrow_products


def of_transposed(grad: Tensor, u: Tensor) -> Tensor:
    return torch.mm(grad.t(), u)


def traced(function: Callable[..., Tensor], *tensors: Tensor, symbolic: bool = False) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*tensors)


def test_a_turned_product_is_as_near_to_the_true_one_and_laid_out_as_before() -> None:
    torch.manual_seed(0)
    grad, u = torch.randn(300, 96), torch.randn(300, 8)
    graph = traced(of_transposed, grad, u)
    assert turn_narrow_products(graph.graph) == 1
    graph.recompile()
    (product,) = (node for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default)
    assert product.meta["val"].shape == (8, 96)
    found, true = graph(grad, u), grad.double().t() @ u.double()
    assert found.shape == (96, 8)
    assert found.is_contiguous()
    # 300 products a sum: rounding is 300^0.5 * 6e-8 of it at most, 1.2e-7 was measured
    assert float((found - true).norm() / true.norm()) < 1e-6
    assert turn_narrow_products(graph.graph) == 0


@pytest.mark.parametrize(
    ("function", "grad", "u"),
    [
        pytest.param(of_transposed, torch.ones(300, 96).bfloat16(), torch.ones(300, 8).bfloat16(), id="16 bit"),
        pytest.param(of_transposed, torch.ones(300, 96), torch.ones(300, 65), id="not narrow"),
        pytest.param(of_transposed, torch.ones(300, 24), torch.ones(300, 8), id="about square"),
        pytest.param(of_transposed, torch.ones(96, 300).t(), torch.ones(300, 8), id="read by row already"),
        pytest.param(torch.mm, torch.ones(300, 96), torch.ones(96, 8), id="forward"),
    ],
)
def test_other_products_stay(function: Callable[..., Tensor], grad: Tensor, u: Tensor) -> None:
    graph = traced(function, grad, u)
    before = [str(node) for node in graph.graph.nodes]
    assert turn_narrow_products(graph.graph) == 0
    assert [str(node) for node in graph.graph.nodes] == before


def test_symbolic_sizes_stay() -> None:
    graph = traced(of_transposed, torch.ones(300, 96), torch.ones(300, 8), symbolic=True)
    assert turn_narrow_products(graph.graph) == 0
