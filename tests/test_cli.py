"""The commands from end to end on a tiny model: standard output is data, the rest is on standard error."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from command_line import Outcome, rematree, remedies
from rematree.cli import output
from rematree.cli.main import app
from rematree.errors import VerificationError
from rematree.finetune import base
from rematree.finetune.config import TrainConfig
from rematree.plans import Plan
from rematree.pricing.cost import Roofline
from rematree.units import MIB, parse_bytes
from test_finetune_tiny import save_tiny_model, sums, write_jsonl

# Adapters on two projections: the fewer regions there are, the fewer steps are simulated.
ADAPTERS = ["--dtype", "float32", "--lora-r", "4", "--lora-target-modules", "q_proj,down_proj"]
GROUP: Any = typer.main.get_command(app)
SHAPE = ["--batch-size", "32", "--max-length", "128", *ADAPTERS, "--forbid", "groups,lean_adapters"]
EXACT = ["--forbid", "chunked_loss"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Prices from arithmetic: measuring every op takes longer than all the rest. One thread, so that losses repeat."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rematree.planning.observed.Measured", lambda device: Roofline(1e11, 1e10))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    save_tiny_model(path / "model")
    write_jsonl(path / "sums.jsonl", sums(24))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> list[str]:
    return ["--model", str(folder / "model")]


@pytest.fixture(scope="module")
def points(model: list[str]) -> Outcome:
    return rematree("frontier", *model, *SHAPE, "--points", "6", "--json")


@pytest.fixture(scope="module")
def budget(points: Outcome) -> int:
    """Between the least and the most the step can use."""
    peaks = [point["predicted_peak_bytes"] for point in points.data["points"]]
    return (min(peaks) + max(peaks)) // 2


@pytest.fixture(scope="module")
def exact(model: list[str], budget: int, folder: Path) -> Outcome:
    """A plan that recomputes, without a chunked loss."""
    words = ["plan", *model, *SHAPE, *EXACT, "--budget", f"{budget}B"]
    return rematree(*words, "--output", folder / "exact.json")


def test_plan_prints_the_table_and_stores_the_plan(exact: Outcome, budget: int, folder: Path) -> None:
    assert exact.code == 0, exact.err
    plan = Plan.from_json((folder / "exact.json").read_text())
    assert plan.predicted_peak_bytes <= budget == plan.budget_bytes
    assert plan.recomputes
    assert plan.exact
    assert plan.summary() in exact.out
    assert exact.out.startswith(
        "plan for LlamaForCausalLM on cpu: input_ids 32x128, labels 32x128, position_ids 32x128\n"
    )
    assert "planning" in exact.err
    assert not list(folder.glob(".exact*")), "nothing half-written"


def test_plan_as_json_is_the_plan(model: list[str], budget: int) -> None:
    outcome = rematree("plan", *model, *SHAPE, "--no-packing", "--budget", f"{budget}B", "--json")
    assert outcome.code == 0, outcome.err
    plan = Plan.from_json(outcome.out)
    assert [name for name, _, _ in plan.fingerprint.batch] == ["attention_mask", "input_ids", "labels"]
    assert plan.predicted_peak_bytes <= budget


def test_a_plan_goes_into_a_pipe(model: list[str], tmp_path: Path) -> None:
    """As into /dev/null, which must not become a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        outcome = rematree("plan", *model, *SHAPE, *EXACT, "--budget", "1GiB", "--output", pipe, "--json")
        assert os.read(reader, 1 << 16).decode() == outcome.out
    finally:
        os.close(reader)
    assert (outcome.code, pipe.is_fifo(), list(tmp_path.iterdir())) == (0, True, [pipe])
    assert Plan.from_json(outcome.out).budget_bytes == parse_bytes("1GiB")


def test_full_fine_tuning_trains_everything(model: list[str]) -> None:
    outcome = rematree("plan", *model, *SHAPE, *EXACT, "--full", "--budget", "1GiB", "--json")
    assert outcome.code == 0, outcome.err
    ledger = {line["category"]: line["num_bytes"] for line in outcome.data["ledger"]}
    assert ledger["optimizer state"] >= 2 * ledger["trained weights"]
    assert "lora" not in outcome.out


def test_show_prints_what_plan_printed(exact: Outcome, folder: Path) -> None:
    shown = rematree("show", folder / "exact.json")
    assert (shown.code, shown.out, shown.err) == (0, exact.out, "")


