"""A region's modules are walked once; whatever is put in, taken out or replaced later must be noticed all the same."""

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from both_paths import AGAIN, EVERY_WAY, Ours, by_plan
from checkpointed_models import step
from models import assert_same, batch_for, build, with_lora
from rematree.errors import RecomputeMismatchError
from rematree.execute.context import Known, World
from rematree.regions import find_chain

Found = dict[str, torch.Tensor]


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x)) + x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Part() for _ in range(2))

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=x.square().mean())


def inputs() -> Found:
    return {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(True)}


def exchanged(model: Model) -> list[nn.Dropout]:
    """Another linear and another dropout, two levels down."""
    torch.manual_seed(7)
    found: list[nn.Dropout] = []
    for block in model.blocks:
        assert isinstance(block, Part)
        found.append(nn.Dropout(0.6))
        block.inner[1] = nn.Sequential(nn.Linear(8, 8), found[-1])
    return found


def step_with(model: Model, batch: Found, dropouts: list[nn.Dropout]) -> Found:
    """A step in which the dropouts are switched off between forward and backward."""
    torch.manual_seed(3)
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    for dropout in dropouts:
        dropout.eval()
    loss.backward()
    for dropout in dropouts:
        dropout.train()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@EVERY_WAY
def test_a_module_that_is_exchanged_after_the_first_step(ours: Ours) -> None:
    """The flag of the new dropout must be the forward's in the rerun, so the new one must be known."""
    model, batch = Model(), inputs()
    plain = copy.deepcopy(model)
    expected = step_with(plain, batch, exchanged(plain))
    with ours(model, batch):
        step(model, batch)
        assert_same(expected, step_with(model, batch, exchanged(model)))


def test_only_an_exchange_is_another_walk() -> None:
    block = Part()
    known = Known(block)
    first = known.contents(block)
    assert known.contents(block) is first
    for change in (
        lambda: block.inner.append(nn.ReLU()),
        lambda: block.inner.__setitem__(2, nn.Tanh()),
        lambda: block.inner.__delitem__(2),
        lambda: block.inner[0].add_module("below", nn.ReLU()),
        lambda: block.add_module("beside", nn.ReLU()),
        lambda: setattr(block, "beside", None),
    ):
        before = known.contents(block)
        change()
        after = known.contents(block)
        assert after is not before
        assert list(after.parts) == list(block.modules())[1:]
        assert known.contents(block) is after


def test_a_parameter_that_is_exchanged_is_put_back_for_the_rerun() -> None:
    block = Part()
    known = Known(block)
    World(block, [], known).settle()
    world = World(block, [], known)
    world.settle()
    linear = block.inner[0]
    assert isinstance(linear, nn.Linear)
    then, other = linear.weight, nn.Parameter(torch.zeros(8, 8))
    linear.weight = other
    with world.restored("block"):
        assert linear.weight is then
    assert linear.weight is other
    assert any(p is other for p, _ in World(block, [], known)._requires_grad)


def test_an_adapter_that_is_added_and_deleted_later() -> None:
    from peft import LoraConfig

    model: Any = with_lora(build("llama", layers=2))
    batch = batch_for(model)
    with by_plan(model, batch, dict.fromkeys(find_chain(model).blocks, AGAIN)):
        step(model, batch)
        model.add_adapter("late", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("late")
        loss = model(**batch).loss
        model.set_adapter("default")
        model.delete_adapter("late")
        with pytest.raises(RecomputeMismatchError, match="'late' was deleted"):
            loss.backward()


def test_what_is_known_of_a_layer_does_not_keep_it() -> None:
    """The switch keeps it by layer, weakly."""
    block = Part()
    gone = weakref.ref(block)
    kept: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary({block: Known(block)})
    World(block, [], kept[block]).settle()
    del block
    gc.collect()
    assert gone() is None
    assert not kept


def test_a_copy_knows_its_own_modules() -> None:
    block = Part()
    known = Known(block)
    copied, other = copy.deepcopy((known, block))
    assert list(copied.contents(other).parts) == list(other.modules())[1:]
