"""Work and memory that upstream spends for nothing (2.5 and 4.10 of `upstream_bugs.md`), beside ours."""

import contextlib
import gc
import weakref
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rematree
from both_paths import EVERY_WAY, NOT_REENTRANT, WAYS, Ours
from checkpointed_models import by_transformers, step, upstream_is_wrong
from models import assert_same, batch_for, build, reads_nothing, with_lora
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from rematree.verification import PEAK_SLACK

LAYERS = "base_model.model.model.layers"


def flops_of(model: Any, batch: Any) -> int:
    """Multiplications and additions of one step: forward, backward and what is computed again."""
    with FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def peak_of(model: Any, batch: Any) -> int:
    with PeakMeter(model, None, batch) as meter:
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    return meter.peak_bytes


Planned = tuple[Any, dict[str, torch.Tensor], Planner]


@pytest.fixture(scope="module")
def planned() -> Planned:
    """Layers that count and a head that does not; a device on which arithmetic is all that costs time."""
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = with_lora(transformers.LlamaForCausalLM(config), target_modules=["q_proj", "v_proj", "down_proj"])
    ids = torch.randint(3, 32, (4, 64))
    batch = {"input_ids": ids, "labels": ids.clone()}
    cost = Roofline(5e10, 1e15)
    return model, batch, Planner(model, batch, cost=cost, optimizer="none", forbid=["chunked_loss"])


def test_2_5_the_same_peak_for_less_recomputation(planned: Planned) -> None:
    """The flag recomputes every layer, the last one for nothing; in the memory it takes, a plan recomputes less."""
    model, batch, planner = planned
    expected = step(model, batch)
    plain = flops_of(model, batch)
    with by_transformers(model):
        theirs, their_peak = flops_of(model, batch), peak_of(model, batch)
    with rematree.apply(planner.plan(their_peak + PEAK_SLACK), model):
        ours, our_peak = flops_of(model, batch), peak_of(model, batch)
        assert_same(expected, step(model, batch))
    assert our_peak <= their_peak
    upstream_is_wrong(theirs - plain > 1.2 * (ours - plain), "a fifth of the recomputation is for nothing")


def test_2_5_every_second_layer_is_no_plan(planned: Planned) -> None:
    """`every_n_layers=2` keeps everything in half the layers; in that memory a plan computes less again."""
    model, batch, planner = planned
    plain = flops_of(model, batch)
    with by_transformers(model, every_n_layers=2):
        theirs, their_peak = flops_of(model, batch), peak_of(model, batch)
    with rematree.apply(planner.plan(their_peak + PEAK_SLACK), model):
        ours, our_peak = flops_of(model, batch), peak_of(model, batch)
    assert our_peak <= their_peak
    upstream_is_wrong(theirs - plain > 1.2 * (ours - plain), "which layers are kept does not depend on their sizes")


def mlp_runs(model: Any, batch: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """How often the MLP of each layer runs in a step, and the gradients."""
    counts = dict.fromkeys(range(4), 0)
    hooks = contextlib.ExitStack()
    for index in counts:

        def count(*_: object, index: int = index) -> None:
            counts[index] += 1

        hooks.callback(
            model.get_submodule(f"{LAYERS}.{index}.mlp").register_forward_pre_hook(reads_nothing(count)).remove
        )
    with hooks:
        found = step(model, batch)
    return list(counts.values()), found


@EVERY_WAY
def test_2_5_layers_below_the_lowest_adapter(ours: Ours) -> None:
    """The hook on the embedding makes every layer need a gradient, whether anything below trains or not."""
    model = with_lora(build("llama"), target_modules=["q_proj", "down_proj"], layers_to_transform=[2])
    batch = batch_for(model)
    expected = step(model, batch)
    with by_transformers(model):
        theirs, _ = mlp_runs(model, batch)
    upstream_is_wrong(theirs == [2, 2, 2, 2], "layers without a trained parameter below are rerun")
    with ours(model, batch):
        counts, found = mlp_runs(model, batch)
    assert_same(expected, found)
    if ours is not WAYS["reentrant switch"]:  # it needs the hook, as upstream does
        assert counts == [1, 1, 2, 2]


# ------------------------------------------------------------------------------------------------- 4.10: LLM.int8()


def int8() -> Any:
    model = build("llama", layers=2)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in path:
            packed = bitsandbytes.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
            )
            more: dict[str, Any] = {"has_fp16_weights": False}
            packed.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, **more)
            model.set_submodule(path, packed.to("cpu"))
    return with_lora(model, target_modules=["q_proj", "v_proj"])


def inputs_alive(model: Any, batch: Any) -> dict[str, bool]:
    """Whether the input of an 8-bit layer is alive between forward and backward: that of no adapter, and one with."""
    seen: dict[str, weakref.ref[torch.Tensor]] = {}
    hooks = [
        model.get_submodule(f"{LAYERS}.0.{name}").register_forward_pre_hook(
            reads_nothing(lambda _m, args, name=name: seen.setdefault(name, weakref.ref(args[0])) and None)
        )
        for name in ("mlp.down_proj", "self_attn.o_proj", "mlp.up_proj")
    ]
    loss = model(**batch, use_cache=False).loss
    gc.collect()
    alive = {name: ref() is not None for name, ref in seen.items()}
    loss.backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return alive


def test_4_10_inputs_of_int8_layers_upstream() -> None:
    model = int8()
    batch = batch_for(model)
    with by_transformers(model, {"use_reentrant": False}):
        alive = inputs_alive(model, batch)
    upstream_is_wrong(all(alive.values()), "bitsandbytes keeps each input in `ctx`, where no checkpoint can free it")


@NOT_REENTRANT
def test_4_10_recomputation_frees_the_inputs_of_int8_layers(ours: Ours) -> None:
    model = int8()
    batch = batch_for(model)
    expected = step(model, batch)
    with ours(model, batch):
        assert not any(inputs_alive(model, batch).values())
        assert_same(expected, step(model, batch))
    assert_same(expected, step(model, batch))
