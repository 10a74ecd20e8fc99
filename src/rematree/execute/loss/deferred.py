"""Logits that stand for `head(hidden)` without computing it.

A `DeferredLogits` is a tensor to everyone who asks its shape, dtype or device. Casts, scaling and soft-capping by
scalars are written down, slicing and reshaping of rows is done on the hidden states instead, and
`torch.nn.functional.cross_entropy` is handed to whoever deferred the head. Anything else computes the real logits, with
their gradient, and goes on with them.

Letters: B batch, T tokens, D model width, V vocabulary, N = B*T rows. [..., D] is any number of leading row dimensions.

Not covered: logits read after an optimizer step are those of the new weights, and a head with dropout draws a new mask
for every reading. Adapters and training flags are those of the forward. A hook for the gradient of logits whose loss
was computed in chunks is refused: that gradient never is one tensor. Hooks of torch's engines are not: DDP and FSDP2
put theirs on whatever a model returns.
"""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from rematree.errors import UnsupportedModelError
from rematree.execute.loss.head import HeadCall
from rematree.execute.loss.logit_rows import LogitRows, Source
from rematree.execute.loss.row_ops import record

_QUERIES = frozenset(
    {".shape", ".dtype", ".device", ".ndim", ".layout", ".requires_grad", ".is_leaf", ".grad_fn", ".is_cuda", ".is_cpu"}
    | {
        "._base",
        ".is_meta",
        ".is_sparse",
        ".is_quantized",
        ".itemsize",
        ".nbytes",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
    }
    | {
        "stride",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "element_size",
        "get_device",
        "__len__",
        "__hash__",
    }
)


_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
_ENGINES = "torch.distributed."


class DeferredLogits(Tensor):
    """Logits [..., V] that are not computed; see the module's text."""

    rows: LogitRows

    def __new__(cls, rows: LogitRows) -> Self:
        hidden, head = rows.hidden, rows.source.head
        # All but the last stride of a view of contiguous rows are multiples of D; those of the logits, of V.
        strides = [stride // max(hidden.shape[-1], 1) * head.num_classes for stride in hidden.stride()[:-1]]
        deferred = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportPrivateUsage]
            cls,
            rows.shape,
            strides=(*strides, 1),
            dtype=rows.source.dtype,
            device=rows.device,
        )
        deferred.rows = rows
        return deferred

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__ if func.__name__ != "__get__" else f".{func.__self__.__name__}"
        if name in _QUERIES:
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                return func(*args, **kwargs)
        if torch.is_grad_enabled():
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, DeferredLogits) and _requires_grad(leaf):
                    # DDP clones what a model returns inside of an autograd function, where grad mode is off.
                    leaf.rows.tracked = True
        if name in _HOOKS and _may_wait(name, args, kwargs):
            with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
                return func(*args, **kwargs)
        if args and isinstance(args[0], DeferredLogits) and args[0].rows.source.real is None:
            outcome = record(args[0].rows, name, func, args[1:], kwargs)
            if outcome is not None:
                return _deferred(args[0], outcome)
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        real_args, real_kwargs = _with_real_logits((args, kwargs), shared=writes)
        out = func(*real_args, **real_kwargs)
        if not writes and _is_part_of(out, (args, kwargs), (real_args, real_kwargs)):
            # What is written to it later is written to the logits, whose loss is still to come.
            real_args, real_kwargs = _with_real_logits((args, kwargs), shared=True)
            out = func(*real_args, **real_kwargs)
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Only what passes by `__torch_function__` comes here, such as the inside of a custom autograd function. The
        # graph is autograd's business then: it leads to `_Defer.backward`.
        if func._schema.is_mutable:
            raise UnsupportedModelError(
                f"{func} writes to logits that were deferred by the chunked loss",
                remedies=["apply a plan without the chunked loss"],
            )
        with torch.no_grad():
            real_args, real_kwargs = _with_real_logits((args, kwargs or {}))
        return func(*real_args, **real_kwargs)


def _requires_grad(logits: DeferredLogits) -> bool:
    with torch._C.DisableTorchFunctionSubclass():  # pyright: ignore[reportPrivateUsage]
        return logits.requires_grad


def _may_wait(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a hook for the gradient of deferred logits can be put on these themselves: an engine's can.

    Raises:
        UnsupportedModelError: it is another's, and would not be called.
    """
    logits, *others = args
    hook = others[0] if others else kwargs.get("hook")
    if (getattr(hook, "__module__", None) or "").startswith(_ENGINES):
        return True
    why = None
    if logits.rows.source.head.fate.chunked:
        why = "their loss was computed in chunks, and their gradient with it, before this was called"
    elif logits.rows.views:
        why = "they are a part of the logits that is made anew for each use"
    if why is not None:
        raise UnsupportedModelError(
            f"logits.{name}: {why}", remedies=["apply a plan without the chunked loss: forbid=('chunked_loss',)"]
        )
    return False


def _is_part_of(out: Any, deferred: Any, real: Any) -> bool:
    """Whether `out` shares memory with logits that were made for this use alone, while a loss of them may come."""
    made = {
        there.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
        for leaf, there in zip(tree_leaves(deferred), tree_leaves(real), strict=True)
        if isinstance(leaf, DeferredLogits) and leaf.rows.source.real is None and not leaf.rows.source.head.fate.chunked
    }
    shared = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)) if made else ()
    return any(leaf.untyped_storage()._cdata in made for leaf in shared)  # pyright: ignore[reportPrivateUsage]


def _with_real_logits(tree: Any, *, shared: bool = False) -> Any:
    def real(leaf: object) -> object:
        return leaf.rows.real(shared=shared) if isinstance(leaf, DeferredLogits) else leaf

    return tree_map(real, tree)


class _Defer(torch.autograd.Function):
    """Gives deferred logits a place in the graph: a gradient that reaches them goes through the head."""

    @staticmethod
    def forward(ctx: Any, rows: LogitRows, *inputs: Tensor) -> DeferredLogits:
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        return DeferredLogits(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows: LogitRows = ctx.rows
        inputs = (rows.source.hidden, *rows.source.head.params)
        if grad_outputs[0] is None:  # DDP runs every node behind what a model returns, also where nothing reaches it
            return None, *(None for _ in inputs)
        with torch.enable_grad():
            logits = rows.real(shared=True)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        grads = iter(torch.autograd.grad(logits, wanted, grad_outputs, retain_graph=True, allow_unused=True))
        return None, *(next(grads) if tensor.requires_grad else None for tensor in inputs)


def _defer(rows: LogitRows) -> DeferredLogits:
    """Wrap `rows` in a tensor that autograd knows."""
    apply = cast("Callable[..., DeferredLogits]", _Defer.apply)
    return apply(rows, rows.source.hidden, *rows.source.head.params)


def _deferred(logits: DeferredLogits, outcome: Any) -> Any:
    """`outcome` of `record` on the rows of `logits`, its rows wrapped."""
    if outcome is logits.rows:
        return logits
    if isinstance(outcome, tuple):
        return tuple(_deferred(logits, each) for each in cast("tuple[Any, ...]", outcome))
    return _defer(outcome) if isinstance(outcome, LogitRows) else outcome


def defer_head(head: HeadCall, hidden: Tensor) -> DeferredLogits:
    """Stand-in for `head.forward(hidden)`, [..., D] -> [..., V]."""
    hidden = hidden.contiguous()
    return _defer(LogitRows(Source(head, hidden, head.dtype), hidden))
