"""Nothing outlives its use: not what a forward kept whose backward never comes, not what planning looked at."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import rematree
from models import batch_for, build, with_lora
from rematree.plans import Action
from rematree.pricing.cost import Roofline

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def planned() -> tuple[nn.Module, Batch, rematree.Planner]:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    batch = batch_for(model)
    return model, batch, rematree.Planner(model, batch, cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])


def tensors_after(act: Callable[[], object]) -> int:
    """Tensors that are alive when what `act` returned is dropped."""
    act()
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_forward_without_a_backward_keeps_nothing(
    share: float, planned: tuple[nn.Module, Batch, rematree.Planner]
) -> None:
    """A step that is skipped, for a loss that is no number or an exception, must give its memory back."""
    model, batch, planner = planned
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    plan = planner.plan(int(least + share * (most - least)))
    saved_inside = [d for d in plan.decisions.values() if d.action is Action.SAVE]
    assert bool(saved_inside) == (share < 1)
    with rematree.apply(plan, model):
        counts = [tensors_after(lambda: model(**batch).loss) for _ in range(3)]
    assert counts[0] == counts[1] == counts[2]


def test_planning_keeps_nothing_of_the_model_it_looked_at() -> None:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj"])
    batch = batch_for(model)
    counts = [
        tensors_after(lambda: rematree.plan(model, batch, None, cost=Roofline(5e10, 1e10), forbid=["chunked_loss"]))
        for _ in range(2)
    ]
    assert counts[0] == counts[1]
