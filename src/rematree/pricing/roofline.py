"""Seconds and hidden bytes of an op on a device that is not here, from its peak rates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

import torch

from rematree.pricing.price import OpPrice, Overhead, num_bytes, price_key
from rematree.pricing.workload import Kind, Work, work_of

_OVERHEAD_SECONDS: Final = 5e-6
_NAMES: Final = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "int8",
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second.

    Attributes:
        flops_per_second: Dense peak of the matmul units by dtype: "bf16", "fp16", "tf32", "fp32", "int8". A dtype that
            is not in it computes at the rate of "fp32", or the slowest there is; "int8", at the fastest.
        bytes_per_second: Memory bandwidth.
        efficiency: Fraction of the peak that real kernels reach, by kind of work. Of the FLOP rate for matmuls and
            attention, of the bandwidth for everything else.
        launch_seconds: Least time between two ops.
        overlaps: The host runs ahead of the device, so that a launch is only felt by ops shorter than it.
        tf32: Whether fp32 matmuls run in TF32 (`torch.backends.cuda.matmul.allow_tf32`; off by default).
    """

    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    efficiency: Mapping[Kind, float] = field(default_factory=dict[Kind, float])
    launch_seconds: float = _OVERHEAD_SECONDS
    overlaps: bool = False
    tf32: bool = False

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of the matmul units in `dtype`."""
        name = _NAMES.get(dtype, "fp32")
        if name == "fp32" and self.tf32:
            name = "tf32"
        known = self.flops_per_second
        otherwise = max(known.values()) if name == "int8" else known.get("fp32") or min(known.values())
        return known.get(name) or otherwise

    def seconds(self, work: Work) -> float:
        """Time of `work` at the stated efficiencies."""
        own = self.efficiency.get(work.kind, 1.0)
        streaming = own if not work.flops else self.efficiency.get(Kind.ELEMENTWISE, 1.0)
        busy = work.moved_bytes / (self.bytes_per_second * streaming)
        if work.flops:
            busy = max(busy, work.flops / (self.peak(work.dtype) * own))
        return max(busy, self.launch_seconds) if self.overlaps else busy + self.launch_seconds


class Roofline:
    """seconds = max(FLOPs / peak FLOP/s, bytes moved / bandwidth), each at a stated efficiency.

    Prices fake tensors on any device, whatever device it stands for.

    Args:
        flops_per_second: Peak of the matmul units, the same for every dtype.
        bytes_per_second: Memory bandwidth.
        efficiency: Fraction of both that real kernels reach, the same for every kind of work.
    Attributes:
        rates: What ops are priced with.
        overhead: What the device takes beside tensors; None if it is the device of the tensors that says.
    See Also:
        `Roofline.of`: with peaks by dtype and efficiencies by kind; `rematree.pricing.devices.Device.roofline`.
    """

    def __init__(self, flops_per_second: float, bytes_per_second: float, efficiency: float = 0.6) -> None:
        self.rates = Rates({"fp32": flops_per_second}, bytes_per_second, dict.fromkeys(Kind, efficiency))
        self.overhead: Overhead | None = None
        self._prices: dict[Any, OpPrice] = {}

    @classmethod
    def of(cls, rates: Rates, overhead: Overhead | None = None) -> Self:
        """A roofline with different rates for dtypes and kinds of work."""
        made = cls(1.0, 1.0)
        made.rates, made.overhead = rates, overhead
        return made

    def price(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        """Time by the roofline; hidden bytes count as the outputs', plus an unpacked 4-bit weight."""
        key = price_key(func, args, kwargs)
        price = self._prices.get(key)
        if price is None:
            work = work_of(func, args, kwargs, outputs)
            allocated = 0 if func._schema.is_mutable else num_bytes(outputs)  # what is written to was there before
            hidden = allocated + work.hidden_bytes
            price = self._prices[key] = OpPrice(self.rates.seconds(work), hidden)
        return price
