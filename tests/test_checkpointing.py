"""The model-level switch: same gradients as the plain model, honest about what is on, undone without a trace.

Where PEFT or transformers are wrong today, the test shows theirs beside ours; `upstream_is_wrong` fails once they are
right.
"""

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

import rematree
from checkpointed_models import (
    CASES,
    PLAIN_BATCH,
    Plain,
    bart,
    by_rematree,
    by_transformers,
    state_of,
    step,
    upstream_is_wrong,
)
from models import assert_same, batch_for, build, reads_nothing, with_lora
from rematree.errors import RecomputeMismatchError, UnsupportedModelError, UsageError
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline

BOTH = pytest.mark.parametrize("use_reentrant", [False, True])
ENCODER_DECODERS = ("t5", "bart")


def nonzero(found: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, gradient in found.items() if bool((gradient.abs() > 1e-6).any())}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one)


def calls_of(model: nn.Module, suffix: str | tuple[str, ...]) -> tuple[dict[str, int], contextlib.ExitStack]:
    """How often the modules whose path ends in `suffix` run, and what ends the counting."""
    counts: dict[str, int] = {}
    hooks = contextlib.ExitStack()
    for path, module in model.named_modules():
        if path.endswith(suffix):
            counts[path] = 0

            def count(*_: object, path: str = path) -> None:
                counts[path] += 1

            hooks.callback(module.register_forward_pre_hook(reads_nothing(count)).remove)
    return counts, hooks


# ---------------------------------------------------------------------------------------------------- same gradients


@BOTH
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_plain_models(name: str, adapted: bool, use_reentrant: bool) -> None:
    """With the dropout each model ships with, bit for bit; the control is that the plain model repeats itself.

    One exception: the reentrant variant sums the gradients that one decoder layer sends to the encoder before it adds
    them to those of the other layers. That is another order of additions, so another rounding.
    """
    case = CASES[name]
    model = case.adapted() if adapted else case.make().train()
    batch = case.batch()
    if name in ENCODER_DECODERS:
        # The cache lays keys and values out anew, and on some processors that is another matmul kernel: its last bit.
        batch["use_cache"] = False  # pyright: ignore[reportArgumentType]
    expected = step(model, batch)
    assert_same(expected, step(model, batch))
    with by_rematree(model, {"use_reentrant": use_reentrant}):
        assert model.is_activation_checkpointing  # transformers' own property, also through PEFT
        found = step(model, batch)
    with by_transformers(model, {"use_reentrant": use_reentrant}):
        theirs = step(model, batch)
    assert nonzero(found) == nonzero(theirs) == nonzero(expected)
    if use_reentrant and name in ENCODER_DECODERS:
        for key, gradient in expected.items():
            exact = "decoder" in key or key == "loss"
            torch.testing.assert_close(found[key], gradient, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6)
    else:
        assert_same(expected, found)
    assert_same(expected, step(model, batch))


@BOTH
def test_layers_run_twice_and_their_hooks_once(use_reentrant: bool) -> None:
    model, batch = with_lora(build("llama")), batch_for(build("llama"))
    layers, end_layers = calls_of(model, tuple(f"layers.{i}" for i in range(4)))
    inner, end_inner = calls_of(model, "input_layernorm")
    with end_layers, end_inner, by_rematree(model, {"use_reentrant": use_reentrant}):
        step(model, batch)
    assert set(layers.values()) == {1}
    assert set(inner.values()) == {2}


def test_frozen_embeddings_get_gradients_where_they_are_trained() -> None:
    """transformers' own test: checkpointing must not cut the embedding's weight off."""
    model = build("llama").train()
    with by_rematree(model, {"use_reentrant": True}):
        gradient = step(model, batch_for(model))["model.embed_tokens.weight"]
    assert torch.isfinite(gradient).all()
    assert bool(gradient.abs().sum() > 0)


