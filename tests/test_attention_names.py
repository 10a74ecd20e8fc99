"""The attention core as a region, in models that do more with the name of the attention function than look it up."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import rematree
from both_paths import AGAIN, KEEP, plan_of
from models import assert_same, batch_for, build, gradients, with_lora
from rematree.execute.attention import AttentionRegions, attention_modules, forget_attention
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from rematree.regions import ATTENTION_SUFFIX, find_chain

COST = Roofline(5e10, 1e10)


def sparse() -> nn.Module:
    """Masks the keys that its indexer does not choose, where the name is "eager" or "sdpa"; else hands them on."""
    torch.manual_seed(0)
    config = transformers.GlmMoeDsaConfig(
        vocab_size=151,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_topk=6,
        index_n_heads=2,
        index_head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        first_k_dense_replace=1,
    )
    return transformers.GlmMoeDsaForCausalLM(config).train()


def falcon() -> nn.Module:
    """Calls torch's function where the name is "sdpa", and needs a mask where it is not."""
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=151, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64
    )
    return transformers.FalconForCausalLM(config).train()


def adapted_falcon() -> nn.Module:
    """Also adds to the output of an adapter in place."""
    return with_lora(falcon())


@pytest.mark.parametrize("make", [sparse, falcon, adapted_falcon])
def test_a_name_that_is_compared_is_the_models_own(make: Any) -> None:
    model = make()
    batch = batch_for(model)
    expected = gradients(model, batch)
    decisions = dict.fromkeys(find_chain(model).blocks, AGAIN)
    inside = tuple(f"{block}." for block in decisions)
    cores = [f"{path}{ATTENTION_SUFFIX}" for path, _ in attention_modules(model) if path.startswith(inside)]
    assert cores
    with rematree.apply(plan_of(model, batch, {**decisions, **dict.fromkeys(cores, KEEP)}), model):
        assert_same(expected, gradients(model, batch))
    planner = Planner(model, batch, optimizer="none", cost=COST, forbid=["chunked_loss"])
    low, high = planner.min_peak_bytes(), planner.plan().predicted_peak_bytes
    for plan in planner.plans([low, (low + high) // 2]):
        assert plan.recomputes
        with rematree.apply(plan, model):
            assert_same(expected, gradients(model, batch))


def test_only_the_module_itself_sees_the_other_name() -> None:
    model: Any = build("llama")
    config = model.config
    found: list[tuple[str, Any]] = [(p, m) for p, m in attention_modules(model) if p.endswith("self_attn")]
    (path, module), *others = found
    names: list[str] = []

    def around(inner: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return inner(module, *args, **kwargs)

    batch = batch_for(model)
    expected = gradients(model, batch)
    regions = AttentionRegions([(module, around)])
    assert_same(expected, gradients(model, batch))
    (name,) = set(names)
    assert name == "sdpa"
    assert not name != "sdpa"  # noqa: SIM202  what `!=` says is asked
    assert name in ("eager", "sdpa")
    assert str(name) == "rematree:sdpa"
    assert {"sdpa": 1}.get(name) is None
    assert isinstance(module.config, type(config))
    assert model.config is config
    assert config._attn_implementation == "sdpa"
    assert str(config._attn_implementation) == "sdpa"
    assert all(other.config is config for _, other in others)
    module.config.attention_dropout = 0.25
    assert config.attention_dropout == 0.25
    config.attention_dropout = 0.0
    assert module.config.attention_dropout == 0.0

    copied = copy.deepcopy(model)
    assert copied.get_submodule(path).config.to_dict() == config.to_dict()
    assert copied.get_submodule(path).config.vocab_size is copied.config.vocab_size
    forget_attention(copied)
    assert copied.get_submodule(path).config is copied.config
    assert pickle.loads(pickle.dumps(module.config))._attn_implementation == "sdpa"

    regions.remove()
    assert module.config is config
    regions.remove()
    assert module.config is config


def test_a_function_set_later_is_the_one_that_runs() -> None:
    model: Any = build("llama")
    batch = batch_for(model)
    ((_, module), *_) = [(p, m) for p, m in attention_modules(model) if p.endswith("self_attn")]
    calls: list[str] = []

    def around(inner: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(inner.__name__)
        return inner(module, *args, **kwargs)

    regions = AttentionRegions([(module, around)])
    gradients(model, batch)
    model.set_attn_implementation("eager")
    expected = gradients(model, batch)
    regions.remove()
    assert calls == ["sdpa_attention_forward", "eager_attention_forward"]
    assert_same(expected, gradients(model, batch))


def eager_attention_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


def other_attention_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * 3.0


class Usual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functions: Any = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        return functions.get_interface(self.config._attn_implementation, eager_attention_forward)(self, x)


class Unusual(Usual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        functions: Any = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        return functions.get_interface(self.config._attn_implementation, other_attention_forward)(self, x)


def test_of_several_functions_in_a_file_each_module_has_its_own() -> None:
    """As Llama 4's towers have; a module that names another is none whose core could be a region."""
    model = nn.ModuleList([Usual(), Unusual()])
    assert [path for path, _ in attention_modules(model)] == ["0"]
    seen: list[float] = []

    def around(inner: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(float(inner(module, x)))
        return inner(module, x)

    regions = AttentionRegions([(module, around) for _, module in attention_modules(model)])
    assert [float(module(torch.ones(()))) for module in model] == [2.0, 3.0]
    assert seen == [2.0]
    regions.remove()
