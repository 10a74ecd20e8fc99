"""Design rule R1: Save and Recompute give the plain model's loss and gradients bit for bit, dropout included."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from models import ARCHITECTURES, assert_same, batch_for, build, gradients, reads_nothing, with_lora
from rematree.execute.handle import apply
from rematree.planning.planner import Planner
from rematree.plans import Action
from rematree.pricing.cost import Roofline
from trainers import QUICK

# Prices do not matter for exactness; a fixed roofline makes the plans the same on every machine.
COST = Roofline(5e10, 1e10)


def check_five_budgets(model: nn.Module, forbid: Sequence[str] = QUICK) -> Planner:
    """Without lean adapters and groups every budget is met by Save and Recompute."""
    batch = batch_for(model)
    expected = gradients(model, batch)
    assert_same(expected, gradients(model, batch))  # the control: the plain model repeats itself
    planner = Planner(model, batch, cost=COST, forbid=list(forbid))
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    assert least < most
    recomputed: set[int] = set()
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        plan = planner.plan(int(least + share * (most - least)))
        with apply(plan, model, batch):
            assert_same(expected, gradients(model, batch))
            assert_same(expected, gradients(model, batch))  # and again: nothing is left over from a step
        recomputed.add(sum(d.action is Action.RECOMPUTE for d in plan.decisions.values()))
    assert len(recomputed) > 1, "all budgets gave the same plan"
    assert 0 in recomputed
    assert_same(expected, gradients(model, batch))
    return planner


# Linear layers as Llama's, run by code like Llama's: what differs is the attention, the norms, and the masks.
LIKE_LLAMA = ("llama-eager", "qwen3", "gemma3", "mistral", "olmo2")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_with_dropout(name: str) -> None:
    """On all linear layers of every kind there is; on one before and one behind the activation where Llama has them."""
    targets = {"target_modules": ["q_proj", "down_proj"]} if name in LIKE_LLAMA else {}
    check_five_budgets(with_lora(build(name), **targets))


# Each of these levers has tests of its own, over architectures, in test_lean_plans.py and test_groups.py.
@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES[1:])])
def test_lora_with_every_exact_lever(name: str) -> None:
    planner = check_five_budgets(with_lora(build(name)), ["chunked_loss"])
    least = planner.plan(planner.min_peak_bytes())
    assert least.lean or least.groups


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_full_fine_tuning(name: str) -> None:
    check_five_budgets(build(name, layers=3).train())


def test_frozen_bottom_runs_once_and_keeps_no_graph() -> None:
    model = with_lora(build("llama"), target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
    planner = check_five_budgets(model, ["chunked_loss"])
    plan = planner.plan(planner.min_peak_bytes())
    assert all(".layers.2" in path or ".layers.3" in path for path in plan.decisions)
    calls: list[int] = []
    layers = model.get_submodule("base_model.model.model.layers")
    for index, layer in enumerate(layers.children()):
        layer.get_submodule("mlp").register_forward_hook(reads_nothing(lambda *_, index=index: calls.append(index)))
    with apply(plan, model):
        gradients(model, batch_for(model))
    assert calls.count(0) == 1
    assert calls.count(1) == 1


def test_bf16_where_the_platform_repeats_itself() -> None:
    """CPU bf16 kernels can depend on memory alignment; compare only if the control holds."""
    model = with_lora(build("llama", layers=3).to(torch.bfloat16))
    batch = batch_for(model)
    expected = gradients(model, batch)
    for _ in range(3):
        again = gradients(model, batch)
        if any(not torch.equal(expected[name], again[name]) for name in expected):
            pytest.skip("control: the plain model does not repeat itself in bf16 on this machine")
    check_five_budgets(model)