@pytest.mark.parametrize(
    "kwargs",
    [
        None,
        {},
        {"use_reentrant": False, "determinism_check": "none"},
        {"determinism_check": "default", "debug": True},
        {"preserve_rng_state": False},
        {"early_stop": False},
        {"every_n_layers": 3},
        {"use_reentrant": True, "preserve_rng_state": False},
        {"use_reentrant": True, "determinism_check": "none"},
    ],
    ids=str,
)
def test_every_keyword_gives_the_same_gradients(kwargs: dict[str, Any] | None) -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    expected = step(model, batch)
    with by_rematree(model, kwargs):
        assert_same(expected, step(model, batch))
        effect = rematree.checkpointing_in_effect(model)
    asked = {name: value for name, value in (kwargs or {}).items() if name != "every_n_layers"}
    assert effect.kwargs["use_reentrant"] is asked.get("use_reentrant", False)
    assert dict(effect.kwargs).items() <= {"use_reentrant": False, **asked}.items()


def test_context_fn_is_entered_around_forward_and_rerun() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    expected = step(model, batch)
    entered: list[str] = []

    @contextlib.contextmanager
    def note(name: str) -> Any:
        entered.append(name)
        yield

    with by_rematree(model, {"context_fn": lambda: (note("forward"), note("rerun"))}):
        assert_same(expected, step(model, batch))
    assert entered == ["forward"] * 4 + ["rerun"] * 4


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"use_reentrent": False}, "unknown checkpointing argument 'use_reentrent'"),
        ({"offload": True}, "unknown checkpointing argument 'offload'"),
        ({"use_reentrant": None}, "True or False"),
        ({"use_reentrant": True, "debug": True}, "use_reentrant=False"),
        ({"use_reentrant": True, "context_fn": lambda: None}, "context_fn needs"),
        ({"debug": True, "context_fn": lambda: None}, "exclude each other"),
        ({"determinism_check": "strict"}, "'default' or 'none'"),
        ({"every_n_layers": 0}, "positive whole number"),
        ({"every_n_layers": -2}, "positive whole number"),
        ({"every_n_layers": True}, "positive whole number"),
        ({"every_n_layers": 1.5}, "positive whole number"),
    ],
)
def test_wrong_arguments_are_refused_at_once(kwargs: dict[str, Any], says: str) -> None:
    model = build("llama")
    before = state_of(model)
    with pytest.raises(UsageError, match=says):
        rematree.gradient_checkpointing_enable(model, kwargs)
    assert state_of(model) == before


# ------------------------------------------------------------------------------------------------------ which layers


def test_every_n_layers_counts_in_each_list_of_blocks() -> None:
    """transformers counts through: the decoder's phase depends on the length of the encoder."""
    model = bart(encoder_layers=3, decoder_layers=4)
    ours = tuple(f"model.encoder.layers.{i}" for i in (0, 2)) + tuple(f"model.decoder.layers.{i}" for i in (0, 2))
    with by_transformers(model, every_n_layers=2):
        theirs = rematree.checkpointing_in_effect(model).layers
    upstream_is_wrong("model.decoder.layers.1" in theirs, "every_n_layers counts over all towers")
    with by_rematree(model, every_n_layers=2):
        effect = rematree.checkpointing_in_effect(model)
    assert (set(effect.layers), effect.num_layers) == (set(ours), 7)
    with by_rematree(model, {"every_n_layers": 2}, every_n_layers=2):
        assert rematree.checkpointing_in_effect(model).layers == effect.layers
    with pytest.raises(UsageError, match="given twice"):
        rematree.activation_checkpointing_enable(model, {"every_n_layers": 2}, every_n_layers=3)


def test_upstream_divides_by_no_layers() -> None:
    with pytest.raises(ZeroDivisionError):
        build("llama").activation_checkpointing_enable(every_n_layers=0)  # pyright: ignore[reportCallIssue]
    with pytest.raises(UsageError, match="every_n_layers is 0"):
        rematree.activation_checkpointing_enable(build("llama"), every_n_layers=0)


