"""A key-value cache in training: a filled one, and prefix tuning, whose prefix is one. Bug B7 of `upstream_bugs.md`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers.cache_utils import DynamicCache

import rematree
from both_paths import EVERY_WAY, Ours, assert_same_or_refused, by_plan
from checkpointed_models import by_rematree, by_transformers, step
from models import assert_same, batch_for, build, with_lora
from rematree.errors import UnsupportedModelError
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline

Found = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------------------- a cache, a prefix, a prompt


def given_cache(model: Any, filled: int) -> Callable[[], Found]:
    """A training step that hands a cache in: empty, or holding `filled` tokens without a gradient."""
    batch = batch_for(model)
    prompt = batch["input_ids"].flip(1)[:, :filled]

    def run() -> Found:
        cache = DynamicCache(config=model.config)
        if filled:
            mode = model.training
            model.eval()
            with torch.no_grad():
                model(input_ids=prompt, past_key_values=cache, use_cache=True)
            model.train(mode)
        return step(model, {**batch, "past_key_values": cache})  # pyright: ignore[reportArgumentType]

    return run


def test_a_filled_cache_in_training_upstream() -> None:
    model = with_lora(build("llama"), lora_dropout=0.0)
    run = given_cache(model, 6)
    expected = run()
    assert_same(expected, run())
    with by_transformers(model), pytest.raises(RuntimeError, match="must match the size of tensor"):
        run()  # the layers drop the cache, the mask still counts its tokens


@pytest.mark.parametrize("filled", [0, 6])
@EVERY_WAY
def test_a_cache_in_training(ours: Ours, filled: int) -> None:
    """Right, or refused by name; upstream's layers drop it."""
    model = with_lora(build("llama"), lora_dropout=0.0)
    run = given_cache(model, filled)
    expected = run()

    def recomputed() -> Found:
        with ours(model, batch_for(model)):
            return run()

    assert_same_or_refused(expected, recomputed, ["past_key_values"])
    assert_same(expected, run())


def prefixed(kind: Any = PrefixTuningConfig) -> tuple[Any, Found]:
    config: Any = kind(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model: Any = get_peft_model(build("llama"), config).train()  # pyright: ignore[reportArgumentType]
    return model, {**batch_for(model), "attention_mask": torch.ones(2, 32, dtype=torch.long)}


def test_b7_prefix_tuning_and_checkpointing_enabled_afterwards_upstream() -> None:
    model, batch = prefixed()
    step(model, batch)
    with by_transformers(model), pytest.raises(RuntimeError, match="must match the"):
        step(model, batch)


@EVERY_WAY
def test_b7_prefix_tuning_is_right_or_refused(ours: Ours) -> None:
    model, batch = prefixed()
    expected = step(model, batch)

    def run() -> Found:
        with ours(model, batch):
            return step(model, batch)

    assert_same_or_refused(expected, run, ["key-value cache"])
    assert_same(expected, step(model, batch))


def test_b7_planning_for_a_prefix_is_refused_or_right() -> None:
    model, batch = prefixed()
    expected = step(model, batch)

    def run() -> Found:
        planner = Planner(model, batch, cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])
        with rematree.apply(planner.plan(planner.min_peak_bytes()), model):
            return step(model, batch)

    assert_same_or_refused(expected, run, ["key-value cache"])


@pytest.mark.parametrize("order", ["before", "after"])
def test_b7_prefixes_and_prompts_before_and_after(order: str) -> None:
    """Prompt tuning works in either order. A prefix is refused in either, by PEFT at its creation or by the switch."""
    base: Any = build("llama")
    if order == "before":
        rematree.activation_checkpointing_enable(base)
        prefix: Any = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
            get_peft_model(base, prefix)
        rematree.activation_checkpointing_disable(base)
    else:
        with pytest.raises(UnsupportedModelError, match="key-value cache"), by_rematree(prefixed()[0]):
            pass
    model, batch = prefixed(PromptTuningConfig)
    expected = step(model, batch)
    with by_rematree(model):
        assert_same(expected, step(model, batch))


@pytest.mark.parametrize("masked", [False, True])
def test_b7_a_plan_for_prompt_tuning(masked: bool) -> None:
    """PEFT puts the prompt before the batch, so the model inside sees more tokens than the caller passed."""
    model, batch = prefixed(PromptTuningConfig)
    if not masked:
        del batch["attention_mask"]
    expected = step(model, batch)
    with by_plan(model, batch):
        assert_same(expected, step(model, batch))
