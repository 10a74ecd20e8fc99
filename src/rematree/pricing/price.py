"""Price of an op, what decides it, and who gives it.

The unit of price is one ATen op with its argument shapes, dtypes and strides.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, slots=True)
class OpPrice:
    """Price of one op.

    Attributes:
        seconds: Wall time on the device.
        workspace_bytes: Largest number of bytes live at once inside the op that it allocated itself, outputs included.
    """

    seconds: float
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Overhead:
    """What a device takes beside the tensors of a step.

    Attributes:
        caches: Memory comes from torch's caching allocator for GPUs: sizes are rounded, and segments counted.
        context_bytes: Of the CUDA context.
        library_bytes: Workspaces of cuBLAS.
    """

    caches: bool = False
    context_bytes: int = 0
    library_bytes: int = 0


class Cost(Protocol):
    """Prices ops."""

    def price(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        """Price of `func(*args, **kwargs)`, which gave `outputs`. Tensors may be fake."""
        ...


class Free:
    """Prices nothing: for runs in which only bytes matter and kernels' own are unknown."""

    def price(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        """No time, no hidden bytes."""
        return OpPrice(0.0, 0)


def tensors_in(*values: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested lists, tuples and dicts; op arguments hold nothing else. Ten times faster than a pytree."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


def price_key(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What decides the price of an op: which it is, tensor layouts, and the other arguments."""
    return (func, *(_key_of(value) for value in args), *((k, _key_of(v)) for k, v in kwargs.items()))


def _key_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple([_key_of(item) for item in value])
    return value


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all elements; views of one storage count each."""
    return sum(t.numel() * t.element_size() for t in tensors)
