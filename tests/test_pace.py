"""One block of each kind, run for its time: what it scales, and that nobody notices it."""

from collections.abc import Mapping

import pytest
import torch

from models import batch_for, build, gradients, with_lora
from rematree.observation.observe import Twin
from rematree.planning import pace
from rematree.planning.head_pace import HeadClock
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers
from rematree.pricing.cost import Measured, Roofline
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import find_chain

COST = Roofline(5e10, 1e10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_a_block_of_each_kind_is_run_and_nothing_is_left_of_it(family: str) -> None:
    model = with_lora(build(family))
    batch = batch_for(model)
    twin = Twin(model, batch)
    referee = Referee(twin, find_chain(twin.model).blocks, COST)
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    random = torch.get_rng_state()
    found = pace.measure_pace(model, referee, referee.run(Levers()))
    assert found.keys() == set(referee.kinds)
    assert all(ratio > 0 for ratio in found.values())
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, old) for name, (value, old) in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert gradients(model, batch)


def test_a_ratio_scales_the_blocks_of_its_kind_and_nothing_else() -> None:
    model = with_lora(build("llama"))
    twin = Twin(model, batch_for(model))
    referee = Referee(twin, find_chain(twin.model).blocks, COST)
    levers = Levers({path: Decision(Action.RECOMPUTE) for path in referee.blocks[1:]})
    plain = referee.run(levers)
    second = referee.kinds[1]
    referee.pace = {second: 2.0}
    scaled = referee.run(levers)
    for was, now in zip(plain.segments, scaled.segments, strict=True):
        phase, _, number = was.label.partition(" ")
        of_it = phase in ("forward", "backward") and referee.kinds[int(number)] == second
        assert now.seconds == was.seconds * (2.0 if of_it else 1.0), was.label
        assert (now.label, now.peak_bytes, now.live_bytes) == (was.label, was.peak_bytes, was.live_bytes)
    assert scaled.seconds == sum(segment.seconds for segment in scaled.segments)
    assert scaled.peak_bytes == plain.peak_bytes


def test_a_block_that_cannot_run_alone_is_left_at_its_prices() -> None:
    model = build("llama")

    class Fails(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.attention_type = "full_attention"

        def forward(self, *args: object, **kwargs: object) -> object:
            if not torch._C._len_torch_dispatch_stack():
                raise RuntimeError("only under fake tensors")
            return self.inner(*args, **kwargs)

    layers = model.model.layers  # pyright: ignore[reportAttributeAccessIssue]
    layers[1] = Fails(layers[1])  # pyright: ignore[reportIndexIssue, reportArgumentType, reportCallIssue]
    twin = Twin(model, batch_for(model))
    referee = Referee(twin, ("model.layers.0", "model.layers.1"), COST, kinds=(0, 1))
    assert pace.measure_pace(model, referee, referee.run(Levers())).keys() == {0}


def test_only_where_the_weights_are_here() -> None:
    model = build("llama")
    here = torch.device("cpu")
    assert pace.is_live(model, here)
    assert not pace.is_live(model, torch.device("cuda"))
    assert not pace.is_live(build("llama").to("meta"), here)
    assert pace.is_measured(Measured(here))
    assert not pace.is_measured(COST)
    assert (
        Planner(with_lora(model), batch_for(model), cost=COST).observed.referee.pace == {}
    )  # prices of another device


def test_the_mean_of_two_visits_with_the_head_between_them_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(build("llama", layers=2), target_modules=["q_proj"])
    head = HeadClock.seconds
    order: list[str] = []

    def visit(_model: torch.nn.Module, referee: Referee, _plain: Simulation) -> dict[int, float]:
        order.append("blocks")
        return dict.fromkeys(referee.kinds, 1.0 + len(order))  # 2 and 4

    def between(clock: HeadClock, workspaces: Mapping[int | None, int]) -> dict[int | None, float]:
        order.append("head")
        return head(clock, workspaces)

    monkeypatch.setattr("rematree.planning.observed.measure_pace", visit)
    monkeypatch.setattr(HeadClock, "seconds", between)
    assert set(Planner(model, batch_for(model), optimizer="none").observed.referee.pace.values()) == {3.0}
    assert order == ["blocks", "head", "blocks"]
