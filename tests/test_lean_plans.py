"""Plans with lean adapters: chosen where they pay, exact, predicted to the byte, and refused where they cannot run."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rematree
from both_paths import AGAIN, KEEP, SAVE, plan_of
from checkpointed_models import step
from models import assert_same, batch_for, build, gradients, quantised, with_lora
from rematree.errors import PlanMismatchError
from rematree.execute.adapters import lean_layers
from rematree.measure import PeakMeter
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Decision, Levers, Plan
from rematree.pricing.cost import Roofline
from rematree.referee.simulate import Referee
from rematree.regions import find_chain
from rematree.verification import PEAK_SLACK

COST = Roofline(5e10, 4e10)  # tensors of this size are in caches
LAYERS = "base_model.model.model.layers"
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def plans_of(planner: Planner) -> list[Plan]:
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    return planner.plans([int(low + share * (high - low)) for share in SHARES])


def measured(plan: Plan, model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Peak of the second step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    with rematree.apply(plan, model):
        model(**batch).loss.backward()
        optimizer.step()  # the first step makes the optimizer's state
        optimizer.zero_grad(set_to_none=True)
        with PeakMeter(model, optimizer, batch) as meter:
            model(**batch).loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return meter.peak_bytes


Made = tuple[nn.Module, dict[str, torch.Tensor], list[Plan]]


@pytest.fixture(scope="module")
def made() -> Callable[[torch.dtype], Made]:
    """A model of some dtype with adapters, a batch, and plans over the whole frontier; each is made once."""

    def make(dtype: torch.dtype) -> Made:
        model = with_lora(build("llama").to(dtype), lora_dropout=0.05)
        batch = batch_for(model, rows=8, tokens=64)
        return model, batch, plans_of(Planner(model, batch, cost=COST, forbid=["chunked_loss", "compile"]))

    return functools.cache(make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plans_are_exact_and_predicted_to_the_byte(dtype: torch.dtype, made: Callable[[torch.dtype], Made]) -> None:
    model, batch, plans = made(dtype)
    expected = gradients(model, batch)
    assert len({plan.lean for plan in plans}) >= 2, "lean in some blocks, and not in others"
    for plan in plans:
        assert plan.exact
        with rematree.apply(plan, model, batch):
            assert_same(expected, gradients(model, batch))
            assert_same(expected, gradients(model, batch))
        beyond = measured(plan, model, batch) - (plan.predicted_peak_bytes - PEAK_SLACK)
        # Below the dispatcher, out of the ledger's sight: the number that PEFT's layers scale by, as autograd keeps it.
        lean = sum(path.endswith("_proj") for path in plan.lean)
        assert beyond in range(0, 8 * (28 - lean) + 1, 8)
    assert_same(expected, gradients(model, batch))


def test_lean_adapters_lower_what_must_be_paid() -> None:
    """In bf16: a smaller least peak, and at every budget that both reach no slower step, at some a faster one."""
    model = with_lora(build("llama", layers=2).to(torch.bfloat16), lora_dropout=0.05)
    batch = batch_for(model, rows=8, tokens=64)
    forbid = ["chunked_loss", "compile", "groups"]
    lean = Planner(model, batch, cost=COST, forbid=forbid)
    without = Planner(model, batch, cost=COST, forbid=[*forbid, "lean_adapters"])
    assert lean.min_peak_bytes() < 0.7 * without.min_peak_bytes()
    slower = [plan for plan in plans_of(without)[:-1] if plan.predicted_step_seconds > 0]
    assert all(plan.lean == () for plan in slower)
    faster = lean.plans([plan.budget_bytes for plan in slower])
    gains = [old.extra_seconds - new.extra_seconds for old, new in zip(slower, faster, strict=True)]
    assert min(gains) >= 0.0
    assert max(gains) > 0.2 * max(plan.extra_seconds for plan in slower)


def test_the_table_and_the_notes_say_it(made: Callable[[torch.dtype], Made]) -> None:
    (plan,) = [plan for plan in made(torch.bfloat16)[2] if 0 < len(plan.lean) < 36][:1]
    rows = [row.path for row in plan.rows if row.option.startswith("lean adapters, ")]
    assert rows
    assert {block for block in rows for path in plan.lean if path.startswith(f"{block}.")} == set(rows)
    assert len(plan.lean) == 9 * len(rows)
    assert f"note: {7 * len(rows)} LoRA layers, and {2 * len(rows)} norms are lean" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


def every_layer(model: nn.Module) -> tuple[str, ...]:
    return tuple(path for path, _ in lean_layers(model))


Twinned = tuple[nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor], Twin]


@pytest.fixture(scope="module")
def twins() -> Callable[[str], Twinned]:
    """A model of some architecture, a batch, the gradients of the plain step, and a twin; each is made once."""

    def make(name: str) -> Twinned:
        model = with_lora(build(name, layers=3), lora_dropout=0.05)
        batch = batch_for(model, rows=8, tokens=64)
        return model, batch, gradients(model, batch), Twin(model, batch)

    return functools.cache(make)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("inside", ["nothing", "draws", "base layers", "layers", "whole"])
def test_lean_layers_inside_a_recomputed_block(name: str, inside: str, twins: Callable[[str], Twinned]) -> None:
    """Whatever is saved in the block: the same gradients, and the peak that the referee has said."""
    model, batch, expected, twin = twins(name)
    blocks = find_chain(twin.model).blocks
    decisions: dict[str, Decision] = dict.fromkeys(blocks, AGAIN)
    lean = every_layer(model)
    for path in lean:
        if inside == "draws":
            decisions[f"{path}.lora_dropout.default#draw"] = SAVE
        elif inside == "base layers":
            decisions[f"{path}.base_layer"] = KEEP
        elif inside == "layers":
            decisions[path] = KEEP
    if inside == "whole":
        decisions = {}
    simulation = Referee(twin, blocks, COST).run(Levers(decisions, lean=lean))
    assert not simulation.misread
    plan = dataclasses.replace(plan_of(model, batch, decisions), lean=lean)
    with rematree.apply(plan, model):
        assert_same(expected, gradients(model, batch))
        assert_same(expected, gradients(model, batch))
    found = measured(plan, model, batch)
    assert -(1 << 10) <= simulation.peak_bytes - found < 32 << 10  # on the safe side


def test_a_kept_mask_is_not_drawn_again() -> None:
    """Seven draws of each of four blocks; a rerun draws them again, or asks the generator for nothing."""
    model = with_lora(build("llama"), lora_dropout=0.05)
    batch = batch_for(model)
    blocks = [f"{LAYERS}.{index}" for index in range(4)]
    lean = every_layer(model)

    def draws(decisions: dict[str, Decision]) -> int:
        count = 0

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal count
                count += func is torch.ops.aten.bernoulli_.float
                return func(*args, **(kwargs or {}))

        plan = dataclasses.replace(plan_of(model, batch, decisions), lean=lean)
        with rematree.apply(plan, model), Count():
            model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        return count

    again = dict.fromkeys(blocks, AGAIN)
    kept = {f"{path}.lora_dropout.default#draw": SAVE for path in lean}
    assert draws({}) == 28
    assert draws(again) == 56
    assert draws({**again, **kept}) == 28


def test_the_adapter_of_the_forward_is_rerun() -> None:
    """Active adapters are switched between forward and backward: the rerun must use those of the forward."""
    model: Any = with_lora(build("llama"), lora_dropout=0.05)
    model.add_adapter("other", model.peft_config["default"])
    batch = batch_for(model)
    plan = dataclasses.replace(
        plan_of(model, batch, {f"{LAYERS}.1": AGAIN, f"{LAYERS}.2": AGAIN}), lean=every_layer(model)
    )

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        loss = model(**batch, use_cache=False).loss
        model.base_model.set_adapter("other")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and ".default." in name)
        loss.backward()
        model.base_model.set_adapter("default")
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **found}

    expected = step()
    with rematree.apply(plan, model):
        assert_same(expected, step())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_models(kind: str, tmp_path: Path) -> None:
    base = quantised(build("llama", layers=2), kind, tmp_path)
    model = with_lora(base, lora_dropout=0.05, target_modules=["q_proj", "down_proj"])
    batch = batch_for(model)
    expected = gradients(model, batch)
    planner = Planner(model, batch, cost=COST, forbid=["chunked_loss", "compile"])
    plans = plans_of(planner)
    assert any(plan.lean for plan in plans)
    for plan in plans:
        with rematree.apply(plan, model, batch):
            assert_same(expected, gradients(model, batch))


def test_a_layer_that_cannot_be_lean_is_refused() -> None:
    model = with_lora(build("llama"), use_dora=True, lora_dropout=0.0)
    batch = batch_for(model)
    path = f"{LAYERS}.1.mlp.up_proj"
    with pytest.raises(PlanMismatchError, match=r"runs .*up_proj lean, which it cannot: adapter default is DoRA"):
        rematree.apply(dataclasses.replace(plan_of(model, batch, {}), lean=(path,)), model)
    assert "forward" not in model.get_submodule(path).__dict__


def test_models_without_such_layers_are_planned_as_before() -> None:
    adapted = with_lora(build("llama", layers=2), use_dora=True, lora_dropout=0.0, target_modules=["q_proj"])
    for model in (adapted, build("llama", layers=2).train()):
        planner = Planner(model, batch_for(model), cost=COST, forbid=["chunked_loss", "compile"])
        assert planner.survey.lean == {}
        assert all(plan.lean == () and "lean" not in str(plan) for plan in plans_of(planner))


def test_removal_puts_every_forward_back() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    lean = every_layer(model)
    before = [dict(module.__dict__) for module in model.modules()]
    handle = rematree.apply(dataclasses.replace(plan_of(model, batch, {}), lean=lean), model)
    assert all("forward" in model.get_submodule(path).__dict__ for path in lean)
    handle.remove()
    for was, module in zip(before, model.modules(), strict=True):
        assert was.keys() == module.__dict__.keys()
        assert all(was[key] is module.__dict__[key] for key in was)


def test_a_block_that_is_an_adapter_layer_itself() -> None:
    """Where there is no list of blocks, the classifier is one."""
    config = transformers.AlbertConfig(
        vocab_size=99,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=3,
        hidden_dropout_prob=0.1,
    )
    torch.manual_seed(0)
    model: Any = with_lora(transformers.AlbertForSequenceClassification(config))
    batch = {"input_ids": torch.arange(3, 35).reshape(2, 16), "labels": torch.tensor([0, 1])}

    expected = step(model, batch)
    planner = Planner(model, batch, optimizer="none", cost=Roofline(5e10, 1e10))
    assert any(block.endswith(".classifier") for block in planner.survey.chain.blocks)
    for plan in planner.plans([planner.min_peak_bytes(), None]):
        with rematree.apply(plan, model):
            assert_same(expected, step(model, batch))
