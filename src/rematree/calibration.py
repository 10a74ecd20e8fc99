"""Measure the device that is here: rates of matmuls by dtype, attention, bandwidth, launches; the result is a profile.

Each figure is the best of a few runs, as whatever else the machine does can only add. What cannot run on the device
(a dtype without kernels, 4-bit weights without bitsandbytes) is left out of the profile and priced as its neighbours.
"""

import datetime
import importlib.util
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F

from rematree.pricing.devices import (
    CONTEXT_BYTES,
    MEASURED,
    Device,
    Profile,
    default_efficiency,
)
from rematree.pricing.on_cuda import seconds_of
from rematree.pricing.workload import Kind, attention_flops
from rematree.pricing.workspaces import workspace_here
from rematree.units import MIB

_SIDES: Final = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}
_STREAM_BYTES: Final = {"cpu": 64 * MIB, "cuda": 512 * MIB}
_DTYPES: Final = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_NARROW: Final = 16  # a LoRA adapter's rank
_RUNS: Final = 5
_ENOUGH_SECONDS: Final = 0.5
_HOPELESS_SECONDS: Final = 1.0  # emulated: larger matmuls would say the same, later
_LAUNCHES: Final = 200
_ATTENTION: Final = {"cpu": (1, 8, 1024, 64), "cuda": (4, 32, 4096, 128)}


class _Clock:
    """Best time of a few runs on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def best(self, run: Callable[[], Any]) -> float:
        """Shortest of a few runs; the first loads kernels and fills caches. On a CPU it counts if it was a long one."""
        if self._device.type == "cuda":
            return max(seconds_of(run, self._device), 1e-9)
        first = self._time(run)
        times = [first] if first > _ENOUGH_SECONDS else []
        while len(times) < _RUNS and sum(times) < _ENOUGH_SECONDS:
            times.append(self._time(run))
        return max(min(times), 1e-9)

    def _time(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def calibrate(
    device: torch.device,
    total_bytes: int,
    *,
    sides: Sequence[int] = (),
    stream_bytes: int = 0,
    report: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Measure `device`.

    Args:
        device: "cpu" or "cuda".
        total_bytes: Its memory.
        sides: Sides of the square matmuls; by default three that suit the kind of device.
        stream_bytes: Size of the tensors that bandwidth is measured on.
        report: Told what is being measured.
    Cost:
        Under a minute.
    """
    kind = device.type
    clock = _Clock(device)
    figures: dict[str, float] = {}
    streamed = stream_bytes or _STREAM_BYTES[kind]
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if kind == "cuda" else []):
        report("matmuls")
        rates = _matmuls(device, clock, sides or _SIDES[kind], figures)
        report("bandwidth")
        bandwidth = _bandwidth(device, clock, streamed, figures)
        shares = default_efficiency() | {str(Kind.MATMUL): 1.0}
        report("streams and gathers")
        shares |= _streams(device, clock, streamed, bandwidth, figures)
        shares |= _narrow(device, clock, max(sides or _SIDES[kind]), rates, figures)
        shares |= _dequantisation(device, clock, streamed, bandwidth, figures)
    report("attention")
    shares |= _attention(device, clock, rates, figures)
    launch = _launch(device, clock, figures)
    is_amd = kind == "cuda" and torch.version.hip is not None  # whose "capability" is the architecture's number
    name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine()
    measured = Device(
        name="calibrated-" + "-".join(name.lower().split()),
        title=f"{name}, measured",
        vendor="",
        backend="rocm" if is_amd else kind,
        memory_bytes=total_bytes,
        usable_bytes=total_bytes,
        usable_source=MEASURED,
        bytes_per_second=bandwidth,
        flops_per_second=rates,
        host_bytes_per_second=_host_link(device, clock, streamed, figures) if kind == "cuda" else None,
        efficiency=shares,
        launch_seconds=launch,
        context_bytes=CONTEXT_BYTES if kind == "cuda" else 0,
        workspace_bytes=workspace_here(torch.cuda.get_device_capability(device)[0]) if kind == "cuda" else 0,
        sources={"specification": "measured by rematree calibrate"},
        capability=torch.cuda.get_device_capability(device)[0] if kind == "cuda" and not is_amd else 0,
    )
    return Profile(measured, torch.__version__, datetime.datetime.now(tz=datetime.UTC).date().isoformat(), figures)


