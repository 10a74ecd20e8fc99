"""Steps that run out of memory: undone, planned tighter, run again, and the run ends with the same numbers."""

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import rematree
from models import assert_same, build, with_lora
from rematree import BudgetCallback
from rematree.errors import OutOfMemoryError, UsageError
from rematree.integrations.survival import StepGuard, _Before, _reason, survive_out_of_memory
from rematree.pricing.cost import Roofline
from trainers import QUICK, pad, quiet_arguments, rows_of

COST = Roofline(1e11, 1e10)
LENGTHS = (12, 40, 9, 33, 21, 40, 17, 8, 30, 25, 11, 38, 16, 24, 32, 40)
SAID = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class Fails(nn.Module):
    """A layer that runs out of memory: in the forward, or once some gradients have been added."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = self.raised = 0
        self.fail_at: dict[int, str] = {}
        self.steps_early = False
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not torch._C._len_torch_dispatch_stack():
            self.calls += 1
            self.seen += 1  # running statistics
            place = self.fail_at.pop(self.calls, "")
            torch.rand(3)  # whoever restores the generators has something to restore
            if place == "forward":
                self._raise()
            if place == "backward":
                hidden.register_hook(self._raise)
        return self.inner(hidden, *args, **kwargs)

    def _raise(self, *_: torch.Tensor) -> None:
        self.raised += 1
        if self.steps_early:
            with torch.no_grad():
                next(p for p in self.inner.parameters() if p.requires_grad).add_(1.0)
        raise RuntimeError(SAID)


def run(
    folder: Path, fail_at: dict[int, str], *, guard: bool = True, change: Any = None, **settings: Any
) -> tuple[Any, list[float], list[str]]:
    model: Any = with_lora(build("llama"), target_modules=["q_proj", "down_proj"])  # less to plan, again and again
    layers = model.get_base_model().model.layers
    layers[2] = fails = Fails(layers[2])
    settings.setdefault("max_steps", 8)
    said: list[str] = []
    callback = BudgetCallback("64MiB", cost=COST, forbid=QUICK, say=said.append)
    arguments = quiet_arguments(folder, per_device_train_batch_size=8, **settings)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows_of(*LENGTHS), data_collator=pad, callbacks=[callback]
    )
    if guard:
        survive_out_of_memory(trainer)
    fails.fail_at = dict(fail_at)
    if change is not None:
        change(fails)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], said


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name.replace(".inner", ""): p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_five_failures_in_fifty_steps_leave_no_trace_in_the_numbers(tmp_path: Path) -> None:
    """Under a tighter plan a recomputation is a call of the layer, too; places are counted in calls."""
    check(tmp_path, {7: "forward", 19: "backward", 34: "forward", 58: "backward", 71: "forward"}, max_steps=50)


def test_five_failures_among_accumulated_gradients(tmp_path: Path) -> None:
    places = {2: "forward", 4: "backward", 7: "forward", 11: "backward", 14: "forward"}
    check(tmp_path, places, max_steps=6, gradient_accumulation_steps=2)


def check(folder: Path, places: dict[int, str], **settings: Any) -> None:
    plain, expected, _ = run(folder / "plain", {}, guard=False, **settings)
    failing, losses, said = run(folder / "failing", places, **settings)
    assert len(losses) == settings["max_steps"]
    assert losses == expected
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(failing)[name]), name
    seen = [trainer.model.get_base_model().model.layers[2].seen for trainer in (plain, failing)]
    assert torch.equal(*seen)
    again = [line for line in said if "undone, and run again" in line]
    layer = failing.model.get_base_model().model.layers[2]
    assert len(again) == layer.raised == len(places) == 5
    assert 1 < failing.training_step.func.__self__.survived <= 5


def test_each_failure_takes_a_smaller_plan(tmp_path: Path) -> None:
    trainer, _, said = run(tmp_path, {2: "backward", 3: "backward"})
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, BudgetCallback))
    assert callback.plan is not None
    sizes = [line.partition("under a plan of ")[2] for line in said if "run again" in line]
    assert len(set(sizes)) == 2
    assert callback.plan.recomputes


def test_a_step_that_has_changed_weights_is_not_run_again(tmp_path: Path) -> None:
    """As where an optimizer steps in backward, each weight as soon as its gradient is there."""

    def early(fails: Fails) -> None:
        fails.steps_early = True

    with pytest.raises(OutOfMemoryError, match=r"cannot be run again: it had changed .*layers\.2\.inner.*lora_A"):
        run(tmp_path, {2: "backward"}, change=early)


def test_a_frozen_weight_that_is_written_to_changes_nothing_that_counts(tmp_path: Path) -> None:
    """Adapters of expert weights set them anew in every forward, and adapters are merged to generate."""

    def parametrized(fails: Fails) -> None:
        frozen = next(p for p in fails.inner.parameters() if not p.requires_grad)

        def set_anew(*_: Any) -> None:
            if not torch._C._len_torch_dispatch_stack():
                with torch.no_grad():
                    frozen.set_(frozen.detach())  # pyright: ignore[reportArgumentType]

        fails.register_forward_pre_hook(set_anew)

    trainer, losses, _ = run(tmp_path, {2: "backward"}, change=parametrized)
    assert len(losses) == 8
    assert trainer.training_step.func.__self__.survived == 1


def test_buffers_made_without_versions_stay_as_they_are() -> None:
    model = nn.Linear(4, 4)
    with torch.inference_mode():
        model.register_buffer("frequencies", torch.ones(4))
    before = _Before(model, set())
    before.restore()
    assert before.changed() is None


def test_what_a_failed_step_drew_and_counted_is_undone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = (random.random(), np.random.random(), torch.rand(1))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = _Before(model, set())
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.rand(3, 4) + random.random() + np.random.random())
    assert not torch.equal(statistics["0.running_mean"], model[0].running_mean)  # pyright: ignore[reportArgumentType]
    before.restore()
    assert before.changed() is None
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    assert_same(statistics, dict(model.named_buffers()))


def test_without_the_guard_the_run_dies(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="can't allocate"):
        run(tmp_path, {2: "backward"}, guard=False)


def test_repeated_failure_ends_with_the_ledger_advice_and_a_checkpoint(tmp_path: Path) -> None:
    for step in range(1, 8):  # of an earlier run in the same folder
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (0, 0))
    with pytest.raises(OutOfMemoryError) as caught:
        run(tmp_path, dict.fromkeys(range(4, 40), "backward"))
    text = str(caught.value)
    assert "base weights" in text
    assert "resume_from_checkpoint=True" in text
    assert "rematree fit" in text
    (saved,) = tmp_path.glob("checkpoint-*/optimizer.pt")
    assert (saved.parent / "trainer_state.json").is_file()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ],
)
def test_every_library_says_in_its_own_words_that_memory_is_out(error: Exception) -> None:
    assert _reason(error) == "out of memory"


def test_another_error_is_not_swallowed_and_leaves_gradients_as_they_were(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    before = torch.full_like(model.weight, 3.0)
    model.weight.grad = before

    class Trains:
        callback_handler: Any = None
        state = SimpleNamespace(global_step=0)

        def training_step(self, model: Any, inputs: Any) -> None:
            model(torch.ones(1, 2)).sum().backward()
            raise RuntimeError("shapes do not match")

    trainer = Trains()
    guard = StepGuard(trainer, BudgetCallback(1), 3)
    drawn = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.training_step(model, {})  # pyright: ignore[reportCallIssue]
    assert model.weight.grad is before
    assert torch.equal(before, torch.full_like(before, 3.0))
    assert torch.equal(drawn, torch.get_rng_state())
    guard.remove()
    assert "training_step" not in vars(trainer)


def test_a_budget_callback_is_needed(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=with_lora(build("llama")), args=arguments, train_dataset=rows_of(9), data_collator=pad)
    with pytest.raises(UsageError, match="0 BudgetCallbacks"):
        rematree.survive_out_of_memory(trainer)
    trainer.add_callback(BudgetCallback("64MiB"))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(UsageError, match="DeepSpeed trains"):
        rematree.survive_out_of_memory(trainer)
