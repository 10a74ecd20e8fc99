"""The job from end to end on a tiny model under a real plan: killed, torn, repeated, out of disk."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import SchedulerType, TrainingArguments, get_scheduler

from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.execute.handle import apply
from rematree.finetune import compare, demo, evaluate
from rematree.finetune.config import SCHEDULES, TrainConfig
from rematree.finetune.demo import run_demo
from rematree.finetune.job import run
from rematree.finetune.result import TrainResult
from rematree.finetune.setup import Engine, prepare
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.pricing.cost import Roofline
from rematree.pricing.price import Overhead
from test_finetune_tiny import plain_engine, save_tiny_model, sums, tiny_config, tiny_model, write_jsonl

NUM_STEPS = 9


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job")
    save_tiny_model(path / "model")
    write_jsonl(path / "sums.jsonl", sums(24))
    return path


def planned_engine(plan_file: Path) -> Engine:
    """The library's executor and meter under a plan that is made once for all tests."""
    return Engine(lambda model, batch, config: Plan.from_json(plan_file.read_text()), apply, PeakMeter)


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    """A budget between the least and the most the step can use."""
    setup = prepare(tiny_config(folder), lambda line: None)
    planner = Planner(setup.model, setup.batch, cost=Roofline(1e11, 1e10), forbid=["chunked_loss"])
    most = planner.plan(None).predicted_peak_bytes
    with pytest.raises(InfeasibleBudgetError) as caught:
        planner.plan(1)
    config = tiny_config(folder, budget=(most + caught.value.min_peak) // 2)
    plan = planner.plan(config.budget)
    assert plan.recomputes
    (folder / "plan.json").write_text(plan.to_json())
    return config


@pytest.fixture(scope="module")
def engine(folder: Path, config: TrainConfig) -> Engine:
    return planned_engine(folder / "plan.json")


def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def whole(folder: Path, config: TrainConfig, engine: Engine) -> tuple[TrainResult, str]:
    """The run that nothing interrupts, and what it printed."""
    console = screen()
    return run(dataclasses.replace(config, output_dir=folder / "whole"), console, engine=engine), shown(console)


def elsewhere(config: TrainConfig, path: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, output_dir=path / "out", **changes)


def refuses(*args: Any) -> Any:
    raise AssertionError("must not be reached")


def test_result_is_complete(whole: tuple[TrainResult, str], config: TrainConfig):
    result, _ = whole
    data = json.loads((Path(result.output_dir) / "result.json").read_text())
    assert TrainResult.from_dict(data) == result
    assert data["budget_bytes"] == config.budget
    assert data["measured_peak_bytes"] <= data["predicted_peak_bytes"] <= config.budget
    assert data["measured_step_seconds"] > 0
    assert data["heldout_loss_after"] < data["heldout_loss_before"]
    assert len(data["losses"]) == NUM_STEPS
    assert data["generated_before"] != data["generated_after"]
    assert data["versions"]["torch"] == torch.__version__


def test_plan_is_printed_before_the_first_step(whole: tuple[TrainResult, str]):
    result, text = whole
    assert text.index("predicted: peak") < text.index("held-out loss before") < text.index("step 1/9")
    assert text.index("step 9/9") < text.index("peak       predicted") < text.index(f"adapter    {result.adapter}")


def test_directory_holds_the_run_and_nothing_half_written(whole: tuple[TrainResult, str]):
    path = Path(whole[0].output_dir)
    names = ["adapter", "before.json", "checkpoint-8", "checkpoint-9", "logs", "measured.json", "plan.json"]
    assert sorted(p.name for p in path.iterdir()) == [*names, "result.json", "run.json", "steps.jsonl"]
    assert list((path / "logs").glob("events.*"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_loads_in_plain_peft(folder: Path, config: TrainConfig, engine: Engine, tmp_path: Path):
    short = elsewhere(config, tmp_path, max_steps=2)
    setup = prepare(short, lambda line: None)
    result = run(short, screen(), engine=engine, setup=setup)
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, result.adapter).eval()
    ids = setup.batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, setup.model.eval()(input_ids=ids).logits)
        assert not torch.equal(loaded(input_ids=ids).logits, tiny_model().eval()(input_ids=ids).logits)


def test_finished_run_tells_its_result(whole: tuple[TrainResult, str], config: TrainConfig):
    result, _ = whole
    console = screen()
    again = dataclasses.replace(config, output_dir=Path(result.output_dir))
    assert run(again, console, engine=Engine(refuses, refuses, refuses)) == result
    assert f"{result.output_dir} holds this run, finished" in shown(console)


def test_directory_of_another_run_is_refused(whole: tuple[TrainResult, str], config: TrainConfig):
    path = Path(whole[0].output_dir)
    with pytest.raises(UsageError) as caught:
        run(dataclasses.replace(config, output_dir=path, learning_rate=1.0, seed=3), screen())
    assert str(caught.value) == (
        f"{path} holds another run\n"
        "  --learning-rate: there 0.01, here 1.0\n"
        "  --seed: there 0, here 3\n"
        "What would work:\n"
        "  another --output-dir\n"
        f"  rm -r {path}   (to start afresh)\n"
        "  the settings of that run, to resume it"
    )


def test_whom_the_umask_lets_read_can_read_all_of_a_run(whole: tuple[TrainResult, str], tmp_path: Path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    out, adapter = Path(whole[0].output_dir), Path(whole[0].adapter)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    files = [*out.glob("*.json"), *adapter.iterdir(), *(path for path in out.glob("checkpoint-*/*") if path.is_file())]
    assert {"plan.json", "run.json", "result.json", "adapter_model.safetensors"} <= {path.name for path in files}
    assert {mode(path) for path in files} == {mode(tmp_path / "file")}
    assert mode(adapter) == mode(tmp_path / "folder")


def test_directory_with_other_files_is_refused(tmp_path: Path, config: TrainConfig):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError) as caught:
        run(dataclasses.replace(config, output_dir=tmp_path), screen())
    assert caught.value.message == f"{tmp_path} is not empty and holds no run"
    assert caught.value.details == ("in it: thesis.tex",)


def test_output_directory_that_is_a_file_is_refused(tmp_path: Path, config: TrainConfig):
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="out is a file, not a directory"):
        run(elsewhere(config, tmp_path), screen())
    with pytest.raises(UsageError, match="cannot be written"):
        run(dataclasses.replace(config, output_dir=tmp_path / "out" / "below"), screen())


