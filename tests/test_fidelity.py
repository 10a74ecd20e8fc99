"""The simulated step is the real one: its peak in forward, in backward and with gradients kept, to a few kilobytes."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import rematree
from both_paths import plan_of
from models import assert_same, batch_for, build, gradients, with_lora
from rematree.errors import UsageError
from rematree.fingerprint import describe_model
from rematree.measure import PeakMeter, storage_bytes
from rematree.memory.optimizers import Optimizer, make_optimizer
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers, Plan
from rematree.pricing.cost import Measured
from rematree.pricing.roofline import Roofline
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import find_chain
from rematree.units import KIB, MIB
from rematree.verification import PEAK_SLACK

CLOSE = 8 * KIB  # scalars and generator states; the smallest peak below is 11 MiB
Batch = dict[str, torch.Tensor]


class Gated(nn.Module):
    """Its forward needs much for a moment, and keeps little."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = torch.cat([x] * 64, dim=-1).sigmoid().mean(-1, keepdim=True)
        return self.linear(x) * gate


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def llama(*, lora: bool = True, **others: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **others}))
    return with_lora(model) if lora else model.train()


def tokens(rows: int = 4, length: int = 128) -> Batch:
    ids = torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module")
def cost() -> Measured:
    """Shared: what kernels allocate inside is measured once for each op."""
    return Measured(torch.device("cpu"))


def step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None) -> None:
    out = model(**batch)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    del out  # the twin's step holds no logits after the loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def measured(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> int:
    with PeakMeter(model, optimizer, batch) as meter:
        step(model, batch, optimizer)
    return meter.peak_bytes


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def simulated(
    model: nn.Module, batch: Batch, cost: Measured, optimizer: Optimizer = "adamw", *, accumulate: bool = False
) -> Simulation:
    """The plain step as a plan's numbers come from it."""
    twin = Twin(model, batch)
    return Referee(twin, find_chain(twin.model).blocks, cost, optimizer, accumulate).run(Levers())


def where(simulation: Simulation) -> str:
    """The segment that holds the peak."""
    return max(simulation.segments, key=lambda segment: segment.peak_bytes).label


def test_a_peak_in_forward(cost: Measured) -> None:
    model, batch = Stack().train(), {"x": torch.ones(256, 64)}
    found = simulated(model, batch, cost, "none")
    assert where(found).startswith("forward")
    assert abs(found.peak_bytes - measured(model, batch)) < CLOSE


def test_a_peak_in_the_head(cost: Measured) -> None:
    model, batch = llama(), tokens()
    found = simulated(model, batch, cost)
    assert where(found) == "head"
    optimizer = make_optimizer("adamw", trained(model))
    step(model, batch, optimizer)
    assert abs(found.peak_bytes - measured(model, batch, optimizer)) < CLOSE


def test_a_peak_in_a_recomputation(cost: Measured) -> None:
    model, batch = llama(), tokens()
    twin = Twin(model, batch)
    blocks = find_chain(twin.model).blocks
    referee = Referee(twin, blocks, cost)
    decisions = {path: Decision(Action.RECOMPUTE) for path in blocks}
    found = referee.run(Levers(decisions, 32))
    assert where(found).startswith("backward")
    optimizer = make_optimizer("adamw", trained(model))
    with rematree.apply(Plan(decisions, 32, None, 0, 0.0, (), (), describe_model(model)), model):
        step(model, batch, optimizer)
        assert abs(found.peak_bytes - measured(model, batch, optimizer)) < CLOSE


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_first_step_needs_no_more_than_the_later_ones(lora: bool, cost: Measured) -> None:
    """State is born in the optimizer's first step, when saved tensors are gone; later steps are what is predicted."""
    model, batch = llama(lora=lora), tokens(rows=1 if not lora else 4)
    predicted = simulated(model, batch, cost).peak_bytes
    optimizer = make_optimizer("adamw", trained(model))
    first, second, third = (measured(model, batch, optimizer) for _ in range(3))
    weights = sum(p.numel() * p.element_size() for p in trained(model))
    assert first < second == third
    assert second - first <= 2 * weights + CLOSE  # AdamW's two numbers a weight
    assert abs(predicted - second) < CLOSE