def test_layers_below_the_lowest_adapter_run_once() -> None:
    """transformers' hook on the embedding makes every layer need a gradient, though nothing below trains."""
    model = with_lora(build("llama"), target_modules=["q_proj", "down_proj"], layers_to_transform=[3])
    batch = batch_for(model)
    expected = step(model, batch)
    counts, end = calls_of(model, "mlp")
    with end:
        with by_transformers(model):
            step(model, batch)
        upstream_is_wrong(set(counts.values()) == {2}, "layers without a trained parameter below are rerun")
        counts.update(dict.fromkeys(counts, 0))
        with by_rematree(model):
            assert_same(expected, step(model, batch))
            assert not model.get_input_embeddings()._forward_hooks  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        assert list(counts.values()) == [1, 1, 1, 2]


@BOTH
def test_a_training_model_under_no_grad_is_called_plainly(use_reentrant: bool) -> None:
    """TRL scores with the model in training mode: upstream checkpoints there, and its reentrant variant warns."""
    model = with_lora(build("llama"))
    batch = batch_for(model)
    warned = pytest.warns(UserWarning, match="None of the inputs have requires_grad")
    with by_transformers(model, {"use_reentrant": True}), torch.no_grad(), warned:
        model(**batch)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
    with by_rematree(model, {"use_reentrant": use_reentrant}), torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(model(**batch).logits, expected)  # and no warning: those are errors here


def test_generation_keeps_its_cache() -> None:
    model: Any = with_lora(build("llama")).eval()
    prompt = batch_for(model)["input_ids"][:, :5]
    expected = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    with by_rematree(model):
        with torch.no_grad():
            assert model(input_ids=prompt).past_key_values.get_seq_length() == 5
        assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False), expected)


# ------------------------------------------------------------------------------------- the world of the forward pass


def two_adapters() -> Any:
    model: Any = with_lora(build("llama"), lora_dropout=0.0)
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def step_of_two(model: Any) -> dict[str, torch.Tensor]:
    """peft#2832: a forward with each of two adapters, one backward."""
    batch = batch_for(model)
    model.set_adapter("default")
    one = model(**batch).loss
    model.set_adapter("other")
    two = model(**batch).loss
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    (one + two).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": (one + two).detach(), **found}


@BOTH
def test_gradients_belong_to_the_adapter_of_the_forward(use_reentrant: bool) -> None:
    model = two_adapters()
    expected = step_of_two(model)
    assert_same(expected, step_of_two(model))
    with by_transformers(model, {"use_reentrant": use_reentrant}):
        theirs = step_of_two(model)
    upstream_is_wrong(differ(expected, theirs), "the rerun uses the adapter that is active at backward time")
    with by_rematree(model, {"use_reentrant": use_reentrant}):
        assert_same(expected, step_of_two(model))
    assert model.active_adapter == "other"


@BOTH
def test_adapters_disabled_and_modes_changed_before_backward(use_reentrant: bool) -> None:
    model: Any = with_lora(build("llama"))
    batch = batch_for(model)
    layers = model.base_model

    def disturb() -> None:
        model.eval()
        for module in layers.modules():
            if hasattr(module, "_disable_adapters"):
                module._disable_adapters = True

    def settle() -> None:
        model.train()
        for module in layers.modules():
            if hasattr(module, "_disable_adapters"):
                module._disable_adapters = False

    expected = step(model, batch, between=disturb)
    settle()
    with by_transformers(model, {"use_reentrant": use_reentrant}):
        try:
            wrong = differ(expected, step(model, batch, between=disturb))
        except CheckpointError:
            wrong = True
    upstream_is_wrong(wrong, "the rerun sees the training flags and adapters of backward time")
    settle()
    with by_rematree(model, {"use_reentrant": use_reentrant}):
        assert_same(expected, step(model, batch, between=disturb))
        assert not model.training
    settle()


@BOTH
def test_merging_before_backward_is_refused(use_reentrant: bool) -> None:
    model: Any = with_lora(build("llama"))
    batch = batch_for(model)
    with by_rematree(model, {"use_reentrant": use_reentrant}):
        loss = model(**batch).loss
        model.merge_adapter()
        with pytest.raises(RecomputeMismatchError, match=r"layers\.3: adapters .* merged"):
            loss.backward()
        model.unmerge_adapter()


