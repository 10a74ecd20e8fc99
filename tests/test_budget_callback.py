"""A budget inside the training loops people use: same losses as the plain run, peak inside, nothing left behind."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from models import build, with_lora
from rematree import BudgetCallback, is_activation_checkpointing, prepare_model_for_kbit_training
from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.execute.compiled import why_no_compiler
from rematree.execute.handle import applied_handle
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from rematree.units import parse_bytes
from trainers import QUICK, adapters, pad, quiet_arguments, rows_of

COST = Roofline(1e11, 1e10)

LENGTHS = (12, 40, 9, 33, 21, 40, 17, 8, 30, 25, 11, 38)
BLOCKS = ("lean_adapters", "groups")  # to survey what nobody needs who has memory enough takes seconds
LONG = (40,) * 8  # every batch is the longest
SLACK = (256 << 10) + 4096  # that every prediction holds, and the batch, which the meter does not see here


def adapted(base: Any = None) -> Any:
    """Two layers with adapters on two projections: the fewer regions there are, the fewer steps are simulated."""
    return with_lora(build("llama", layers=2) if base is None else base, target_modules=["q_proj", "down_proj"])


class LastStepPeak(TrainerCallback):
    """Peak of every step but the first."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._meter: PeakMeter | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            optimizer = kwargs["optimizer"]
            self._meter = PeakMeter(kwargs["model"], getattr(optimizer, "optimizer", optimizer))
            self._meter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self.peak_bytes = max(self.peak_bytes, self._meter.peak_bytes)


def train(
    folder: Path, *callbacks: TrainerCallback, model: Any = None, lengths: tuple[int, ...] = LENGTHS, **settings: Any
) -> tuple[Any, list[float]]:
    model = model if model is not None else adapted()
    arguments = quiet_arguments(folder, max_steps=4, **settings)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows_of(*lengths), data_collator=pad, callbacks=list(callbacks)
    )
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def limits() -> tuple[int, int]:
    """Smallest and largest useful budget of the job, loss not chunked."""
    rows: list[Any] = list(rows_of(*LENGTHS))
    batch = pad([row for row in rows if len(row["input_ids"]) == 40])
    batch["attention_mask"][-1, -1] = 0  # other batches of this size have padding, and with it a mask
    planner = Planner(adapted(), batch, cost=COST, forbid=QUICK)
    return planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, losses = train(tmp_path_factory.mktemp("plain"))
    return adapters(model), losses


def same_run(first: tuple[dict[str, torch.Tensor], list[float]], model: Any, losses: list[float]) -> None:
    weights = adapters(model)
    assert losses == first[1]
    assert weights.keys() == first[0].keys()
    for name, value in first[0].items():
        assert torch.equal(value, weights[name]), name