def test_show_as_json(exact: Outcome, folder: Path) -> None:
    facts = rematree("show", folder / "exact.json", "--json").data
    assert facts["exact"] is True
    assert sum(row["count"] for row in facts["rows"]) == 2
    assert facts["headroom_bytes"] == facts["budget_bytes"] - facts["predicted_peak_bytes"]


def test_explain_names_bytes_and_reasons(exact: Outcome, folder: Path) -> None:
    text = rematree("explain", folder / "exact.json").out
    for part in (
        "At the peak",
        "base weights, fp32",
        "simulated",
        "recomputed",
        "adds",
        "are left",
        "model's own, all logits at once",
    ):
        assert part in text
    facts = rematree("explain", folder / "exact.json", "--json").data
    assert sum(facts["ledger"].values()) == facts["predicted_peak_bytes"]


def test_frontier_trades_memory_for_time(points: Outcome) -> None:
    assert points.code == 0, points.err
    found = points.data["points"]
    assert 2 <= len(found) <= 6
    peaks = [point["predicted_peak_bytes"] for point in found]
    seconds = [point["predicted_step_seconds"] for point in found]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)
    assert points.data["plain"]["peak_bytes"] > peaks[0]


def test_frontier_of_given_budgets(model: list[str], budget: int) -> None:
    outcome = rematree("frontier", *model, *SHAPE, *EXACT, "--budgets", f"1MiB,{budget}B", "--budgets", "1GiB")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["budget", "peak", "of", "plain", "step", "of", "plain", "loss", "rows"]
    assert lines[1].split() == ["1.0", "MiB", "does", "not", "fit"]
    assert lines[3].startswith("1.00 GiB")
    assert lines[4].endswith("plain step")