@BOTH
def test_dropout_without_preserved_random_state(use_reentrant: bool) -> None:
    """Upstream draws other masks in the rerun and says nothing. The random stream behind the step is the same, too."""
    model = with_lora(build("llama"))
    batch = batch_for(model)
    expected = step(model, batch)
    after = torch.get_rng_state()
    kwargs = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
    with by_transformers(model, kwargs):
        upstream_is_wrong(differ(expected, step(model, batch)), "preserve_rng_state=False with live dropout")
    with by_rematree(model, kwargs):
        assert_same(expected, step(model, batch))
        assert torch.equal(torch.get_rng_state(), after)


# -------------------------------------------------------------------------------------------- what reentrant may lose


def test_reentrant_trains_adapters_behind_given_embeddings() -> None:
    """No embedding runs, so no hook of anybody: upstream's loss has no gradient at all."""
    model = with_lora(build("llama"))
    ids = batch_for(model)
    embeddings = model.get_input_embeddings()(ids["input_ids"]).detach()  # pyright: ignore[reportCallIssue]
    batch = {"inputs_embeds": embeddings, "labels": ids["labels"]}
    expected = step(model, batch)
    warned, raised = pytest.warns(UserWarning, match="None of the"), pytest.raises(RuntimeError, match="require grad")
    with by_transformers(model, {"use_reentrant": True}), warned, raised:
        step(model, batch)
    with by_rematree(model, {"use_reentrant": True}):
        assert_same(expected, step(model, batch))


