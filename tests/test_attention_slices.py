"""Attention written in PyTorch, in slices: the same to rounding, one slice's scores at a time, and only where meant."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rematree
from models import batch_for, with_lora
from rematree.errors import PlanMismatchError
from rematree.execute import attention_slices
from rematree.execute.attention import AttentionRegions, attention_modules
from rematree.execute.attention_slices import cores_to_slice, in_slices, slice_shape, sliced_cores, why_whole
from rematree.fingerprint import describe_model
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers, Plan
from rematree.pricing.cost import Roofline
from rematree.regions import ATTENTION_SUFFIX
from rematree.verification import PEAK_SLACK

COST = Roofline(5e10, 4e10)
SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attn_implementation": "eager",
}
CONFIGS: Mapping[str, Any] = {
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE, num_hidden_layers=4, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
    ),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, num_hidden_layers=4, sliding_window=8),
    "llama": lambda: transformers.LlamaConfig(**SHAPE, num_hidden_layers=4),
}
ALL = tuple(CONFIGS)


@pytest.fixture(autouse=True)
def few_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices also of small batches."""
    monkeypatch.setattr(attention_slices, "_SCORES", 1 << 11)


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype).train()


@pytest.fixture
def sliced() -> Iterator[Any]:
    """`sliced(model)`: every core of it in slices, until the test is over."""
    regions: list[AttentionRegions] = []

    def put(model: nn.Module) -> None:
        regions.append(AttentionRegions((module, in_slices) for module in cores_of(model)))

    yield put
    for each in regions:
        each.remove()


def cores_of(model: nn.Module) -> list[nn.Module]:
    return [module for path, module in attention_modules(model) if path.endswith("self_attn")]


def grads(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]) -> float:
    """Largest of all gradients, relative to the gradient."""
    assert found.keys() == true.keys()
    return max(float((found[name].double() - g.double()).norm() / g.double().norm()) for name, g in true.items())


# -- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((1, 4, 8, 64), (1, 8)),  # 2048 are few
        ((2, 4, 16, 16), (2, 16)),
        ((4, 4, 16, 16), (2, 16)),  # two slices: rows are divided first
        ((1, 4, 32, 32), (1, 16)),
        ((3, 4, 40, 40), (1, 14)),  # ten slices: three of each row
        ((4, 64, 64, 64), (1, 8)),  # no more than 32
        ((100, 64, 64, 64), (4, 64)),
    ],
)
def test_how_scores_are_divided(scores: tuple[int, int, int, int], expected: tuple[int, int]) -> None:
    assert slice_shape(*scores) == expected


@given(st.tuples(*(st.integers(1, high) for high in (70, 16, 300, 300))))
def test_slices_are_few_and_hold_few_scores(scores: tuple[int, int, int, int]) -> None:
    rows, heads, queries, keys = scores
    few, some = slice_shape(*scores)
    count = math.ceil(rows / few) * math.ceil(queries / some)
    share = max(1 << 11, math.prod(scores) / 32)
    assert 1 <= few <= rows
    assert 1 <= some <= queries
    assert count <= 32
    assert few * heads * some * keys <= 2 * share + heads * keys * few


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_all_parameters_are_the_same_to_rounding(name: str, padded: bool, sliced: Any) -> None:
    model = made(name)
    batch = batch_for(model, rows=3, tokens=40)
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 25:] = 0
        batch["labels"][1, 25:] = -100
    true = grads(model, batch)
    assert len(sliced_cores(model, 3, 40)) == 4
    sliced(model)
    assert distance(grads(model, batch), true) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_in_bf16_many_slices_are_as_near_to_the_true_gradients(name: str, sliced: Any) -> None:
    model = made(name, torch.bfloat16)
    batch = batch_for(model, rows=1, tokens=192)  # 32 slices
    whole, true = grads(model, batch), grads(_widened(name, model), batch)
    sliced(model)
    found = grads(model, batch)
    for key in (key for key in true if "k_proj" in key or "v_proj" in key or "sinks" in key):
        near, far = (distance({key: g[key]}, {key: true[key]}) for g in (whole, found))
        assert far < (4 if "sinks" in key else 1.5) * near, key  # a sum over slices in bf16, and in fp32


def _widened(name: str, model: nn.Module) -> nn.Module:
    wide = made(name)
    wide.load_state_dict(model.state_dict())
    return wide


def test_without_gradients_the_output_is_the_same(sliced: Any) -> None:
    model = made("gpt_oss").eval()
    batch = batch_for(model, rows=3, tokens=40)
    with torch.no_grad():
        expected = model(**batch).logits
        sliced(model)
        torch.testing.assert_close(model(**batch).logits, expected)


