"""Adapters of one input in a compiled block: their products with it, which are narrow, as one.

The layers behind one norm (q, k and v; gate and up) each multiply the same fp32 input by a matrix of some eight
columns, and backward the same input by as many rows: each time the input is all that the product reads, and its time.
Side by side in one matrix it is read once.

Letters: T tokens, I features, N columns or rows of an adapter.

Imported only to compile.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch._guards import detect_fake_mode
from torch._inductor.pattern_matcher import stable_topological_sort

_ATEN: Final = torch.ops.aten
_NARROW: Final = 64  # N of one product


def join_products(graph: Any) -> int:
    """Make one product of all that share a wide operand, where the others are narrow. fp32 on a CPU only.

    Args:
        graph: torch.fx's; its nodes have their fake values in `meta["val"]`.
    Returns:
        How many products are parts of others now.
    """
    groups: dict[tuple[Any, int], list[Any]] = {}
    for node in graph.nodes:
        if node.target is _ATEN.mm.default and node.meta["val"].dtype is torch.float32:
            for side in (0, 1):
                if _is_narrow(node, side):
                    groups.setdefault((node.args[side], side), []).append(node)
    joined = 0
    for (wide, side), nodes in groups.items():
        if len(nodes) > 1 and not _depends(nodes, side):
            _join(graph, wide, side, nodes)
            joined += len(nodes)
    if joined:
        stable_topological_sort(graph)
    return joined


def _is_narrow(node: Any, side: int) -> bool:
    """Whether the operand beside the one at `side` is narrow, and that one is not."""
    wide, narrow = (node.args[place].meta["val"] for place in (side, 1 - side))
    width, length = narrow.shape[1 - side], wide.shape[side]
    if wide.device.type != "cpu" or not isinstance(width, int) or width > _NARROW:
        return False
    return not isinstance(length, int) or length > _NARROW


def _depends(nodes: Sequence[Any], side: int) -> bool:
    """Whether the narrow operand of one of `nodes` is made from the result of another."""
    results = set(nodes)
    seen: set[Any] = set()
    waiting = [node.args[1 - side] for node in nodes]
    while waiting:
        node = waiting.pop()
        if node in results:
            return True
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _join(graph: Any, wide: Any, side: int, nodes: Sequence[Any]) -> None:
    along = 1 - side  # columns of what is on the right, rows of what is on the left

    def call(function: Any, *args: Any) -> Any:
        made = graph.call_function(function, args)
        values = torch.fx.node.map_arg(args, lambda node: node.meta["val"])
        with detect_fake_mode(values) or contextlib.nullcontext():
            made.meta["val"] = function(*values)
        return made

    with graph.inserting_after(nodes[-1]):
        narrow = call(_ATEN.cat.default, [node.args[1 - side] for node in nodes], along)
    with graph.inserting_after(narrow):
        total = call(_ATEN.mm.default, *((wide, narrow) if side == 0 else (narrow, wide)))
    start, after = 0, total
    for node in nodes:
        end = start + node.meta["val"].shape[along]
        with graph.inserting_after(after):
            after = call(_ATEN.slice.Tensor, total, along, start, end)
        if side == 1:  # gradients of weights: each has memory of its own
            with graph.inserting_after(after):
                after = call(_ATEN.clone.default, after)
        start = end
        node.replace_all_uses_with(after)
        graph.erase_node(node)
