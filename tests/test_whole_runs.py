"""What surrounds the steps of a real run, under a ladder of plans: the numbers of the plain run, bit for bit.

Batches of several lengths, dropout on: each step runs under the plan of its length, with kept regions, lean layers and
groups among them. Everything is compared at the end: losses, weights, what was generated, and the random generator.
"""

import contextlib
import copy
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import rematree
from killed import LENGTHS
from models import assert_same, batch_for, build, with_lora
from rematree import BudgetCallback
from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.pricing.cost import Roofline
from rematree.units import KIB
from test_plans_by_length import plans_for
from trainers import QUICK, adapters, pad, quiet_arguments, rows_of

Found = dict[str, torch.Tensor]
STEPS = (40, 12, 24, 33, 9, 40)  # tokens of each step's batch
SHOWN = ("loss", "eval_loss", "grad_norm")
COST = Roofline(1e11, 1e10)


class Loop:
    """A training loop as users write it. What differs is in the methods that the others override."""

    autocast: torch.dtype | None = None
    accumulate = 1

    def __init__(self) -> None:
        self.model: Any = with_lora(build("llama"))
        self.model.config.use_cache = False
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.found: Found = {}

    def run(self) -> Found:
        torch.manual_seed(11)
        self.begin()
        for number, tokens in enumerate(STEPS):
            for part in range(self.accumulate):
                with self.precision():
                    loss = self.model(**batch_for(self.model, tokens=max(8, tokens - 4 * part))).loss / self.accumulate
                self.found[f"loss {number}.{part}"] = loss.detach()
                self.backward(loss)
            self.step(number)
        named = self.model.named_parameters()
        self.found |= {name: p.detach().clone() for name, p in named if p.requires_grad}
        self.found["random state"] = torch.get_rng_state()
        return self.found

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)

    def begin(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-2)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, number: int) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Accumulated(Loop):
    accumulate = 3


class Bfloat16(Loop):
    autocast = torch.bfloat16


class Scaled(Loop):
    """fp16 with a scale so large that the first steps are skipped: the scaler's state is part of the numbers."""

    autocast = torch.float16
    accumulate = 2

    def begin(self) -> None:
        super().begin()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, number: int) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.found[f"norm {number}"] = norm.nan_to_num(-1.0)
        self.found[f"scale {number}"] = torch.tensor(self.scaler.get_scale())


class Clipped(Loop):
    def step(self, number: int) -> None:
        self.found[f"norm {number}"] = nn.utils.clip_grad_norm_(self.trained, 0.1)
        nn.utils.clip_grad_value_(self.trained, 0.01)
        super().step(number)


class Averaged(Loop):
    """A moving average of the weights, made by a hook of the optimizer and evaluated in a copy of the model."""

    def begin(self) -> None:
        super().begin()
        self.average = [p.detach().clone() for p in self.trained]
        self.optimizer.register_step_post_hook(lambda *_: self._blend())

    def _blend(self) -> None:
        for mean, p in zip(self.average, self.trained, strict=True):
            mean.lerp_(p.detach(), 0.1)

    def step(self, number: int) -> None:
        super().step(number)
        averaged = copy.deepcopy(self.model).eval()
        with torch.no_grad():
            for p, mean in zip([p for p in averaged.parameters() if p.requires_grad], self.average, strict=True):
                p.copy_(mean)
            self.found[f"of the average {number}"] = averaged(**batch_for(averaged)).loss


