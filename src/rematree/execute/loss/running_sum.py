"""A sum that grows in its own memory, in a wider dtype than what is added."""

from typing import Final

from torch import Tensor

_CAST_ELEMENTS: Final = 1 << 18  # that are cast at once, if that takes no more than the pieces below
_MOST_PIECES: Final = 8  # a simulated step has them, too


def added_in_place(total: Tensor, other: Tensor) -> Tensor:
    """`total.add_(other)`, [..., O]. A CPU kernel first casts all of another dtype: here, some rows at a time."""
    count = total.numel() // max(1, total.shape[-1])
    pieces = min(_MOST_PIECES, -(-total.numel() // _CAST_ELEMENTS))
    if total.device.type != "cpu" or other.dtype == total.dtype or pieces < 2:
        return total.add_(other)
    sums, rows = as_rows(total), as_rows(other)
    step = -(-count // pieces)
    for start in range(0, count, step):
        sums[start : start + step].add_(rows[start : start + step])
    return total


def as_rows(x: Tensor) -> Tensor:
    """[..., O] -> [T, O]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
