"""Layers that are not a function of their tensors alone: shared keys and values, caches, routers, mutable arguments.

Numbers in the names are those of `upstream_bugs.md`.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput

import rematree
from both_paths import EVERY_WAY, NOT_REENTRANT, Ours, assert_same_or_refused, differ
from checkpointed_models import CASES, EXPERTS, by_transformers, qwen3_moe, step, upstream_is_wrong
from models import assert_same, reads_nothing, with_lora
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline

Found = dict[str, torch.Tensor]
BOTH = pytest.mark.parametrize("use_reentrant", [False, True])


# ------------------------------------------------------------------------------------- 4.11: shared keys and values


def gemma3n(layer_types: tuple[str, ...] = ("sliding_attention", "full_attention") * 3, shared: int = 2) -> Any:
    """The last `shared` layers read the keys and values that others of their type have put into a dictionary."""
    num_layers = len(layer_types)
    config = transformers.Gemma3nTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=99,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=shared,
        sliding_window=8,
        layer_types=list(layer_types),
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * num_layers,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma3nForCausalLM(config)


def gemma4() -> Any:
    config = transformers.Gemma4TextConfig(
        global_head_dim=8,  # pyright: ignore[reportCallIssue]
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=99,
        vocab_size_per_layer_input=99,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(config)


SHARING = {"gemma3n": gemma3n, "gemma4": gemma4}
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
TEXT: dict[str, torch.Tensor] = {"input_ids": IDS, "labels": IDS.clone()}


@pytest.mark.parametrize("name", SHARING)
def test_4_11_shared_keys_and_values_upstream(name: str) -> None:
    """They travel in a dictionary beside the arguments, where the reentrant variant records no gradient."""
    model = with_lora(SHARING[name](), **ATTENTION)
    expected = step(model, TEXT)
    assert len(expected) == 1 + 4 * 2 * 4 + 2 * 2 * 2  # the last two layers have no k_proj and no v_proj
    with by_transformers(model, {"use_reentrant": False}):
        assert_same(expected, step(model, TEXT))
    with by_transformers(model, {"use_reentrant": True}):
        found = step(model, TEXT)
    assert torch.equal(found["loss"], expected["loss"])
    upstream_is_wrong(differ(expected, found), "reentrant: no gradient through shared keys and values")


@pytest.mark.parametrize("name", SHARING)
@EVERY_WAY
def test_4_11_shared_keys_and_values(ours: Ours, name: str) -> None:
    model = with_lora(SHARING[name](), **ATTENTION)
    expected = step(model, TEXT)

    def run() -> Found:
        with ours(model, TEXT):
            return step(model, TEXT)

    assert_same_or_refused(expected, run, ["shared_kv_states", "layers."])
    assert_same(expected, step(model, TEXT))


@NOT_REENTRANT
def test_4_11_two_forwards_of_shared_keys_and_values(ours: Ours) -> None:
    model = with_lora(gemma3n(), **ATTENTION)

    def two() -> Found:
        torch.manual_seed(2)
        loss = model(**TEXT).loss + model(input_ids=IDS.flip(1), labels=IDS).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), **found}

    expected = two()
    with ours(model, TEXT):
        assert_same(expected, two())


@pytest.mark.slow
def test_4_11_a_plan_for_shared_keys_and_values() -> None:
    """Half a minute: a layer of Gemma 3n has some forty regions."""
    model = with_lora(gemma3n(("full_attention",) * 3, shared=1), target_modules=["q_proj", "k_proj"])
    expected = step(model, TEXT)
    planner = Planner(model, TEXT, cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    for plan in planner.plans([low, (low + high) // 2]):
        with rematree.apply(plan, model):
            assert_same(expected, step(model, TEXT))


# -------------------------------------------------------------------------------------------------- 4.12: the router


def with_near_ties(model: Any) -> Any:
    """Pairs of experts whose logits agree up to rounding, and a kernel that rounds another way the second time.

    The first run of a router is the model's own. In every later one the second expert of a pair gets one part in a
    million more, so that of two equal experts the other is chosen.
    """
    for layer in model.get_base_model().model.layers:
        router = layer.mlp.gate
        original: Any = type(router)

        class Router(original):
            runs = 0

            def forward(self, hidden_states: torch.Tensor) -> Any:
                hidden_states = hidden_states.reshape(-1, self.hidden_dim)
                logits = F.linear(hidden_states, self.weight)
                logits = torch.stack([logits[:, 0], logits[:, 0], logits[:, 2], logits[:, 2]], dim=-1)
                if self.runs > 0:
                    logits = logits + 1e-6 * torch.tensor([0.0, 1.0, 0.0, 1.0])
                else:
                    logits = logits + 1e-6 * torch.tensor([1.0, 0.0, 1.0, 0.0])
                self.runs += 1
                probabilities = F.softmax(logits, dtype=torch.float, dim=-1)
                values, indices = torch.topk(probabilities, self.top_k, dim=-1)
                return logits, values.to(logits.dtype), indices

        Router.__name__, Router.__qualname__ = original.__name__, original.__qualname__
        router.__class__ = Router
    return model


def routed_step(model: Any, batch: Any) -> Found:
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate.runs = 0
    return step(model, batch)


def routed(top_k: int) -> tuple[Any, Found]:
    torch.manual_seed(0)
    base = qwen3_moe()
    base.config.num_experts_per_tok = top_k
    for layer in base.model.layers:
        layer.mlp.gate.top_k = top_k
        nn.init.normal_(layer.mlp.gate.weight)
    return with_near_ties(with_lora(base, **EXPERTS)), CASES["qwen3-moe"].batch()


@BOTH
def test_4_12_routing_that_differs_in_the_rerun_upstream(use_reentrant: bool) -> None:
    model, batch = routed(1)
    expected = routed_step(model, batch)
    assert_same(expected, routed_step(model, batch))
    with by_transformers(model, {"use_reentrant": use_reentrant}):
        try:
            found = routed_step(model, batch)
        except CheckpointError:
            return  # shapes differ: another number of tokens for an expert
    off = max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items() if g.any())
    upstream_is_wrong(off > 0.1, "gradients through other experts than the forward's")


@pytest.mark.parametrize("top_k", [1, 3])
@EVERY_WAY
def test_4_12_the_routing_decision_is_kept(ours: Ours, top_k: int) -> None:
    """Experts are those of the forward. What the router computes again may round another way: one part in a million."""
    model, batch = routed(top_k)
    expected = routed_step(model, batch)
    runs: list[int] = []
    with ours(model, batch):
        found = routed_step(model, batch)
        hook = model.get_submodule("base_model.model.model.layers.1.mlp.experts").register_forward_pre_hook(
            reads_nothing(lambda *_: runs.append(1))
        )
        routed_step(model, batch)
        hook.remove()
    assert len(runs) == 2  # the rest is recomputed
    assert torch.equal(found["loss"], expected["loss"])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-12)


# ------------------------------------------------------------------------------------------- 4.13: mutable arguments


class Popping(GradientCheckpointingLayer):
    """Takes its tensor out of the caller's list, and its gain out of the caller's dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, inputs: list[torch.Tensor], settings: dict[str, Any] | None = None) -> torch.Tensor:
        gain = settings.pop("gain") if settings else 1.0
        return self.dropout(torch.tanh(self.linear(inputs.pop()))) * gain


class PoppingModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Popping(), Popping(), Popping()])

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        for index, layer in enumerate(self.layers):
            given, settings = [x], {"gain": 1.5 + index}
            x = layer(given, settings=settings)
            assert (given, settings) == ([], {})  # the caller sees what the layer did
        return CausalLMOutput(loss=x.square().mean())


@BOTH
def test_4_13_mutable_arguments_upstream(use_reentrant: bool) -> None:
    model: Any = PoppingModel()
    batch = {"x": torch.randn(3, 8)}
    expected = step(model, batch)
    for layer in model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *a: checkpoint(f, *a, use_reentrant=use_reentrant)
    if use_reentrant:
        with pytest.warns(UserWarning, match="None of the inputs"), pytest.raises(RuntimeError, match="require grad"):
            step(model, batch)
    else:
        with pytest.raises(IndexError, match="pop from empty list"):
            step(model, batch)
    for layer in model.layers:
        layer.gradient_checkpointing = False
    assert_same(expected, step(model, batch))


@EVERY_WAY
def test_4_13_mutable_arguments(ours: Ours) -> None:
    model = PoppingModel()
    batch = {"x": torch.randn(3, 8)}
    expected = step(model, batch)
    with ours(model, batch):
        assert_same(expected, step(model, batch))
        assert_same(expected, step(model, batch))
