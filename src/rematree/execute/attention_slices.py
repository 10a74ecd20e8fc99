"""Attention written in PyTorch, a slice of its queries at a time.

Where no fused kernel computes what a model wants (a learned sink, a cap on scores), transformers forms all scores of a
block at once, [B, H, T, T], several times over: softmax, its cast, their gradients. No recomputation of the block helps
against that, for it is there again while the block runs backward. Here the model's own function is called for a few
rows or queries at a time, each call under `torch.utils.checkpoint`: what is kept are queries, keys and values, and what
is there at once are the scores of one slice.

The function does for each query what it did before, but products of other shapes may sum in another order, and the
gradients of keys and values are sums over slices, in fp32, and that of a weight the function reads, as a sink, one in
its own dtype: results differ in their last bits.

Letters: B rows of the batch, H heads of queries, K heads of keys, T queries, S keys, D width of a head.

Source of the idea: Rabe & Staats 2021, self-attention does not need O(n^2) memory.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rematree.engines import own_class, whole_shape
from rematree.errors import PlanMismatchError
from rematree.execute.attention import AttentionAround, attention_modules, eager_core
from rematree.regions import ATTENTION_SUFFIX, find_module, split_function

_SCORES: Final = 1 << 26  # of one slice; 256 MiB of fp32
_MOST: Final = 32  # slices: each is simulated, and expands keys and values anew
_WEIGHTS: Final = "output_attentions"
_DROPOUTS: Final = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
_SMALL: Final = 1 << 16  # numbers of a weight that a core may read: sinks, biases
_NEAR: Final = 1e-4  # of two ways to compute the same in fp32


def slice_shape(rows: int, heads: int, queries: int, keys: int) -> tuple[int, int]:
    """(rows, queries) of a slice of scores [rows, heads, queries, keys]; all of them where they are few."""
    count = min(_MOST, -(-rows * heads * queries * keys // _SCORES))
    if count <= 1:
        return rows, queries
    at_once = -(-rows // count)
    return at_once, -(-queries // max(1, count * at_once // rows))


def sliced_cores(model: nn.Module, rows: int, tokens: int) -> list[tuple[str, nn.Module]]:
    """Path and module of every attention of `model` that can be sliced and, at this size of batch, would be."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in attention_modules(model):
        heads = getattr(_config_of(module), "num_attention_heads", None)
        large = type(heads) is int and slice_shape(rows, heads, tokens, tokens) != (rows, tokens)
        if large and why_whole(module) is None:
            found.append((path, module))
    return found


def why_whole(module: nn.Module) -> str | None:
    """Why the core of the attention `module` cannot be sliced. None if it can."""
    core = eager_core(module)
    if core is None:
        return "it is not attention written in PyTorch that transformers' interface leads to"
    if _WEIGHTS in inspect.signature(own_class(module).forward).parameters:
        return "it may be asked for its weights, and does not say so to the function that makes them"
    config = _config_of(module)
    drops = any(getattr(holder, name, 0) for holder in (module, config) for name in _DROPOUTS)
    if drops or any(isinstance(child, nn.Dropout) and child.p for child in module.children()):
        return "it has dropout, whose masks would be others"
    return _trial(core, module)