class _Gated(GradientCheckpointingLayer):
    """A layer with a trained tensor among its keyword arguments, inside a tuple, and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, gate: tuple[torch.Tensor, int] | None = None) -> dict[str, Any]:
        assert gate is not None
        return {"hidden": torch.tanh(self.linear(x)) * gate[0], "extra": [x.mean(), None]}


class _GatedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.full((8,), 0.5))
        self.layers = nn.ModuleList([_Gated(), _Gated()])

    def forward(self, x: torch.Tensor) -> Any:
        total = torch.zeros(())
        gate = torch.tanh(self.gate)
        for layer in self.layers:
            out = layer(x, gate=(gate, 1))
            x, total = out["hidden"], total + out["extra"][0]
        return CausalLMOutput(loss=x.square().mean() + total)


def test_reentrant_reaches_keyword_arguments_and_nested_tensors() -> None:
    model = _GatedModel()
    batch = {"x": torch.randn(3, 8)}
    expected = step(model, batch)
    for layer in model.layers:
        layer.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]
        layer._gradient_checkpointing_func = lambda f, *a: checkpoint(f, *a, use_reentrant=True)  # pyright: ignore[reportArgumentType]
    # Theirs sees neither the gate, nor what is inside the result.
    with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(RuntimeError, match="require grad"):
        step(model, batch)
    for layer in model.layers:
        del layer.gradient_checkpointing, layer._gradient_checkpointing_func
    for use_reentrant in (False, True):
        with by_rematree(model, {"use_reentrant": use_reentrant}):
            assert_same(expected, step(model, batch))


def test_reentrant_with_adapters_that_take_no_part() -> None:
    """torch refuses a rerun in which nothing needs a gradient; here the loss just has none from those layers."""
    model = _GatedModel().requires_grad_(False)
    unused = nn.Linear(2, 2)
    model.layers[0].add_module("unused", unused)
    head = nn.Parameter(torch.ones(()))
    with by_rematree(model, {"use_reentrant": True}):
        (model(torch.randn(3, 8)).loss * head).backward()
    assert head.grad is not None
    assert unused.weight.grad is None


# ------------------------------------------------------------------------------------------ embeddings and their hook


def test_one_hook_however_often_and_none_after() -> None:
    model: Any = build("llama").requires_grad_(False)
    embedding = model.get_input_embeddings()
    ids = batch_for(model)["input_ids"]
    plain = embedding(ids)
    before = state_of(model)
    for _ in range(3):
        rematree.enable_input_require_grads(model)
    assert len(embedding._forward_hooks) == 1
    assert embedding(ids).requires_grad
    assert torch.equal(embedding(ids), plain)
    assert not embedding.weight.requires_grad
    with torch.no_grad():
        assert not embedding(ids).requires_grad
    rematree.disable_input_require_grads(model)
    rematree.disable_input_require_grads(model)
    assert state_of(model) == before
    with pytest.raises(UnsupportedModelError, match="get_input_embeddings"):
        rematree.enable_input_require_grads(nn.Sequential(nn.Linear(2, 2)))


def test_the_hook_keeps_every_bit() -> None:
    embedding: Any = Plain()
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, -3.5, 1.0, 2.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        embedding.embedding.to(dtype).weight.data[0] = values.to(dtype)
        embedding.requires_grad_(False)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        plain = embedding.embedding(torch.tensor([0]))
        rematree.enable_input_require_grads(embedding)
        hooked = embedding.embedding(torch.tensor([0]))
        rematree.disable_input_require_grads(embedding)
        assert torch.equal(plain.view(bits), hooked.detach().view(bits))
        assert hooked.dtype == dtype


def test_embeddings_that_are_changed_in_place() -> None:
    """A leaf that requires a gradient must not be changed in place; a model that scales its embeddings does."""
    model: Any = with_lora(build("llama"))
    batch = batch_for(model)
    hooked: list[Any] = []

    def scale(*_: object) -> Any:
        return hooked.append(model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.mul_(2)))

    with by_transformers(model, {"use_reentrant": True}):
        scale()
        with pytest.raises(RuntimeError, match="leaf Variable"):
            model(**batch)
    hooked.pop().remove()
    scale()
    expected = step(model, batch)
    hooked.pop().remove()
    with by_rematree(model, {"use_reentrant": True}):
        scale()
        assert_same(expected, step(model, batch))
    hooked.pop().remove()


@BOTH
def test_each_tower_has_its_own_input(use_reentrant: bool) -> None:
    """Adapters in a frozen vision tower need an input that requires a gradient there, not in the language model."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=99),
        image_token_index=98,
        vision_feature_layer=-1,
    )
    model = with_lora(transformers.LlavaForConditionalGeneration(config), target_modules=["q_proj", "v_proj"])
    ids = torch.randint(3, 90, (2, 12))
    ids[:, 1:5] = 98
    batch = {"input_ids": ids, "labels": ids.clamp(max=90), "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = step(model, batch)
    assert sum("vision_tower" in name for name in expected) == 12
    with by_rematree(model, {"use_reentrant": use_reentrant}):
        assert_same(expected, step(model, batch))
        hooks = [m for m in model.modules() if any("InputGradHook" in repr(h) for h in m._forward_hooks.values())]
        assert len(hooks) == (2 if use_reentrant else 0)


# -------------------------------------------------------------------------------------------------- on, off, and what


@BOTH
def test_before_and_after_adapters(use_reentrant: bool) -> None:
    """Enabling before `get_peft_model`, after it, and around `add_adapter` is the same, with one hook each time."""
    kwargs = {"use_reentrant": use_reentrant}
    expected = step(with_lora(build("llama")), batch_for(build("llama")))
    early: Any = build("llama")
    rematree.activation_checkpointing_enable(early, kwargs)
    wrapped: Any = with_lora(early)
    assert_same(expected, step(wrapped, batch_for(wrapped)))
    assert len(wrapped.get_input_embeddings()._forward_hooks) == 1  # PEFT asks for it, whichever variant is on
    rematree.activation_checkpointing_disable(wrapped)
    assert not wrapped.get_input_embeddings()._forward_hooks
    assert_same(expected, step(wrapped, batch_for(wrapped)))

    native: Any = build("llama").train()
    rematree.gradient_checkpointing_enable(native, kwargs)
    native.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1))
    with by_rematree(native, kwargs):
        found = step(native, batch_for(native))
    assert_same(step(native, batch_for(native)), found)
    assert len(found) == 1 + 2 * 2 * 4


