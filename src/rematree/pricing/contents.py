"""Contents of made-up tensors, for the few ops whose time or life depends on them.

What all tensors are filled with leaves every index at zero. A grouped matmul then has no rows in any group, and what
adds rows up adds all of them to one row, one after the other, which takes a GPU a hundred times as long.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

_aten: Any = torch.ops.aten
_MASKS: Final = (torch.bool, torch.uint8)


def with_values(func: Any, args: Any) -> Any:
    """The positional arguments of `func`, real tensors, with the contents they need; filled in place where they can."""
    prepare = _PREPARED.get(func)
    return args if prepare is None else prepare(*args) or args


def _balance_groups(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor | None = None, *_: Any) -> None:
    """Make the groups of a grouped matmul one size."""
    if ends is None:
        return
    # Groups split what both have in common where both are matrices, else the rows or columns of the one that is.
    whole = a.shape[1] if a.dim() == b.dim() else a.shape[0] if a.dim() == 2 else b.shape[1]
    ends.copy_(torch.arange(1, len(ends) + 1, device=ends.device) * whole // len(ends))


def _spread(index: torch.Tensor, below: int) -> None:
    """Any numbers below `below`; an element that is seen many times is one number."""
    index[tuple(slice(1) if stride == 0 else slice(None) for stride in index.stride())].random_(below)


def _spread_rows(_grad: torch.Tensor, index: torch.Tensor, rows: int, *_: Any) -> None:
    _spread(index, rows)


def _spread_along(target: torch.Tensor, dim: int, index: torch.Tensor, *_: Any) -> None:
    _spread(index, target.shape[dim])


def _spread_indices(target: torch.Tensor, indices: Any, *_: Any) -> None:
    dim = 0
    for index in indices:
        if index is not None and index.dtype in _MASKS:
            dim += index.dim()  # a mask stands for as many dimensions as it has
            continue
        if index is not None:
            _spread(index, target.shape[dim])
        dim += 1


def _seeds_on_host(*args: Any) -> Any:
    """The memory-efficient kernel's backward reads its two random numbers on the host, wherever it is told they are."""
    return tuple(a.cpu() if isinstance(a, torch.Tensor) and a.dim() == 0 else a for a in args)


_PREPARED: Final[Mapping[Any, Callable[..., Any]]] = {
    _aten._grouped_mm.default: _balance_groups,
    _aten.embedding_dense_backward.default: _spread_rows,
    _aten.index_add.default: _spread_along,
    _aten.index_add_.default: _spread_along,
    _aten.scatter_add.default: _spread_along,
    _aten.scatter_add_.default: _spread_along,
    _aten.index_put.default: _spread_indices,
    _aten.index_put_.default: _spread_indices,
    _aten._index_put_impl_.default: _spread_indices,
    _aten._scaled_dot_product_efficient_attention_backward.default: _seeds_on_host,
    _aten._efficient_attention_backward.default: _seeds_on_host,
}
