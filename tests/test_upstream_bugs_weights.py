"""Weights that are others in backward than they were in forward: refused by name, never silently wrong.

Numbers in the names are those of `upstream_bugs.md`.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from both_paths import EVERY_WAY, Ours, differ
from checkpointed_models import CASES, EXPERTS, by_transformers, qwen3_moe, step, upstream_is_wrong
from models import assert_same, batch_for, build, with_lora
from rematree.errors import RecomputeMismatchError

Found = dict[str, torch.Tensor]
LAYERS = "base_model.model.model.layers"
GATE = f"{LAYERS}.1.mlp.gate_proj"


# ----------------------------------------------------------------------------------------- 4.9: weights behind a hook


def nf4() -> Any:
    """A model whose MLPs are NF4; the adapters sit on the attention, so the MLPs only pass gradients on."""
    model = build("llama", layers=2)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".mlp." in path:
            packed = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")  # pyright: ignore[reportCallIssue]
            model.set_submodule(path, packed.to("cpu"))
    return with_lora(model, target_modules=["q_proj", "v_proj"])


def stream(model: Any, how: str) -> None:
    """Put another layer's bytes where a layer's packed weight was, as a loader that streams weights does."""
    one, other = (model.get_submodule(GATE.replace("1", str(i))) for i in (1, 0))
    with torch.no_grad():
        if how == "copied":
            one.weight.copy_(other.weight.flip(0))
        else:
            one.weight.data = other.weight.data.flip(0)


@pytest.mark.parametrize("how", ["copied", "replaced"])
def test_4_9_packed_weights_replaced_before_backward(how: str) -> None:
    """MatMul4Bit keeps its weight in `ctx`, where neither autograd's versions nor anybody's hooks see it."""

    def between() -> None:
        stream(model, how)

    expected = step(nf4(), batch_for(nf4()))
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = nf4()
        switch = contextlib.nullcontext() if kwargs is None else by_transformers(model, kwargs)
        with switch:
            found = step(model, batch_for(model), between=between)
        assert torch.equal(found["loss"], expected["loss"])
        wrong = differ(expected, found)
        if kwargs is None and how == "replaced":
            assert not wrong  # the plain model keeps the old bytes
        else:
            upstream_is_wrong(wrong, "gradients through other weights than the forward's")


@pytest.mark.parametrize("how", ["copied", "replaced"])
@EVERY_WAY
def test_4_9_replaced_packed_weights_are_refused_by_name(ours: Ours, how: str) -> None:
    model = nf4()
    batch = batch_for(model)
    expected = step(model, batch)
    with ours(model, batch):
        loss = model(**batch).loss
        before = model.get_submodule(GATE).weight.data.clone()
        stream(model, how)
        with pytest.raises(RecomputeMismatchError, match=r"layers\.1.*mlp\.gate_proj"):
            loss.backward()
        model.get_submodule(GATE).weight.data = before
        assert_same(expected, step(model, batch))


# ------------------------------------------------------------------------------- weights changed before backward


def adapter_step(model: Any) -> None:
    """An optimizer step between forward and backward, as a loop with two losses makes by mistake."""
    with torch.no_grad():
        model.get_submodule(f"{LAYERS}.2.mlp.up_proj.lora_A.default").weight.add_(0.01)


def frozen_weight(model: Any) -> None:
    """An average of weights, or a loader, writes into the base model."""
    with torch.no_grad():
        model.get_submodule(f"{LAYERS}.2.mlp.up_proj.base_layer").weight.mul_(1.5)


def norm_replaced(model: Any) -> None:
    """`.data` is given another tensor: no version counter moves."""
    norm = model.get_submodule(f"{LAYERS}.2.post_attention_layernorm")
    norm.weight.data = norm.weight.data * 1.5


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "adapter in place": (adapter_step, "up_proj.lora_A.default.weight"),
    "frozen weight in place": (frozen_weight, "up_proj.base_layer.weight"),
    "norm replaced": (norm_replaced, "post_attention_layernorm.weight"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_weights_changed_before_backward_upstream(change: str, use_reentrant: bool) -> None:
    model = with_lora(build("llama"), lora_dropout=0.0)
    batch = batch_for(model)
    expected = step(model, batch)
    with by_transformers(model, {"use_reentrant": use_reentrant}):
        found = step(model, batch, between=lambda: CHANGES[change][0](model))
    assert torch.equal(found["loss"], expected["loss"])
    upstream_is_wrong(differ(expected, found), "the rerun computes with weights that the forward did not have")


@pytest.mark.parametrize("change", CHANGES)
@EVERY_WAY
def test_weights_changed_before_backward_are_refused_by_name(ours: Ours, change: str) -> None:
    model = with_lora(build("llama"), lora_dropout=0.0)
    batch = batch_for(model)
    alter, name = CHANGES[change]
    with ours(model, batch):
        loss = model(**batch).loss
        alter(model)
        with pytest.raises(RecomputeMismatchError) as caught:
            loss.backward()
        assert "layers.2" in str(caught.value)
        assert name in str(caught.value)
        model.zero_grad(set_to_none=True)
        expected = step(model, batch)  # the changed weights, both in forward and in backward
    assert_same(step(model, batch), expected)


@EVERY_WAY
def test_an_optimizer_step_after_backward_is_no_change(ours: Ours) -> None:
    """Also with gradients accumulated over two backwards, and a second loss made before the first backward."""
    models = [with_lora(build("llama")) for _ in range(2)]
    batch = batch_for(models[0])

    def train(model: Any) -> Found:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(5)
        for _ in range(3):
            losses = [model(**batch).loss for _ in range(2)]
            for loss in losses:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    expected = train(models[0])
    with ours(models[1], batch):
        assert_same(expected, train(models[1]))


@EVERY_WAY
def test_adapters_on_the_parameters_of_experts(ours: Ours) -> None:
    """PEFT parametrises them for the length of a forward: the weight a layer sees is another tensor each time."""
    model = with_lora(qwen3_moe(), **EXPERTS)
    batch = CASES["qwen3-moe"].batch()
    expected = step(model, batch)
    assert sum("experts" in name for name in expected) == 12
    with ours(model, batch):
        assert_same(expected, step(model, batch))
        assert_same(expected, step(model, batch))
