"""Products with few columns in a compiled block, the other way round.

The gradient of LoRA's second matrix is `G^T u` with G [T, O] and u [T, r], r some 8: as `(u^T G)^T` it takes half the
time on a CPU (856 and 428 us for O = 1536, T = 1024), because G is read row by row. The same products are summed, maybe
in another order: a difference by fp32 rounding.

Imported only to compile.
"""

from typing import Any, Final

import torch

_MM: Final = torch.ops.aten.mm.default
_NARROW: Final = 64  # columns at most
_WIDER: Final = 4  # how many times the other side


def turn_narrow_products(graph: Any) -> int:
    """Compute fp32 products of a transposed matrix with a narrow one as the transpose of the turned product.

    Args:
        graph: torch.fx's, of forward and backward; its nodes have their fake values in `meta["val"]`.
    Returns:
        How many were turned.
    """
    found = [node for node in graph.nodes if node.target is _MM and _faster_turned(*node.args)]
    for node in found:
        _turn(graph, node)
    return len(found)


def _faster_turned(left: Any, right: Any) -> bool:
    a, b = left.meta["val"], right.meta["val"]
    if a.device.type != "cpu" or a.dtype is not torch.float32:
        return False
    if not all(isinstance(size, int) for size in (*a.shape, *b.shape)):
        return False
    by_column = a.stride() == (1, a.shape[0]) and b.is_contiguous()
    return by_column and b.shape[1] <= _NARROW and a.shape[0] >= _WIDER * b.shape[1]


def _turn(graph: Any, node: Any) -> None:
    def call(func: Any, *args: Any, **kwargs: Any) -> Any:
        made = graph.call_function(func, args, kwargs)
        values = [arg.meta["val"] if isinstance(arg, torch.fx.Node) else arg for arg in args]
        made.meta = {"val": func(*values, **kwargs)}
        return made

    aten = torch.ops.aten
    left, right = node.args
    with graph.inserting_before(node), node.meta["val"].fake_mode:
        turned = call(_MM, call(aten.permute.default, right, [1, 0]), call(aten.permute.default, left, [1, 0]))
        back = call(aten.permute.default, turned, [1, 0])
        plain = call(aten.clone.default, back, memory_format=torch.contiguous_format)
    node.replace_all_uses_with(plain)
    graph.erase_node(node)