def in_slices(
    inner: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What `inner` returns, from slices, but without the weights.

    Args:
        inner: Attention as transformers' interface calls it: (output [B, T, H, D], weights).
        module: The attention that calls.
        query: [B, H, T, D].
        key: [B, K, S, D].
        value: [B, K, S, D].
        attention_mask: [B or 1, H or 1, T or 1, S], or None.
        args: More of the same.
        kwargs: More of the same.
    Cost:
        The forward once more in backward. Scores of one slice at a time.
    """
    rows, heads, queries, _ = query.shape
    few = slice_shape(rows, heads, queries, key.shape[2])
    whole = few == (rows, queries) or kwargs.get("dropout") or _gives_weights(module, kwargs)
    if whole or args or _others(inner, kwargs) or not _usual(query, key, value, attention_mask):
        return inner(module, query, key, value, attention_mask, *args, **kwargs)
    return _joined(functools.partial(inner, module, **kwargs), few, query, key, value, attention_mask), None


def within(around: AttentionAround, core: AttentionAround | None) -> AttentionAround:
    """`around` what `core` is around, if there is any."""

    def both(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert core is not None
        return around(functools.partial(core, inner), *args, **kwargs)

    return around if core is None else both


def is_core(path: str) -> bool:
    """Whether what is lean at `path` is a core of attention."""
    return path.endswith(ATTENTION_SUFFIX)


def cores_to_slice(model: nn.Module, lean: Iterable[str], *, check: bool) -> list[nn.Module]:
    """The attentions whose cores are among what is lean.

    Raises:
        PlanMismatchError: one cannot be sliced; only if `check`.
    """
    found: list[nn.Module] = []
    for path in filter(is_core, lean):
        found.append(find_module(model, split_function(path)[0]))
        reason = why_whole(found[-1]) if check else None
        if reason is not None:
            raise PlanMismatchError(
                f"the plan slices {path}, which cannot be sliced: {reason}",
                remedies=["plan again with forbid=['sliced_attention']"],
            )
    return found


class _Sum:
    """A gradient that slices add up in fp32."""

    def __init__(self) -> None:
        self.total: Tensor | None = None


class _Whole(torch.autograd.Function):
    """A tensor that every slice reads: its gradient is what they have added up."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, summed: _Sum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.summed, ctx.dtype = summed, tensor.dtype
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total, ctx.summed.total = ctx.summed.total, None
        return None if total is None else total.to(ctx.dtype), None


class _InSlice(torch.autograd.Function):
    """The same tensor, as one slice reads it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, summed: _Sum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.summed = summed
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        if grad is not None:
            if ctx.summed.total is None:
                ctx.summed.total = torch.zeros_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
            ctx.summed.total += grad
        return None, None


def _for_slices(tensor: Tensor, count: int) -> list[Tensor]:
    """`tensor` for each of `count` slices; their gradients are summed without rounding to its dtype each time."""
    if count == 1:
        return [tensor]
    summed = _Sum()
    whole: Any = _Whole.apply(tensor, summed)
    return [_InSlice.apply(whole, summed) for _ in range(count)]  # pyright: ignore[reportReturnType]


def _joined(
    core: Callable[..., Any], few: tuple[int, int], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    """The output, [B, T, H, D], from slices of (rows, queries)."""
    # One split has one node, whose backward joins the gradients; a slice's own would fill each with zeros.
    of_rows: list[Tensor] = []
    queries, keys, values = (tensor.split(few[0]) for tensor in (query, key, value))
    for q, k, v, of_them in zip(queries, keys, values, _parts(mask, few[0], 0, len(queries)), strict=True):
        slices = q.split(few[1], 2)
        count = len(slices)
        given = (slices, _for_slices(k, count), _for_slices(v, count), _parts(of_them, few[1], 2, count))
        of_rows.append(torch.cat([_once(core, *each) for each in zip(*given, strict=True)], 1))
    return of_rows[0] if len(of_rows) == 1 else torch.cat(of_rows)


def _parts(mask: Tensor | None, size: int, dim: int, count: int) -> Sequence[Tensor | None]:
    return [mask] * count if mask is None or mask.shape[dim] == 1 else mask.split(size, dim)


def _once(core: Callable[..., Any], *slice_: Tensor | None) -> Tensor:
    """Output of one slice of query, key, value and mask, [rows, queries, H, D]."""

    def run(*again: Tensor | None) -> Tensor:
        return core(*again)[0]

    return checkpoint(run, *slice_, use_reentrant=False, preserve_rng_state=False)


def _usual(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether it is known of all dimensions what they are."""
    rows, _, queries, _ = query.shape
    if len(key) != rows or len(value) != rows:
        return False
    return mask is None or (mask.dim() == 4 and mask.shape[0] in (1, rows) and mask.shape[2] in (1, queries))


def _config_of(module: nn.Module) -> Any:
    """What holds for the layer of `module`: a config that differs by layer may not be asked for all of them."""
    config: Any = module.__dict__["config"]
    if not getattr(config, "is_heterogeneous", False):
        return config
    index = getattr(module, "layer_idx", None)
    return SimpleNamespace() if index is None else config.per_layer_config[index]


def _gives_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether somebody asked for the weights."""
    return bool(kwargs.get(_WEIGHTS) or getattr(module.__dict__["config"], _WEIGHTS, False))


def _others(inner: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether `inner` reads tensors beside the usual ones, of which nobody says how they belong to queries."""
    tensors = {name for name, given in kwargs.items() if isinstance(given, Tensor)}
    return not tensors.isdisjoint(inspect.signature(inner).parameters)


def _trial(core: Callable[..., Any], module: nn.Module) -> str | None:
    """What is wrong when `core` runs on a few made-up queries, whole and in slices; None if nothing is."""
    heads, rows, tokens, width = _config_of(module).num_attention_heads, 2, 6, 8
    pairs = heads // getattr(module, "num_key_value_groups", 1)
    made = torch.Generator("cpu").manual_seed(0)
    stand_in = copy.copy(module)
    # What it holds may be fake, or sharded, and must not be asked; what is large, as of experts, is read by no core.
    for kind in ("_parameters", "_buffers"):
        stand_in.__dict__[kind] = {
            name: _made_up(*whole_shape(held), made=made)
            for name, held in module.__dict__[kind].items()
            if held is not None and held.is_floating_point() and math.prod(whole_shape(held)) <= _SMALL
        }
    query, key, value = (_made_up(rows, count, tokens, width, made=made) for count in (heads, pairs, pairs))
    causal = torch.full((tokens, tokens), -1e9, dtype=torch.float32, device="cpu").triu(1).expand(rows, 1, -1, -1)
    run = functools.partial(core, stand_in, scaling=width**-0.5)
    tried = False
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for mask in (causal, None):
            try:
                whole: Tensor = run(query, key, value, mask)[0]
            except Exception:  # noqa: BLE001  another form of mask may be what it takes
                continue
            try:
                sliced = _joined(run, (1, 2), query, key, value, mask)
            except Exception as error:  # noqa: BLE001  code of others
                return f"a slice of it fails ({error})"
            if whole.shape != (rows, tokens, heads, width) or not torch.allclose(sliced, whole, _NEAR, _NEAR):
                return "its slices give another result"
            tried = True
    return None if tried else "it fails on made-up queries"


def _made_up(*shape: int, made: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=made, dtype=torch.float32, device="cpu")
