"""What an op has to do: FLOPs, bytes moved, bytes it hides, and which kind of work that is. From shapes alone.

Tensors may be fake. A causal attention is counted with the half of its scores that kernels skip; the backward of a
flash kernel with the scores it computes again.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch
from torch.utils.flop_counter import flop_registry

from rematree.pricing.price import num_bytes, tensors_in

_CONVOLUTION_BACKWARD: Final = torch.ops.aten.convolution_backward.default
_BITSANDBYTES: Final = "bitsandbytes"
# Narrower than one tile of a matmul kernel in some dimension: most of the tile is idle.
_TILE: Final = 128
_FORWARD_MATMULS: Final = (1, 1)  # scores from query and key; output from scores and value
_BACKWARD_MATMULS: Final = (3, 2)  # scores again, d(query), d(key); d(value), d(scores)


class Kind(StrEnum):
    """Kinds of work that reach different fractions of a device's peak."""

    MATMUL = "matmul"
    SMALL_MATMUL = "small_matmul"
    ATTENTION = "attention"
    ATTENTION_BACKWARD = "attention_backward"
    ELEMENTWISE = "elementwise"
    DEQUANTISE = "dequantise"
    GATHER = "gather"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Work:
    """One op's work.

    Attributes:
        kind: Decides the efficiency.
        flops: Multiplications and additions of its matmuls; 0 for anything else.
        dtype: What the matmul units compute in.
        moved_bytes: Read from and written to the device's memory.
        hidden_bytes: Allocated inside the op beside its outputs.
    """

    kind: Kind
    flops: int
    dtype: torch.dtype
    moved_bytes: int
    hidden_bytes: int = 0


