"""The table of devices, their names, and profiles that are carried to another machine."""

import contextlib
import dataclasses
import errno
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from command_line import rematree
from rematree.calibration import calibrate
from rematree.cli.main import main
from rematree.errors import UsageError
from rematree.finetune.target import Target
from rematree.observation.attention_kernels import choose_kernel
from rematree.pricing.devices import (
    Device,
    Profile,
    aliases,
    find_device,
    known_devices,
    overhead_of,
    read_profile,
)
from rematree.pricing.roofline import Rates, Roofline
from rematree.pricing.workload import Kind
from rematree.pricing.workspaces import cublas_workspace_bytes, hipblas_workspace_bytes, workspace_here
from rematree.report.devices import device_markdown
from rematree.units import GIB, KIB, MIB

DEVICES = known_devices()


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("h100", "h100-sxm"),
        ("H100", "h100-sxm"),
        ("rtx-4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("a100_80gb", "a100-80gb"),
        ("a100", "a100-80gb"),
        ("AMD mi300x", "mi300x"),
        ("Apple M3 Ultra", "m3-ultra"),
    ],
)
def test_names_people_type(typed: str, name: str) -> None:
    assert find_device(typed).name == name


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        find_device("rtx-4900")
    assert caught.value.message == "unknown device 'rtx-4900'; the nearest are rtx-4090, rtx-4080, rtx-4070"
    assert caught.value.remedies[0] == "rematree devices   (lists them)"
    for name in ("", "?", "x" * 200):
        with pytest.raises(UsageError, match="the nearest are"):
            find_device(name)


def test_every_figure_has_a_source_and_a_sensible_size() -> None:
    names = [device.name for device in DEVICES]
    assert len(set(names)) == len(names)
    assert not set(aliases()) & set(names)
    for device in DEVICES:
        assert device.sources["specification"]
        assert device.usable_source
        assert 0.7 * device.memory_bytes < device.usable_bytes <= device.memory_bytes
        assert set(device.efficiency) == {str(kind) for kind in Kind}
        assert all(0 < share <= 1 for share in device.efficiency.values())
        assert set(device.flops_per_second) <= {"bf16", "fp16", "tf32", "fp32", "int8"}
        assert device.flops_per_second or "no FLOP rate" in device.note


def test_figures_as_published() -> None:
    h100 = find_device("h100")
    assert (h100.memory_bytes, h100.usable_bytes) == (80 * GIB, (81559 - 512) * MIB)
    assert h100.usable_source == "nvidia-smi, total as reported by users, less 512 MiB"
    assert find_device("rtx-3090").usable_bytes == int(0.97 * 24 * GIB)  # estimated: the driver's share is in it
    assert h100.flops_per_second == pytest.approx(
        {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12, "int8": 1978.9e12}
    )
    assert h100.bytes_per_second == 3.35e12
    assert h100.host_bytes_per_second == pytest.approx(63.0e9, rel=1e-3)
    assert (h100.context_bytes, h100.workspace_bytes) == (512 * MIB, 32 * MIB)
    # Their ECC takes a sixteenth of the memory, and it is on as they come.
    for name, gib in (("t4", 16), ("a10", 24), ("a10g", 24), ("l4", 24), ("a40", 48), ("l40s", 48)):
        assert find_device(name).usable_bytes < 0.941 * gib * GIB
    for name in ("4090", "t4", "v100"):
        assert find_device(name).workspace_bytes == 8320 * KIB
    assert find_device("gh200").host_bytes_per_second == 450e9
    assert find_device("m4-max").host_bytes_per_second is None


def test_products_of_int8_are_not_priced_as_slow_as_fp32_where_nobody_timed_them() -> None:
    timed = Rates({"bf16": 3e14, "fp32": 2e13}, 1e12)
    assert timed.peak(torch.int8) == timed.peak(torch.bfloat16) == 3e14
    assert timed.peak(torch.float64) == 2e13


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mi210", 32), ("mi250x", 32), ("mi300x", 128), ("mi325x", 128), ("mi355x", 128), ("rx-7900-xtx", 32)],
)
def test_the_workspace_of_hipblas_is_not_that_of_cublas(name: str, expected: int) -> None:
    device = find_device(name)
    assert device.workspace_bytes == expected * MIB
    assert device.overhead.library_bytes == 2 * expected * MIB


