"""Attention's backward as matrix products: as near to the true gradient as torch's kernel, and only where meant."""

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from rematree.execute.attention_backward import attention_grads, replace_attention_backward

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@pytest.fixture(autouse=True)
def with_bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


def made(heads: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, tokens, heads, 16, dtype=dtype).transpose(1, 2)


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """Gradient of the output, q, k, v: six heads of queries, two of keys."""
    torch.manual_seed(0)
    return (made(6, tokens, dtype), made(6, tokens, dtype), made(2, tokens, dtype), made(2, tokens, dtype))


def true_grads(grad: torch.Tensor, *qkv: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, ...]:
    q, k, v = (tensor.double().requires_grad_() for tensor in qkv)
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
    return torch.autograd.grad(out, (q, k, v), grad.double())


def distance(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("tokens", [1, 128, 300])
def test_gradients_are_as_near_to_the_true_ones_as_the_kernels(tokens: int, scale: float | None) -> None:
    grad, q, k, v = inputs(tokens)
    out, lse = _FORWARD(q, k, v, 0.0, True, scale=scale)
    ours = attention_grads(grad, q, k, v, out, lse, scale=scale)
    kernels = _BACKWARD(grad, q, k, v, out, lse, 0.0, True, scale=scale)
    for found, kernel, true in zip(ours, kernels, true_grads(grad, q, k, v, scale=scale), strict=True):
        assert found.shape == true.shape
        assert found.dtype == torch.bfloat16
        if tokens > 1:  # of a single key the gradient of its score is 0
            assert distance(found, true) < max(2 * distance(kernel, true), 5e-3)


def joint(tensors: tuple[torch.Tensor, ...], dropout: float = 0.0, causal: bool = True, mask: Any = None) -> Any:
    def run(grad: torch.Tensor, *qkv: torch.Tensor) -> Any:
        out, lse = _FORWARD(*qkv, dropout, causal, attn_mask=mask)
        return _BACKWARD(grad, *qkv, out, lse, dropout, causal, attn_mask=mask)

    return make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)


def test_a_graph_computes_the_same_gradients_in_the_same_layout() -> None:
    tensors = inputs(300)
    graph = joint(tensors)
    before = graph(*tensors)
    assert replace_attention_backward(graph.graph) == 1
    graph.graph.lint()
    graph.recompile()
    assert not any(node.target is _BACKWARD for node in graph.graph.nodes)
    assert all("val" in node.meta for node in graph.graph.nodes if node.op == "call_function")
    for found, kernel, true in zip(graph(*tensors), before, true_grads(*tensors, scale=None), strict=True):
        assert found.stride() == kernel.stride()
        assert distance(found, true) < max(2 * distance(kernel, true), 5e-3)


@pytest.mark.parametrize(
    ("tokens", "dtype", "options"),
    [
        (64, torch.float32, {}),
        (64, torch.bfloat16, {"causal": False}),
        (64, torch.bfloat16, {"causal": False, "mask": torch.zeros(64, 64, dtype=torch.bfloat16)}),
        (2048, torch.bfloat16, {}),
    ],
)
def test_what_is_left_to_the_kernel(tokens: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert replace_attention_backward(joint(inputs(tokens, dtype), **options).graph) == 0


def test_without_products_of_bf16_the_kernel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert replace_attention_backward(joint(inputs(64)).graph) == 0
