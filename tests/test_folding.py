"""A folded run of the referee is the whole run, byte for byte."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import rematree
from models import assert_same, batch_for, build, gradients, quantised, with_lora
from rematree.catalogue.meta_model import build_meta_model
from rematree.execute.attention import attention_modules
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers
from rematree.pricing.cost import Roofline
from rematree.pricing.devices import find_device
from rematree.referee.folding import fold, list_of, shortened, whole
from rematree.referee.ranks import Ranks
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import find_chain, inner_regions

COST = Roofline(5e10, 1e10)
NARROW = ["q_proj", "down_proj"]
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _gemma3() -> nn.Module:
    """Every third block sees all tokens, the others a window: no two neighbours of a full one are alike."""
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 4
    extra: dict[str, Any] = {"head_dim": 8, "sliding_window": 8, "attn_implementation": "sdpa"}
    config = transformers.Gemma3TextConfig(**_SIZES, **extra, layer_types=types)
    return transformers.Gemma3ForCausalLM(config)


def _qwen3_moe() -> nn.Module:
    extra: dict[str, Any] = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = transformers.Qwen3MoeConfig(**_SIZES, **extra)
    return transformers.Qwen3MoeForCausalLM(config)


def _model(name: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    match name:
        case "lora":
            return with_lora(build("llama", layers=12))
        case "full":
            return build("llama", layers=12).train()
        case "frozen bottom":
            return with_lora(
                build("llama", layers=12), target_modules=["q_proj", "down_proj"], layers_to_transform=[7, 8, 9, 10, 11]
            )
        case "a few layers":
            return with_lora(
                build("llama", layers=12), target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3, 7]
            )
        case "gemma3":
            return with_lora(_gemma3())
        case "qwen3-moe":
            return with_lora(_qwen3_moe(), target_modules=["q_proj", "v_proj"])
        case "nf4":
            return with_lora(quantised(build("llama", layers=12), "nf4", folder))
        case _:
            raise ValueError(name)


MODELS = ("lora", "full", "frozen bottom", "a few layers", "gemma3", "qwen3-moe", "nf4")
Pair = tuple[Referee, Referee]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = _model(request.param, tmp_path_factory.mktemp("model"))
    twin = Twin(model, batch_for(model))
    blocks = find_chain(twin.model).blocks
    return Referee(twin, blocks, COST), Referee(twin, blocks, COST, folds=False)


def options(referee: Referee) -> list[dict[str, Decision]]:
    """Decisions inside a block, by relative path; the empty one saves everything."""
    block = referee.twin.model.get_submodule(referee.blocks[0])
    regions = [path for path, _ in inner_regions(block)]
    linear = [path for path in regions if path.endswith(("q_proj", "o_proj"))]
    cores = [f".{path}#attention" for path, _ in attention_modules(block)]
    everything = Decision(Action.RECOMPUTE)
    return [
        {},
        {"": everything},
        {"": everything, **{f".{path}": Decision(Action.SAVE, stash=True) for path in linear}},
        {"": everything, **{path: Decision(Action.SAVE, stash=True) for path in cores}},
    ]


def decide(referee: Referee, chosen: list[int]) -> dict[str, Decision]:
    known = options(referee)
    return {
        block + path: decision
        for block, index in zip(referee.blocks, chosen, strict=True)
        for path, decision in known[index].items()
    }


def assert_equal(folded: Simulation, full: Simulation) -> None:
    assert folded.peak_bytes == full.peak_bytes
    assert folded.at_peak == full.at_peak
    assert sum(folded.at_peak.values()) == folded.peak_bytes
    assert [s.label for s in folded.segments] == [s.label for s in full.segments]
    for mine, other in zip(folded.segments, full.segments, strict=True):
        assert (mine.live_bytes, mine.peak_bytes) == (other.live_bytes, other.peak_bytes), mine.label
        assert {k: v for k, v in mine.live.items() if v} == {k: v for k, v in other.live.items() if v}
    assert folded.seconds == pytest.approx(full.seconds, rel=1e-9)
    assert folded.graph == full.graph
    assert bool(folded.misread) == bool(full.misread)


def test_one_choice_for_all(pair: Pair) -> None:
    folded, full = pair
    for index in (0, 2):
        decisions = decide(folded, [index] * 12)
        assert_equal(folded.run(Levers(decisions)), full.run(Levers(decisions)))
    assert folded._container is not None, "nothing was left out"


_runs = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), min_size=1, max_size=5)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(runs=_runs, rows=st.sampled_from([None, 16]))
def test_runs_of_choices(pair: Pair, runs: list[tuple[int, int]], rows: int | None) -> None:
    folded, full = pair
    chosen = [index for index, length in runs for _ in range(length)]
    chosen = (chosen + [0] * 12)[:12]
    decisions = decide(folded, chosen)
    assert_equal(folded.run(Levers(decisions, rows)), full.run(Levers(decisions, rows)))
    assert folded._container is not None


def test_gradients_that_persist(tmp_path: Path) -> None:
    model = _model("lora", tmp_path)
    twin = Twin(model, batch_for(model))
    blocks = find_chain(twin.model).blocks
    folded, full = (Referee(twin, blocks, COST, accumulate=True, folds=folds) for folds in (True, False))
    decisions = decide(folded, [1] * 6 + [0] * 6)
    assert_equal(folded.run(Levers(decisions)), full.run(Levers(decisions)))
    assert folded._container is not None


# -- which blocks are left --------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=24))
def test_every_block_keeps_its_surroundings(signatures: list[str]) -> None:
    found = fold(signatures)
    kept = ["^", *(signatures[index] for index in found.kept), "$"]
    there = ["^", *signatures, "$"]

    def triples(of: list[str]) -> set[tuple[str, ...]]:
        return {tuple(of[i : i + 3]) for i in range(len(of) - 2)}

    assert triples(kept) == triples(there)
    assert list(found.kept) == sorted(set(found.kept))
    for index, image in enumerate(found.images):
        place = found.kept.index(image) + 1
        assert kept[place - 1 : place + 2] == there[index : index + 3]


def test_eighty_equal_blocks_are_three() -> None:
    assert len(fold(["A"] * 80).kept) == 3
    assert len(fold(["F", *["A"] * 40, *["B"] * 39]).kept) <= 9
    assert fold(["A"]) == whole(1)


class _Skipping(nn.Module):
    """Each block adds what the block before the last one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        older = last = x
        for layer in self.layers:
            older, last = last, layer(last) * older
        return last.sum()


