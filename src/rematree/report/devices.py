"""Devices and measured profiles as tables."""

from collections.abc import Sequence

from rematree.pricing.devices import Device, Profile
from rematree.report.tables import Columns
from rematree.units import format_bytes, format_seconds

_TERA, _GIGA = 1e12, 1e9


def device_columns(devices: Sequence[Device]) -> Columns:
    """One line a device."""
    headers = ("device", "", "memory", "usable", "GB/s", "bf16", "fp16", "fp32", "host GB/s")
    rows = [
        (
            device.name,
            device.title,
            format_bytes(device.memory_bytes),
            ("~" if device.usable_source.startswith("estimated") else "") + format_bytes(device.usable_bytes),
            f"{device.bytes_per_second / _GIGA:g}",
            *(_rate(device, dtype) for dtype in ("bf16", "fp16", "fp32")),
            "" if device.host_bytes_per_second is None else f"{device.host_bytes_per_second / _GIGA:.1f}",
        )
        for device in devices
    ]
    return Columns(
        headers,
        rows,
        frozenset(range(2, len(headers))),
        below=("rates in 1e12 FLOP/s, dense; ~ is estimated; an empty rate is not published, see docs/devices.md",),
    )


def device_markdown(devices: Sequence[Device]) -> str:
    """The table of docs/devices.md."""
    dtypes = ("bf16", "fp16", "tf32", "fp32", "int8")
    headers = ("device", "name", "memory", "usable", "GB/s", *dtypes, "host GB/s", "source")
    rows = [
        (
            f"`{device.name}`",
            device.title,
            format_bytes(device.memory_bytes),
            ("~" if device.usable_source.startswith("estimated") else "") + format_bytes(device.usable_bytes),
            f"{device.bytes_per_second / _GIGA:g}",
            *(_rate(device, dtype) for dtype in dtypes),
            "" if device.host_bytes_per_second is None else f"{device.host_bytes_per_second / _GIGA:.1f}",
            device.sources["specification"] + (f" ({device.note})" if device.note else ""),
        )
        for device in devices
    ]
    lines = [headers, tuple("--" for _ in headers), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _rate(device: Device, dtype: str) -> str:
    return f"{device.flops_per_second[dtype] / _TERA:g}" if dtype in device.flops_per_second else ""


def figure_columns(profile: Profile) -> Columns:
    """Every measurement of a profile."""
    device = profile.device
    rows = [(name, _figure(name, value)) for name, value in profile.figures.items()]
    rows.append(("memory", format_bytes(device.memory_bytes)))
    return Columns(("what", device.title), rows, frozenset({1}))


def _figure(name: str, value: float) -> str:
    if "seconds" in name:
        return format_seconds(value)
    if "matmul" in name or "attention" in name:
        return f"{value / _TERA:.3g} TFLOP/s"
    return f"{value / _GIGA:.3g} GB/s"
