"""What is priced of a step beside its blocks and its head: clipping, and the gradients of embeddings. Exact."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import batch_for, build, with_lora
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers
from rematree.pricing.cost import OpPrice, Roofline
from rematree.pricing.workload import Kind, work_of
from rematree.referee.clipping import clipping_seconds
from rematree.referee.simulate import Referee
from rematree.regions import find_chain

COST = Roofline(5e10, 1e10)


class ByName:
    """A second for each op of some names, nothing for others."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def price(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
        return OpPrice(float(func.__name__.partition(".")[0] in self.names), 0)


def referee(model: Any, cost: Any = COST, **options: Any) -> Referee:
    twin = Twin(model, batch_for(model))
    return Referee(twin, find_chain(twin.model).blocks, cost, **options)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_clipping_is_priced_as_the_ops_that_really_run() -> None:
    model = build("llama")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with _Names() as real:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    names = sorted(set(real.seen))
    assert {"_foreach_norm", "_foreach_mul_"} <= set(names)
    twin = Twin(model, batch_for(model))
    trained = list(twin.model.parameters())
    for name in names:
        views = name in {"detach", "_to_copy"}
        priced = clipping_seconds(trained, ByName(name), torch.device("cpu"), twin.mode)
        assert views or priced == real.seen.count(name), name
    assert all(p.grad is None for p in trained)


def test_clipping_reads_all_gradients_twice_and_writes_them_once() -> None:
    model = build("llama")
    twin = Twin(model, batch_for(model))
    trained = list(twin.model.parameters())
    size = sum(p.numel() * p.element_size() for p in trained)
    moved: list[int] = []

    class Counts(ByName):
        def price(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> OpPrice:
            work = work_of(func, args, kwargs, outputs)
            if func.__name__.startswith("_foreach"):
                assert work.kind is Kind.OPTIMIZER
                moved.append(work.moved_bytes)
            return OpPrice(0.0, 0)

    clipping_seconds(trained, Counts(), torch.device("cpu"), twin.mode)
    scalars = 4 * len(trained) + 4  # the norms, and the factor
    assert sum(moved) == 3 * size + scalars


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_that_is_clipped_takes_that_longer_and_no_byte_more(family: str) -> None:
    model = build(family)
    clipped, bare = referee(model, clips=True).run(Levers()), referee(model).run(Levers())
    twin = Twin(model, batch_for(model))
    seconds = clipping_seconds(list(twin.model.parameters()), COST, torch.device("cpu"), twin.mode)
    assert seconds > 0
    assert clipped.segments[-1].label == "optimizer"
    assert clipped.segments[-1].seconds == bare.segments[-1].seconds + seconds
    assert clipped.segments[:-1] == bare.segments[:-1]
    assert (clipped.peak_bytes, clipped.at_peak) == (bare.peak_bytes, bare.at_peak)


def test_without_an_optimizer_nothing_is_clipped() -> None:
    clipped = referee(build("llama"), optimizer="none", clips=True).run(Levers())
    assert clipped == referee(build("llama"), optimizer="none").run(Levers())


def test_a_plan_counts_clipping_unless_told_otherwise() -> None:
    model = with_lora(build("llama"), target_modules=["q_proj", "down_proj"])
    batch = batch_for(model)
    forbid = ["chunked_loss", "lean_adapters", "groups"]
    by_default = Planner(model, batch, cost=COST, forbid=forbid).plan(None)
    bare = Planner(model, batch, cost=COST, forbid=forbid, clips=False).plan(None)
    assert by_default.predicted_step_seconds > bare.predicted_step_seconds
    assert by_default.predicted_peak_bytes == bare.predicted_peak_bytes


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("family", "tables"), [("llama", 1), ("gpt2", 2)])
def test_gradients_of_embeddings_are_no_part_of_the_first_block(family: str, tables: int, recomputed: bool) -> None:
    cost = ByName("embedding_dense_backward", "native_layer_norm_backward", "silu_backward")
    first = referee(build(family), cost)
    levers = Levers({path: Decision(Action.RECOMPUTE) for path in first.blocks if recomputed})
    plain = first.run(levers)
    of_block = 2.0 if family == "gpt2" else 1.0  # its norms, its activation
    backward = plain.backward(0)
    assert backward is not None
    assert plain.tail_seconds == tables
    assert backward.seconds == of_block + tables
    assert plain.block_seconds(0) == plain.block_seconds(1) == of_block
    first.pace = dict.fromkeys(first.kinds, 3.0)
    paced = first.run(levers)
    backward = paced.backward(0)
    assert backward is not None
    assert backward.seconds == 3 * of_block + tables
    assert paced.block_seconds(0) == 3 * of_block
    assert paced.seconds == plain.seconds + 2 * of_block * len(first.blocks)


def test_frozen_embeddings_leave_nothing_behind_the_first_block() -> None:
    assert referee(with_lora(build("llama"))).run(Levers()).tail_seconds == 0.0
