"""Logits that stand for `head(hidden)` without computing it.

A `DeferredLogits` is a tensor to everyone who asks its shape, dtype or device. Casts, scaling and soft-capping by
scalars are written down, slicing and reshaping of rows is done on the hidden states instead, and
`torch.nn.functional.cross_entropy` is handed to whoever deferred the head. Anything else computes the real logits, with
their gradient, and goes on with them.

Letters: B batch, T tokens, D model width, V vocabulary, N = B*T rows. [..., D] is any number of leading row dimensions.

Not covered: logits read after an optimizer step are those of the new weights, and a head with dropout draws a new mask
for every reading.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from rematree.errors import UnsupportedModelError
from rematree.execute.head import HeadCall, Unary, autocast_as
from rematree.execute.rows import leading_shape, row_index

_QUERIES = frozenset(
    {".shape", ".dtype", ".device", ".ndim", ".layout", ".requires_grad", ".is_leaf", ".grad_fn", ".is_cuda", ".is_cpu"}
    | {
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
_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
_POINTWISE = frozenset(
    {
        "div",
        "divide",
        "true_divide",
        "mul",
        "multiply",
        "add",
        "sub",
        "subtract",
        "__rsub__",
        "tanh",
        "neg",
        "clamp",
        "clone",
    }
)
_POINTWISE_IN_PLACE = frozenset({"div_", "mul_", "add_", "sub_", "tanh_", "neg_", "clamp_"})


@dataclass(eq=False)
class _Source:
    """What one storage would be for real logits: shared by all views of it, so that in-place changes reach them all.

    Attributes:
        head: How to run the head.
        hidden: [..., D], contiguous.
        dtype: Of the logits after `ops`.
        ops: Row-wise operations to do after the head.
        real: The logits [..., V], once somebody needed them in full.
    """

    head: HeadCall
    hidden: Tensor
    dtype: torch.dtype
    ops: tuple[Unary, ...] = ()
    real: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], through the head and all recorded operations."""
        return self.finished(self.raw(hidden))

    def raw(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], through the head alone."""
        with autocast_as(hidden.device.type, self.head.autocast):
            return self.head.forward(hidden)

    def finished(self, logits: Tensor) -> Tensor:
        """[..., V] -> [..., V], through the recorded operations, each of which treats every element by itself."""
        with autocast_as(logits.device.type, self.head.autocast):
            for op in self.ops:
                logits = op(logits)
        return logits


@dataclass(eq=False)
class LogitRows:
    """Some rows of the head's output, not computed.

    Attributes:
        source: The storage they belong to.
        hidden: [..., D], the rows they are computed from.
        views: How to get them from the source's real logits.
        tracked: A gradient flows into them.
    """

    source: _Source
    hidden: Tensor
    views: tuple[Unary, ...] = ()
    tracked: bool = field(init=False)

    def __post_init__(self) -> None:
        needs_grad = self.source.hidden.requires_grad or bool(self.source.head.params)
        self.tracked = torch.is_grad_enabled() and needs_grad

    @property
    def whole(self) -> bool:
        """These are all rows of the source."""
        return self.hidden.shape[:-1].numel() == self.source.hidden.shape[:-1].numel()

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V]; the head sees as many dimensions as it would have seen."""
        return self.source.finished(self.raw(hidden))

    def raw(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V], of the head alone."""
        lead = (1,) * (self.source.hidden.ndim - 2)
        logits = self.source.raw(hidden.reshape(*lead, *hidden.shape))
        return logits.reshape(hidden.shape[0], logits.shape[-1])

    def real(self, *, shared: bool = False) -> Tensor:
        """The logits [..., V], with their graph if they are tracked and grad mode is on.

        Args:
            shared: They will be written to, so every view must see the same memory.
        """
        source = self.source
        tracked = torch.is_grad_enabled() and self.tracked
        if source.real is None and (shared or (tracked and self.whole)):
            with torch.set_grad_enabled(self.tracked):
                source.real = source.logits(source.hidden)
        if source.real is None:
            with torch.set_grad_enabled(tracked):
                logits = self.logits(self.hidden.reshape(-1, self.hidden.shape[-1]))
                return logits.reshape(*self.hidden.shape[:-1], logits.shape[-1])
        real = source.real
        for view in self.views:
            real = view(real)
        return real if tracked else real.detach()

    def defer(self) -> "DeferredLogits":
        """Wrap them in a tensor that autograd knows."""
        apply = cast("Callable[..., DeferredLogits]", _Defer.apply)
        return apply(self, self.source.hidden, *self.source.head.params)

    def view(self, view: Unary) -> "DeferredLogits":
        """The same memory seen otherwise; `view` keeps the last dimension whole."""
        return LogitRows(self.source, view(self.hidden), (*self.views, view)).defer()

    def copy(self, hidden: Tensor, op: Unary | None = None, dtype: torch.dtype | None = None) -> "DeferredLogits":
        """New memory: these rows of hidden states [..., D], one more operation."""
        ops = self.source.ops if op is None else (*self.source.ops, op)
        hidden = hidden.contiguous()
        return LogitRows(_Source(self.source.head, hidden, dtype or self.source.dtype, ops), hidden).defer()


class DeferredLogits(Tensor):
    """Logits [..., V] that are not computed; see the module's text."""

    rows: LogitRows

    def __new__(cls, rows: LogitRows) -> Self:
        hidden, head = rows.hidden, rows.source.head
        # All but the last stride of a view of contiguous rows are multiples of D; those of the logits, of V.
        strides = [stride // max(hidden.shape[-1], 1) * head.num_classes for stride in hidden.stride()[:-1]]
        deferred = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportPrivateUsage]
            cls,
            (*hidden.shape[:-1], head.num_classes),
            strides=(*strides, 1),
            dtype=rows.source.dtype,
            # autograd asks for streams, which a device that a twin only imagines does not have (`absent.py`)
            device=getattr(getattr(hidden, "fake_mode", None), "engine_device", None) or head.device,
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
        if args and isinstance(args[0], DeferredLogits) and args[0].rows.source.real is None:
            outcome = _record(args[0], name, func, args[1:], kwargs)
            if outcome is not None:
                return outcome
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        real_args, real_kwargs = _with_real_logits((args, kwargs), shared=writes)
        return func(*real_args, **real_kwargs)

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


