"""Devices to plan for, whether they are here or not: memory, rates and links, each figure with its source.

The table is `data/devices.toml`; docs/devices.md explains it. A device can also come from a profile that
`rematree calibrate` measured on another machine.
"""

import dataclasses
import difflib
import functools
import importlib.resources
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rematree.errors import UsageError
from rematree.pricing.workspaces import (
    HOPPER,
    MATMUL_THREADS,
    cublas_workspace_bytes,
    hipblas_workspace_bytes,
    workspace_here,
)
from rematree.typed_json import read_typed
from rematree.units import GIB, MIB

if TYPE_CHECKING:
    from rematree.pricing.price import Cost, Overhead
    from rematree.pricing.roofline import Roofline

PROFILE_FORMAT: Final = 1
_TABLE: Final = "data/devices.toml"
_SUGGESTIONS: Final = 3
# GT/s of a lane; 128 of 130 bits carry data.
_PCIE_LANE: Final = {3: 8e9, 4: 16e9, 5: 32e9}
_PCIE_ENCODING: Final = 128 / 130
# A driver keeps a few percent for itself where no figure is known; Metal lets a process have about three quarters.
_DRIVER_SHARE: Final = 0.97
_METAL_SHARE: Final = 0.75
# CUDA on Linux offers 260 to 520 MiB less than the total that nvidia-smi shows, before any context: totals in torch's
# out-of-memory messages, as users quote them, of T4, L4, A10G, RTX 4090 and 5090, L40S and H100.
_KEPT_BY_DRIVER: Final = 512 * MIB
# Not measured on GPU: estimated, the context with the kernels a fine-tuning step loads.
CONTEXT_BYTES: Final = 512 * MIB
_LAUNCH_SECONDS: Final = 5e-6
_CPU: Final = "cpu"
MEASURED: Final = "measured"  # what a profile says of where its usable memory is from


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: What is typed: "rtx-4090".
        title: What it is called.
        vendor: "nvidia", "amd", "apple"; "" for a CPU.
        backend: "cuda", "rocm", "mps" or "cpu".
        memory_bytes: Nominal.
        usable_bytes: What CUDA offers, after ECC, firmware and what the driver keeps; the CUDA context comes out of it
            and has a line of its own in a plan's ledger. Estimated (see `usable_source`) where no figure is known.
        usable_source: How `usable_bytes` was obtained.
        bytes_per_second: Memory bandwidth.
        flops_per_second: Dense peak by dtype: "bf16", "fp16", "tf32", "fp32", "int8". Empty when none is published.
        host_bytes_per_second: To or from the host, one direction; None when memory is shared with it.
        efficiency: Fraction of the peak reached, by `rematree.pricing.workload.Kind`.
        launch_seconds: Least time between two ops.
        context_bytes: Of the CUDA context with its loaded kernels.
        workspace_bytes: Workspace of cuBLAS, or of hipBLAS, in one thread.
        sources: Document of each group of figures.
        note: What a reader should know.
        capability: Major number of the compute capability, from Hopper (9) on and below Ampere (8); 0 for those
            between and for other vendors.
    """

    name: str
    title: str
    vendor: str
    backend: str
    memory_bytes: int
    usable_bytes: int
    usable_source: str
    bytes_per_second: float
    flops_per_second: Mapping[str, float]
    host_bytes_per_second: float | None
    efficiency: Mapping[str, float]
    launch_seconds: float
    context_bytes: int
    workspace_bytes: int
    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    note: str = ""
    capability: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether its figures are from a profile, not from the table."""
        return self.usable_source == MEASURED

    @property
    def overhead(self) -> "Overhead":
        """What it takes beside the tensors of a step; nothing on a CPU."""
        from rematree.pricing.price import Overhead

        caches = self.backend in {"cuda", "rocm"}
        return Overhead(caches, self.context_bytes, MATMUL_THREADS * self.workspace_bytes)

    def roofline(self, *, tf32: bool = False) -> "Roofline":
        """Prices ops for this device.

        Args:
            tf32: fp32 matmuls run in TF32, which torch leaves off.
        Raises:
            UsageError: no rate of the device is published.
        """
        from rematree.pricing.roofline import Rates, Roofline
        from rematree.pricing.workload import Kind

        if not self.flops_per_second:
            raise UsageError(f"no FLOP rate of {self.title} is published, so its steps cannot be timed from here")
        return Roofline.of(
            Rates(
                self.flops_per_second,
                self.bytes_per_second,
                {Kind(kind): share for kind, share in self.efficiency.items()},
                self.launch_seconds,
                overlaps=self.backend != _CPU,
                tf32=tf32,
            ),
            self.overhead,
        )


