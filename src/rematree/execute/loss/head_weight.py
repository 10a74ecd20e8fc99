"""The gradient of an output embedding, summed over chunks of rows without a chunk's own gradient beside the sum."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from rematree.execute.loss.running_sum import added_in_place

_SLICES: Final = 8  # of the classes
_VIEWS: Final = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0"})


def past_views(node: Any) -> Any:
    """The node of the graph below what only changes the shape."""
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node


def is_product_with(node: Any, hidden: Tensor, params: Sequence[nn.Parameter]) -> bool:
    """Whether what `node` of the graph made is hidden @ weight.T and nothing else, with `params` = (weight,)."""
    node = past_views(node)
    if node is None or node.name() != "MmBackward0" or len(params) != 1:
        return False
    (left, _), (right, _) = node.next_functions
    left = past_views(left)
    if right is None or right.name() != "TBackward0":
        return False
    (right, _) = right.next_functions[0]
    return getattr(left, "variable", None) is hidden and getattr(right, "variable", None) is params[0]


def add_product(total: Tensor | None, grad: Tensor, hidden: Tensor) -> Tensor:
    """`total` + grad.T @ hidden, [V, D], in one buffer of at least fp32, an eighth of the classes at a time.

    Args:
        total: Of the chunks before, None at the first; overwritten.
        grad: Of the logits, [n, V].
        hidden: [n, D], in the dtype of `grad`.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    wide = torch.promote_types(grad.dtype, torch.float32)
    first = total is None
    if total is None:
        total = torch.empty(grad.shape[1], rows.shape[1], dtype=wide, device=grad.device)
    step = max(1, -(-grad.shape[1] // _SLICES))
    for start in range(0, grad.shape[1], step):
        part = slice(start, start + step)
        product = grad[:, part].t().mm(rows)
        if first:
            total[part] = product
        else:
            added_in_place(total[part], product)
        del product  # not beside the next one
    return total