def _with_real_logits(tree: Any, *, shared: bool = False) -> Any:
    def real(leaf: object) -> object:
        return leaf.rows.real(shared=shared) if isinstance(leaf, DeferredLogits) else leaf

    return tree_map(real, tree)


class _Defer(torch.autograd.Function):
    """Gives deferred logits a place in the graph: a gradient that reaches them goes through the head."""

    @staticmethod
    def forward(ctx: Any, rows: LogitRows, *inputs: Tensor) -> DeferredLogits:
        ctx.rows = rows
        return DeferredLogits(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows: LogitRows = ctx.rows
        with torch.enable_grad():
            logits = rows.real(shared=True)
        inputs = (rows.source.hidden, *rows.source.head.params)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        grads = iter(torch.autograd.grad(logits, wanted, grad_outputs, retain_graph=True, allow_unused=True))
        return None, *(next(grads) if tensor.requires_grad else None for tensor in inputs)


def _record(logits: DeferredLogits, name: str, func: Any, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Do `func(logits, *rest, **options)` without logits; None if it needs them."""
    rows = logits.rows
    if name == "cross_entropy":
        return rows.source.head.cross_entropy(rows, *rest, **options)
    if name in _CASTS or name == "to":
        return _record_cast(logits, name, rest, options)
    if name in _POINTWISE or name in _POINTWISE_IN_PLACE:
        if not all(_is_scalar(value) for value in (*rest, *options.values())):
            return None

        def op(real: Tensor) -> Tensor:
            return func(real, *rest, **options)

        if name in _POINTWISE:
            return rows.copy(rows.hidden, op)
        if not rows.whole or rows.tracked != torch.is_grad_enabled():
            return None
        # Not in place: what it would write to may be a leaf of the graph by then.
        rows.source.ops = (*rows.source.ops, lambda real: getattr(real, name.removesuffix("_"))(*rest, **options))
        return logits
    if name == "argmax":
        return _argmax(logits, *rest, **options)
    return _record_rows(logits, name, rest, options)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.requires_grad and not value.is_complex()
    return value is None or isinstance(value, int | float | str | torch.memory_format)


def _record_cast(logits: DeferredLogits, name: str, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if name == "to":
        if any(isinstance(value, Tensor) for value in rest) or options.keys() - {"device", "dtype", "non_blocking"}:
            return None
        parse = cast("Callable[..., tuple[Any, Any, Any, Any]]", torch._C._nn._parse_to)  # pyright: ignore
        device, dtype, _, memory_format = parse(*rest, **options)
        if memory_format is not None or (device is not None and torch.device(device) != logits.device):
            return None
    else:
        if rest or options:
            return None
        dtype = _CASTS[name]
    if dtype is None or dtype == logits.dtype:
        return logits
    if not dtype.is_floating_point:
        return None
    return logits.rows.copy(logits.rows.hidden, lambda real: real.to(dtype), dtype)


def _record_rows(logits: DeferredLogits, name: str, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Views and copies of rows: whatever leaves the last dimension whole is done on the hidden states."""
    rows = logits.rows
    match name, rest:
        case "contiguous", () if not options:
            return logits if rows.hidden.is_contiguous() else rows.copy(rows.hidden)
        case "__getitem__", (index,):
            items = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
            whole_rows = row_index(items, logits.shape)
            if whole_rows is None:
                return None
            if any(isinstance(item, Tensor) for item in items):
                return rows.copy(rows.hidden[whole_rows])
            return rows.view(lambda tensor: tensor[whole_rows])
        case "view" | "reshape" | "flatten", _ if not options:
            lead = leading_shape(name, rest, logits.shape)
            if lead is None:
                return None
            if name != "view" and not rows.hidden.is_contiguous():
                return rows.copy(rows.hidden.reshape(*lead, rows.hidden.shape[-1]))
            return rows.view(lambda tensor: tensor.view(*lead, tensor.shape[-1]))
        case "split", (int(size), *dims):
            dim = dims[0] if dims else options.get("dim", 0)
            if dim % logits.ndim != 0 or logits.ndim < 2:
                return None
            return tuple(logits[start : start + size] for start in range(0, logits.shape[0], size))
        case _:
            return None


def _argmax(logits: DeferredLogits, dim: int | None = None, keepdim: bool = False) -> Tensor | None:
    """Trainers report token accuracy from the logits: rows are enough for that, too."""
    if dim is None or dim % logits.ndim != logits.ndim - 1:
        return None
    rows = logits.rows
    with torch.no_grad():
        parts = torch.split(rows.hidden.reshape(-1, rows.hidden.shape[-1]), rows.source.head.chunk_rows)
        best = torch.cat([rows.logits(part).argmax(-1) for part in parts]).reshape(logits.shape[:-1])
    return best.unsqueeze(-1) if keepdim else best


def defer_head(head: HeadCall, hidden: Tensor) -> DeferredLogits:
    """Stand-in for `head.forward(hidden)`, [..., D] -> [..., V]."""
    hidden = hidden.contiguous()
    return LogitRows(_Source(head, hidden, head.dtype), hidden).defer()
