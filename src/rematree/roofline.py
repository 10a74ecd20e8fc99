"""Seconds and hidden bytes of an op on a device that is not here, from its peak rates."""

from typing import Any, Final

import torch
from torch.utils.flop_counter import flop_registry

from rematree.price import OpPrice, num_bytes, price_key, tensors_in

_OVERHEAD_SECONDS: Final = 5e-6


def _packed_matmul(func: Any, args: Any) -> tuple[int, int]:
    """FLOPs and hidden bytes of bitsandbytes' 4-bit matmul; zeros for any other op.

    Its kernels unpack the weight into the dtype of the input before they multiply (on a GPU only from a few hundred
    rows on), with its scales in fp32.
    """
    if func.namespace != "bitsandbytes" or not func.__name__.startswith("gemm_4bit"):
        return 0, 0
    x, (rows, columns), blocksize = args[0], args[2], args[4]
    weight = rows * columns
    return 2 * x.numel() * rows, weight * x.element_size() + -(-weight // blocksize) * torch.float32.itemsize


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    counter = flop_registry.get(func.overloadpacket)
    if counter is None:
        return 0
    try:
        return int(counter(*args, **kwargs, out_val=out))
    except (TypeError, ValueError, AssertionError):  # an overload the counter does not know
        return 0


class Roofline:
    """seconds = max(FLOPs / peak FLOP/s, bytes moved / bandwidth), each at a stated efficiency.

    Args:
        flops_per_second: Peak of the matmul dtype.
        bytes_per_second: Memory bandwidth.
        efficiency: Fraction of both that real kernels reach; 0.6 is typical of large matmuls.
    """

    def __init__(self, flops_per_second: float, bytes_per_second: float, efficiency: float = 0.6) -> None:
        self._flops_per_second = flops_per_second * efficiency
        self._bytes_per_second = bytes_per_second * efficiency
        self._prices: dict[Any, OpPrice] = {}

    def price(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        """Time by the roofline; hidden bytes count as the outputs', plus an unpacked 4-bit weight."""
        key = price_key(func, args, kwargs)
        price = self._prices.get(key)
        if price is None:
            moved = num_bytes(tensors_in(args, kwargs)) + num_bytes(outputs)
            flops, unpacked = _packed_matmul(func, args)
            flops += _flops(func, args, kwargs, outputs[0] if len(outputs) == 1 else tuple(outputs))
            seconds = max(flops / self._flops_per_second, (moved + 2 * unpacked) / self._bytes_per_second)
            price = self._prices[key] = OpPrice(seconds + _OVERHEAD_SECONDS, num_bytes(outputs) + unpacked)
        return price
