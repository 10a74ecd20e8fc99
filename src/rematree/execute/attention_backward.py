"""The gradient of causal attention in a compiled block, as matrix products instead of torch's kernel for a CPU.

torch's kernel (`_scaled_dot_product_flash_attention_for_cpu_backward`, 2.13) does many products of 64 rows. Here they
are batched over heads, for a slice of the queries and the keys that it sees, and what lies between them the compiler
fuses: half the time on a processor with AMX, 0.65 to 0.83 of it on one with AVX512-BF16 alone. Probabilities are made
from scores in fp32, as in the forward, so the result is as near to the true gradient as the kernel's, with other last
bits.

Letters: B batch, H heads, K heads of keys and values, G = H / K, T tokens, D width of a head.

Imported only to compile. Source: Dao 2023 (FlashAttention-2), algorithm 2, by slices of queries.
"""

import contextlib
import math
import operator
from typing import Any, Final

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

_BACKWARD: Final = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SLICE: Final = 128  # queries at once
_MOST_SLICES: Final = 8  # each is some twenty nodes for the compiler
_MOST_SCORES: Final = 1 << 21  # of one slice; they are there in fp32


def replace_attention_backward(graph: Any) -> int:
    """Replace the kernel in a graph of forward and backward, where the products are faster and memory allows.

    Left alone: dtypes other than bf16, masks, dropout, symbolic sizes, more keys than queries, and long or many rows,
    whose scores would be large or the slices many.

    Args:
        graph: torch.fx's; its nodes have their fake values in `meta["val"]`.
    Returns:
        How many were replaced.
    """
    found = [node for node in graph.nodes if node.target is _BACKWARD and _faster(node)]
    for node in found:
        _replace(graph, node)
    return len(found)


def _faster(node: Any) -> bool:
    dropout, causal = node.args[6:8]
    if dropout or not causal or node.kwargs.get("attn_mask") is not None:
        return False
    q, k = (node.args[place].meta["val"] for place in (1, 2))
    if q.dtype is not torch.bfloat16 or not torch.cpu._is_avx512_bf16_supported():  # pyright: ignore[reportPrivateUsage]
        return False
    if not all(isinstance(size, int) for size in (*q.shape, *k.shape)):
        return False
    batch, heads, tokens, _ = q.shape
    same = k.shape[2] == tokens and heads % k.shape[1] == 0 and k.shape[3] == q.shape[3]
    return same and tokens <= _SLICE * _MOST_SLICES and batch * heads * min(tokens, _SLICE) * tokens <= _MOST_SCORES


def _replace(graph: Any, node: Any) -> None:
    from torch._inductor.decomposition import select_decomp_table

    scale = node.kwargs.get("scale")
    values = [argument.meta["val"] for argument in node.args[:6]]
    strides = [like.stride() for like in node.meta["val"]]

    def grads(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = attention_grads(*tensors, scale=scale)
        return tuple(_laid_out(grad, stride) for grad, stride in zip(found, strides, strict=True))

    with detect_fake_mode(values) or contextlib.nullcontext():
        traced = make_fx(grads, select_decomp_table())(*values)
    made = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), node.args[:6], strict=True))
    outputs: Any = ()
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "output":
                outputs = inner.args[0]
            elif inner.op != "placeholder":
                made[inner] = graph.node_copy(inner, made.__getitem__)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(made[outputs[user.args[1]]])
        graph.erase_node(user)
    graph.erase_node(node)


def _laid_out(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """[B, H, T, D] in the order of dimensions that the kernel's result has: the graph behind it views it so."""
    order = sorted(range(grad.dim()), key=lambda dim: stride[dim], reverse=True)
    back = sorted(range(grad.dim()), key=order.__getitem__)
    return grad.permute(order).contiguous().permute(back)


def attention_grads(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for causal attention without mask or dropout.

    Args:
        grad: Gradient of the output, [B, H, T, D].
        q: [B, H, T, D].
        k: [B, K, T, D]; H / K heads of queries share one of keys.
        v: Like k.
        out: The output, [B, H, T, D].
        lse: Logarithm of the sum of exponentials of the scaled scores, [B, H, T], fp32.
        scale: Of the scores; None: 1 / sqrt(D).
    Cost:
        10 B H D T^2 FLOPs, of which slices spare up to half; 12 bytes for each score of a slice.
    """
    batch, heads, tokens, width = q.shape
    factor = 1 / math.sqrt(width) if scale is None else scale
    pairs, group = batch * k.shape[1], heads // k.shape[1]
    by_row = (grad.float() * out.float()).sum(-1).reshape(pairs, group, tokens, 1)
    lse = lse.reshape(pairs, group, tokens, 1)
    q, grad = (x.reshape(pairs, group, tokens, width) for x in (q, grad))
    k, v = (x.reshape(pairs, tokens, width) for x in (k, v))
    wide_k = k.float()
    of_k, of_v = torch.zeros_like(wide_k), torch.zeros_like(wide_k)
    of_q: list[Tensor] = []
    for start in range(0, tokens, _SLICE):
        end = min(start + _SLICE, tokens)
        shape = (pairs, group, end - start, end)
        rows, of_rows = (x[:, :, start:end].reshape(pairs, -1, width) for x in (q, grad))
        scores = rows.float().bmm(wide_k[:, :end].transpose(1, 2)).view(shape)
        of_weights = of_rows.bmm(v[:, :end].transpose(1, 2)).view(shape).float()
        queries, keys = (torch.arange(first, end, device=q.device) for first in (start, 0))
        weights = (scores * factor - lse[:, :, start:end]).exp().masked_fill(keys > queries[:, None], 0.0)
        of_scores = (weights * (of_weights - by_row[:, :, start:end]) * factor).to(q.dtype).view(pairs, -1, end)
        weights = weights.to(q.dtype).view(pairs, -1, end)
        later = (0, 0, 0, tokens - end)
        of_v = of_v + torch.nn.functional.pad(weights.transpose(1, 2).bmm(of_rows).float(), later)
        of_k = of_k + torch.nn.functional.pad(of_scores.transpose(1, 2).bmm(rows).float(), later)
        of_q.append(of_scores.bmm(k[:, :end]).view(pairs, group, -1, width))
    like_k = (batch, -1, tokens, width)
    return (
        torch.cat(of_q, 2).view(batch, heads, tokens, width),
        of_k.to(k.dtype).view(like_k),
        of_v.to(v.dtype).view(like_k),
    )
