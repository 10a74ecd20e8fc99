"""The largest value that fits is found whatever the curve, and verified; the commands answer on a tiny model."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command_line import rematree, remedies
from rematree.errors import InfeasibleBudgetError
from rematree.finetune.config import TrainConfig
from rematree.finetune.fit import find_device as smallest_device
from rematree.finetune.largest import Grid, Probe, find_first, find_largest
from rematree.finetune.planned import described
from rematree.finetune.remedies import working_changes
from rematree.finetune.side_by_side import DevicePlan, plan_each
from rematree.finetune.target import Target
from rematree.plans import Plan
from rematree.pricing.devices import MEASURED, find_device
from rematree.units import GIB, MIB, parse_bytes
from test_finetune_tiny import save_tiny_model

# Adapters on one projection: the fewer regions there are, the fewer steps are simulated. And the fewer levers.
ADAPTERS = ["--lora-target-modules", "down_proj", "--forbid", "groups,lean_adapters"]
SHAPE = ["--batch-size", "2", "--max-length", "32"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The config of a tiny model, without its weights."""
    path = tmp_path_factory.mktemp("fit")
    save_tiny_model(path / "whole")
    file = path / "config.json"
    file.write_text((path / "whole" / "config.json").read_text())
    return str(file)


@given(
    least=st.sampled_from([1, 8]),
    extent=st.integers(0, 3000),
    step=st.sampled_from([1, 8, 64]),
    slopes=st.tuples(st.integers(0, 10**6), st.integers(1, 10**4), st.floats(0, 5)),
    share=st.floats(0, 1.2),
    first=st.integers(1, 4000),
    about=st.sampled_from([None, 1.0, 0.5, 0.98, 1.02, 2.0]),
)
def test_the_answer_fits_and_the_next_value_does_not(
    least: int,
    extent: int,
    step: int,
    slopes: tuple[int, int, float],
    share: float,
    first: int,
    about: float | None,
) -> None:
    """Whether there is an estimate, which is `about` times the peak, or none."""
    grid = Grid(least, least + extent, step)
    values = [grid[index] for index in range(len(grid))]
    assert values == sorted(set(values))
    assert (values[0], values[-1]) == (least, least + extent)

    def peak(value: int) -> int:
        return int(slopes[0] + slopes[1] * value + slopes[2] * value * value)

    budget = int(share * peak(values[-1]))
    tried: list[int] = []

    def try_value(value: int) -> Probe:
        tried.append(value)
        return Probe(value, peak(value), budget)

    def estimate(value: int) -> Probe:
        assert tried == [grid[grid.index_of(first)]]
        assert about is not None
        return Probe(value, int(peak(value) * about), budget)

    fitting = [value for value in values if peak(value) <= budget]
    answer, refused = find_largest(try_value, grid, first, None if about is None else estimate)
    assert (None if answer is None else answer.value) == max(fitting, default=None)
    beyond = values[len(fitting)] if len(fitting) < len(values) else None
    assert (None if refused is None else refused.value) == beyond
    if answer is None:
        assert tried[-1] == least  # whose plan says what takes the room
    assert len(tried) == len(set(tried)) <= (3 if about == 1.0 else 24)