def test_gradients_of_earlier_micro_batches_stay(cost: Measured) -> None:
    """The later micro-batches of an accumulated step are the ones planned for."""
    model, batch = llama(lora=False), tokens(rows=2)
    predicted = simulated(model, batch, cost, accumulate=True).peak_bytes
    alone = simulated(model, batch, cost).peak_bytes
    optimizer = make_optimizer("adamw", trained(model))
    step(model, batch, optimizer)
    model(**batch).loss.backward()
    kept = sum(p.grad.numel() * p.element_size() for p in trained(model) if p.grad is not None)
    found = measured(model, batch, optimizer)
    assert kept > 2 * MIB
    assert alone < predicted
    assert abs(predicted - found) < CLOSE


@pytest.mark.parametrize("kind", ["sgd", "none"])
def test_an_optimizer_without_state(kind: Any, cost: Measured) -> None:
    model, batch = llama(lora=False), tokens(rows=1)
    predicted = simulated(model, batch, cost, kind).peak_bytes
    optimizer = make_optimizer(kind, trained(model))
    first = measured(model, batch, optimizer)
    model.zero_grad(set_to_none=True)
    assert first == measured(model, batch, optimizer)
    assert abs(predicted - first) < CLOSE


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"amsgrad": True}, {"fused": True}])
def test_the_step_of_the_optimizer_that_trains(settings: dict[str, Any], cost: Measured) -> None:
    """All weights: the end of the step is its peak where the optimizer takes copies of the second moments."""
    model, batch = llama(lora=False, vocab_size=8000), tokens(1, 16)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4, **settings)
    planner = Planner(model, batch, optimizer=optimizer, cost=cost, clips=False)
    assert (where(planner.survey.plain) == "optimizer") == (settings != {"fused": True})
    step(model, batch, optimizer)
    assert abs(planner.survey.plain.peak_bytes - measured(model, batch, optimizer)) < CLOSE


def test_an_optimizer_that_is_not_known(cost: Measured) -> None:
    model = llama()
    with pytest.raises(UsageError, match="what Adagrad keeps is not known"):
        Planner(model, tokens(), optimizer=torch.optim.Adagrad(trained(model)), cost=cost)


def test_a_meter_that_is_kept_keeps_no_optimizer() -> None:
    """Else the state of the one before would be freed, and subtracted, within the block that is measured."""
    model, batch = llama(lora=False), tokens(rows=1)
    peaks: list[int] = []
    for _ in range(2):
        optimizer = make_optimizer("adamw", trained(model))
        with PeakMeter(model, optimizer, batch) as meter:  # this name's older meter goes only when the block has begun
            step(model, batch, optimizer)
        peaks.append(meter.peak_bytes)
        del optimizer
    assert peaks[0] == peaks[1]


def test_a_meter_does_not_subtract_what_it_never_counted() -> None:
    """Torch's profiler reports the end of whatever any earlier profile saw begin; a cache may let go of it any time."""
    model = nn.Linear(4, 4)
    held: list[torch.Tensor] = []
    with PeakMeter(model):
        held.append(torch.ones(1000))
        model(torch.ones(2, 4)).sum().backward()
    with PeakMeter(model) as meter:  # its gradients are counted, and their end as well
        held.clear()
        grown = torch.ones(500)
        model.zero_grad()
    assert meter.start_bytes == 2 * (16 + 4) * 4
    assert meter.peak_bytes == meter.start_bytes + grown.nbytes
    assert meter.end_bytes == 20 * 4 + grown.nbytes


