"""Calls and modules that a recomputation once got wrong: each compared with the plain model, or refused by it too."""

import contextlib
import dataclasses
import io
import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

import rematree
from both_paths import AGAIN, EVERY_WAY, KEEP, NOT_REENTRANT, SAVE, Ours, by_plan, plan_of
from models import assert_same, batch_for, build, with_lora
from rematree.errors import RecomputeMismatchError
from rematree.execute.module_state import ChangingBuffers, ModuleState


class _Block(nn.Module):
    def __init__(self, extra: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(8, 8), nn.Linear(8, 8), extra()

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return x + self.b(self.extra(torch.tanh(self.a(x))))


class _Net(nn.Module):
    def __init__(self, extra: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(8, 8)
        self.layers = nn.ModuleList(_Block(extra) for _ in range(3))

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x, **options)
        return x.pow(2).mean()


X = {"x": torch.linspace(-1, 1, 64).view(8, 8)}
Step = Callable[[Any, Mapping[str, Any]], None]


def _plain(model: nn.Module, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def _grads(make: Callable[[], nn.Module], ours: Ours, step: Step, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    model = make()
    with ours(model, batch):
        torch.manual_seed(3)
        step(model, batch)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def _same(make: Callable[[], nn.Module], ours: Ours, step: Step, batch: Mapping[str, Any] = X) -> None:
    assert_same(_grads(make, _plain, step, batch), _grads(make, ours, step, batch))


def _once(model: Any, batch: Mapping[str, Any]) -> None:
    model(**batch).backward()


@EVERY_WAY
def test_a_graph_is_gone_through_twice(ours: Ours) -> None:
    def step(model: Any, batch: Mapping[str, Any]) -> None:
        loss = model(**batch)
        loss.backward(retain_graph=True)
        loss.backward()

    _same(_Net, ours, step)


@NOT_REENTRANT
def test_second_derivatives(ours: Ours) -> None:
    def step(model: Any, batch: Mapping[str, Any]) -> None:
        first = torch.autograd.grad(model(**batch), list(model.parameters()), create_graph=True)
        torch.stack([g.pow(2).sum() for g in first]).sum().backward()

    _same(_Net, ours, step)


class _Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x * self.mean


@EVERY_WAY
def test_a_buffer_that_forward_assigns_anew(ours: Ours) -> None:
    def step(model: Any, batch: Mapping[str, Any]) -> None:
        _once(model, batch)
        _once(model, batch)

    _same(lambda: _Net(_Average), ours, step)


@EVERY_WAY
def test_weights_assigned_between_forward_and_backward(ours: Ours) -> None:
    def make() -> nn.Module:
        model = _Net()
        model.layers.requires_grad_(False)
        return model

    def step(model: Any, batch: Mapping[str, Any]) -> None:
        loss = model(**batch)
        other = {name: value + 1 for name, value in model.layers.state_dict().items()}
        model.layers.load_state_dict(other, assign=True)
        loss.backward()

    _same(make, ours, step)


class _Late(nn.Module):
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.scale.clone()
        if self.training:
            self.scale.mul_(0.9)
        return y


@EVERY_WAY
def test_a_buffer_that_changes_from_a_later_call_on(ours: Ours) -> None:
    def step(model: Any, batch: Mapping[str, Any]) -> None:
        model.layers[1].extra.eval()
        _once(model, batch)
        model.train()
        _once(model, batch)

    _same(lambda: _Net(_Late), ours, step)


class _Held(nn.Module):
    def __init__(
        self, make: Callable[[], torch.Tensor], use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.register_buffer("held", make())
        self._use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._use(x, self.held)  # pyright: ignore[reportArgumentType]


@torch.inference_mode()
def _inference() -> torch.Tensor:
    return torch.ones(8)


@EVERY_WAY
@pytest.mark.parametrize(
    "extra",
    [
        lambda: _Held(_inference, torch.add),
        lambda: _Held(lambda: torch.eye(8).to_sparse(), lambda x, eye: torch.sparse.mm(eye, x.t()).t()),
    ],
    ids=["inference", "sparse"],
)
def test_buffers_without_version_or_storage(ours: Ours, extra: Callable[[], nn.Module]) -> None:
    _same(lambda: _Net(extra), ours, _once)


@EVERY_WAY
@pytest.mark.parametrize("name", ["debug", "region", "module", "inner", "block", "function", "context_fn"])
def test_keyword_arguments_named_like_our_own_or_torchs(ours: Ours, name: str) -> None:
    def step(model: Any, batch: Mapping[str, Any]) -> None:
        model(**batch, **{name: False}).backward()

    _same(_Net, ours, step)


class _TwoDraws(nn.Module):
    """One dropout called twice; only the mask of the second call, a dense one, can be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.drop(x.t().contiguous().t())
        return self.linear(self.drop(torch.tanh(first.contiguous())))


def test_one_dropout_called_twice_in_a_region() -> None:
    decisions = {f"layers.{i}": AGAIN for i in range(3)} | {f"layers.{i}.extra.drop#draw": SAVE for i in range(3)}

    def ours(model: nn.Module, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        return by_plan(model, batch, plan_of(model, batch, decisions).decisions)

    _same(lambda: _Net(_TwoDraws), ours, _once)


def _two_adapters() -> Any:
    model: Any = with_lora(build("llama"), modules_to_save=["input_layernorm"], target_modules=["q_proj"])
    torch.manual_seed(1)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.add_(0.5)
    model.set_adapter("default")
    return model.train()


@EVERY_WAY
def test_modules_to_save_follow_the_adapter_of_the_forward(ours: Ours) -> None:
    def step(model: Any, batch: Mapping[str, Any]) -> None:
        losses: list[torch.Tensor] = []
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.requires_grad_(True)
            losses.append(model(**batch).loss)
        (losses[0] + losses[1]).backward()

    _same(_two_adapters, ours, step, batch_for(build("llama")))


@EVERY_WAY
def test_a_model_can_be_pickled_before_its_first_step(ours: Ours) -> None:
    model, file = with_lora(build("llama")), io.BytesIO()
    with ours(model, batch_for(model)):
        torch.save(model, file)
    assert file.tell()


@EVERY_WAY
def test_a_step_with_a_flat_loss_names_no_adapter(ours: Ours) -> None:
    model: Any = with_lora(build("llama"))
    batch = batch_for(model)
    with warnings.catch_warnings(), ours(model, batch):
        warnings.simplefilter("error", UserWarning)
        (model(**batch).loss * 0).backward()
        model(**batch)


def test_a_weight_that_an_optimizer_changed_in_backward_is_kept_from_the_rerun() -> None:
    """A region that the rerun skips may have stepped already; whatever uses its weight after all must not go unseen."""
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first: Any = block[0]
    second: Any = block[1]
    weight, x = second.weight, torch.ones(1, 2)
    state = ModuleState((block, first, second), ("", "0", "1"), ChangingBuffers())
    state.settle({"1"})
    with torch.no_grad():
        weight.add_(1)
    with contextlib.ExitStack() as undo:
        state.restore("block", undo)
        first(x)
        with pytest.raises(TypeError):
            second(x)
    assert second.weight is weight
    with torch.no_grad():
        first.weight.add_(1)
    with contextlib.ExitStack() as undo, pytest.raises(RecomputeMismatchError, match=r"block\.0\.weight was modified"):
        state.restore("block", undo)


class _Draws(nn.Module):
    """Draws from a generator that is not torch's, in calls of a certain number and those after."""

    def __init__(self, draw: Callable[[], float], since: int = 0) -> None:
        super().__init__()
        self._draw, self._since, self._calls = draw, since, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        return x * (1 + self._draw()) if self._calls > self._since else x


@EVERY_WAY
@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["python", "numpy"])
def test_a_rerun_draws_again_from_generators_that_are_not_torchs(ours: Ours, draw: Callable[[], float]) -> None:
    """As many calls of the layer as steps and reruns; the run goes on from where the forward left the generators."""
    after: list[float] = []

    def step(model: Any, batch: Mapping[str, Any]) -> None:
        random.seed(3)
        np.random.seed(3)
        for _ in range(3):
            _once(model, batch)
        after.append(draw())

    _same(lambda: _Net(lambda: _Draws(draw)), ours, step)
    assert after[0] == after[1]


@pytest.mark.parametrize("path", ["layers.1.a", "layers.1.extra"])
def test_a_saved_region_is_skipped_with_what_it_drew(path: str) -> None:
    decisions = {**dict.fromkeys(("layers.0", "layers.1", "layers.2"), AGAIN), path: KEEP}

    def step(model: Any, batch: Mapping[str, Any]) -> None:
        random.seed(3)
        _once(model, batch)

    _same(lambda: _Net(lambda: _Draws(random.random)), lambda model, batch: by_plan(model, batch, decisions), step)


def test_numbers_that_are_drawn_in_later_steps_alone_are_said_once() -> None:
    model = _Net(lambda: _Draws(random.random, since=4))  # two calls a step: the forward's, and its rerun's
    with by_plan(model, X):
        _once(model, X)
        _once(model, X)
        with pytest.warns(UserWarning, match="was drawn from in a forward for the first time"):
            _once(model, X)
        _once(model, X)  # warnings are errors


class _Asked(nn.Module):
    """A block that draws where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, draws: bool) -> torch.Tensor:
        out = torch.tanh(self.inner(x))
        return x + out * (1 + random.random()) if draws else x + out


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(_Asked() for _ in range(3))

    def forward(self, x: torch.Tensor, draws: bool = True) -> torch.Tensor:
        x = x.clone().requires_grad_()
        for layer in self.layers:
            x = layer(self.dropout(x), draws)
        return x.pow(2).mean()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_batches_that_draw_and_batches_that_do_not(grouped: bool, together: bool) -> None:
    """One after the other, and two forwards before their backward; a loss of one's own draws between the two."""
    after: list[float] = []

    def step(model: Any, batch: Mapping[str, Any]) -> None:
        random.seed(3)
        for draws in (True, False, True, False, True):
            loss = model(**batch, draws=draws)
            loss = loss + model(**batch, draws=not draws) if together else loss
            (loss * random.random()).backward()
            after.append(random.random())

    def ours(model: nn.Module, batch: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
        blocks = ("layers.0", "layers.1", "layers.2")
        plan = plan_of(model, batch, dict.fromkeys(blocks, AGAIN))
        return rematree.apply(dataclasses.replace(plan, groups=(blocks,)) if grouped else plan, model)

    _same(_Mixed, ours, step)
    assert after[: len(after) // 2] == after[len(after) // 2 :]


def test_a_loss_that_draws_between_forward_and_backward_goes_on_from_there() -> None:
    """The first step looks at all generators, and finds that the model draws from torch's alone."""
    after: list[float] = []

    def step(model: Any, batch: Mapping[str, Any]) -> None:
        random.seed(3)
        loss = model(**batch, draws=False)
        (loss * random.random()).backward()
        after.append(random.random())

    class Drops(_Mixed):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.layers:
                layer.inner = nn.Sequential(layer.inner, nn.Dropout(0.1))  # pyright: ignore[reportArgumentType]

    _same(Drops, by_plan, step)
    assert after[0] == after[1]


@EVERY_WAY
def test_numbers_drawn_outside_of_what_runs_again_are_as_they_were(ours: Ours) -> None:
    class Skips(_Net):
        def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
            return super().forward(x * random.random(), **options)

    def step(model: Any, batch: Mapping[str, Any]) -> None:
        random.seed(3)
        _once(model, batch)
        _once(model, batch)

    _same(Skips, ours, step)