def test_a_chain_whose_blocks_see_further_is_run_whole() -> None:
    model = _Skipping()
    twin = Twin(model, {"x": torch.ones(4, 8)})
    blocks = find_chain(twin.model).blocks
    folded, full = Referee(twin, blocks, COST), Referee(twin, blocks, COST, folds=False)
    assert_equal(folded.run(Levers()), full.run(Levers()))
    assert folded._container is None


class _Tied(nn.Module):
    """Blocks that share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        for layer in self.layers:
            layer.weight = self.layers[0].weight  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def test_blocks_that_share_parameters_are_run_whole() -> None:
    twin = Twin(_Tied(), {"x": torch.ones(4, 8)})
    assert list_of(twin.model, find_chain(twin.model).blocks) is None


def test_an_encoder_keeps_its_layers_where_a_decoder_of_as_many_is_shortened() -> None:
    """Both towers of T5Gemma say layer by layer what attends to what, in configs of their own."""
    stack: dict[str, Any] = {**_SIZES, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8}
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**stack), decoder=transformers.T5GemmaModuleConfig(**stack)
    )
    config.decoder_start_token_id = 1
    torch.manual_seed(0)
    model: Any = transformers.T5GemmaForConditionalGeneration(config).train()
    types = list(model.config.encoder.layer_types)
    assert types == list(model.config.decoder.layer_types)
    container = list_of(model, find_chain(model).blocks)
    assert container is not None
    with shortened(model, container, [1, 2]):
        assert model.get_submodule(container.rpartition(".")[0]).config.layer_types == types[1:3]
        other = model.config.encoder if ".decoder." in f".{container}" else model.config.decoder
        assert list(other.layer_types) == types
    batch = batch_for(model)
    expected = gradients(model, batch)
    planner = Planner(model, batch, optimizer="none", cost=COST, forbid=["chunked_loss"])
    plan = planner.plan(planner.min_peak_bytes())
    assert plan.recomputes
    with rematree.apply(plan, model):
        assert_same(expected, gradients(model, batch))


# -- the allocator of a GPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("what", ["save", "half", "groups", "zero2"])
def test_segments_in_use_are_those_of_all_blocks(what: str, lora: bool) -> None:
    """3000 tokens: tensors that fill no segment, of which each block leaves some."""
    sizes: dict[str, Any] = {
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 4000,
        "use_cache": False,
    }
    config = transformers.LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, **sizes)
    model: nn.Module = build_meta_model(config, dtype=torch.bfloat16).train()
    model = with_lora(model) if lora else model.requires_grad_(True)
    ids = torch.zeros(1, 3000, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids.clone()}
    twin = Twin(model, batch, device=torch.device("cuda", 0), capability=(9, 0))
    blocks, cost = find_chain(twin.model).blocks, find_device("h100").roofline()
    again = Decision(Action.RECOMPUTE)
    levers = {
        "save": Levers(),
        "half": Levers(dict.fromkeys(blocks[:6], again)),
        "zero2": Levers(dict.fromkeys(blocks[:6], again)),
        "groups": Levers(dict.fromkeys(blocks[8:], again), groups=(tuple(blocks[:4]), tuple(blocks[4:8]))),
    }[what]
    ranks = Ranks("zero2", 4) if what == "zero2" else None
    folded, whole_chain = (Referee(twin, blocks, cost, folds=folds, ranks=ranks).run(levers) for folds in (True, False))
    assert len(folded.segments) == len(whole_chain.segments)
    assert folded.peak_bytes == whole_chain.peak_bytes
    assert folded.slack_bytes == whole_chain.slack_bytes > 0