def test_verify_keeps_the_promises(exact: Outcome, folder: Path, model: list[str]) -> None:
    outcome = rematree("verify", folder / "exact.json", *model, *ADAPTERS, "--rounds", "1", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.data["gradients_equal"] is True
    assert outcome.data["num_gradients"] == 8
    assert outcome.data["measured_peak_bytes"] <= outcome.data["predicted_peak_bytes"]


def test_verify_measures_with_the_accumulation_of_the_plan(folder: Path, model: list[str]) -> None:
    """Everything is trained on few tokens: the gradients of earlier batches are a good part of the peak."""
    place = folder / "accumulating.json"
    words = ["plan", *model, "--batch-size", "2", "--max-length", "64", *ADAPTERS, *EXACT, "--budget", "1GiB"]
    assert rematree(*words, "--full", "--gradient-accumulation-steps", "2", "--output", place).code == 0
    outcome = rematree("verify", place, *model, *ADAPTERS, "--full", "--rounds", "1", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.data["gradients_equal"] is True
    once = dataclasses.replace(Plan.from_json(place.read_text()), run={})
    place.write_text(once.to_json())
    outcome = rematree("verify", place, *model, *ADAPTERS, "--full", "--rounds", "1")
    assert outcome.code == 4
    assert "more than 3% below the prediction" in outcome.err


def test_failed_verification_exits_with_four(
    exact: Outcome, folder: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*args: Any, **kwargs: Any) -> Any:
        raise VerificationError("gradients differ")

    monkeypatch.setattr("rematree.verification.verify", differ)
    outcome = rematree("verify", folder / "exact.json", *model, *ADAPTERS)
    assert (outcome.code, outcome.out) == (4, "")
    assert outcome.err.endswith("error: gradients differ\n")


def test_env_says_what_is_here() -> None:
    facts = rematree("env", "--json").data
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == sys.version.split()[0]
    most = facts["total_bytes"] if facts["device"] == "cuda" else facts["free_bytes"] - 1
    assert 0 <= facts["largest_budget_bytes"] <= most
    assert facts["free_bytes"] <= facts["total_bytes"]
    text = rematree("env").out
    assert {"torch", "device", "memory", "bfloat16"} <= {line.split()[0] for line in text.splitlines()}
    stated = next(line for line in text.splitlines() if line.startswith("largest budget now")).split()[-1]
    assert parse_bytes(stated) > 0


@pytest.fixture(scope="module")
def training(folder: Path, model: list[str]) -> tuple[list[object], Outcome]:
    """A run of four steps, and the words of its command."""
    words: list[object] = ["train", *model, "--data", folder / "sums.jsonl", "--output-dir", folder / "run"]
    words += ["--budget", "64MiB", "--max-steps", "4", "--batch-size", "2", "--max-length", "64", *ADAPTERS]
    words += ["--max-new-tokens", "4", "--no-packing"]
    return words, rematree(*words)


def test_train_prints_the_adapter(training: tuple[list[object], Outcome], folder: Path) -> None:
    _, outcome = training
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{folder / 'run' / 'adapter'}\n"
    assert outcome.err.index("predicted: peak") < outcome.err.index("step 1/4")
    targets = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert set(targets) == {"q_proj", "down_proj"}


def test_train_again_tells_the_result(training: tuple[list[object], Outcome], folder: Path) -> None:
    again = rematree(*training[0], "--json")
    assert again.code == 0, again.err
    assert again.data == json.loads((folder / "run" / "result.json").read_text())
    assert "holds this run, finished" in again.err


def test_a_run_has_a_page(training: tuple[list[object], Outcome], folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    outcome = rematree("report", folder / "run", "--output", target)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{target}\n", "")  # the frontier is stored: nothing is made
    found = re.search(r'id="data">(.*?)</script>', target.read_text())
    assert found is not None
    data = json.loads(found[1])
    result = json.loads((folder / "run" / "result.json").read_text())
    assert data["plans"][data["inForce"]]["bytes"] == result["predicted_peak_bytes"]
    assert data["budgets"][data["start"]][:2] == [64 * MIB, "64.0 MiB"]
    assert data["budgets"][-1][0] == 64 * MIB > data["scale"]["bytes"]  # far beyond every peak
    assert [step[0] for step in data["run"]["steps"]] == [1, 2, 3, 4]


def test_a_page_as_json_says_where_it_is_and_what_it_is_about(
    training: tuple[list[object], Outcome], folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "page.html"
    outcome = rematree("report", folder / "run", "--output", target, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    plan = Plan.from_json((folder / "run" / "plan.json").read_text())
    result = json.loads((folder / "run" / "result.json").read_text())
    facts = outcome.data
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert facts.pop("plans") > 1
    assert facts.pop("plain_peak_bytes") >= plan.predicted_peak_bytes
    assert 0 < facts.pop("plain_step_seconds") <= plan.predicted_step_seconds
    assert facts.pop("notes")[0].startswith("Peaks and times of plans are predicted before the first step")
    assert facts == {
        "page": str(target),
        "run": str(folder / "run"),
        "title": "model in 64.0 MiB",
        "budget_bytes": 64 * MIB,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "predicted_allocated_bytes": result["predicted_peak_bytes"],
        "measured_peak_bytes": result["measured_peak_bytes"],
        "predicted_step_seconds": result["predicted_step_seconds"],
        "steps": 4,
    }


def test_another_run_is_refused(training: tuple[list[object], Outcome], folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    outcome = rematree(*training[0], "--learning-rate", "0.5")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(
        f"error: {folder / 'run'} holds another run\n  --learning-rate: there 0.0002, here 0.5"
    )
    assert sorted(folder.rglob("*")) == before


def test_every_remedy_of_an_infeasible_budget_works(model: list[str], tmp_path: Path) -> None:
    file = str(tmp_path / "plan.json")
    words = [
        "plan",
        *model,
        *ADAPTERS,
        "--per-device-train-batch-size=8",
        "--max-length",
        "128",
        "--output",
        file,
        *EXACT,
    ]
    outcome = rematree(*words, "--budget", "3MiB")
    assert (outcome.code, outcome.out) == (3, "")
    least = re.search(r"budget 3\.0 MiB is below the smallest reachable peak, ([\d.]+ MiB)", outcome.err)
    assert least
    assert "at that peak:" in outcome.err
    assert not list(tmp_path.iterdir())
    larger, shorter, fewer = remedies(outcome)
    assert 0 <= parse_bytes(options_of(larger)["--budget"]) - parse_bytes(least[1]) <= parse_bytes("1MiB")
    assert {**options_of(larger), "--budget": "3MiB", "--max-length": "64"} == options_of(shorter)
    assert options_of(shorter)["--max-length"] == "64"
    assert options_of(fewer)["--per-device-train-batch-size"] == "4"
    assert options_of(fewer)["--gradient-accumulation-steps"] == "2"
    for command in (larger, shorter, fewer):
        assert options_of(command)["--output"] == file
        again = rematree(*command)
        assert again.code == 0, (command, again.err)
        assert Plan.from_json(Path(file).read_text()).budget_bytes == parse_bytes(options_of(command)["--budget"])


def options_of(words: list[str]) -> dict[str, str]:
    """Options of a command, all of which have a value."""
    return dict(zip(words[1::2], words[2::2], strict=True))


def test_infeasible_training_leaves_nothing_and_says_what_works(folder: Path, model: list[str], tmp_path: Path) -> None:
    words: list[object] = ["train", *model, "--data", folder / "sums.jsonl", "--output-dir", tmp_path / "run"]
    outcome = rematree(*words, "--budget", "300KiB", *ADAPTERS, "--batch-size", "1", "--max-length", "64")
    assert (outcome.code, outcome.out) == (3, "")
    assert not list(tmp_path.iterdir())
    larger, *_ = remedies(outcome)
    assert larger[0] == "train"
    assert model[-1] in larger
    assert larger[larger.index("--output-dir") + 1] == str(tmp_path / "run")
    assert larger[larger.index("--budget") + 1].endswith("MiB")


def test_infeasible_training_lets_the_model_go_before_it_tries_what_works(
    folder: Path, model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []
    own = base.load_base

    def load(config: TrainConfig) -> Any:
        assert not any(each() for each in loaded), "two copies of the weights"
        found = own(config)
        loaded.append(weakref.ref(found.model))
        return found

    for module in ("setup", "synthetic"):
        monkeypatch.setattr(f"rematree.finetune.{module}.load_base", load)
    words: list[object] = ["train", *model, "--data", folder / "sums.jsonl", "--output-dir", tmp_path / "run"]
    outcome = rematree(*words, "--budget", "300KiB", *ADAPTERS, "--batch-size", "1", "--max-length", "64")
    assert outcome.code == 3
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Usage: rematree"),
        (["plan", "--budget", "1GiB"], "Missing argument 'MODEL'"),
        (["plan", "--model", "m"], "Missing option '--budget'"),
        (["train", "--model", "m", "--budget", "1GiB", "--data", "d"], "Missing option '--output-dir'"),
        (["plan", "--model", "m", "--budget", "1GiB", "--max-length", "many"], "Invalid value for '--max-length'"),
        (["plan", "--model", "m", "--budget", "1GiB", "--max-lenght", "8"], "No such option: --max-lenght"),
        (["make"], "No such command 'make'"),
        (["show"], "Missing argument"),
    ],
)
def test_wrong_usage_exits_with_two(words: list[str], message: str) -> None:
    outcome = rematree(*words)
    assert outcome.code == 2
    assert message in " ".join((outcome.out + outcome.err).split())


@pytest.mark.parametrize("command", sorted(GROUP.commands))
def test_every_command_has_json_and_help(command: str) -> None:
    outcome = rematree(command, "--help")
    assert outcome.code == 0
    assert "--json" in outcome.out


def test_every_setting_of_a_run_has_its_option() -> None:
    options = {parameter.name: parameter.opts for parameter in GROUP.commands["train"].params}
    assert options.pop("model") == ["model"]  # an argument; --model is taken for it
    for item in dataclasses.fields(TrainConfig):
        assert item.name == "model" or "--" + item.name.replace("_", "-") in options[item.name]
    defaults = {p.name: p.default for p in GROUP.commands["train"].params}
    for item in dataclasses.fields(TrainConfig):
        if item.default is not dataclasses.MISSING and item.name not in ("lora_target_modules", "forbid"):
            assert defaults[item.name] == item.default


def test_a_terminal_gets_colours_and_its_width(
    exact: Outcome, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    from rematree.report.tables import plan_columns

    output.emit_table(plan_columns(Plan.from_json((folder / "exact.json").read_text())))
    lines = capsys.readouterr().out.splitlines()
    assert any("\x1b[" in line for line in lines)
    assert "added time" in "".join(lines)


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(text: str) -> Any:
        raise RuntimeError("a bug")

    (tmp_path / "plan.json").write_text("{}")
    monkeypatch.setattr(Plan, "from_json", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        rematree("show", tmp_path / "plan.json")


def test_the_installed_command_works_in_a_shell(exact: Outcome, folder: Path) -> None:
    words = [sys.executable, "-m", "rematree.cli.main", "show", str(folder / "exact.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, exact.out, "")


def test_reading_a_plan_needs_no_torch(exact: Outcome, folder: Path) -> None:
    program = (
        "import sys\nfrom rematree.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for command in ("show", "explain"):
        words = [sys.executable, "-c", program, command, str(folder / "exact.json")]
        result = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
