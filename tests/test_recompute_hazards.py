"""What goes wrong between a forward and its rerun, for the switch and for a plan: right, or refused by name.

The rules are "never silently wrong" and "an exception leaves the model usable". Where upstream is silently wrong, the
test shows it.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import rematree
from both_paths import (
    AGAIN,
    EVERY_WAY,
    KEEP,
    SAVE,
    Ours,
    assert_same_or_refused,
    by_plan,
)
from checkpointed_models import Block, Plain, step, upstream_is_wrong
from models import assert_same, with_lora
from rematree.errors import RecomputeMismatchError, UnsupportedModelError
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline

Found = dict[str, torch.Tensor]
LAYERS = "base_model.model.model.layers"
IDS = {"input_ids": torch.arange(10).reshape(2, 5)}


# --------------------------------------------------------------------------------------------- in-place operations


class InPlace(nn.Module):
    """A block that changes the outputs of its linears in place, and its own input if asked to.

    Nobody reads the values of `skip`: backward through an addition needs none. Those of `up` are read.
    """

    def __init__(self, changes_input: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.2)
        self.skip = nn.Linear(8, 8)
        self._changes_input = changes_input

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._changes_input:
            x = x.mul_(1.5)
        y = self.up(x)
        y.mul_(2.0)
        y = self.dropout(F.relu_(y))
        out = self.skip(x)
        out += self.down(torch.tanh(y))
        return out


class InPlaceModel(nn.Module):
    def __init__(self, changes_input: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(InPlace(changes_input) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.tanh(self.first(x)) + 0.0
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=x.square().mean())


def tensors(rows: int = 4) -> Found:
    return {"x": torch.randn(rows, 8, generator=torch.Generator().manual_seed(2))}


@EVERY_WAY
def test_in_place_operations_inside_a_block(ours: Ours) -> None:
    model, batch = InPlaceModel(), tensors()
    expected = step(model, batch)
    with ours(model, batch):
        assert_same(expected, step(model, batch))


@pytest.mark.parametrize(("name", "inner"), [("skip", SAVE), ("skip", KEEP), ("up", KEEP)])
def test_in_place_operations_on_the_output_of_a_saved_region(name: str, inner: Any) -> None:
    model, batch = InPlaceModel(), tensors()
    expected = step(model, batch)
    decisions = {"blocks.1": AGAIN, f"blocks.1.{name}": inner}

    def run() -> Found:
        with by_plan(model, batch, decisions):
            return step(model, batch)

    assert_same_or_refused(expected, run, [f"blocks.1.{name}"])
    assert_same(expected, step(model, batch))


def test_plans_for_a_model_with_in_place_operations() -> None:
    """The planner must not choose what the executor then refuses."""
    model, batch = InPlaceModel(), tensors(rows=4096)
    expected = step(model, batch)
    planner = Planner(model, batch, cost=Roofline(5e10, 1e10))
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    assert low < high
    for plan in planner.plans([low + share * (high - low) // 4 for share in range(5)]):
        with rematree.apply(plan, model):
            assert_same(expected, step(model, batch))


class Rotation(nn.Module):
    """Turns pairs of features as complex numbers, as Llama 4 does: a view that not every layout has."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.core = nn.Linear(8, 32), nn.Linear(32, 8)
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)
        self.angles = nn.Buffer(torch.linspace(0, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(self.query(x).reshape(*x.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(self.angles), self.angles))
        return x + self.core(turned.flatten(-2)) + self.down(torch.tanh(self.up(x)))


def test_plans_where_a_stand_in_has_no_such_view() -> None:
    """What stands for an output that nobody reads has strides of zero: there the output itself is kept."""
    model = InPlaceModel()
    model.blocks = nn.ModuleList(Rotation() for _ in range(3))
    batch = tensors(rows=4096)
    expected = step(model, batch)
    decisions = {"blocks.1": AGAIN, "blocks.1.core": SAVE, "blocks.1.query": SAVE}
    with by_plan(model, batch, decisions), pytest.raises(RuntimeError, match="stride 1"):
        step(model, batch)
    planner = Planner(model, batch, cost=Roofline(1e8, 1e12))  # products are what there is to save
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    plans = planner.plans([low + share * (high - low) // 8 for share in range(9)])
    kept = [decision for plan in plans for path, decision in plan.decisions.items() if path.endswith(".query")]
    assert kept
    assert all(decision.stash for decision in kept)
    for plan in plans:
        with rematree.apply(plan, model):
            assert_same(expected, step(model, batch))


@EVERY_WAY
def test_a_block_that_changes_its_input(ours: Ours) -> None:
    """The rerun would begin with the changed input. Right, or refused, here by torch, which sees it too."""
    model, batch = InPlaceModel(changes_input=True), tensors()
    expected = step(model, batch)
    with ours(model, batch):
        try:
            found = step(model, batch)
        except (RuntimeError, RecomputeMismatchError) as error:
            assert "in-place operation" in str(error) or "modified" in str(error)  # noqa: PT017
        else:
            assert_same(expected, found)
    assert_same(expected, step(model, batch))


@EVERY_WAY
def test_an_output_changed_by_whoever_called_the_block(ours: Ours) -> None:
    model: Any = Plain()
    expected_hooks = [block.register_forward_hook(lambda _m, _i, out: out.mul_(0.5)) for block in model.blocks]
    expected = step(model, IDS)
    with ours(model, IDS):
        assert_same(expected, step(model, IDS))
    for hook in expected_hooks:
        hook.remove()


# ------------------------------------------------------------------------------------------ twice in a step, once told


class Twice(nn.Module):
    """Every block runs twice in a step, with another scale each time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embedding(input_ids)
        for turn in (1.0, -0.5):
            for block in self.blocks:
                x = block(x, scale=self.scale * turn)
        return SimpleNamespace(loss=x.square().mean())


@EVERY_WAY
def test_a_block_that_runs_twice(ours: Ours) -> None:
    model = Twice()
    expected = step(model, IDS)
    with ours(model, IDS):
        assert_same(expected, step(model, IDS))


@pytest.mark.parametrize("inner", [SAVE, KEEP], ids=["placeholder", "stash"])
def test_a_saved_region_that_runs_twice(inner: Any) -> None:
    model = Twice()
    expected = step(model, IDS)
    for name in ("dropout#draw",) if inner is SAVE else ("up", "down"):
        with by_plan(model, IDS, {f"blocks.{i}": AGAIN for i in range(3)} | {f"blocks.1.{name}": inner}):
            assert_same(expected, step(model, IDS))


@EVERY_WAY
def test_albert_runs_one_layer_many_times(ours: Ours) -> None:
    config = transformers.AlbertConfig(
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=99,
        hidden_dropout_prob=0.1,
    )
    torch.manual_seed(0)
    model = with_lora(transformers.AlbertForSequenceClassification(config), task_type="SEQ_CLS")
    batch = {"input_ids": torch.randint(3, 99, (2, 12)), "labels": torch.tensor([0, 1])}
    expected = step(model, batch)
    if ours is not by_plan:  # transformers' word for it: the layer is no GradientCheckpointingLayer
        with pytest.raises(UnsupportedModelError, match="does not support checkpointing"), ours(model, batch):
            pass
        return
    layer = "base_model.model.albert.encoder.albert_layer_groups.0.albert_layers.0"
    for decisions in ({layer: AGAIN}, {layer: AGAIN, f"{layer}.ffn": KEEP, f"{layer}.attention.value": KEEP}):
        with by_plan(model, batch, decisions):
            assert_same(expected, step(model, batch))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.norm(self.up(x))))


class NormedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Normed() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(loss=x.square().mean())


def normed_step(model: Any) -> Found:
    """A step from the same running statistics; they are among the results."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    found = step(model, tensors(16))
    return {**found, **{name: b.clone() for name, b in model.named_buffers()}}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_running_statistics_upstream(use_reentrant: bool) -> None:
    model: Any = NormedModel()
    expected = normed_step(model)
    forwards = [block.forward for block in model.blocks]
    for block in model.blocks:
        block.forward = lambda x, inner=block.forward: checkpoint(inner, x, use_reentrant=use_reentrant)
    found = normed_step(model)
    for block, forward in zip(model.blocks, forwards, strict=True):
        block.forward = forward
    counts = {name: int(found[name]) for name in found if name.endswith("num_batches_tracked")}
    upstream_is_wrong(set(counts.values()) == {2}, "running statistics are updated once more in the rerun")
    assert all(int(expected[name]) == 1 for name in counts)


@EVERY_WAY
def test_running_statistics_are_updated_once(ours: Ours) -> None:
    model = NormedModel()
    expected = normed_step(model)
    with ours(model, tensors(16)):
        assert_same(expected, normed_step(model))


# ---------------------------------------------------------------------------------- states that a forward leaves behind


def test_a_state_left_with_its_graph_is_planned_around() -> None:
    """RecurrentGemma keeps the last state of each layer on the layer, grad_fn and all, which cannot be copied."""
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        lru_width=32,
        attention_window_size=8,
        use_cache=False,
    )
    model = with_lora(transformers.RecurrentGemmaForCausalLM(config).train(), target_modules="all-linear")
    batch = {"input_ids": torch.randint(3, 99, (2, 24)), "labels": torch.randint(3, 99, (2, 24))}
    expected = step(model, batch)
    held = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor) and not v.is_leaf]
    assert held, "transformers leaves none any more"
    planner = Planner(model, batch, optimizer="none", cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])
    plan = planner.plan(planner.min_peak_bytes())
    assert plan.recomputes
    with rematree.apply(plan, model):
        assert_same(expected, step(model, batch))
    assert_same(expected, step(model, batch))