def test_infeasible_budget_leaves_nothing(tmp_path: Path, config: TrainConfig):
    def infeasible(*args: Any) -> Any:
        raise InfeasibleBudgetError("too small", budget=1, min_peak=2)

    with pytest.raises(InfeasibleBudgetError):
        run(elsewhere(config, tmp_path), screen(), engine=dataclasses.replace(plain_engine(), plan=infeasible))
    assert not list(tmp_path.iterdir())


CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from rich.console import Console
from test_finetune_job import planned_engine
from test_finetune_tiny import tiny_config
from rematree.finetune.job import run
folder, out, budget = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = tiny_config(folder, output_dir=out, budget=budget)
run(config, Console(file=sys.stdout, width=200), engine=planned_engine(folder / "plan.json"))
"""


def test_killed_run_resumes_and_ends_with_the_same_losses(
    whole: tuple[TrainResult, str], folder: Path, config: TrainConfig, engine: Engine, tmp_path: Path
):
    last_step = random.SystemRandom().randint(1, NUM_STEPS - 1)
    resumed = elsewhere(config, tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(resumed.output_dir), str(config.budget)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    lines: list[str] = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith(f"step {last_step}/"):
            child.kill()
            break
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL, "".join(lines)
    assert not (resumed.output_dir / "result.json").exists()
    console = screen()
    result = run(resumed, console, engine=dataclasses.replace(engine, plan=refuses))
    assert result.losses == whole[0].losses, f"killed after step {last_step}"
    assert result.heldout_loss_before == whole[0].heldout_loss_before
    assert result.heldout_loss_after == whole[0].heldout_loss_after
    assert result.generated_after == whole[0].generated_after
    if last_step > 3:
        assert "resuming from checkpoint-" in shown(console)


def copy_run(result: TrainResult, tmp_path: Path) -> Path:
    path = tmp_path / "out"
    shutil.copytree(result.output_dir, path)
    (path / "result.json").unlink()
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "tear",
    [
        lambda checkpoint: cut(checkpoint / "optimizer.pt"),
        lambda checkpoint: (checkpoint / "complete.json").unlink(),
        lambda checkpoint: (checkpoint / "rng_state.pth").unlink(),
        lambda checkpoint: cut(checkpoint / "complete.json"),
    ],
    ids=["cut file", "not marked", "missing file", "cut mark"],
)
def test_torn_checkpoint_is_removed_and_the_one_before_used(
    tear: Any, whole: tuple[TrainResult, str], config: TrainConfig, engine: Engine, tmp_path: Path
):
    path = copy_run(whole[0], tmp_path)
    tear(path / "checkpoint-9")
    (path / ".adapter-half").mkdir()
    console = screen()
    result = run(dataclasses.replace(config, output_dir=path), console, engine=engine)
    assert "checkpoint-9 is not whole" in shown(console)
    assert "resuming from checkpoint-8" in shown(console)
    assert result.losses == whole[0].losses
    assert result.heldout_loss_after == whole[0].heldout_loss_after
    assert not (path / ".adapter-half").exists()


def test_a_file_of_someone_elses_does_not_make_a_checkpoint_torn(
    whole: tuple[TrainResult, str], config: TrainConfig, engine: Engine, tmp_path: Path
):
    path = copy_run(whole[0], tmp_path)
    shutil.rmtree(path / "adapter")
    (path / "checkpoint-9" / ".DS_Store").write_bytes(b"\0")
    (path / "checkpoint-9" / "notes").mkdir()
    (path / "checkpoint-9" / "notes" / "README.md").write_text("mine")
    no_steps = dataclasses.replace(engine, apply=refuses, meter=refuses)
    assert run(dataclasses.replace(config, output_dir=path), screen(), engine=no_steps).losses == whole[0].losses
    assert (path / "checkpoint-9" / "notes" / "README.md").read_text() == "mine"


def test_run_killed_after_its_last_step_makes_no_step_more(
    whole: tuple[TrainResult, str], config: TrainConfig, engine: Engine, tmp_path: Path
):
    path = copy_run(whole[0], tmp_path)
    shutil.rmtree(path / "adapter")
    no_steps = dataclasses.replace(engine, apply=refuses, meter=refuses)
    result = run(dataclasses.replace(config, output_dir=path), screen(), engine=no_steps)
    assert dataclasses.replace(result, output_dir="", adapter="") == dataclasses.replace(
        whole[0], output_dir="", adapter=""
    )
    assert (path / "adapter" / "adapter_model.safetensors").exists()


def test_full_disk_while_saving(
    whole: tuple[TrainResult, str],
    config: TrainConfig,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    save = torch.save

    def full(data: Any, path: Any, *args: Any) -> None:
        if "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(data, path, *args)

    resumed = elsewhere(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UsageError) as caught:
            run(resumed, screen(), engine=engine)
    path = resumed.output_dir
    assert re.fullmatch(
        rf"saving to {re.escape(str(path))} failed: it takes about 8\.\d MiB, [\d.]+ [KMG]iB are free",
        caught.value.message,
    )
    assert caught.value.details[0].startswith("[Errno 28] No space left on device")
    assert caught.value.details[1] == "checkpoint-2 is whole"
    assert caught.value.remedies[0] == "make room and start the same command again"
    assert not (path / "checkpoint-4").exists()
    assert run(resumed, screen(), engine=engine).losses == whole[0].losses


def test_disk_that_really_is_full(config: TrainConfig, engine: Engine, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)], check=False, capture_output=True
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("not allowed to mount a small file system")
    try:
        with pytest.raises(UsageError, match=r"saving to .* failed: it takes about .*, .* are free") as caught:
            run(elsewhere(config, disk), screen(), engine=engine)
        assert re.fullmatch(r"checkpoint-\d is whole", caught.value.details[1])
        left = [p for p in (disk / "out").glob("checkpoint-*") if not (p / "complete.json").exists()]
        assert not left
        assert not (disk / "out" / "result.json").exists()
    finally:
        # Lazily: the error still holds the frame with the file that could not be written.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_gradient_accumulation_counts_all_its_passes(config: TrainConfig, tmp_path: Path):
    settings = elsewhere(config, tmp_path, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=1.0)
    result = run(settings, screen(), engine=plain_engine())
    assert result.predicted_step_seconds == 2 * 0.25
    assert len(result.losses) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 500}, "--max-length is 500, the model has 128 positions"),
        ({"lora_target_modules": ("no_proj",)}, "--lora-target-modules ('no_proj',): Target modules"),
    ],
)
def test_settings_that_do_not_fit_the_model(changes: dict[str, Any], message: str, folder: Path):
    with pytest.raises(UsageError) as caught:
        prepare(tiny_config(folder, **changes), lambda line: None)
    assert caught.value.message.startswith(message)


def make_schedule(name: str, learning_rate: float, folder: Path) -> None:
    """As the Trainer makes it of what the job gives it."""
    arguments = TrainingArguments(output_dir=str(folder), lr_scheduler_type=name, report_to=[], use_cpu=True)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(9), num_training_steps=9)


def test_schedules_are_all_that_the_trainer_can_make(tmp_path: Path):
    possible: list[str] = []
    for schedule in SchedulerType:
        with contextlib.suppress(ValueError, TypeError):
            make_schedule(schedule.value, 1e-2, tmp_path)
            possible.append(schedule.value)
    assert sorted(possible) == sorted(SCHEDULES)


def test_the_polynomial_schedule_ends_where_the_settings_say(tmp_path: Path):
    make_schedule("polynomial", 1.1e-7, tmp_path)
    with pytest.raises(ValueError, match="must be smaller than initial lr"):
        make_schedule("polynomial", 1e-7, tmp_path)


def test_cache_is_off_or_packed_examples_would_leak(folder: Path):
    assert prepare(tiny_config(folder), lambda line: None).model.config.use_cache is False


def test_heldout_loss_is_the_mean_over_answer_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "_LOGIT_ROWS", 3)
    setup = prepare(tiny_config(folder, heldout=5), lambda line: None)
    total, count = 0.0, 0
    heldout: Any = setup.data.heldout
    for row in heldout.select(range(4)):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = setup.model.eval()(input_ids=ids, labels=labels).loss
        tokens = int((labels[:, 1:] != -100).sum())
        total, count = total + loss.item() * tokens, count + tokens
    setup.model.train()
    assert evaluate.heldout_loss(setup.model, setup.data.heldout, 4) == pytest.approx(total / count, rel=1e-6)
    assert setup.model.training


def test_nothing_held_out_has_no_loss(folder: Path):
    setup = prepare(tiny_config(folder, heldout=0), lambda line: None)
    assert evaluate.heldout_loss(setup.model, setup.data.heldout, 4) is None


def test_comparison_leaves_the_model_as_it_was(folder: Path):
    setup = prepare(tiny_config(folder), lambda line: None)
    hooks = [len(module._forward_hooks) for module in setup.model.modules()]
    weights = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    options = {"learning_rate": 0.1, "max_grad_norm": 1.0}
    peak = compare.hf_checkpointing_peak(setup.model, setup.batch, PeakMeter, **options)
    times = compare.time_side_by_side(setup.model, setup.batch, nullcontext, rounds=2, **options)
    assert peak > 0
    assert set(times) == {"budgeted", "hf_checkpointing", "plain"}
    assert all(seconds is not None and seconds > 0 for seconds in times.values())
    assert [len(module._forward_hooks) for module in setup.model.modules()] == hooks
    assert all(torch.equal(tensor, weights[name]) for name, tensor in setup.model.state_dict().items())
    assert all(parameter.grad is None for parameter in setup.model.parameters())
    assert not setup.model.get_base_model().is_activation_checkpointing


def test_step_that_does_not_fit_is_said(folder: Path):
    setup = prepare(tiny_config(folder), lambda line: None)

    class TooLarge:
        def __enter__(self) -> None:
            raise torch.OutOfMemoryError

        def __exit__(self, *error: object) -> None:
            raise AssertionError("never entered")

    times = compare.time_side_by_side(
        setup.model, setup.batch, TooLarge, rounds=1, learning_rate=0.1, max_grad_norm=1.0
    )
    assert times["budgeted"] is None
    assert times["plain"] is not None


def test_the_demos_budget_on_a_gpu_is_for_its_context_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the flag's tensors; the workspaces of cuBLAS are in its peak, and are there once."""
    monkeypatch.setattr(demo, "overhead_of", lambda cost, kind: Overhead(True, 100, 3))
    budgets: list[Any] = []

    def stop(config: TrainConfig, *_: Any, **__: Any) -> Any:
        budgets.append(config.budget)
        raise InterruptedError

    monkeypatch.setattr(demo, "run", stop)
    settings = tiny_config(folder)
    names = {field.name for field in dataclasses.fields(settings)} - {"budget", "output_dir", "compare_hf"}
    changes = {name: getattr(settings, name) for name in names}
    with pytest.raises(InterruptedError):
        run_demo(tmp_path / "demo", screen(), engine=plain_engine(), **changes)
    assert budgets == [(7 - 3) // 2 + 3 + 100]


def test_demo_runs_in_half_of_what_checkpointing_takes(folder: Path, tmp_path: Path):
    settings = tiny_config(folder)
    changes = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in ("budget", "output_dir", "compare_hf")
    }
    console = screen()
    result = run_demo(tmp_path / "demo", console, engine=plain_engine(), **changes)
    assert (result.hf_checkpointing_peak_bytes, result.budget_bytes) == (7, 3)
    assert result.ratio_to_hf is not None
    assert "budgeted / every layer checkpointed:" in shown(console)
    (tmp_path / "demo" / "result.json").unlink()
    again = run_demo(tmp_path / "demo", screen(), engine=plain_engine(), **changes)
    assert again.losses == result.losses
    assert (again.hf_checkpointing_peak_bytes, again.budget_bytes) == (7, 3)
