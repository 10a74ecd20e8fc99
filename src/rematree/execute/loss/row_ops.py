"""What is done to logits that are not computed: written down, or done on the rows they would be computed from.

Casts, scaling and soft-capping by scalars are written down; slicing and reshaping of rows is done on the hidden states.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from rematree.execute.loss.logit_rows import LogitRows
from rematree.execute.loss.rows import leading_shape, row_index

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


def record(rows: LogitRows, name: str, func: Any, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What `func(logits, *rest, **options)` is without logits: rows, a tuple of them, or a tensor.

    `rows` themselves: the same logits. None: it needs them.
    """
    if name == "cross_entropy":
        return rows.source.head.cross_entropy(rows, *rest, **options)
    if name in _CASTS or name == "to":
        return _record_cast(rows, name, rest, options)
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
        return rows
    if name == "argmax":
        return _argmax(rows, *rest, **options)
    return _record_rows(rows, name, rest, options)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.requires_grad and not value.is_complex()
    return value is None or isinstance(value, int | float | str | torch.memory_format)


def _record_cast(rows: LogitRows, name: str, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if name == "to":
        if any(isinstance(value, Tensor) for value in rest) or options.keys() - {"device", "dtype", "non_blocking"}:
            return None
        parse = cast("Callable[..., tuple[Any, Any, Any, Any]]", torch._C._nn._parse_to)  # pyright: ignore
        device, dtype, _, memory_format = parse(*rest, **options)
        if memory_format is not None or (device is not None and torch.device(device) != rows.device):
            return None
    else:
        if rest or options:
            return None
        dtype = _CASTS[name]
    if dtype is None or dtype == rows.source.dtype:
        return rows
    if not dtype.is_floating_point:
        return None
    return rows.copy(rows.hidden, lambda real: real.to(dtype), dtype)


def _record_rows(rows: LogitRows, name: str, rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Views and copies of rows: whatever leaves the last dimension whole is done on the hidden states."""
    match name, rest:
        case "contiguous", () if not options:
            return rows if rows.hidden.is_contiguous() else rows.copy(rows.hidden)
        case "__getitem__", (index,):
            items = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
            whole_rows = row_index(items, rows.shape)
            if whole_rows is None:
                return None
            if any(isinstance(item, Tensor) for item in items):
                return rows.copy(rows.hidden[whole_rows])
            return rows.view(lambda tensor: tensor[whole_rows])
        case "view" | "reshape" | "flatten", _ if not options:
            lead = leading_shape(name, rest, rows.shape)
            if lead is None:
                return None
            if name != "view" and not rows.hidden.is_contiguous():
                return rows.copy(rows.hidden.reshape(*lead, rows.hidden.shape[-1]))
            return rows.view(lambda tensor: tensor.view(*lead, tensor.shape[-1]))
        case "split", (int(size), *dims):
            dim = dims[0] if dims else options.get("dim", 0)
            if dim % len(rows.shape) != 0 or len(rows.shape) < 2:
                return None
            parts = (slice(start, start + size) for start in range(0, rows.shape[0], size))
            return tuple(_record_rows(rows, "__getitem__", (part,), {}) for part in parts)
        case _:
            return None


def _argmax(rows: LogitRows, dim: int | None = None, keepdim: bool = False) -> Tensor | None:
    """Trainers report token accuracy from the logits: rows are enough for that, too."""
    if dim is None or dim % len(rows.shape) != len(rows.shape) - 1:
        return None
    with torch.no_grad(), rows.source.head.switches.restored("the logits"):
        parts = torch.split(rows.hidden.reshape(-1, rows.hidden.shape[-1]), rows.source.head.chunk_rows)
        best = torch.cat([rows.logits(part).argmax(-1) for part in parts]).reshape(rows.shape[:-1])
    return best.unsqueeze(-1) if keepdim else best