def test_modules_to_save_carry_no_hook_away() -> None:
    """PEFT copies the embedding with its hooks; both copies lose theirs."""
    model: Any = build("llama")
    rematree.activation_checkpointing_enable(model, {"use_reentrant": True})
    wrapped: Any = with_lora(model, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    hooked = [name for name, module in wrapped.named_modules() if module._forward_hooks]
    assert len(hooked) == 2
    rematree.activation_checkpointing_enable(wrapped, {"use_reentrant": True})
    rematree.activation_checkpointing_disable(wrapped)
    assert [name for name, module in wrapped.named_modules() if module._forward_hooks] == []


@pytest.mark.parametrize("theirs_before", [False, True])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"every_n_layers": 2}], ids=str)
def test_nothing_is_left_behind(kwargs: dict[str, Any] | None, theirs_before: bool) -> None:
    model: Any = with_lora(build("llama"))
    batch = batch_for(model)
    if theirs_before:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": True, "preserve_rng_state": True})
    before = state_of(model)
    for _ in range(2):
        rematree.activation_checkpointing_enable(model, kwargs)
    once = rematree.checkpointing_in_effect(model)
    step(model, batch)
    model.eval()
    model.generate(input_ids=batch["input_ids"], max_new_tokens=2, do_sample=False)
    model.train()
    step(model, batch)
    assert rematree.checkpointing_in_effect(model) == once
    rematree.activation_checkpointing_disable(model)
    model.eval().train()
    assert state_of(model) == before
    assert rematree.is_activation_checkpointing(model) is theirs_before
    rematree.activation_checkpointing_disable(model)
    assert not rematree.is_activation_checkpointing(model)
    assert not model.get_input_embeddings()._forward_hooks
    rematree.activation_checkpointing_disable(model)


def test_an_exception_in_forward_or_backward_leaves_the_model_usable() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    expected = step(model, batch)
    norm = model.get_submodule("base_model.model.model.layers.2.input_layernorm")
    for use_reentrant in (False, True):
        with by_rematree(model, {"use_reentrant": use_reentrant}):
            hook = norm.register_forward_hook(reads_nothing(lambda *_: 1 / 0))
            with pytest.raises(ZeroDivisionError):
                model(**batch)
            hook.remove()
            torch.manual_seed(7)
            runs = iter((1, 0))  # once in forward, once in the rerun
            hook = norm.register_forward_hook(reads_nothing(lambda *_, runs=runs: 1 / next(runs) and None))
            loss = model(**batch).loss
            with pytest.raises(ZeroDivisionError):
                loss.backward()
            hook.remove()
            assert_same(expected, step(model, batch))


def test_a_copy_is_a_model_of_its_own() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)
    expected = step(model, batch)
    rematree.activation_checkpointing_enable(model, {"use_reentrant": True})
    copied = copy.deepcopy(model)
    rematree.activation_checkpointing_disable(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(expected, step(copied, batch))
    rematree.activation_checkpointing_disable(copied)
    assert not rematree.is_activation_checkpointing(copied)


@BOTH
def test_a_model_outside_transformers(use_reentrant: bool) -> None:
    model = Plain()
    before = state_of(model)
    expected = step(model, PLAIN_BATCH)
    wrapped = nn.DataParallel(model)
    with by_rematree(wrapped, {"use_reentrant": use_reentrant}, every_n_layers=2):
        effect = rematree.checkpointing_in_effect(model)
        assert effect.layers == ("blocks.0", "blocks.2", "blocks.4")
        assert_same(expected, step(model, PLAIN_BATCH))
        counts, end = calls_of(model, ".up")
        with end:
            step(model, PLAIN_BATCH)
        assert list(counts.values()) == [2, 1, 2, 1, 2]
    assert state_of(model) == before
    adapted = get_peft_model(model, LoraConfig(target_modules=["up", "down"], lora_dropout=0.1))  # pyright: ignore[reportArgumentType]
    expected = step(adapted, PLAIN_BATCH)
    with by_rematree(adapted, {"use_reentrant": use_reentrant}):
        assert_same(expected, step(adapted, PLAIN_BATCH))
    with pytest.raises(UnsupportedModelError, match="no list of blocks"):
        rematree.activation_checkpointing_enable(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_a_compiled_model() -> None:
    model = with_lora(build("llama", layers=2), lora_dropout=0.0)
    batch = batch_for(model)
    expected = step(model, batch)
    compiled: Any = torch.compile(model, backend="aot_eager")
    try:
        with by_rematree(compiled):
            found = step(compiled, batch)
            assert len(rematree.checkpointing_in_effect(compiled).layers) == 2
    finally:
        torch._dynamo.reset()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name.replace("_orig_mod.", "")])