def _matmuls(device: torch.device, clock: _Clock, sides: Sequence[int], figures: dict[str, float]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for name, dtype in _DTYPES.items():
        for side in sides:
            try:
                a = torch.ones(side, side, dtype=dtype, device=device)
                seconds = clock.best(lambda a=a: a @ a)
            except RuntimeError:  # no kernel for this dtype
                break
            figures[f"matmul {name} {side}"] = 2 * side**3 / seconds
            rates[name] = max(rates.get(name, 0.0), figures[f"matmul {name} {side}"])
            if seconds > _HOPELESS_SECONDS:
                break
    return rates


def _bandwidth(device: torch.device, clock: _Clock, num_bytes: int, figures: dict[str, float]) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    figures["copy"] = 2 * num_bytes / clock.best(lambda: target.copy_(source))
    return figures["copy"]


def _streams(
    device: torch.device, clock: _Clock, num_bytes: int, bandwidth: float, figures: dict[str, float]
) -> dict[str, float]:
    count = num_bytes // 4
    x, y = torch.ones(count, device=device), torch.ones(count, device=device)
    figures["elementwise"] = 3 * num_bytes / clock.best(lambda: x * y)
    figures["dropout"] = (2 * num_bytes + count) / clock.best(lambda: torch.native_dropout(x, 0.1, True))
    width = 1024
    rows = max(1, count // width)
    table = torch.ones(rows, width, device=device)
    index = torch.randint(rows, (max(1, rows // 2),), device=device)
    moved = index.numel() * (2 * width * 4 + 8)
    figures["gather"] = moved / clock.best(lambda: F.embedding(index, table))
    part = max(1, count // 4)
    weight, *others = (torch.ones(part, device=device) for _ in range(4))
    weight.grad = others[0]
    stepper = torch.optim.AdamW([weight.requires_grad_()], lr=1e-6, fused=True)
    figures["optimizer"] = 7 * part * 4 / clock.best(stepper.step)
    kinds = {Kind.ELEMENTWISE: "elementwise", Kind.GATHER: "gather", Kind.OPTIMIZER: "optimizer"}
    return {str(kind): figures[name] / bandwidth for kind, name in kinds.items()}


def _narrow(
    device: torch.device, clock: _Clock, side: int, rates: dict[str, float], figures: dict[str, float]
) -> dict[str, float]:
    a, b = torch.ones(side, side, device=device), torch.ones(side, _NARROW, device=device)
    figures["narrow matmul fp32"] = 2 * side * side * _NARROW / clock.best(lambda: a @ b)
    return {str(Kind.SMALL_MATMUL): figures["narrow matmul fp32"] / rates["fp32"]}


def _dequantisation(
    device: torch.device, clock: _Clock, num_bytes: int, bandwidth: float, figures: dict[str, float]
) -> dict[str, float]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    try:
        from bitsandbytes import functional

        library: Any = functional
        count = num_bytes // 8
        packed, state = library.quantize_4bit(torch.ones(count, dtype=torch.bfloat16, device=device), quant_type="nf4")
        seconds = clock.best(lambda: library.dequantize_4bit(packed, state))
    except (ImportError, OSError, RuntimeError):  # installed, but not for this device
        return {}
    figures["dequantise nf4"] = (count * 2 + count / 2 + count / 16) / seconds
    return {str(Kind.DEQUANTISE): figures["dequantise nf4"] / bandwidth}


def _attention(
    device: torch.device, clock: _Clock, rates: dict[str, float], figures: dict[str, float]
) -> dict[str, float]:
    name = "bf16" if device.type == "cuda" and "bf16" in rates else "fp32"
    try:
        return _attention_of(_ATTENTION[device.type], name, device, clock, rates, figures)
    except torch.OutOfMemoryError:
        return _attention_of(_ATTENTION["cpu"], name, device, clock, rates, figures)


def _attention_of(
    shape: tuple[int, int, int, int],
    name: str,
    device: torch.device,
    clock: _Clock,
    rates: dict[str, float],
    figures: dict[str, float],
) -> dict[str, float]:
    make = torch.ones(shape, dtype=_DTYPES[name], device=device)
    q, k, v = (make.clone().requires_grad_() for _ in range(3))
    with torch.no_grad():
        forward = clock.best(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    grad = torch.ones_like(out)
    backward = clock.best(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    figures[f"attention {name}"] = attention_flops(shape, shape, shape, causal=True) / forward
    work = attention_flops(shape, shape, shape, causal=True, backward=True)
    figures[f"attention backward {name}"] = work / backward
    return {
        str(Kind.ATTENTION): figures[f"attention {name}"] / rates[name],
        str(Kind.ATTENTION_BACKWARD): figures[f"attention backward {name}"] / rates[name],
    }


def _launch(device: torch.device, clock: _Clock, figures: dict[str, float]) -> float:
    x = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1)

    figures["launch seconds"] = clock.best(many) / _LAUNCHES
    return figures["launch seconds"]


def _host_link(device: torch.device, clock: _Clock, num_bytes: int, figures: dict[str, float]) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8).pin_memory()
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    figures["host to device"] = num_bytes / clock.best(lambda: target.copy_(source, non_blocking=True))
    return figures["host to device"]