@pytest.fixture
def old_names_allowed() -> Iterator[None]:
    """transformers says of its own old argument names that they are old."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        yield


def test_trainer_stays_inside_and_trains_the_same(
    tmp_path: Path, limits: tuple[int, int], plain: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    budget = (limits[0] * 3 + limits[1]) // 4
    said: list[str] = []
    callback = BudgetCallback(budget, cost=COST, forbid=QUICK, say=said.append)
    peak = LastStepPeak()
    model, losses = train(tmp_path, callback, peak)
    same_run(plain, model, losses)
    assert callback.plan is not None
    assert callback.plan.recomputes
    assert peak.peak_bytes <= max(plan.predicted_peak_bytes for plan in callback.plans) <= budget
    assert "the 2 longest of 12 examples" in said[-1]
    assert {n: s for n, s, _ in callback.plan.fingerprint.batch}["input_ids"] == (2, 40)


class Steps(TrainerCallback):
    """The plan and the longest row of every step."""

    def __init__(self, callback: BudgetCallback) -> None:
        self._callback = callback
        self.seen: list[tuple[int, bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plan = self._callback.in_force
        assert plan is not None
        shape = next(shape for name, shape, _ in plan.fingerprint.batch if name == "input_ids")
        self.seen.append((shape[1], plan.recomputes))


def test_short_batches_run_under_plans_of_their_own(
    tmp_path: Path, limits: tuple[int, int], plain: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    budget = (limits[0] + limits[1]) // 2
    said: list[str] = []
    callback = BudgetCallback(budget, cost=COST, forbid=QUICK, say=said.append)
    steps = Steps(callback)
    model, losses = train(tmp_path, callback, steps)
    same_run(plain, model, losses)
    assert callback.plans[-1] is callback.plan is callback.in_force
    assert all(plan.predicted_peak_bytes <= budget for plan in callback.plans)
    rungs = [{n: s for n, s, _ in plan.fingerprint.batch}["input_ids"][1] for plan in callback.plans]
    assert rungs == sorted(rungs)
    assert len(rungs) > 1
    assert rungs[-1] == 40
    assert len(set(steps.seen)) > 1, "batches of several lengths"
    assert not callback.plans[0].recomputes
    shown = next(line for line in said if line.startswith("batches of up to"))
    assert [line.split("  ")[0] for line in shown.splitlines()[1:]] == [f"2 x {rung} tokens" for rung in rungs]


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.usefixtures("old_names_allowed")
def test_budget_in_the_training_arguments(
    name: str, tmp_path: Path, limits: tuple[int, int], plain: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    budget = f"{limits[0] / 2**20 + 0.2:.2f}MiB"
    settings: dict[str, Any] = {name: True, f"{name}_kwargs": {"budget": budget}}
    callback = BudgetCallback(cost=COST, forbid=QUICK, say=lambda text: None)
    model, losses = train(tmp_path, callback, **settings)
    same_run(plain, model, losses)
    assert callback.plan is not None
    assert callback.plan.budget_bytes == parse_bytes(budget)


def test_budget_written_on_the_model(tmp_path: Path, limits: tuple[int, int]) -> None:
    """As a script does it that prepares for k-bit training: until the plan is applied, every layer is checkpointed."""
    base = prepare_model_for_kbit_training(build("llama", layers=2), budget=limits[1] * 2)
    assert is_activation_checkpointing(base)
    model = adapted(base)
    callback = BudgetCallback(cost=COST, forbid=QUICK, say=lambda text: None)
    train(tmp_path, callback, model=model)
    assert callback.plan is not None
    assert (callback.plan.budget_bytes, callback.plan.recomputes) == (limits[1] * 2, False)
    assert is_activation_checkpointing(model)  # the plan is off, what was there before is back


def test_nothing_is_left_behind(tmp_path: Path, limits: tuple[int, int]) -> None:
    model, _ = train(tmp_path)  # accelerate leaves a mark of its own
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    train(tmp_path, BudgetCallback(limits[0], cost=COST, forbid=QUICK, say=lambda text: None), model=model)
    assert applied_handle(model) is None
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    for path, module in model.named_modules():
        assert module.__dict__.keys() == before[path].keys(), path
        assert module.__dict__.get("forward") is before[path].get("forward"), path


def predicted_within_slack(callback: BudgetCallback, peak: LastStepPeak) -> None:
    assert callback.plan is not None
    predicted = callback.plan.predicted_peak_bytes
    assert predicted - SLACK <= peak.peak_bytes <= predicted


def test_peak_is_the_predicted_one(tmp_path: Path, limits: tuple[int, int]) -> None:
    callback, peak = (
        BudgetCallback(limits[0], cost=COST, forbid=QUICK, say=lambda text: None),
        LastStepPeak(),
    )
    train(tmp_path, callback, peak, lengths=LONG)
    predicted_within_slack(callback, peak)


def test_bf16_autocast_is_planned_as_it_runs(tmp_path: Path) -> None:
    """accelerate wraps the model's forward; the twin is wrapped the same way."""
    callback, peak = BudgetCallback("100MiB", cost=COST, forbid=BLOCKS, say=lambda text: None), LastStepPeak()
    train(tmp_path, callback, peak, lengths=LONG, bf16=True)
    predicted_within_slack(callback, peak)


def test_gradient_accumulation_is_planned_with_gradients_live(tmp_path: Path, limits: tuple[int, int]) -> None:
    callback, peak = BudgetCallback(limits[1] * 2, cost=COST, forbid=BLOCKS, say=lambda text: None), LastStepPeak()
    train(tmp_path, callback, peak, lengths=LONG, gradient_accumulation_steps=2)
    predicted_within_slack(callback, peak)


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._steps


@pytest.mark.slow  # compiles
@pytest.mark.skipif(why_no_compiler(torch.device("cpu")) is not None, reason="nothing here to compile with")
def test_blocks_are_compiled_where_that_is_allowed_and_batches_of_all_lengths_run(tmp_path: Path) -> None:
    def run(*callbacks: TrainerCallback) -> list[float]:
        model = with_lora(build("llama", layers=4), lora_dropout=0.1)
        arguments = quiet_arguments(tmp_path, max_steps=10**6)  # enough to pay for compiling, were they all run
        data = rows_of(*(length * 8 for length in LENGTHS))
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=pad, callbacks=[*callbacks, StopAfter(6)]
        )
        trainer.train()
        assert applied_handle(model) is None
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    callback = BudgetCallback("2GiB", allow_compile=True)
    losses = run(callback)
    assert callback.plan is not None
    assert callback.plans == (callback.plan,)
    assert len(callback.plan.compiled) == 4
    # fp32, six steps: what fused sums are off by
    assert losses == pytest.approx(run(), abs=1e-4)


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no budget: neither BudgetCallback nor the training arguments nor the model"):
        train(tmp_path, BudgetCallback(cost=COST))
    with pytest.raises(UsageError, match=r"two budgets: 2\.00 GiB and 1\.00 GiB"):
        train(
            tmp_path,
            BudgetCallback("1GiB", cost=COST),
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"budget": "2GiB"},
        )
    with pytest.raises(UsageError, match="has no unit"):
        BudgetCallback("14")
    model = adapted()
    with pytest.raises(InfeasibleBudgetError, match="below the smallest reachable peak") as caught:
        train(tmp_path, BudgetCallback("300KiB", cost=COST), model=model)
    assert caught.value.budget == 300 * 1024 < caught.value.min_peak
    assert applied_handle(model) is None