def test_what_is_in_effect_is_read_from_the_model() -> None:
    model: Any = with_lora(build("llama"))
    prefix = "base_model.model.model.layers"
    assert str(rematree.checkpointing_in_effect(model)) == "no layer is recomputed"
    with by_transformers(model, {"use_reentrant": True}, every_n_layers=2):
        theirs = rematree.checkpointing_in_effect(model)
    assert str(theirs) == f"2 of 4 layers recomputed ({prefix}.0,2); use_reentrant=True; set by transformers"
    rematree.activation_checkpointing_enable(model, {"preserve_rng_state": False})
    ours = rematree.checkpointing_in_effect(model)
    assert str(ours) == (
        f"4 of 4 layers recomputed ({prefix}.0-3); use_reentrant=False; preserve_rng_state=False; set by rematree"
    )
    rematree.activation_checkpointing_disable(model)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False, "budget": "6GiB"})
    theirs = rematree.checkpointing_in_effect(model)  # transformers hands the budget to torch, which does not know it
    assert (theirs.kwargs, theirs.budget) == ({"use_reentrant": False}, 6 << 30)
    assert str(theirs).endswith("set by transformers; budget 6.00 GiB, no plan applied yet")
    model.get_base_model().activation_checkpointing_disable()
    assert not rematree.checkpointing_in_effect(model)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_.*able. is deprecated:FutureWarning")
