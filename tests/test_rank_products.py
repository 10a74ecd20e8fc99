"""Products of few terms written out in a compiled block: as near to the true sum as the kernel; only where meant."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

from rematree.execute.compiled import compiled_forward, why_no_compiler
from rematree.execute.rank_products import MOST_TERMS, write_out_products
from rematree.measure import allocation_changes

_PRODUCT = torch.ops.aten.mm.default


def graph_of(left: torch.Tensor, right: torch.Tensor, *, turned: bool = False) -> Any:
    def run(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.mm(left, right.t() if turned else right).relu()

    return make_fx(run, tracing_mode="fake")(left, right)


def operands(terms: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(40, terms, dtype=dtype), torch.randn(terms, 24, dtype=dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("terms", [1, 8, MOST_TERMS])
def test_a_product_is_written_out_and_as_near_to_the_true_one(terms: int, turned: bool) -> None:
    left, right = operands(terms)
    given = right.t().contiguous() if turned else right
    graph = graph_of(left, given, turned=turned)
    assert write_out_products(graph.graph) == 1
    graph.graph.lint()
    graph.recompile()
    assert not any(node.target is _PRODUCT for node in graph.graph.nodes)
    assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
    found, kernel, true = graph(left, given), left.mm(right).relu(), left.double().mm(right.double()).relu()
    assert found.shape == kernel.shape
    assert found.dtype is torch.float32
    limit = max(2 * (kernel.double() - true).norm(), 2.0**-23 * true.norm())  # one rounding, where the kernel has none
    assert (found.double() - true).norm() <= limit


@pytest.mark.parametrize(
    ("left", "right"),
    [
        operands(MOST_TERMS + 1),
        operands(8, torch.bfloat16),
        operands(8, torch.float64),
        (torch.ones(8, 8), torch.ones(8, 24)),  # gradient of a weight of rank 8, in a batch of eight tokens
        (torch.ones(40, 8), torch.ones(8, 8)),
    ],
)
def test_what_is_left_to_the_kernel(left: torch.Tensor, right: torch.Tensor) -> None:
    assert write_out_products(graph_of(left, right).graph) == 0


@pytest.mark.skipif(why_no_compiler(torch.device("cpu")) is not None, reason="nothing here to compile with")
def test_compiled_it_is_never_in_memory() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(64, 8, bias=False)
            self.second = torch.nn.Linear(8, 4096, bias=False)

        def forward(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
            return (base + self.second(self.first(x)) * 2.0).to(torch.bfloat16)

    layer, x = Layer(), torch.randn(512, 64, requires_grad=True)
    base = torch.randn(512, 4096, dtype=torch.bfloat16)
    run = compiled_forward(1.0, [])
    found = run(layer, x, base)
    assert torch.allclose(found.float(), layer(x, base).float(), rtol=2.0**-7, atol=1e-3)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as events:
        out = run(layer, x, base)
    live = peak = 0
    for change in allocation_changes(events):
        live += change
        peak = max(peak, live)
    # Beside the result: the product of rank r, and one of the adapter's matrices turned.
    assert peak == out.nbytes + 512 * 8 * 4 + 8 * 4096 * 4
