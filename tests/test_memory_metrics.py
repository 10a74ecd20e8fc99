"""Memory and the plan in force among what a Trainer logs, read back from TensorBoard's and W&B's own files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import rematree
from models import batch_for, build, with_lora
from rematree.finetune.callbacks import StepMeter
from rematree.finetune.run_folder import RunFolder
from rematree.integrations import metrics
from rematree.integrations.metrics import MemoryMetrics, device_memory
from rematree.measure import resident_peak_bytes
from rematree.planning.ladder import Ladder
from rematree.pricing.cost import Roofline
from rematree.units import GIB
from test_finetune_tiny import FixedMeter

COST = Roofline(5e10, 1e10)
PREDICTED = {
    "rematree/predicted_peak(GiB)",
    "rematree/recompute_share",
    "rematree/budget(GiB)",
    "rematree/headroom(GiB)",
}


@pytest.fixture
def model() -> Any:
    return with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def plan() -> rematree.Plan:
    """One that recomputes, for the model of all tests."""
    model = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    planner = rematree.Planner(model, batch_for(model, rows=4), cost=COST)
    made = planner.plan((planner.min_peak_bytes() + planner.plain_step()[0]) // 2)
    assert made.recomputes
    return made


class Planned:
    """Stands for the planner of a callback: the plan is made already."""

    def __init__(self, plan: rematree.Plan) -> None:
        self._plan = plan

    def plan(self, budget: int) -> rematree.Plan:
        assert budget == self._plan.budget_bytes
        return self._plan


@pytest.fixture
def callback(plan: rematree.Plan, monkeypatch: pytest.MonkeyPatch) -> rematree.BudgetCallback:
    monkeypatch.setattr("rematree.integrations.trainer.Planner", lambda *args, **options: Planned(plan))
    monkeypatch.setattr("rematree.integrations.job.build_ladder", lambda planner, *_: Ladder((planner,)))
    return rematree.BudgetCallback(plan.budget_bytes, say=lambda text: None)


def trainer_for(model: Any, folder: Path, callbacks: list[Any], report_to: list[str]) -> Trainer:
    batch = batch_for(model, rows=4)
    rows = [{name: tensor[index] for name, tensor in batch.items()} for index in range(4)] * 3
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        report_to=report_to,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)  # pyright: ignore[reportArgumentType]


def scalars(folder: Path) -> tuple[dict[str, list[float]], list[str]]:
    """What TensorBoard would show: values by tag, and the texts of the plan."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags: dict[str, Any] = events.Tags()
    found = {tag: [event.value for event in events.Scalars(tag)] for tag in tags["scalars"]}
    tag = "train/rematree/plan/text_summary"
    texts = events.Tensors(tag) if tag in tags["tensors"] else []
    return found, [text.tensor_proto.string_val[0].decode() for text in texts]


def test_tensorboard_shows_memory_and_plan(
    model: Any,
    plan: rematree.Plan,
    callback: rematree.BudgetCallback,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = trainer_for(model, tmp_path, [callback], ["tensorboard"])
    added = rematree.log_memory(trainer)
    assert rematree.log_memory(trainer) is added
    assert sum(isinstance(each, MemoryMetrics) for each in trainer.callback_handler.callbacks) == 1
    trainer.train()
    assert callback.plan == plan
    budget = plan.budget_bytes
    assert budget is not None
    found, texts = scalars(tmp_path / "logs")
    assert len(found["train/loss"]) == 3
    assert found["train/rematree/budget(GiB)"] == pytest.approx([budget / GIB] * 3, rel=1e-6)  # stored in 32 bits
    assert found["train/rematree/predicted_peak(GiB)"] == pytest.approx([plan.predicted_peak_bytes / GIB] * 3, rel=1e-6)
    assert plan.headroom_bytes is not None
    assert found["train/rematree/headroom(GiB)"] == pytest.approx([plan.headroom_bytes / GIB] * 3, rel=1e-6)
    share = plan.extra_seconds / plan.predicted_step_seconds
    assert found["train/rematree/recompute_share"] == pytest.approx([share] * 3, rel=1e-6)
    resident = found["train/memory/max_resident(GiB)"]
    assert len(resident) == 3
    assert resident == sorted(resident)
    assert 0 < resident[-1] <= resident_peak_bytes() / GIB * 1.0001
    assert not any("max_active" in tag for tag in found), "a CPU has no such counter"
    (text,) = texts  # once, not with every loss
    assert text.startswith(plan.summary())
    assert all(row.option in text for row in plan.rows)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry.keys() >= PREDICTED | {"memory/max_resident(GiB)"} for entry in logged)