def test_the_page_is_the_file(repository: Path) -> None:
    page = (repository / "docs" / "devices.md").read_text(encoding="ascii")
    assert device_markdown(DEVICES) in page
    table = tomllib.loads((repository / "src/rematree/data/devices.toml").read_text(encoding="ascii"))
    shares = {entry["name"]: entry for entry in table["efficiency"]}
    assert list(shares) == ["default", "hopper", "cdna"]
    for kind in Kind:
        row = " | ".join([str(kind), *(f"{shares[name][kind]:g}" for name in shares)])
        assert f"| {row} |" in page


def test_a_device_prices_fake_tensors_that_are_not_its_own() -> None:
    with FakeTensorMode():
        x = torch.empty(4096, 4096, dtype=torch.bfloat16)
        out = x @ x
    price = find_device("h100").roofline().price(torch.ops.aten.mm.default, (x, x), {}, [out])
    assert price.seconds == pytest.approx(2 * 4096**3 / (989.4e12 * 0.75))
    with FakeTensorMode():
        y = torch.empty(4096, 4096)
    slow = find_device("h100").roofline().price(torch.ops.aten.mm.default, (y, y), {}, [y])
    fast = find_device("h100").roofline(tf32=True).price(torch.ops.aten.mm.default, (y, y), {}, [y])
    assert slow.seconds == pytest.approx(2 * 4096**3 / (66.9e12 * 0.75))
    assert fast.seconds == pytest.approx(2 * 4096**3 / (494.7e12 * 0.75))


def test_a_device_without_rates_says_so() -> None:
    with pytest.raises(UsageError, match="no FLOP rate of M3 Max is published, so its steps cannot be timed from here"):
        find_device("m3-max").roofline()


@pytest.mark.parametrize(
    ("name", "runs", "measures"), [("m3-max", "the CPU: it", "its CPU"), ("jetson-agx-thor", "published: it", "it")]
)
def test_how_a_device_without_rates_can_be_planned_for(name: str, runs: str, measures: str) -> None:
    with pytest.raises(UsageError) as caught:
        Target.named(name)
    assert f"{runs} can be planned for where it is, or as it was measured" in caught.value.message
    here, measure, elsewhere = caught.value.remedies
    assert here.startswith(f"--budget {find_device(name).usable_bytes // MIB}MiB, without --device   (on a machine")
    assert measure.startswith("rematree calibrate --output profile.json   (on a machine with ")
    assert measure.endswith(f"measures {measures})")
    assert elsewhere.startswith("--device ./profile.json")


@pytest.fixture(scope="module")
def profile() -> Profile:
    return calibrate(torch.device("cpu"), 3 * GIB, sides=(128,), stream_bytes=MIB)


def test_calibration_measures_what_is_here(profile: Profile) -> None:
    device = profile.device
    assert device.backend == "cpu"
    assert device.usable_bytes == device.memory_bytes == 3 * GIB
    assert {"bf16", "fp32"} <= set(device.flops_per_second)
    assert set(device.efficiency) == {str(kind) for kind in Kind}
    assert {"copy", "elementwise", "dropout", "gather", "optimizer", "launch seconds"} <= set(profile.figures)
    assert all(value > 0 for value in profile.figures.values())
    assert device.flops_per_second["fp32"] == profile.figures["matmul fp32 128"]
    assert isinstance(device.roofline(), Roofline)
    assert (device.context_bytes, device.workspace_bytes) == (0, 0)


def test_a_profile_is_a_device_wherever_it_is_carried(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile.to_json(), encoding="ascii")
    assert find_device(str(path)) == read_profile(path) == profile.device
    assert Profile.from_json(profile.to_json(), "here") == profile
    assert json.loads(profile.to_json())["torch"] == torch.__version__


