"""Wide casts in a compiled block, made for some rows at a time: an adapter's products read them, and nothing else does.

A LoRA layer in fp32 reads its 16-bit input, and backward the 16-bit gradient of its output, as fp32: twice the bytes of
either, for a product of few columns. As a whole, such a cast is the largest tensor of a block, and there are up to
three at once. Here each product is made of products of some rows, whose cast also stays in the caches. A sum over rows
is a sum of sums then: it is rounded elsewhere.

Letters: T tokens, C features, N columns or rows of the other operand.

Imported only to compile.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._guards import detect_fake_mode

from rematree.units import MIB

_ATEN: Final = torch.ops.aten
_CAST: Final = torch.ops.prims.convert_element_type.default
_VIEWS: Final = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)
_SLICE: Final = 2 * MIB  # of a cast that is there at once
_LARGE: Final = 2 * _SLICE  # smaller ones are made whole
_MOST_SLICES: Final = 16  # each is several nodes for the compiler
_NARROW: Final = 64  # columns of the other operand; with more the product pays for its operand


@dataclass(frozen=True)
class _Cast:
    """An operand of a product that is a 16-bit tensor in fp32.

    Attributes:
        source: Node of the tensor, contiguous, T * C numbers.
        rows: T.
        columns: C.
        factor: What the cast is multiplied by; None: nothing.
        turned: The operand is [C, T].
    """

    source: Any
    rows: int
    columns: int
    factor: float | None
    turned: bool


def slice_casts(graph: Any) -> int:
    """Make products of large casts in slices of rows, where the other operand is narrow. CPU and static sizes only.

    Args:
        graph: torch.fx's; its nodes have their fake values in `meta["val"]`.
    Returns:
        How many products are in slices now.
    """
    made: dict[Any, Any] = {}
    count = 0
    for node in [node for node in graph.nodes if node.target is _ATEN.mm.default]:
        left, right = (_cast_of(argument) for argument in node.args)
        with graph.inserting_before(node):
            if left is not None and node.args[1].meta["val"].shape[1] <= _NARROW:
                result = _in_slices(graph, made, left, functools.partial(_left, graph, node.args[1], left))
                joins_rows = not left.turned
            elif right is not None and not right.turned and node.args[0].meta["val"].shape[0] <= _NARROW:
                result = _in_slices(graph, made, right, functools.partial(_right, graph, node.args[0]))
                joins_rows = False
            else:
                continue
            add = functools.partial(_call, graph, _ATEN.add.Tensor)
            total = _call(graph, _ATEN.cat.default, result) if joins_rows else functools.reduce(add, result)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        count += 1
    return count


def _cast_of(node: Any) -> _Cast | None:
    """What `node` is, if it is a large cast."""
    value = node.meta["val"]
    turned = node.target is _ATEN.t.default or (node.target is _ATEN.permute.default and list(node.args[1]) == [1, 0])
    rows, columns = reversed(value.shape) if turned else value.shape
    if value.device.type != "cpu" or not all(isinstance(n, int) for n in (rows, columns)) or value.nbytes < _LARGE:
        return None
    inner = _behind_views(node.args[0] if turned else node)
    factor = None
    if inner.target is _ATEN.mul.Tensor and isinstance(inner.args[1], int | float):
        inner, factor = _behind_views(inner.args[0]), float(inner.args[1])
    if inner.target is not _CAST or value.dtype is not torch.float32:
        return None
    source = inner.args[0]
    given = source.meta["val"]
    if given.itemsize != 2 or not given.is_contiguous() or given.shape[-1] != columns:
        return None
    return _Cast(source, rows, columns, factor, turned)


def _behind_views(node: Any) -> Any:
    while node.target in _VIEWS:
        node = node.args[0]
    return node


def _in_slices(graph: Any, made: dict[Any, Any], cast: _Cast, product: Callable[[Any, int, int], Any]) -> list[Any]:
    """`product` of each slice: its node [rows, C], first row, last row + 1."""
    pieces = min(_MOST_SLICES, math.ceil(4 * cast.rows * cast.columns / _SLICE))
    step = math.ceil(cast.rows / pieces)
    results: list[Any] = []
    for start in range(0, cast.rows, step):
        end = min(start + step, cast.rows)
        key = (cast.source, cast.factor, start)
        if key not in made:
            flat = _call(graph, _ATEN.view.default, cast.source, [cast.rows, cast.columns])
            part = _call(graph, _CAST, _call(graph, _ATEN.slice.Tensor, flat, 0, start, end), torch.float32)
            made[key] = part if cast.factor is None else _call(graph, _ATEN.mul.Tensor, part, cast.factor)
        results.append(product(made[key], start, end))
    return results


def _left(graph: Any, other: Any, cast: _Cast, part: Any, start: int, end: int) -> Any:
    if not cast.turned:
        return _call(graph, _ATEN.mm.default, part, other)
    rows = _call(graph, _ATEN.slice.Tensor, other, 0, start, end)
    return _call(graph, _ATEN.mm.default, _call(graph, _ATEN.permute.default, part, [1, 0]), rows)


def _right(graph: Any, other: Any, part: Any, start: int, end: int) -> Any:
    return _call(graph, _ATEN.mm.default, _call(graph, _ATEN.slice.Tensor, other, 1, start, end), part)


def _call(graph: Any, function: Any, *args: Any) -> Any:
    made = graph.call_function(function, args)
    values = torch.fx.node.map_arg(args, lambda node: node.meta["val"])
    with detect_fake_mode(values) or contextlib.nullcontext():
        made.meta["val"] = function(*values)
    return made