@given(needs=st.tuples(*[st.integers(0, 12)] * 3), kinds=st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_the_first_that_fits_is_found_although_kinds_need_different_room(
    needs: tuple[int, int, int], kinds: list[int]
) -> None:
    """Rooms grow from one to the next; how much is needed depends on the kind."""
    tried: list[int] = []

    def fits(index: int) -> bool:
        tried.append(index)
        return index >= needs[kinds[index]]

    fitting = [index for index, kind in enumerate(kinds) if index >= needs[kind]]
    assert find_first(kinds, fits) == min(fitting, default=None)
    assert len(tried) == len(set(tried)) <= 8
    if not fitting:
        assert len(kinds) - 1 in tried  # whose plan says what takes the room


@pytest.mark.parametrize(
    ("find", "words", "option"),
    [
        pytest.param(
            *("batch-size", ["--lora-r", "4", "--max-length", "32", "--budget", "560MiB"], "--batch-size"),
            marks=pytest.mark.slow,  # the same search, half a minute
        ),
        ("max-length", ["--lora-r", "4", "--batch-size", "128", "--budget", "600MiB"], "--max-length"),
    ],
)
def test_what_is_found_fits_and_the_next_value_is_refused(model: str, find: str, words: list[str], option: str) -> None:
    common = [model, *ADAPTERS, *words, "--forbid", "chunked_loss", "--device", "rtx-4090"]
    outcome = rematree("fit", *common, "--find", find, "--json")
    assert outcome.code == 0, outcome.err
    answer, refused = outcome.data["answer"], outcome.data["refused"]
    assert answer < refused
    fits = rematree("plan", *common, option, answer, "--json")
    assert fits.code == 0, fits.err
    assert fits.data["predicted_peak_bytes"] == outcome.data["predicted_peak_bytes"] <= outcome.data["budget_bytes"]
    assert rematree("plan", *common, option, refused).code == 3


def test_the_highest_rank_ends_at_the_hidden_size(model: str) -> None:
    outcome = rematree("fit", model, *ADAPTERS, *SHAPE, "--device", "h100", "--find", "lora-r")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith("The largest --lora-r that fits is 32: it takes at least ")
    assert lines[1] == "There is no next value: a rank above the hidden size, 32, is no adapter."
    assert "--lora-r 32: " in outcome.err


def test_the_smallest_device_of_a_few(model: str) -> None:
    names = "h100,rtx-4090,rtx-3080"
    outcome = rematree("fit", model, *ADAPTERS, *SHAPE, "--find", "device", "--device", names, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.data["answer"] == "GeForce RTX 3080 10GB"
    assert outcome.data["refused"] is None
    assert outcome.data["limit"] == "no smaller device was asked about"


def test_where_nothing_fits_the_peak_is_broken_down(model: str) -> None:
    words = [model, *ADAPTERS, "--forbid", "groups,chunked_loss", "--device", "rtx-4090", "--batch-size", "1"]
    outcome = rematree("fit", *words, "--find", "max-length", "--budget", "520MiB")
    assert outcome.code == 3, outcome.err
    assert "error: nothing fits: even with --max-length 8 the smallest reachable peak is 5" in outcome.err
    assert ", and 520.0 MiB may be taken\n  at that peak:\n  base weights" in outcome.err
    (command,) = remedies(outcome)
    budget = command[command.index("--budget") + 1]
    assert 520 * MIB < parse_bytes(budget) < 540 * MIB
    assert "--find max-length" in " ".join(command)


@pytest.mark.slow  # three searches
def test_what_would_work_where_nothing_fits_works(model: str) -> None:
    words = [model, *ADAPTERS, "--forbid", "groups,chunked_loss", "--device", "rtx-4090", "--budget", "600MiB"]
    outcome = rematree("fit", *words, "--find", "lora-r", "--batch-size", "128", "--max-length", "128")
    assert outcome.code == 3, outcome.err
    assert "error: nothing fits: even with --lora-r 1 the smallest" in outcome.err
    commands = [" ".join(command) for command in remedies(outcome)]
    changes = ["--budget 6", "--max-length 64 ", "--per-device-train-batch-size 64 "]
    assert len(commands) == len(changes)
    for command, change in zip(commands, changes, strict=True):
        assert change in command
        assert "--find lora-r" in command
        assert rematree(*command.split()).code == 0, command


def test_devices_beside_each_other(model: str) -> None:
    words = ["compare", model, *ADAPTERS, *SHAPE, "--device", "h100,rtx-4090"]
    outcome = rematree(*words, "--json")
    assert outcome.code == 0, outcome.err
    assert [column["device"] for column in outcome.data] == ["H100 SXM5 80GB", "GeForce RTX 4090"]
    assert all(column["fits"] and column["predicted_peak_bytes"] <= column["budget_bytes"] for column in outcome.data)
    assert all(
        column["tokens_per_second"] == pytest.approx(64 / column["predicted_step_seconds"]) for column in outcome.data
    )
    small = rematree(*words, "--budget", "100KiB")
    assert small.code == 0
    assert [line.split()[-1] for line in small.out.splitlines()[1:]] == ["no", "no"]


def test_the_optimizer_steps_once_for_all_passes_that_are_accumulated(model: str) -> None:
    run: dict[str, Any] = {"model": model, "data": "", "budget": 1, "output_dir": Path(), "max_length": 32}
    run |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "lora_target_modules": ("down_proj",)}
    config = TrainConfig(**run, forbid=("groups", "lean_adapters"))
    (column,) = plan_each(config, [Target.named("h100")], None, say=lambda line: None)
    assert column.plan is not None
    step, once = column.plan.predicted_step_seconds, column.optimizer_seconds
    assert 0 < once < step
    assert (column.tokens, column.passes) == (64, 4)
    assert column.tokens_per_second == pytest.approx(4 * 64 / (4 * (step - once) + once))
    assert column.facts()["tokens_per_second"] == column.tokens_per_second
    mostly = replace(column, plan=replace(column.plan, predicted_step_seconds=3.0), optimizer_seconds=2.0)
    assert mostly.tokens_per_second == pytest.approx(256 / 6)
    assert replace(mostly, passes=1).tokens_per_second == pytest.approx(64 / 3)
    assert DevicePlan("a device", GIB, 2 * GIB, 64, None, 4).tokens_per_second == 0


def test_a_frontier_is_of_what_the_device_can_use(model: str) -> None:
    words = ["frontier", model, *ADAPTERS, *SHAPE, "--device", "h100", "--json", "--budgets"]
    usable = find_device("h100").usable_bytes
    outcome = rematree(*words, "1GiB,81500MiB,80GiB")
    assert outcome.code == 0, outcome.err
    points = outcome.data["points"]
    assert [point["budget_bytes"] for point in points] == [GIB, usable]
    assert all(point["fits"] and point["predicted_peak_bytes"] <= outcome.data["usable_bytes"] for point in points)
    outcome = rematree(*words, "1GiB,81GiB")
    assert (outcome.code, outcome.out) == (2, "")
    assert "81.00 GiB is more than H100 SXM5 80GB has" in outcome.err


@pytest.fixture(scope="module")
def stored(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that recomputes one of two layers, in a file."""
    path = tmp_path_factory.mktemp("stored") / "plan.json"
    words = [model, *ADAPTERS, "--batch-size", "8", "--max-length", "128", "--forbid", "chunked_loss"]
    found = rematree("frontier", *words, "--device", "h100", "--points", "6", "--json").data
    assert (found["device"], found["usable_bytes"]) == ("H100 SXM5 80GB", find_device("h100").usable_bytes)
    peaks = found["points"]
    budget = sum(point["predicted_peak_bytes"] for point in (peaks[0], peaks[-1])) // 2
    outcome = rematree("plan", *words, "--device", "h100", "--budget", f"{budget}B", "--output", path)
    assert outcome.code == 0, outcome.err
    return path


def test_a_plan_says_what_it_was_made_for(stored: Path, model: str) -> None:
    plan = Plan.from_json(stored.read_text())
    assert plan.fingerprint.device == "cuda"
    assert plan.notes[0].startswith("for H100 SXM5 80GB, timed by its published rates")
    assert plan.notes[1] == f"made of the config alone: {model}"
    assert plan.run["model"] == model
    assert plan.run["device"] == "h100-sxm"
    assert (plan.run["lora_r"], plan.run["max_length"], plan.run["packing"]) == ("16", "128", "true")
    assert "full" not in plan.run


def test_a_plan_for_a_profile_does_not_speak_of_published_rates(stored: Path, model: str) -> None:
    plan = replace(Plan.from_json(stored.read_text()), notes=())
    config = TrainConfig(model=model, data="", budget=1, output_dir=Path(), max_length=32)
    target = Target(replace(find_device("h100"), usable_source=MEASURED))
    again = described(plan, config, target, target.shape(config, full=False), full=False)
    assert again.notes[0] == "for H100 SXM5 80GB, timed by the rates of its profile"
    assert again.run["dtype"] == "bfloat16"


def settings_of_trl() -> set[str]:
    from dataclasses import fields

    trl: Any = pytest.importorskip("trl")
    return {item.name for kind in (trl.SFTConfig, trl.ModelConfig) for item in fields(kind)}


@pytest.mark.parametrize("trainer", ["trl", "axolotl"])
def test_exports_are_yaml_with_what_they_leave_out(stored: Path, trainer: str, model: str) -> None:
    import yaml

    outcome = rematree("export", stored, "--to", trainer)
    assert outcome.code == 0, outcome.err
    facts = rematree("export", stored, "--to", trainer, "--json").data
    settings = facts["settings"]
    assert yaml.safe_load(outcome.out) == settings
    assert [line.removeprefix("not expressed: ") for line in outcome.err.splitlines()] == facts["not_expressed"]
    assert any("the budget of" in line for line in facts["not_expressed"])
    assert any("which layers" in line or "what recomputed layers save" in line for line in facts["not_expressed"])
    assert facts["not_expressed"][0].startswith(f"the weights: {trainer} loads a folder or an id on the Hub, and ")
    if trainer == "trl":
        assert set(settings) <= settings_of_trl()
        assert settings["model_name_or_path"] == model
        assert settings["dtype"] == "bfloat16"  # without it, TRL takes float32
        assert settings["bf16"] is False  # without it, TRL computes under autocast to bf16
        assert settings["activation_checkpointing"] is True
        assert settings["lora_target_modules"] == ["down_proj"]
    else:
        assert settings["base_model"] == model
        assert (settings["adapter"], settings["micro_batch_size"], settings["sequence_len"]) == ("lora", 8, 128)
        assert settings["gradient_checkpointing_kwargs"]["use_reentrant"] is False
        assert (settings["bf16"], settings["bfloat16"]) == (False, True)  # bf16 is autocast there
        assert (settings["sample_packing"], settings["sdp_attention"]) == (True, True)  # without, nothing is masked


def exported(stored: Path, folder: Path, trainer: str, **run: str) -> tuple[dict[str, Any], str]:
    """The settings of `stored` for `trainer`, had it been made for another `run`, and what they leave out."""
    data = json.loads(stored.read_text())
    (folder / "plan.json").write_text(json.dumps({**data, "run": data["run"] | run}))
    outcome = rematree("export", folder / "plan.json", "--to", trainer, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.data["settings"], "\n".join(outcome.data["not_expressed"])


def test_exports_to_axolotl_are_in_the_dtype_of_the_plan(stored: Path, tmp_path: Path) -> None:
    settings, _ = exported(stored, tmp_path, "axolotl", dtype="float32", packing="false")
    assert (settings["bf16"], settings["bfloat16"]) == (False, False)
    assert settings["sample_packing"] is False
    assert "sdp_attention" not in settings


@pytest.mark.parametrize(
    ("trainer", "run", "said"),
    [
        ("trl", {}, True),
        ("trl", {"per_device_train_batch_size": "1"}, False),
        ("trl", {"packing": "false"}, False),
        ("axolotl", {}, False),
    ],
)
def test_exports_to_trl_say_that_packed_rows_become_one(
    stored: Path, tmp_path: Path, trainer: str, run: dict[str, str], said: bool
) -> None:
    _, lost = exported(stored, tmp_path, trainer, **run)
    assert ("8 packed rows beside each other: TRL lays them end to end" in lost) is said
    assert ("packed rows" in lost) is said


PACKED = {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": "true"}


@pytest.mark.parametrize(
    ("trainer", "run", "said"),
    [
        ("trl", PACKED, True),
        ("trl", {"load_in_8bit": "true"}, True),
        ("trl", {}, False),
        ("axolotl", PACKED, False),
    ],
)
def test_exports_to_trl_say_that_adapters_of_packed_weights_are_in_bf16(
    stored: Path, tmp_path: Path, trainer: str, run: dict[str, str], said: bool
) -> None:
    _, lost = exported(stored, tmp_path, trainer, **run)
    assert ("adapters in fp32, with their gradients and moments: TRL trains those" in lost) is said


@pytest.mark.parametrize("trainer", ["trl", "axolotl"])
def test_exports_say_that_the_weights_are_of_more_than_was_planned(stored: Path, tmp_path: Path, trainer: str) -> None:
    hub = "google/gemma-3-4b-pt"
    name = "model_name_or_path" if trainer == "trl" else "base_model"
    settings, lost = exported(stored, tmp_path, trainer, model="gemma-3-4b")
    assert settings[name] == hub
    assert lost.startswith("what was planned: Text model alone.")
    for whole in (hub, "qwen3-8b"):  # by its id, all of it was planned
        settings, lost = exported(stored, tmp_path, trainer, model=whole)
        assert settings[name] in (hub, "Qwen/Qwen3-8B")
        assert "what was planned" not in lost


def test_exports_name_the_weights_and_every_lever(stored: Path, tmp_path: Path) -> None:
    """A name of the catalogue is none of the Hub."""
    data = json.loads(stored.read_text())
    data["run"] |= {"model": "llama-3-8b", "ranks": "2", "engine": "fsdp2"}
    levers = {"lean": ["a"], "compiled": {"b": 0.5}, "groups": [["a", "b"]]}
    (tmp_path / "plan.json").write_text(json.dumps({**data, **levers}))
    for trainer, name in (("trl", "model_name_or_path"), ("axolotl", "base_model")):
        facts = rematree("export", tmp_path / "plan.json", "--to", trainer, "--json").data
        assert facts["settings"][name] == "meta-llama/Llama-3.1-8B"
        said = "\n".join(facts["not_expressed"])
        for lever in (
            "layers that are recomputed together",
            "lean layers",
            "blocks that are compiled: 1",
            "2 ranks under fsdp2",
        ):
            assert lever in said
        assert "the weights" not in said


def test_exports_that_cannot_be_made_say_why(stored: Path, tmp_path: Path) -> None:
    outcome = rematree("export", stored, "--to", "torchtune")
    assert (outcome.code, outcome.err) == (2, "error: --to is 'torchtune'; it can be trl or axolotl\n")
    data = json.loads(stored.read_text())
    broken = {**data["run"], "gradient_accumulation_steps": "two"}
    for run, command in (({}, "export"), ({"model": "x"}, "export"), (broken, "export"), (broken, "verify")):
        (tmp_path / "old.json").write_text(json.dumps({**data, "run": run}))
        words = ["--to", "trl"] if command == "export" else ["--model", "x"]
        outcome = rematree(command, tmp_path / "old.json", *words)
        assert outcome.code == 2
        said = "the plan does not say what run it was made for" if command == "export" else "not a plan: its run has"
        assert said in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "llama-3-8b", "--device", "h1000"], "unknown device 'h1000'; the nearest are h100"),
        (
            ["plan", "lama-3-8b", "--device", "h100"],
            "there is no model called 'lama-3-8b'\n  nearest names: llama-3-8b",
        ),
        (
            ["plan", "llama-3-8b", "--device", "h100", "--budget", "90GiB"],
            "--budget 90.00 GiB is more than H100 SXM5 80GB has, 80.00 GiB\n  79.15 GiB of it can be used",
        ),
        (["compare", "phi-4", "--device", "h100,rtx-4090", "--budget", "30GiB"], "--budget 30.00 GiB is more than"),
        (["plan", "llama-3-8b"], "Missing option '--budget': the bytes that the step may take"),
        (["plan", "--budget", "1GiB"], "Missing argument 'MODEL'"),
        (
            ["plan", "llama-3-8b", "--model", "qwen3-8b", "--budget", "1GiB"],
            "MODEL is 'llama-3-8b' and --model is 'qwen3-8b'; they contradict each other",
        ),
        (["plan", "llama-3-8b", "--device", "h100", "--max-length", "0"], "--max-length is 0; it must be above zero"),
        (
            ["plan", "llama-3-8b", "--device", "h100", "--batch-size", "0"],
            "--per-device-train-batch-size is 0; it must be above zero",
        ),
        (
            ["plan", "llama-3-8b", "--device", "h100", "--load-in-4bit", "--load-in-8bit"],
            "--load-in-4bit and --load-in-8bit contradict each other",
        ),
        (
            ["plan", "llama-3-8b", "--device", "h100", "--load-in-4bit", "--full"],
            "--full trains all parameters, and --load-in-4bit packs them",
        ),
        (
            ["plan", "llama-3-8b", "--device", "h100,a100-80gb"],
            "--device h100,a100-80gb names several devices, and a plan is for one",
        ),
        (["compare", "llama-3-8b", "--device", "h100,h100-sxm"], "--device names H100 SXM5 80GB more than once"),
        (
            ["fit", "llama-3-8b", "--device", "h100", "--find", "max-length", "--max-length", "64"],
            "--find max-length looks for the largest --max-length; a value for it contradicts that",
        ),
        (
            ["fit", "llama-3-8b", "--find", "device", "--budget", "9GiB"],
            "--find device looks for a device by its memory; --budget contradicts that",
        ),
        (
            ["fit", "llama-3-8b", "--device", "h100", "--find", "lora-r", "--full"],
            "--full trains all parameters: there is no adapter whose rank --find lora-r could look for",
        ),
        (
            ["plan", "llama-3-8b", "--device", "h100", "--max-length", "200000"],
            "--max-length is 200000, the model has 131072 positions",
        ),
        (
            ["train", "llama-3-8b", "--data", "d", "--output-dir", "o", "--budget", "1GiB"],
            "llama-3-8b is a shape without weights: it can be planned, not trained",
        ),
    ],
)
def test_bad_input_says_what_is_wrong(words: list[str], message: str) -> None:
    outcome = rematree(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: {message}" in outcome.err


def test_what_would_work_works(model: str) -> None:
    shape = ["--batch-size", "128", "--max-length", "128"]
    words = [model, *ADAPTERS, *shape, "--forbid", "chunked_loss", "--device", "rtx-4090", "--budget", "600MiB"]
    outcome = rematree("plan", *words)
    assert outcome.code == 3
    assert outcome.err.count("rematree plan") >= 2
    for command in remedies(outcome):
        assert rematree(*command).code == 0, command


def test_both_spellings_of_an_option_are_taken(model: str) -> None:
    words = [*SHAPE[:2], "--device", "h100", "--json"]
    dashes = rematree("plan", model, *words, "--lora-target-modules", "down_proj", "--max-length", "32")
    other = rematree("plan", "--model", model, *words, "--lora_target_modules", "down_proj", "--max_length", "32")
    assert dashes.code == 0, dashes.err
    assert other.data == dashes.data


def test_a_budget_is_that_of_the_device_by_default(model: str) -> None:
    plan = rematree("plan", model, *ADAPTERS, *SHAPE, "--device", "rtx-4090", "--json").data
    assert plan["budget_bytes"] > 23 * 1024 * MIB
    advice = rematree("advise", model, *ADAPTERS, *SHAPE, "--device", "rtx-4090", "--json").data
    assert advice["budget_bytes"] == plan["budget_bytes"]


def test_a_run_that_no_budget_and_no_fewer_tokens_help_is_told_of_a_device(model: str) -> None:
    small = replace(find_device("rtx-4060-ti-16gb"), usable_bytes=8 * MIB)  # less than its context takes
    run: dict[str, Any] = {"model": model, "data": "", "budget": 1, "output_dir": Path(), "max_length": 8}
    config = TrainConfig(**run, lora_target_modules=("down_proj",), forbid=("groups", "lean_adapters"))
    changes: list[dict[str, Any]] = []

    def command(**change: Any) -> str:
        changes.append(change)
        return "a command"

    with pytest.raises(InfeasibleBudgetError, match="no device fits: even on GeForce RTX 4060 Ti 16GB the") as error:
        smallest_device(config, [Target(small)], say=lambda line: None, command=command)
    assert error.value.remedies == ("a command",)
    assert error.value.details[0] == "at that peak:"
    assert changes == [{"device": "rtx-3080", "budget": None}]  # the smallest of its make
    told = InfeasibleBudgetError("more than any device of its make has", budget=1, min_peak=200 * GIB)
    assert working_changes(told, config, lambda line: None, target=Target(find_device("b200"))) == [
        {"device": "mi325x", "budget": None}
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        (16384, [], [{"--load-in-4bit"}, {"--device=a10"}]),
        (8192, ["--full"], [set(), {"--full", "--device=a10"}]),  # adapters fit as they are
        (16384, ["--full"], [{"--load-in-4bit"}, {"--full", "--device=a100-80gb"}]),
    ],
    ids=str,
)
def test_a_run_whose_weights_are_too_large_is_told_what_fits(
    tmp_path: Path, size: int, options: list[str], expected: list[set[str]]
) -> None:
    """Neither a larger budget nor fewer tokens help; each command that is named does."""
    config = {"model_type": "llama", "hidden_size": size, "intermediate_size": 4 * size, "num_hidden_layers": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "num_attention_heads": 64, "vocab_size": 96}))
    given = ["--max-length", "64", "--lora-dropout", "0", "--forbid", "groups,lean_adapters,chunked_loss"]
    outcome = rematree("plan", str(file), *given, *options, "--device", "rtx-4060-ti-16gb")
    assert outcome.code == 3, outcome.err
    commands = remedies(outcome)
    for words in commands:
        again = rematree(*words, "--json")
        assert again.code == 0, (words, again.err)
        plan = Plan.from_json(again.out)
        assert plan.budget_bytes is not None
        assert plan.predicted_peak_bytes <= plan.budget_bytes
    said = [" ".join(words).replace("--device ", "--device=").split() for words in commands]
    assert [
        {word for word in words if word.startswith(("--load", "--full", "--dev"))} - {"--device=rtx-4060-ti-16gb"}
        for words in said
    ] == expected