@pytest.mark.parametrize(("hip", "backend", "capability"), [("7.0", "rocm", 0), (None, "cuda", 9)])
def test_a_profile_of_an_amd_gpu_is_one_of_rocm(
    hip: str | None, backend: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To torch it is a CUDA device of capability 9.4, which is the number of its architecture."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(gcnArchName="gfx942"))
    monkeypatch.setattr("rematree.calibration._matmuls", lambda *_: {"bf16": 1e14, "fp32": 1e13})
    for name in ("_bandwidth", "_launch", "_host_link"):
        monkeypatch.setattr(f"rematree.calibration.{name}", lambda *_: 1.0)
    for name in ("_streams", "_narrow", "_dequantisation", "_attention"):
        monkeypatch.setattr(f"rematree.calibration.{name}", lambda *_: dict[str, float]())
    made = calibrate(torch.device("cuda", 0), 3 * GIB)
    device = Profile.from_json(made.to_json(), "here").device
    assert (device.backend, device.capability, device.context_bytes) == (backend, capability, 512 * MIB)
    assert device.overhead.caches
    told = asked_of_the_planner(Target(device), monkeypatch)
    assert told["device"] == torch.device("cuda", 0)
    assert told["capability"] == (capability or 8, 0)


def change(text: str, **fields: Any) -> str:
    data = json.loads(text)
    return json.dumps({**data, **fields})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:-5], "p.json is no device profile: it is not JSON"),
        (lambda text: "[]", "p.json is no device profile: no format version in it"),
        (
            lambda text: change(text, format=2),
            "p.json is a device profile of another format version; this library reads version 1",
        ),
        (lambda text: change(text, torch=3), "p.json is no device profile: torch: expected a string, found 3"),
        (lambda text: change(text, more=3), "p.json is no device profile: unknown field more"),
        (
            lambda text: change(text, device={}),
            "p.json is no device profile: there is no device.name",
        ),
        (
            lambda text: change(text, device={**json.loads(text)["device"], "bytes_per_second": 0}),
            "p.json is no device profile: device.bytes_per_second: expected a positive number, found 0.0",
        ),
        (
            lambda text: change(text, device={**json.loads(text)["device"], "flops_per_second": {"fp32": -1.0}}),
            "p.json is no device profile: device.flops_per_second['fp32']: expected a positive number, found -1.0",
        ),
    ],
)
def test_another_file_is_refused(profile: Profile, edit: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Profile.from_json(edit(profile.to_json()), "p.json")
    assert caught.value.message == message


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no device profile at"):
        find_device(str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match="cannot read the device profile"):
        read_profile(tmp_path)


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["devices", "--json"])
    assert ended.value.code == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed == json.loads(json.dumps([dataclasses.asdict(device) for device in DEVICES]))
    with pytest.raises(SystemExit):
        main(["devices"])
    assert "rtx-4090" in capsys.readouterr().out


def test_the_command_stores_a_profile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: Profile
) -> None:
    monkeypatch.setattr("rematree.calibration.calibrate", lambda device, total, report: profile)
    path = tmp_path / "here.json"
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "-o", str(path)])
    assert ended.value.code == 0
    assert read_profile(path) == profile.device
    assert "matmul fp32 128" in capsys.readouterr().out


UNWRITABLE = [
    ("x" * 300, "File name too long"),
    ("loop", "Too many levels of symbolic links"),
    pytest.param(
        "/proc/profile.json",
        "No such file or directory",
        marks=pytest.mark.skipif(not Path("/proc/self").exists(), reason="no file system that takes no files"),
    ),
]