def test_passed_as_a_callback_it_would_come_behind_the_reports(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why there is `log_memory`: should this fail, transformers has changed the order and it can go."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = trainer_for(model, tmp_path, [MemoryMetrics()], ["tensorboard"])
    trainer.train()
    assert "train/memory/max_resident(GiB)" not in scalars(tmp_path / "logs")[0]
    rematree.log_memory(trainer)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "again"))
    trainer.train()
    found = [scalars(path)[0] for path in (tmp_path / "logs", tmp_path / "again") if path.exists()]
    assert any("train/memory/max_resident(GiB)" in each for each in found)


def test_without_a_plan_memory_alone_is_logged(model: Any, tmp_path: Path) -> None:
    trainer = trainer_for(model, tmp_path, [], [])
    rematree.log_memory(trainer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert "memory/max_resident(GiB)" in logged
    assert not any(name.startswith("rematree/") for name in logged)
    assert not any(name.startswith("memory/") for name in trainer.state.log_history[-1]), "the sums at the end"


def test_wandb_keeps_them_offline(
    model: Any,
    plan: rematree.Plan,
    callback: rematree.BudgetCallback,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; it is no dependency")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    trainer = trainer_for(model, tmp_path, [callback], ["wandb"])
    rematree.log_memory(trainer)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert {f"train/{name}" for name in PREDICTED} <= summary.keys()
    assert summary["train/rematree/budget(GiB)"] == pytest.approx((plan.budget_bytes or 0) / GIB)
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_gpu_is_told_by_the_names_of_torchtitan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of an allocator that is not here; `test_a_gpu_counts` reads a real one."""
    counters = {
        "active_bytes.all.peak": 3 * GIB,
        "reserved_bytes.all.peak": 6 * GIB,
        "num_alloc_retries": 2,
        "num_ooms": 1,
    }
    reset: list[Any] = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: counters)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    properties = type("Properties", (), {"total_memory": 24 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert device_memory(torch.device("cuda", 0)) == {
        "memory/max_active(GiB)": 3.0,
        "memory/max_active(%)": 12.5,
        "memory/max_reserved(GiB)": 6.0,
        "memory/max_reserved(%)": 25.0,
        "memory/num_alloc_retries": 2,
        "memory/num_ooms": 1,
    }
    assert reset == [torch.device("cuda", 0)]


def test_the_counters_of_a_gpu_are_reset_by_one_callback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two would each lose what the other has read; before the first step, and with each log after that."""
    order: list[str] = []
    counters = {f"{name}_bytes.all.peak": 3 * GIB for name in ("active", "reserved")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {**counters, "num_alloc_retries": 0, "num_ooms": 0})
    monkeypatch.setattr("rematree.finetune.callbacks.requested_peak_bytes", lambda device: order.append("read") or 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: order.append("reset"))
    properties = type("Properties", (), {"total_memory": 24 * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model: Any = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda", 0))]))
    monkeypatch.setattr(metrics, "applied_handle", lambda model: None)
    meter = StepMeter(RunFolder(tmp_path), FixedMeter)
    state = SimpleNamespace(global_step=0, max_steps=9, log_history=[])
    both = [MemoryMetrics(), meter]

    def event(name: str, **more: Any) -> None:
        for callback in both:
            getattr(callback, name)(None, state, None, model=model, optimizer=None, **more)

    event("on_train_begin")
    for _ in range(3):
        event("on_step_begin")
        state.global_step += 1
        event("on_step_end")
        event("on_log", logs={"loss": 1.0})
    assert order == ["reset", *["read", "reset"] * 3]
    assert [entry["peak_bytes"] for entry in RunFolder(tmp_path).steps()] == [7, 7, 7]


@pytest.mark.gpu
def test_a_gpu_counts() -> None:
    device = torch.device("cuda", 0)
    device_memory(device)
    before = torch.cuda.memory_stats(device)["active_bytes.all.current"]
    block = torch.empty(1 << 28, device=device, dtype=torch.uint8)
    del block
    assert device_memory(device)["memory/max_active(GiB)"] == pytest.approx((before + (1 << 28)) / GIB, rel=0.01)


def test_every_name_is_documented() -> None:
    documented = MemoryMetrics.__doc__ or ""
    assert all(f"`{name}`" in documented for name in PREDICTED | {"memory/max_resident(GiB)", metrics._PLAN})


def test_of_several_plans_the_one_that_the_latest_batch_ran_under_is_logged(model: Any, plan: rematree.Plan) -> None:
    longest, short = batch_for(model, rows=4), batch_for(model, rows=4, tokens=8)
    shorter = rematree.Planner(model, longest, cost=COST).for_batch(short).plan(None)
    metrics, state = MemoryMetrics(), SimpleNamespace(log_history=[])
    with rematree.apply(plan, model, smaller=[shorter]):
        for batch, expected in ((short, shorter), (longest, plan)):
            model(**batch).loss.backward()
            logs: dict[str, Any] = {"loss": 1.0}
            metrics.on_log(None, state, None, logs=logs, model=model)
            assert logs["rematree/predicted_peak(GiB)"] == expected.predicted_peak_bytes / GIB
            assert logs["rematree/plan"].startswith(expected.summary())