class InBackward(Loop):
    """Each parameter is updated, and its gradient freed, as soon as autograd has added it up."""

    def begin(self) -> None:
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in self.trained}

        def update(parameter: torch.Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(update)

    def step(self, number: int) -> None:
        assert all(p.grad is None for p in self.trained)


class Evaluated(Loop):
    """Between the micro-batches too: a loss in eval mode, one in train mode without a graph, and a generated answer."""

    accumulate = 2

    def backward(self, loss: torch.Tensor) -> None:
        prompt = batch_for(self.model, tokens=6)["input_ids"]
        with torch.no_grad():
            self.found[f"in between {len(self.found)}"] = self.model(**batch_for(self.model, tokens=64)).loss
        self.model.eval()
        with torch.no_grad():
            self.found[f"evaluated {len(self.found)}"] = self.model(**batch_for(self.model, tokens=64)).loss
        self.found[f"greedy {len(self.found)}"] = self.generated(prompt, do_sample=False)
        self.found[f"sampled {len(self.found)}"] = self.generated(prompt, do_sample=True)
        self.model.train()
        loss.backward()  # of the forward before all that

    def generated(self, prompt: torch.Tensor, **how: Any) -> torch.Tensor:
        answer = self.model.generate(
            input_ids=prompt, max_new_tokens=8, min_new_tokens=8, use_cache=True, return_dict_in_generate=True, **how
        )
        assert answer.past_key_values is not None, "the cache is on"
        return answer.sequences


class Restored(Loop):
    """Weights, optimizer and generator go through a file after each step."""

    def step(self, number: int) -> None:
        super().step(number)
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        assert set(names) <= state.keys(), "a plan renames nothing"
        kept, random = copy.deepcopy(self.optimizer.state_dict()), torch.get_rng_state()
        for p in self.trained:
            p.data.zero_()
        torch.rand(5)
        self.model.load_state_dict(state)
        self.begin()
        self.optimizer.load_state_dict(kept)
        torch.set_rng_state(random)


LOOPS: list[Callable[[], Loop]] = [
    Accumulated, Bfloat16, Scaled, Clipped, Averaged, InBackward, Evaluated, Restored,
]  # fmt: skip


@contextlib.contextmanager
def ladder(model: nn.Module) -> Generator[Any]:
    *smaller, largest = plans_for(model)
    with rematree.apply(largest, model, smaller=smaller) as handle:
        yield handle


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_of_ones_own(loop: Callable[[], Loop]) -> None:
    expected = loop().run()
    planned = loop()
    with ladder(planned.model) as handle:
        assert_same(expected, planned.run())
        assert handle.in_force is handle.plan, "the last batch is the longest"
    if loop is Scaled:
        skipped = [number for number in range(len(STEPS)) if expected[f"norm {number}"] == -1]
        assert 0 < len(skipped) < len(STEPS)


# -- compiled by their user -------------------------------------------------------------------------------------------


def whole(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def one_layer(model: Any) -> Any:
    model.get_base_model().model.layers[1].compile(backend="eager")
    return model


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("compiled", "named"),
    [(whole, r"model\.compile\(\)"), (one_layer, r"layers\.1\.compile\(\)"), (wrapped, r"torch\.compile\(model\)")],
)
def test_compiled_models_are_refused_by_name(compiled: Callable[[Any], Any], named: str) -> None:
    plain = with_lora(build("llama"))
    plans = plans_for(plain)
    model = compiled(plain)
    with pytest.raises(UsageError, match=named):
        rematree.apply(plans[-1], model)
    with pytest.raises(UsageError, match=named):
        rematree.plan(model, batch_for(plain), None, cost=COST)


@pytest.mark.parametrize("compiled", [whole, one_layer, wrapped])
def test_a_model_compiled_under_a_plan_is_refused_when_it_runs(compiled: Callable[[Any], Any]) -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    plan = plans_for(model)[-1]
    with rematree.apply(plan, model), pytest.raises(UsageError, match="a model under a plan"):
        compiled(model)(**batch)
    torch._dynamo.reset()


def test_a_trainer_that_compiles_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch_compile=True"):
        train(tmp_path, BudgetCallback("1GiB", cost=COST), torch_compile=True, torch_compile_backend="eager")


# -- in a Trainer with a budget ---------------------------------------------------------------------------------------


class Asks(TrainerCallback):
    """Generates with the model in mid-run, as callbacks that show samples do."""

    def __init__(self) -> None:
        self.answers: list[list[int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, prompt = kwargs["model"], batch_for(kwargs["model"], rows=1, tokens=6)["input_ids"]
        model.eval()
        with torch.no_grad():
            self.answers += model.generate(input_ids=prompt, max_new_tokens=4, min_new_tokens=4).tolist()
        model.train()


def train(folder: Path, *callbacks: TrainerCallback, resume: bool = False, **settings: Any) -> Found:
    """Losses, weights and answers of six steps with accumulation and clipping, evaluated every second one."""
    defaults: dict[str, Any] = {"max_steps": 6, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    arguments = quiet_arguments(
        folder, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3, **{**defaults, **settings}
    )
    asks = Asks()
    trainer = Trainer(
        model=with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"]),
        args=arguments,
        train_dataset=rows_of(*LENGTHS),
        eval_dataset=rows_of(40, 33, 12),
        data_collator=pad,
        callbacks=[asks, *callbacks],
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    log = trainer.state.log_history
    found = {f"{key} {entry['step']}": torch.tensor(entry[key]) for entry in log for key in SHOWN if key in entry}
    assert len([name for name in found if name.startswith("loss")]) == 6
    if not resume:
        found |= {"answers": torch.tensor(asks.answers)}
    return {**found, **adapters(trainer.model)}


@pytest.mark.parametrize("settings", [{}, pytest.param({"bf16": True}, marks=pytest.mark.slow)], ids=str)
def test_a_trainer_with_a_budget(settings: dict[str, Any], tmp_path: Path) -> None:
    """A little more than the smallest peak: long batches recompute all they can, short ones nothing."""
    expected = train(tmp_path / "plain", **settings)
    with pytest.raises(InfeasibleBudgetError) as caught:
        train(tmp_path / "impossible", budgeted(1), **settings)
    callback = budgeted(caught.value.min_peak + 16 * KIB)
    assert_same(expected, train(tmp_path / "planned", callback, **settings))
    assert len(callback.plans) > 1
    assert not callback.plans[0].recomputes
    assert callback.plans[-1].recomputes
    again = budgeted(caught.value.min_peak + 16 * KIB)
    resumed = train(tmp_path / "planned", again, resume=True, **settings)
    assert_same({name: value for name, value in expected.items() if name != "answers"}, resumed)


def budgeted(budget: int) -> BudgetCallback:
    return BudgetCallback(budget, cost=COST, forbid=QUICK, say=lambda text: None)