@pytest.mark.parametrize(("name", "reason"), UNWRITABLE)
def test_where_a_profile_cannot_be_written_nothing_is_measured(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(*args: Any, **kwargs: Any) -> Profile:
        raise AssertionError("measured for a file that cannot be written")

    monkeypatch.setattr("rematree.calibration.calibrate", measure)
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name
    outcome = rematree("calibrate", "--output", path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: {path} cannot be written: {reason}\nWhat would work:\n  another --output\n"


def test_a_profile_is_stored_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: Profile
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rematree.calibration.calibrate", lambda device, total, report: profile)
    monkeypatch.setattr("os.fsync", full)
    path = tmp_path / "here.json"
    path.write_text("an older profile")
    outcome = rematree("calibrate", "--output", path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.endswith(
        f"\nerror: {path} cannot be written: No space left on device\nWhat would work:\n  another --output\n"
    )
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("here.json", "an older profile")]


def test_devices_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEVICES[0].name = "x"  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(DEVICES[0], Device)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("", 32 * MIB),
        (":4096:8", 32 * MIB),
        (":4096:2:16:8", (4096 * 2 + 16 * 8) * KIB),
        (":16:8", 128 * KIB),
        (":16", 32 * MIB),
        (":a:b", 32 * MIB),
    ],
)
def test_the_workspace_of_cublas_is_what_its_variable_asks_for(
    told: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic training must set it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", told)
    assert workspace_here(9) == expected
    assert cublas_workspace_bytes(9) == 32 * MIB  # of a device elsewhere
    assert overhead_of(None, "cuda").library_bytes == 2 * expected


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, 128 * MIB),
        ({"HIPBLAS_WORKSPACE_CONFIG": ":4096:2:16:8"}, 8320 * KIB),
        ({"ROCBLAS_WORKSPACE_CONFIG": ":16:8"}, 128 * KIB),
        ({"ROCBLAS_WORKSPACE_CONFIG": ":16:8", "HIPBLAS_WORKSPACE_CONFIG": ":0:0"}, 0),
        ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HIPBLAS_WORKSPACE_CONFIG": ":16:8"}, 32 * MIB),
        ({"CUBLAS_WORKSPACE_CONFIG": "", "HIPBLAS_WORKSPACE_CONFIG": ":16:8"}, 128 * MIB),
    ],
)
def test_under_rocm_the_workspace_is_that_of_hipblas(
    told: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To torch an MI300X has compute capability 9.4, which on NVIDIA's side is a Hopper."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    instinct = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: instinct)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "HIPBLAS_WORKSPACE_CONFIG", "ROCBLAS_WORKSPACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert workspace_here(9) == expected
    assert overhead_of(None, "cuda").library_bytes == 2 * expected
    assert hipblas_workspace_bytes("gfx1100") == 32 * MIB  # of a device elsewhere


def asked_of_the_planner(target: Target, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """With what options a planner is made for `target`."""
    told: dict[str, Any] = {}
    monkeypatch.setattr("rematree.planning.planner.Planner", lambda model, batch, **options: told.update(options))
    shape: Any = SimpleNamespace(model=torch.nn.Linear(1, 1), batch={})
    config: Any = SimpleNamespace(gradient_accumulation_steps=1, max_grad_norm=1.0, forbid=(), compile=False)
    target.planner(shape, config)
    return told


MAJORS = [("h100", 9), ("rtx-4090", 8), ("b200", 10), ("mi300x", 8), ("t4", 7), ("v100-16gb", 7), ("v100-32gb", 7)]


@pytest.mark.parametrize(("name", "major"), MAJORS)
def test_attention_is_that_of_the_device_asked_for(name: str, major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of another one that may be here."""
    told = asked_of_the_planner(Target.named(name), monkeypatch)
    assert told["device"] == torch.device("cuda", 0)
    assert told["capability"] == (major, 0)


@pytest.mark.parametrize(("name", "kernel"), [("t4", "math"), ("v100", "math"), ("a100", "efficient")])
def test_without_bf16_units_its_attention_keeps_the_probabilities(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = asked_of_the_planner(Target.named(name), monkeypatch)["capability"]
    heads = torch.empty(2, 8, 40, 64, dtype=torch.bfloat16, device="meta")
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool, device="meta")
    assert choose_kernel(heads, heads, heads, mask, capability=capability) == kernel


@pytest.mark.parametrize(
    ("rates", "dtype"),
    [
        ({"bf16": 3e13, "fp16": 3e13, "fp32": 8e12}, torch.bfloat16),
        ({"bf16": 3e13}, torch.bfloat16),
        ({"fp32": 8e12}, torch.bfloat16),  # nothing is known of it
        ({"fp16": 6e13, "fp32": 8e12}, torch.float32),
        ({"bf16": 7e12, "fp16": 6e13, "fp32": 8e12}, torch.float32),  # measured where it is emulated
        ({"bf16": 8e12, "fp32": 8e12}, torch.float32),
    ],
)
def test_weights_are_in_bf16_where_that_is_not_emulated(rates: dict[str, float], dtype: torch.dtype) -> None:
    assert Target(dataclasses.replace(find_device("t4"), flops_per_second=rates)).dtype is dtype