@dataclass(frozen=True)
class Profile:
    """What was measured, and with what.

    Attributes:
        device: The device as measured; efficiencies are in its rates already where they were measured.
        torch: Version of torch.
        measured: Day, as "2026-11-24".
        figures: Every single measurement, for the reader: "matmul bf16 4096" -> FLOP/s, "copy" -> bytes/s ...
    """

    device: Device
    torch: str
    measured: str
    figures: Mapping[str, float]

    def to_json(self) -> str:
        """Indented JSON; `read_profile` gives an equal device back."""
        return json.dumps({"format": PROFILE_FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str, place: str) -> "Profile":
        """Read what `to_json` wrote.

        Args:
            text: The JSON.
            place: Name of the file, for errors.
        Raises:
            UsageError: not JSON, not a profile, of another format version, or with rates no device can have.
        """
        again = ["rematree calibrate -o profile.json"]
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place} is no device profile: it is not JSON", remedies=again) from error
        if not isinstance(data, dict) or "format" not in data:
            raise UsageError(f"{place} is no device profile: no format version in it", remedies=again)
        entries: dict[str, Any] = {**data}
        version: Any = entries.pop("format")
        if type(version) is not int or version != PROFILE_FORMAT:
            raise UsageError(
                f"{place} is a device profile of another format version; this library reads version {PROFILE_FORMAT}",
                remedies=again,
            )
        try:
            profile: Profile = read_typed(cls, entries, "")
            _check(profile.device)
        except ValueError as error:
            raise UsageError(f"{place} is no device profile: {error}", remedies=again) from error
        return profile


def _check(device: Device) -> None:
    positive = {
        "memory_bytes": device.memory_bytes,
        "usable_bytes": device.usable_bytes,
        "bytes_per_second": device.bytes_per_second,
        **{f"flops_per_second[{name!r}]": rate for name, rate in device.flops_per_second.items()},
        **{f"efficiency[{name!r}]": share for name, share in device.efficiency.items()},
    }
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"device.{name}: expected a positive number, found {value}")