def test_the_models_own_methods_lead_to_the_switch_while_it_is_on() -> None:
    """What the Trainer and TRL call, in both names: options change, the guarantees of this library's switch stay."""
    model: Any = with_lora(build("llama"))
    base = model.get_base_model()
    batch = batch_for(model)
    before = state_of(model)
    expected = step(model, batch)
    rematree.activation_checkpointing_enable(model)
    base.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": True}, every_n_layers=2, offload=False
    )
    effect = rematree.checkpointing_in_effect(model)
    assert (effect.set_by, effect.kwargs, len(effect.layers)) == ("rematree", {"use_reentrant": True}, 2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    effect = rematree.checkpointing_in_effect(model)
    assert (effect.set_by, effect.kwargs, len(effect.layers)) == ("rematree", {"use_reentrant": False}, 4)
    assert_same(expected, step(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": True, "budget": "6GiB"})
    assert rematree.requested_budget(model) == 6 << 30
    for disable in (base.activation_checkpointing_disable, model.gradient_checkpointing_disable):
        disable()
        assert not rematree.checkpointing_in_effect(model)
        assert not model.is_activation_checkpointing
        assert not model.get_input_embeddings()._forward_hooks
        counts, end = calls_of(model, "mlp")
        with end:
            assert_same(expected, step(model, batch))
        assert set(counts.values()) == {1}
        model.activation_checkpointing_enable()  # as TRL does it after scoring
        assert rematree.checkpointing_in_effect(model).set_by == "rematree"
    with pytest.raises(UsageError, match="unknown checkpointing argument"):
        base.activation_checkpointing_enable({"use_reentrent": True})
    rematree.activation_checkpointing_disable(model)
    assert rematree.requested_budget(model) is None
    assert state_of(model) == before


def test_offload_is_transformers_own() -> None:
    """This library's switch has none; the user's last word counts, and is shown."""
    model: Any = with_lora(build("llama"))
    rematree.activation_checkpointing_enable(model, {"use_reentrant": True})
    model.get_base_model().activation_checkpointing_enable(offload=True)
    effect = rematree.checkpointing_in_effect(model)
    assert (effect.set_by, effect.kwargs) == ("transformers", {"use_reentrant": False})
    rematree.activation_checkpointing_disable(model)
    assert not rematree.checkpointing_in_effect(model)
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("training", [True, False])
def test_generation_decodes_one_token_at_a_time(training: bool) -> None:
    """Upstream's layers drop the cache in training mode: each new token sees only itself, and the text is another."""
    model: Any = with_lora(build("llama"), lora_dropout=0.0).train(training)
    prompt = batch_for(model)["input_ids"][:, :5]
    fed: list[int] = []
    hook = model.get_submodule("base_model.model.model.layers.0").register_forward_pre_hook(
        lambda _, args: fed.append(args[0].shape[1])
    )
    before = {**vars(model.config), **vars(model.generation_config)}

    def generate() -> torch.Tensor:
        fed.clear()
        return model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)

    expected = generate()
    assert fed == [5, 1, 1, 1, 1, 1]
    if training:
        with by_transformers(model):
            wrong = not torch.equal(generate(), expected)
        upstream_is_wrong(wrong, "a checkpointed model in training mode generates without the cache it counts on")
    with by_rematree(model):
        effect = rematree.checkpointing_in_effect(model)
        assert torch.equal(generate(), expected)
        assert fed == [5, 1, 1, 1, 1, 1]
        assert rematree.checkpointing_in_effect(model) == effect
    assert {**vars(model.config), **vars(model.generation_config)} == before
    hook.remove()


class _Said(logging.Handler):
    """What a library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_the_cache_is_off_in_training_and_said_once() -> None:
    """By transformers, as with its own switch: a recomputed layer must not write into a cache a second time."""
    model: Any = with_lora(build("llama"))
    batch = batch_for(model)
    assert model.config.use_cache is True
    assert model(**batch).past_key_values is not None
    logger: Any = logging.getLogger("transformers.utils.generic")
    type(logger).warning_once.cache_clear()
    said = _Said()
    logger.addHandler(said)
    with by_rematree(model):
        assert [model(**batch).past_key_values for _ in range(3)] == [None] * 3
    logger.removeHandler(said)
    assert said.messages == ["`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."]
    assert model.config.use_cache is True
    assert model(**batch).past_key_values is not None


def test_a_plan_and_the_switch_do_not_mix() -> None:
    model = with_lora(build("llama"), target_modules=["q_proj", "down_proj"])
    batch = batch_for(model)
    expected = step(model, batch)
    rematree.activation_checkpointing_enable(model)
    planner = Planner(model, batch, cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])
    plan = planner.plan(planner.min_peak_bytes())
    with rematree.apply(plan, model):  # takes the switch's place
        effect = rematree.checkpointing_in_effect(model)
        assert effect.plan is plan
        assert len(effect.layers) == 4
        assert "by a plan with a predicted peak of" in str(effect)
        assert_same(expected, step(model, batch))
        for part in (model, model.get_base_model()):  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            for change in (rematree.activation_checkpointing_enable, rematree.activation_checkpointing_disable):
                with pytest.raises(UsageError, match=r"handle\.remove\(\)"):
                    change(part)  # pyright: ignore[reportArgumentType]
    assert rematree.checkpointing_in_effect(model).set_by == "rematree"
    assert_same(expected, step(model, batch))
    rematree.activation_checkpointing_disable(model)
    plain = Plain().train()
    # large enough that what a block keeps is more than the generator's state
    batch = {name: tensor.repeat(16, 8) for name, tensor in PLAIN_BATCH.items()}
    rematree.activation_checkpointing_enable(plain)
    expected = step(plain, batch)
    planner = Planner(plain, batch, cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])
    counts, end = calls_of(plain, ".up")
    plan = planner.plan((planner.min_peak_bytes() + planner.plan(None).predicted_peak_bytes) // 2)
    with rematree.apply(plan, plain), end:
        assert_same(expected, step(plain, batch))
        again = rematree.checkpointing_in_effect(plain).layers
    assert 0 < len(again) < 5
    assert counts == {f"blocks.{i}.up": 2 if f"blocks.{i}" in again else 1 for i in range(5)}