def work_of(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Work:
    """The work of `func(*args, **kwargs)`, which gave `outputs`."""
    name = func.__name__.partition(".")[0]
    inputs = list(tensors_in(args, kwargs))
    dtype = next((t.dtype for t in inputs if t.dtype.is_floating_point), torch.float32)
    moved = num_bytes(inputs) + _written(func, args, kwargs, inputs, outputs)
    if func.namespace == _BITSANDBYTES:
        return _bitsandbytes(name, args, outputs, dtype, moved)
    if name in _GATHERS:
        return Work(Kind.GATHER, 0, dtype, _GATHERS[name](args, outputs))
    if name.startswith(("_fused_adam", "_fused_sgd", "_foreach_")):
        return Work(Kind.OPTIMIZER, 0, dtype, moved)
    if name in _GROUPED:
        flops = grouped_matmul_flops(args[0].shape, args[1].shape)
        return Work(Kind.MATMUL, flops, dtype, moved)
    if "attention" in name:
        found = _attention(func, name, args, kwargs)
        if found is not None:
            kind = Kind.ATTENTION_BACKWARD if "backward" in name else Kind.ATTENTION
            return Work(kind, found, dtype, moved)
    flops = _registered(func, args, kwargs, outputs)
    if flops:
        return Work(_matmul_kind(inputs, outputs), flops, dtype, moved)
    return Work(Kind.ELEMENTWISE, 0, dtype, moved)


def attention_flops(
    query: Iterable[int], key: Iterable[int], value: Iterable[int], *, causal: bool, backward: bool = False
) -> int:
    """FLOPs of a fused attention kernel.

    Args:
        query: Shape [batch, heads, rows, width].
        key: Shape [batch, key heads, columns, width].
        value: Shape [batch, key heads, columns, value width].
        causal: Row r sees columns 0 to r, as torch aligns them; the rest is skipped.
        backward: Five matmuls instead of two, one of them the scores computed again.
    """
    (batch, heads, rows, width), (_, _, columns, _), (*_, value_width) = query, key, value
    if causal:
        full = min(rows, columns)  # rows that see one column more than the row above
        pairs = full * (full + 1) // 2 + (rows - full) * columns
    else:
        pairs = rows * columns
    wide, valued = _BACKWARD_MATMULS if backward else _FORWARD_MATMULS
    return 2 * batch * heads * pairs * (wide * width + valued * value_width)


def grouped_matmul_flops(a: Iterable[int], b: Iterable[int]) -> int:
    """FLOPs of `_grouped_mm`: every row of a flat operand belongs to one group, so the groups add up to one matmul."""
    first, second = tuple(a), tuple(b)
    groups = first[0] if len(first) == len(second) == 3 else 1
    return 2 * groups * first[-2] * first[-1] * second[-1]


def _attention(func: Any, name: str, args: Any, kwargs: Any) -> int | None:
    named = {item.name: value for item, value in zip(func._schema.arguments, args, strict=False)}
    named.update(kwargs)
    query, key, value = (named.get(each) for each in ("query", "key", "value"))
    if query is None or key is None or value is None or query.dim() != 4:
        return None
    shapes = [query.shape, key.shape, value.shape]
    if name.startswith(("_flash_attention", "_efficient_attention")):
        if named.get("cum_seq_q", named.get("cu_seqlens_q")) is not None:
            return None  # packed rows: their lengths are values
        shapes = [(s[0], s[2], s[1], s[3]) for s in shapes]  # these take [batch, rows, heads, width]
    causal = bool(named.get("is_causal", False)) or bool(named.get("custom_mask_type", 0))
    return attention_flops(*shapes, causal=causal, backward="backward" in name)


def _bitsandbytes(name: str, args: Any, outputs: list[torch.Tensor], dtype: torch.dtype, moved: int) -> Work:
    if name.startswith("gemm_4bit"):
        # The kernels unpack the weight into the dtype of the input before they multiply (on a GPU only from a few
        # hundred rows on), with its scales in fp32; written once, read once.
        x, (rows, columns), blocksize = args[0], args[2], args[4]
        weight = rows * columns
        unpacked = weight * x.element_size() + -(-weight // blocksize) * torch.float32.itemsize
        kind = _matmul_kind([x], [x.new_empty(0)], extra=(rows, columns))
        return Work(kind, 2 * x.numel() * rows, x.dtype, moved + 2 * unpacked, unpacked)
    if name.startswith(("int8_linear_matmul", "int8_scaled_mm", "int8_mixed_scaled_mm")):
        a, b = (args[1], args[2]) if name.startswith("int8_mixed") else (args[0], args[1])
        return Work(Kind.MATMUL, 2 * a.numel() * b.shape[0], torch.int8, moved)
    if name.startswith("optimizer_update"):
        return Work(Kind.OPTIMIZER, 0, dtype, moved)
    return Work(Kind.DEQUANTISE, 0, dtype, moved)  # packing and unpacking: a table look-up an element


def _matmul_kind(inputs: list[torch.Tensor], outputs: list[torch.Tensor], *, extra: tuple[int, ...] = ()) -> Kind:
    matrices = [t for t in (*inputs, *outputs) if t.dim() >= 2]
    sides = [side for t in matrices for side in (t.shape[-1], math.prod(t.shape[-2:-1]))] + list(extra)
    return Kind.SMALL_MATMUL if min(sides, default=0) < _TILE else Kind.MATMUL


def _registered(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> int:
    counter = flop_registry.get(func.overloadpacket)
    if counter is None:
        return 0
    found: Any = outputs[0] if len(outputs) == 1 else tuple(outputs)
    if func is _CONVOLUTION_BACKWARD:  # its last argument says which of the three gradients there are
        left = iter(outputs)
        found = tuple(next(left) if wanted else None for wanted in args[-1])
    try:
        return int(counter(*args, **kwargs, out_val=found))
    except (TypeError, ValueError, AssertionError):  # an overload the counter does not know
        return 0


def _written(func: Any, args: Any, kwargs: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes written: outputs, and arguments changed in place that are not returned."""
    written = num_bytes(outputs)
    if func._schema.is_mutable and not outputs:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written += num_bytes(tensors_in(value))
    return written


def _read_by_index(args: Any, outputs: list[torch.Tensor]) -> int:
    """The rows that are asked for, not the table: read once, written once, and the indices."""
    index = num_bytes(t for t in tensors_in(args[1:]) if not t.dtype.is_floating_point)
    return 2 * num_bytes(outputs) + index


def _written_by_index(args: Any, outputs: list[torch.Tensor]) -> int:
    """A table filled with zeros, and the given rows read and added."""
    given = num_bytes(tensors_in(args))
    return num_bytes(outputs) + 2 * given


_GATHERS: Final[dict[str, Callable[[Any, list[torch.Tensor]], int]]] = {
    "embedding": _read_by_index,
    "index": _read_by_index,
    "index_select": _read_by_index,
    "gather": _read_by_index,
    "embedding_dense_backward": _written_by_index,
}
_GROUPED: Final = frozenset({"_grouped_mm", "_scaled_grouped_mm"})