def read_profile(path: Path) -> Device:
    """The device of the profile in the file at `path`.

    Raises:
        UsageError: there is no such file, or it is no profile.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"there is no device profile at {path}", remedies=[f"rematree calibrate -o {path}"]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the device profile {path}: {error}") from error
    return Profile.from_json(text, str(path)).device


@dataclass(frozen=True)
class _Entry:
    """A line of the table as it stands in the file."""

    name: str
    title: str
    vendor: str
    backend: str
    aliases: tuple[str, ...]
    memory_gib: int
    bandwidth_gb_per_second: float
    tflops: Mapping[str, float]
    efficiency: str
    sources: Mapping[str, str]
    capability: int = 0
    architecture: str = ""
    driver_mib: int | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    host_gb_per_second: float | None = None
    note: str = ""


@functools.cache
def _table() -> tuple[Mapping[str, Mapping[str, float]], tuple[_Entry, ...]]:
    text = importlib.resources.files("rematree").joinpath(_TABLE).read_text(encoding="ascii")
    data = tomllib.loads(text)
    shares: dict[str, dict[str, float]] = {}
    for entry in data["efficiency"]:
        name: str = entry.pop("name")
        shares[name] = read_typed(Mapping[str, float], entry, f"efficiency.{name}")
    absent: dict[str, Any] = {
        "capability": 0,
        "architecture": "",
        "driver_mib": None,
        "pcie_generation": None,
        "pcie_lanes": None,
        "host_gb_per_second": None,
        "note": "",
    }
    entries: list[_Entry] = [
        read_typed(_Entry, {**absent, **entry}, f"device {entry.get('name')}") for entry in data["device"]
    ]
    return shares, tuple(entries)


def _device(entry: _Entry) -> Device:
    shares, _ = _table()
    memory = entry.memory_gib * GIB
    if entry.driver_mib is not None:
        usable, source = entry.driver_mib * MIB - _KEPT_BY_DRIVER, f"{entry.sources['driver_mib']}, less 512 MiB"
    else:
        share = _METAL_SHARE if entry.backend == "mps" else _DRIVER_SHARE
        usable, source = int(memory * share), f"estimated: {share:.0%} of the nominal memory"
    link = None if entry.host_gb_per_second is None else entry.host_gb_per_second * 1e9
    if entry.pcie_generation is not None and entry.pcie_lanes is not None:
        link = _PCIE_LANE[entry.pcie_generation] * entry.pcie_lanes / 8 * _PCIE_ENCODING
    workspaces = {"cuda": cublas_workspace_bytes(entry.capability), "rocm": hipblas_workspace_bytes(entry.architecture)}
    return Device(
        name=entry.name,
        title=entry.title,
        vendor=entry.vendor,
        backend=entry.backend,
        memory_bytes=memory,
        usable_bytes=usable,
        usable_source=source,
        bytes_per_second=entry.bandwidth_gb_per_second * 1e9,
        flops_per_second={name: rate * 1e12 for name, rate in entry.tflops.items()},
        host_bytes_per_second=link,
        efficiency=shares[entry.efficiency],
        launch_seconds=_LAUNCH_SECONDS,
        context_bytes=CONTEXT_BYTES if entry.backend in workspaces else 0,
        workspace_bytes=workspaces.get(entry.backend, 0),
        sources=entry.sources,
        note=entry.note,
        capability=entry.capability,
    )


def overhead_of(cost: "Cost | None", device_type: str) -> "Overhead":
    """What a step takes beside its tensors: on the device that `cost` stands for, or on the one that is here."""
    from rematree.pricing.price import Overhead

    stated: Overhead | None = getattr(cost, "overhead", None)
    if stated is not None or device_type != "cuda":
        return stated or Overhead()
    import torch

    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else HOPPER
    return Overhead(True, CONTEXT_BYTES, MATMUL_THREADS * workspace_here(major))


def default_efficiency() -> dict[str, float]:
    """Fractions of the peak that are assumed where none are measured, by kind of work."""
    return dict(_table()[0]["default"])


def known_devices() -> list[Device]:
    """Every device of the table, in its order."""
    return [_device(entry) for entry in _table()[1]]


def aliases() -> dict[str, str]:
    """Name of the device that each alias means."""
    return {alias: entry.name for entry in _table()[1] for alias in entry.aliases}


def find_device(name: str) -> Device:
    """The device called `name`, or that of the profile in a file.

    Args:
        name: A name or alias of the table, in any case, with "-", "_" or spaces; or the path of a profile that
            `rematree calibrate` wrote.
    Raises:
        UsageError: no such device (names the three nearest), or not a profile.
    """
    if name.endswith(".json") or "/" in name or "\\" in name:
        return read_profile(Path(name))
    wanted = _plain(name)
    others = aliases()
    by_name = {entry.name: entry for entry in _table()[1]}
    found = by_name.get(others.get(wanted, wanted))
    if found is not None:
        return _device(found)
    spelled = {**{each: each for each in by_name}, **others}
    close = difflib.get_close_matches(wanted, spelled, n=len(spelled), cutoff=0.0)
    nearest = list(dict.fromkeys(spelled[each] for each in close))[:_SUGGESTIONS]
    raise UsageError(
        f"unknown device {name!r}; the nearest are {', '.join(nearest)}",
        remedies=["rematree devices   (lists them)", "--device ./profile.json   (from rematree calibrate)"],
    )


def _plain(name: str) -> str:
    text = "-".join(name.strip().lower().replace("_", " ").replace("-", " ").split())
    return text.removeprefix("nvidia-").removeprefix("amd-").removeprefix("apple-").removeprefix("geforce-")
