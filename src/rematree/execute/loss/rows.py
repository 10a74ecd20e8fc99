"""Which rows of the logits an index or a new shape leaves; None when it would touch the vocabulary."""

import math
from typing import Any

import torch
from torch import Tensor


def row_index(index: tuple[Any, ...], shape: torch.Size) -> tuple[Any, ...] | None:
    """`index` so that it fits the hidden states, None unless it takes rows whole."""
    consumed = 0
    for item in index:
        if isinstance(item, Tensor):
            consumed += item.ndim if item.dtype == torch.bool else 1
        elif isinstance(item, slice) or (isinstance(item, int) and not isinstance(item, bool)):
            consumed += 1
        elif item is not None and item is not Ellipsis:
            return None
    has_ellipsis = any(item is Ellipsis for item in index)
    if consumed < len(shape) and (not has_ellipsis or index[-1] is Ellipsis):
        return index
    last = index[-1]
    if not isinstance(last, slice) or last.indices(shape[-1]) != (0, shape[-1], 1):
        return None
    return (*index[:-1], slice(None))


def leading_shape(name: str, rest: tuple[Any, ...], shape: torch.Size) -> tuple[int, ...] | None:
    """All but the last dimension that `view`, `reshape` or `flatten` asks for, None if it cuts through rows."""
    if name == "flatten":
        start, end = (*rest, *(0, -1)[len(rest) :])
        start, end = start % len(shape), end % len(shape)
        if end >= len(shape) - 1 or start > end:
            return None
        return (*shape[:start], shape[start : end + 1].numel(), *shape[end + 1 : -1])
    sizes = rest[0] if len(rest) == 1 and not isinstance(rest[0], int) else rest
    if not isinstance(sizes, tuple | list) or not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    *lead, last = sizes
    num_rows = shape[:-1].numel()
    if -1 in lead:
        known = -math.prod(lead)
        lead[lead.index(-1)] = num_rows // known if known > 0 else -1
    return tuple(lead) if last in (shape[-1], -1) and math.prod(lead) == num_rows else None
