"""After enable, train, generate, train, disable the model is as before, in every attribute and hook; so after a plan.

`deep_state` looks at every module's `__dict__`: attributes by value where they have one, tensors and modules by
identity, hooks and other containers element by element, configs as the dictionaries they are.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import nn

import rematree
from checkpointed_models import PLAIN_BATCH, Batch, Plain, step
from models import assert_same, batch_for, build, with_lora
from rematree.pricing.cost import Roofline

COST = Roofline(5e10, 1e10)
Make = Callable[[], tuple[Any, Batch]]


def _value(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    if id(value) in seen:
        return "cycle"
    seen |= {id(value)}
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, (transformers.PretrainedConfig, transformers.GenerationConfig)):
        return _value(vars(value), seen)
    if isinstance(value, dict):
        return {str(key): _value(item, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_value(item, seen) for item in items]
    return (type(value).__name__, id(value))  # tensors, modules, functions: the same object


def deep_state(model: nn.Module) -> dict[str, Any]:
    """Everything that is held by a module of `model`, and what of a parameter can be changed without replacing it."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = (type(module).__name__, _value(module.__dict__))
    for name, parameter in model.named_parameters():
        hooks = getattr(parameter, "_backward_hooks", None)
        state[name] = (parameter.requires_grad, parameter.dtype, parameter.data_ptr(), parameter.grad is None, hooks)
    return state


def assert_restored(before: dict[str, Any], model: nn.Module) -> None:
    after = deep_state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value == after[name], name


def _plain() -> tuple[Any, Batch]:
    model = build("llama", layers=2).train()
    return model, batch_for(model)


def _peft() -> tuple[Any, Batch]:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj"])
    return model, batch_for(model)


def _native() -> tuple[Any, Batch]:
    model: Any = build("llama", layers=2)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1))
    return model.train(), batch_for(model)


def _outside() -> tuple[Any, Batch]:
    return Plain().train(), {name: tensor.repeat(16, 8) for name, tensor in PLAIN_BATCH.items()}


MODELS = pytest.mark.parametrize("make", [_plain, _peft, _native, _outside], ids=lambda make: make.__name__[1:])


def use(model: Any, batch: Batch) -> list[Batch]:
    """Train, generate in evaluation and in training mode, train again."""
    first = step(model, batch)
    if hasattr(model, "generate"):
        prompt = batch["input_ids"][:, :4]
        for training in (False, True):
            model.train(training)
            model.generate(input_ids=prompt, max_new_tokens=3, do_sample=False)
    else:
        with torch.no_grad():
            model(**batch)
    return [first, step(model.train(), batch)]


def settled(make: Make) -> tuple[Any, Batch, list[Batch]]:
    """A model on which everything has been done once: generation writes defaults into its settings."""
    model, batch = make()
    use(model, batch)
    return model, batch, use(model, batch)


@MODELS
@pytest.mark.parametrize(
    "kwargs", [None, {"use_reentrant": True}, {"every_n_layers": 2, "preserve_rng_state": False}], ids=str
)
def test_the_switch(make: Make, kwargs: dict[str, Any] | None) -> None:
    model, batch, expected = settled(make)
    before = deep_state(model)
    rematree.activation_checkpointing_enable(model, kwargs)
    once = _without_identities(deep_state(model))
    assert once != _without_identities(before)
    rematree.activation_checkpointing_enable(model, kwargs)
    assert _without_identities(deep_state(model)) == once  # two applies are one
    twice = deep_state(model)
    for plain, found in zip(expected, use(model, batch), strict=True):
        assert_same(plain, found)
    assert_restored(twice, model)
    rematree.activation_checkpointing_disable(model)
    assert_restored(before, model)
    rematree.activation_checkpointing_disable(model)
    assert_restored(before, model)
    for plain, found in zip(expected, use(model, batch), strict=True):
        assert_same(plain, found)


def _without_identities(state: Any) -> Any:
    """Of objects that a second apply makes anew, the kind."""
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], int) and isinstance(state[0], str):
        return state[0]
    if isinstance(state, dict):
        # the ids of hooks count on
        return {
            name: sorted(map(str, map(_without_identities, value.values())))
            if name.endswith("_hooks") and isinstance(value, dict)
            else _without_identities(value)
            for name, value in state.items()
        }
    if isinstance(state, (list, tuple)):
        return [_without_identities(item) for item in state]
    return state


@MODELS
@pytest.mark.parametrize("switched_on", [False, True], ids=["plain", "switch on before"])
def test_a_plan(make: Make, switched_on: bool) -> None:
    model, batch, expected = settled(make)
    if switched_on:
        rematree.activation_checkpointing_enable(model, {"use_reentrant": True})
    before = deep_state(model)
    planner = rematree.Planner(model, batch, cost=COST, forbid=["chunked_loss"])
    plan = planner.plan(planner.min_peak_bytes())
    assert plan.recomputes
    assert_restored(before, model)  # planning only looks
    handle = rematree.apply(plan, model)
    applied = deep_state(model)
    assert applied != before
    assert rematree.apply(plan, model) is handle
    assert rematree.apply(rematree.Plan.from_json(plan.to_json()), model) is handle  # an equal plan
    assert_restored(applied, model)  # two applies are one
    for plain, found in zip(expected, use(model, batch), strict=True):
        assert_same(plain, found)
    assert_restored(applied, model)
    handle.remove()
    assert_restored(before, model)
    handle.remove()
    assert_restored(before, model)
    with rematree.apply(plan, model):
        step(model, batch)
    assert_restored(before, model)


def test_preparation_twice_is_preparation_once() -> None:
    """All that stays is what preparation is for: a frozen model in fp32, switched on."""
    model = rematree.prepare_model_for_kbit_training(build("llama", layers=2).to(torch.bfloat16))
    once = _without_identities(deep_state(model))
    rematree.prepare_model_for_kbit_training(model)
    assert _without_identities(deep_state(model)) == once


def test_the_comparison_sees_what_it_should() -> None:
    """One change of each kind, on a copy's own terms."""
    model, _ = _peft()
    before = deep_state(model)
    layer = model.get_base_model().model.layers[1]
    changes: list[Callable[[], Any]] = [
        lambda: setattr(layer, "mark", None),
        lambda: layer.register_forward_hook(lambda *_: None),
        lambda: layer.mlp.eval(),
        lambda: setattr(model.config, "use_cache", False),
        lambda: setattr(model.get_base_model().generation_config, "use_cache", False),
        lambda: layer.input_layernorm.weight.requires_grad_(True),
        lambda: layer.__dict__.__setitem__("forward", layer.forward),
    ]
    for change in changes:
        kept = copy.copy(before)
        change()
        before = deep_state(model)
        assert before != kept