def test_who_asks_for_weights_gets_them(sliced: Any) -> None:
    model = made("llama")
    batch = batch_for(model, rows=3, tokens=40)
    expected = model(**batch, output_attentions=True).attentions
    sliced(model)
    found = model(**batch, output_attentions=True).attentions
    assert len(found) == 4
    assert all(map(torch.equal, found, expected))


def test_gradients_are_the_same_in_every_backward_of_a_graph(sliced: Any) -> None:
    model = made("gpt_oss")
    batch = batch_for(model, rows=2, tokens=40)
    sliced(model)
    loss = model(**batch).loss
    first, second = (torch.autograd.grad(loss, [*model.parameters()], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("shape", [(40, 40), (1, 40, 40)])
def test_a_mask_of_which_it_is_not_known_what_its_dimensions_are_leaves_attention_whole(shape: tuple[int, ...]) -> None:
    model = made("llama")
    (core, *_) = cores_of(model)
    q, k, v = (torch.randn(3, heads, 40, 8) for heads in (4, 2, 2))
    mask = torch.full((40, 40), -1e9).triu(1).reshape(shape)
    eager = transformers.models.llama.modeling_llama.eager_attention_forward
    output, weights = in_slices(eager, core, q, k, v, mask, scaling=1.0)
    expected, _ = eager(core, q, k, v, mask, scaling=1.0)
    assert torch.equal(output, expected)
    assert weights is not None


# -- where ------------------------------------------------------------------------------------------------------------


def test_what_is_not_sliced() -> None:
    assert why_whole(cores_of(made("llama"))[0]) is None
    assert sliced_cores(made("llama"), 1, 8) == []  # few scores
    dropped = CONFIGS["llama"]()
    dropped.attention_dropout = 0.1
    (core, *_) = cores_of(transformers.AutoModelForCausalLM.from_config(dropped))
    assert "dropout" in str(why_whole(core))
    fused = transformers.LlamaConfig(**dict[str, Any](SHAPE, attn_implementation="sdpa"), num_hidden_layers=1)
    (core, *_) = cores_of(transformers.AutoModelForCausalLM.from_config(fused))
    assert "PyTorch" in str(why_whole(core))
    mlp = made("llama").get_submodule("model.layers.0.mlp")
    assert "config" in vars(mlp)
    assert "PyTorch" in str(why_whole(mlp))
    silent = transformers.StableLmConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=48, vocab_size=99)
    silent._attn_implementation = "eager"
    core = transformers.StableLmForCausalLM(silent).get_submodule("model.layers.0.self_attn")
    assert "asked for its weights" in str(why_whole(core))


def test_heads_may_differ_by_layer() -> None:
    """Then transformers' config raises where all layers are asked about."""
    model = made("llama")
    config: Any = model.config
    config.per_layer_config = {1: {"num_attention_heads": 2, "attention_dropout": 0.1}}
    assert config.is_heterogeneous
    assert [path for path, _ in sliced_cores(model, 1, 64)] == [f"model.layers.{n}.self_attn" for n in (0, 2, 3)]
    second: Any = cores_of(model)[1]
    assert "dropout" in str(why_whole(second))
    del second.layer_idx
    assert sliced_cores(second, 1, 64) == []


def test_weights_that_other_ranks_hold_are_made_up_whole() -> None:
    (core, *_) = cores_of(made("gpt_oss"))
    sinks: Any = core.sinks
    sinks.ds_id, sinks.ds_shape = 0, sinks.shape
    sinks.data = torch.empty(0)
    assert why_whole(core) is None


def test_where_tensors_are_made_by_default_does_not_matter() -> None:
    (core, *_) = cores_of(made("gpt_oss"))
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert why_whole(core) is None


def test_a_core_that_counts_its_queries_is_not_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformers.models.llama.modeling_llama
    own = module.eager_attention_forward

    def counts(attention: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = own(attention, query, *args, **kwargs)
        return output / query.shape[2], weights

    monkeypatch.setattr(module, "eager_attention_forward", counts)
    model = made("llama")
    assert "another result" in str(why_whole(cores_of(model)[0]))
    with pytest.raises(PlanMismatchError, match="cannot be sliced: its slices give another result"):
        cores_to_slice(model, ["model.layers.0.self_attn#attention"], check=True)


def test_a_dropout_that_is_given_leaves_attention_whole(sliced: Any) -> None:
    model = made("llama")
    batch = batch_for(model, rows=3, tokens=40)
    for core in cores_of(model):
        core.__dict__["attention_dropout"] = 0.5
    torch.manual_seed(1)
    expected = grads(model, batch)
    sliced(model)
    torch.manual_seed(1)
    found = grads(model, batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- plans ------------------------------------------------------------------------------------------------------------

LAYERS = "base_model.model.model.layers"
BLOCKS = tuple(f"{LAYERS}.{index}" for index in range(4))
CORES = tuple(f"{block}.self_attn{ATTENTION_SUFFIX}" for block in BLOCKS)


@pytest.mark.parametrize(
    "levers",
    [
        Levers({BLOCKS[1]: Decision(Action.RECOMPUTE)}, lean=CORES),
        Levers({BLOCKS[1]: Decision(Action.RECOMPUTE), CORES[1]: Decision(Action.SAVE, stash=True)}, lean=CORES),
        Levers({CORES[0]: Decision(Action.RECOMPUTE)}, lean=CORES),
        Levers(groups=(BLOCKS[:2],), lean=CORES),
        Levers({block: Decision(Action.RECOMPUTE) for block in BLOCKS}, groups=(BLOCKS[1:3],), lean=CORES),
    ],
)
def test_recomputation_around_slices_changes_no_bit(levers: Levers) -> None:
    model = with_lora(made("gpt_oss"), lora_dropout=0.05)
    batch = batch_for(model, rows=3, tokens=40)
    fingerprint = describe_model(model)

    def under(here: Levers) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        with rematree.apply(Plan.of(here, fingerprint), model):
            return grads(model, batch)

    expected, found = under(Levers(lean=CORES)), under(levers)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def measured(plan: Plan, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
    meter = PeakMeter(model, optimizer, batch)
    with rematree.apply(plan, model):
        for _ in range(2):
            with PeakMeter(model, optimizer, batch) as meter:
                model(**batch).loss.backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter.peak_bytes


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_plans_reach_below_what_scores_need_and_are_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_slices, "_SCORES", 1 << 14)  # every slice is simulated
    model = with_lora(made(name), lora_dropout=0.05)
    batch = batch_for(model, rows=2, tokens=128)
    without = Planner(model, batch, cost=COST, forbid=["compile", "sliced_attention"])
    planner = Planner(model, batch, cost=COST, forbid=["compile"])
    least = planner.plan(planner.min_peak_bytes())
    scores = 2 * 4 * 128 * 128 * 4
    assert without.min_peak_bytes() - least.predicted_peak_bytes > scores
    assert least.sliced
    assert not least.exact
    assert "attention in slices" in str(least)
    assert any("sliced_attention" in note for note in least.notes)
    assert Plan.from_json(least.to_json()) == least
    assert not without.plan(None).sliced
    torch.manual_seed(5)
    true = grads(model, batch)
    torch.manual_seed(5)
    with rematree.apply(least, model, batch):
        assert distance(grads(model, batch), true) < 1e-4
    for plan in (least, planner.plan(None)):
        beyond = measured(plan, model, batch) - (plan.predicted_peak_bytes - PEAK_SLACK)
        assert -0.01 * plan.predicted_peak_bytes <= beyond <= PEAK_SLACK


def test_full_fine_tuning_is_sliced_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_slices, "_SCORES", 1 << 14)
    model = made("gemma2")
    batch = batch_for(model, rows=2, tokens=128)
    planner = Planner(model, batch, cost=COST, forbid=["compile", "lean_adapters"])
    least = planner.plan(planner.min_peak_bytes())
    assert len(least.lean) == len(least.sliced) > 0
    assert not any("LoRA" in note for note in least.notes)
    assert not any("adapters" in row.option for row in least.rows)
    true = grads(model, batch)
    with rematree.apply(least, model, batch):
        assert distance(grads(model, batch), true) < 1e-4


def test_a_survey_of_few_tokens_says_nothing_of_many() -> None:
    model = made("gemma2")
    short, long = batch_for(model, rows=1, tokens=16), batch_for(model, rows=1, tokens=64)
    forbid = ["compile", "lean_adapters", "chunked_loss", "groups"]
    of_few, of_many = (Planner(model, batch, cost=COST, forbid=forbid) for batch in (short, long))
    assert of_few.scales_to(short)
    assert not of_few.scales_to(long)
    assert of_many.scales_to(batch_for(model, rows=1, tokens=72))
    assert not of_many.scales_to(short)
    assert Planner(model, short, cost=COST, forbid=[*forbid, "sliced_attention"]).scales_to(long)