def test_the_gradient_of_a_tied_embedding_is_added_to_that_of_the_head_in_place(cost: Measured) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8}
    model, batch = llama(lora=False, tie_word_embeddings=True, **sizes), tokens(rows=1, length=32)
    twin = Twin(model, batch)
    blocks = find_chain(twin.model).blocks
    levers = Levers({path: Decision(Action.RECOMPUTE) for path in blocks}, loss_chunk_rows=8)
    predicted = Referee(twin, blocks, cost, "none").run(levers)
    plan = dataclasses.replace(plan_of(model, batch, levers.decisions), loss_chunk_rows=levers.loss_chunk_rows)
    with rematree.apply(plan, model):
        step(model, batch, None)
        model.zero_grad()
        found = measured(model, batch)
    assert abs(predicted.peak_bytes - found) <= CLOSE
    # Where the step ends: all gradients, and the embedding's own beside them before it is added.
    assert found == pytest.approx(2 * storage_bytes(model.parameters()) + 1000 * 64 * 4, rel=0.02)


def test_the_smallest_plan_of_a_tied_head_counts_on_that() -> None:
    """What the planner takes for the end of the step is not that behind a plain head, where autograd makes a copy."""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 16000}
    model, batch = llama(lora=False, tie_word_embeddings=True, **sizes).bfloat16(), tokens(rows=2, length=256)
    planner = rematree.Planner(model, batch, cost=Roofline(1e11, 1e10), forbid=["compile"])
    assert model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight
    everything = {path: Decision(Action.RECOMPUTE) for path in planner.survey.chain.blocks}
    by_hand = planner.observed.referee.run(Levers(everything, loss_chunk_rows=32)).peak_bytes
    assert planner.min_peak_bytes() - PEAK_SLACK <= by_hand


@pytest.mark.parametrize("forbid", [(), ("chunked_loss",)])
def test_a_model_of_which_only_the_head_is_trained(forbid: tuple[str, ...]) -> None:
    """Its blocks keep nothing, and the first one leaves less than it found: there is a plan, to do nothing."""
    model = build("llama").requires_grad_(False)
    model.get_submodule("lm_head").requires_grad_(True)
    batch = batch_for(model)
    planner = Planner(model, batch, optimizer="none", cost=Roofline(5e10, 1e10), forbid=forbid)
    plan = planner.plan(planner.min_peak_bytes())
    assert not plan.recomputes
    with rematree.apply(plan, model), PeakMeter(model, None, batch) as meter:
        model(**batch).loss.backward()
    assert 0 <= plan.predicted_peak_bytes - meter.peak_bytes <= PEAK_SLACK + (64 << 10)


def test_a_mask_that_a_recomputed_block_makes_is_made_as_in_its_forward() -> None:
    """HRM runs its layers several times a step, so that all of the model is one block, with the mask made in it.

    transformers looks whether it needs one; where the rerun looked otherwise, it saved other tensors.
    """
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 151}
    cycles: dict[str, Any] = {"H_cycles": 2, "L_cycles": 1, "L_bp_cycles": [1]}
    config = transformers.HrmTextConfig(
        **sizes, **cycles, num_attention_heads=4, head_dim=8, pad_token_id=0, use_cache=False
    )
    model = with_lora(transformers.HrmTextForCausalLM(config), target_modules=["q_proj", "down_proj"])
    batch = batch_for(model)
    expected = gradients(model, batch)
    planner = Planner(model, batch, optimizer="none", cost=Roofline(5e10, 1e10), forbid=["chunked_loss"])
    plan = planner.plan(planner.min_peak_bytes())
    assert plan.recomputes
    with rematree.apply(plan, model, batch):
        assert_same(expected, gradients(model, batch))
        with PeakMeter(model, None, batch) as meter:
            gradients(model, batch)
    assert 0 <= plan.predicted_peak_bytes - meter.peak_bytes < PEAK_SLACK + CLOSE
