"""Groups: blocks recomputed as one give the plain model's gradients bit for bit, and keep what the referee says."""

import contextlib
import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import rematree
from both_paths import AGAIN, KEEP, SAVE, plan_of
from checkpointed_models import EXPERTS, qwen3_moe
from models import assert_same, batch_for, build, gradients, reads_nothing, with_lora
from rematree.errors import RecomputeMismatchError
from rematree.execute.group import _Frame, _Holder
from rematree.execute.handle import Handle
from rematree.execute.noted import Kept, Link
from rematree.measure import PeakMeter
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Decision, Levers, Plan
from rematree.pricing.cost import Roofline
from rematree.referee.simulate import Referee
from rematree.regions import find_chain
from rematree.report.explanation import explain_facts, explain_text
from rematree.report.tables import plan_facts
from rematree.solve.chain import ChainChoice, position_peak

COST = Roofline(5e10, 1e10)
Group = tuple[int, int]


def grouped(
    model: nn.Module,
    batch: Mapping[str, Any],
    groups: Sequence[Group],
    inside: Mapping[int, Mapping[str, Decision]] | None = None,
) -> Plan:
    """A plan with these groups of blocks, and these decisions inside blocks ("" is the block itself)."""
    blocks = find_chain(model).blocks
    decisions = {
        f"{blocks[index]}.{name}".rstrip("."): decision
        for index, chosen in (inside or {}).items()
        for name, decision in chosen.items()
    }
    return dataclasses.replace(plan_of(model, batch, decisions), groups=tuple(blocks[a:b] for a, b in groups))


@contextlib.contextmanager
def under(*args: Any, **kwargs: Any) -> Generator[Handle]:
    with rematree.apply(grouped(*args, **kwargs), args[0]) as handle:
        yield handle


def _half(model: nn.Module) -> nn.Module:
    return model.bfloat16()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama-lora": lambda: with_lora(build("llama")),
    "llama-lora-bf16": lambda: _half(with_lora(build("llama"))),
    "llama-full": lambda: build("llama"),
    "llama-eager": lambda: with_lora(build("llama-eager")),
    "gpt2-lora": lambda: with_lora(build("gpt2")),
    "gpt2-full": lambda: build("gpt2"),
    "gemma3-lora": lambda: with_lora(build("gemma3")),
    "qwen3-moe": lambda: with_lora(qwen3_moe(), **EXPERTS),
    "mixtral-lora": lambda: with_lora(build("mixtral")),
}
NESTINGS: dict[str, tuple[tuple[Group, ...], dict[int, dict[str, Decision]]]] = {
    "one": (((0, 3),), {}),
    "from the second": (((1, 3),), {1: {"": AGAIN}}),
    "two": (((0, 2), (2, 4)), {0: {"": AGAIN}, 3: {"": AGAIN}}),
    "two levels": (((0, 4), (0, 2)), {2: {"": AGAIN}}),
    "three levels": (((0, 4), (0, 3), (1, 3)), {index: {"": AGAIN} for index in range(4)}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("nesting", NESTINGS)
def test_gradients_are_those_of_the_plain_model(name: str, nesting: str) -> None:
    model = MODELS[name]()
    batch = {name: value.clamp(max=98) for name, value in batch_for(model).items()}
    count = len(find_chain(model).blocks)
    groups, inside = NESTINGS[nesting]
    groups = tuple((a, min(b, count)) for a, b in groups if min(b, count) - a > 1)
    inside = {index: chosen for index, chosen in inside.items() if index < count}
    expected = gradients(model, batch)
    with under(model, batch, groups, inside):
        assert_same(expected, gradients(model, batch))
        assert_same(expected, gradients(model, batch))
    assert_same(expected, gradients(model, batch))


def test_saved_regions_in_groups() -> None:
    """Their saved tensors, stashes and dropout masks are the group's to throw away and bring back."""
    model = with_lora(build("llama"))
    batch = batch_for(model)
    masked = {"": AGAIN, "self_attn": KEEP, "mlp.down_proj.base_layer": SAVE}
    masked |= {f"mlp.{name}_proj.lora_dropout.default#draw": SAVE for name in ("gate", "up", "down")}
    expected = gradients(model, batch)
    for groups in (((0, 4),), ((0, 4), (0, 3)), ((1, 3),)):
        with under(model, batch, groups, dict.fromkeys(range(4), masked)):
            assert_same(expected, gradients(model, batch))


def under_autocast(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of a step whose forward, and not its backward, runs under autocast."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_autocast_of_the_forward_is_that_of_the_rerun() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)

    expected = under_autocast(model, batch)
    with under(model, batch, ((0, 3),), {1: {"": AGAIN}}):
        assert_same(expected, under_autocast(model, batch))


def test_accumulated_gradients_and_a_kept_graph() -> None:
    model = with_lora(build("llama"))
    batch = batch_for(model)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        first, second = model(**batch).loss, model(**batch).loss  # two graphs at a time
        first.backward(retain_graph=True)
        first.backward()
        second.backward()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = step()
    with under(model, batch, ((0, 4), (1, 3)), {1: {"": AGAIN}}):
        assert_same(expected, step())


def test_the_adapter_of_the_forward_is_that_of_the_rerun() -> None:
    model: Any = with_lora(build("llama"))
    model.add_adapter("other", model.peft_config["default"])
    batch = batch_for(model)

    def step(between: Callable[[], Any]) -> dict[str, torch.Tensor]:
        model.set_adapter("default")
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(**batch).loss
        between()
        loss.backward()
        model.set_adapter("default")
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def other() -> None:
        model.set_adapter("other")
        for name, parameter in model.named_parameters():  # PEFT stops their training as well
            parameter.requires_grad_("lora" in name)

    expected = step(lambda: None)
    with under(model, batch, ((0, 3),)):
        assert_same(expected, step(other))


class _Break(nn.Module):
    """A small model that does something to what one block returned before the next one gets it."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 16)) for _ in range(4)
        )
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 1:
                x = self.change(x)
        return x.square().mean()


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda x: x,
    "another tensor": lambda x: x * 2,
    "a view": lambda x: x[:, :],
    "in place": lambda x: x.mul_(2),
    "random": torch.nn.functional.dropout,
    "detached": lambda x: x.detach(),
}


def _small_step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    model(x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def _small_group(model: nn.Module, *groups: Group) -> Generator[None]:
    blocks = [f"layers.{index}" for index in range(4)]
    plan = dataclasses.replace(plan_of(model, {}, {}), groups=tuple(tuple(blocks[a:b]) for a, b in groups))
    with rematree.apply(plan, model):
        yield


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("groups", [((0, 4),), ((0, 4), (0, 3)), ((0, 4), (1, 3))])
def test_a_break_between_the_blocks(change: str, groups: tuple[Group, ...]) -> None:
    model = _Break(CHANGES[change])
    x = torch.randn(3, 16)
    expected = _small_step(model, x)
    with _small_group(model, *groups):
        assert_same(expected, _small_step(model, x))


def test_a_block_that_is_left_out_and_one_that_runs_twice() -> None:
    class Odd(_Break):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in (0, 2, 3, 1, 1, 3):
                x = self.layers[index](x)
            return x.square().mean()

    model = Odd(lambda x: x)
    x = torch.randn(3, 16)
    expected = _small_step(model, x)
    with _small_group(model, (0, 4), (0, 2)):
        assert_same(expected, _small_step(model, x))


def test_boundaries_are_links_and_gone_after_forward() -> None:
    """Weak references show that what one block hands to the next does not live; the group's input does."""
    model = _Break(lambda x: x)
    seen: list[weakref.ref[torch.UntypedStorage]] = []
    for layer in model.layers:
        layer.register_forward_hook(reads_nothing(lambda _, args, out: seen.append(weakref.ref(out.untyped_storage()))))
    x = torch.randn(3, 16, requires_grad=True)
    with _small_group(model, (1, 4)):
        loss = model(x)
        alive = [reference() is not None for reference in seen]
        assert alive == [True, False, False, True]  # the last one is what the loss needs
        loss.backward()
        del loss
    assert [reference() is not None for reference in seen] == [False] * len(seen)
    seen.clear()
    model(x)
    assert len(seen) == 4


def test_a_changed_boundary_is_kept() -> None:
    model = _Break(lambda x: x * 2)
    frames: list[_Frame] = []
    with _small_group(model, (0, 4)):
        loss = model(torch.randn(3, 16))
        frames += [holder.frame for holder in gc.get_objects() if type(holder) is _Holder]
        kinds = [type(call.arguments.again((None,))[0][0]) for call in frames[0].calls]
        assert kinds == [Kept, Link, Kept, Link]
        loss.backward()


def _living() -> int:
    return sum(type(thing) in {_Frame, _Holder} for thing in gc.get_objects())


@pytest.mark.parametrize("how", ["backward", "dropped", "error in forward", "error in backward", "partial"])
def test_nothing_is_left(how: str) -> None:
    """No reference cycle: without the garbage collector, nothing of the group outlives the graph."""
    model = _Break(lambda x: x * 2)
    gc.collect()
    gc.disable()
    try:
        with _small_group(model, (0, 4), (0, 3)):
            if how == "error in forward":
                hook = model.layers[3].register_forward_hook(reads_nothing(lambda *_: 1 / 0))
                with pytest.raises(ZeroDivisionError):
                    model(torch.randn(3, 16))
                hook.remove()
            else:
                loss = model(torch.randn(3, 16))
                assert _living() > 1
                if how == "backward":
                    loss.backward()
                elif how == "partial":
                    torch.autograd.grad(loss, [*model.layers[3].parameters()])
                elif how == "error in backward":
                    with torch.no_grad():
                        model.layers[2][0].weight.add_(1)  # pyright: ignore[reportIndexIssue]
                    with pytest.raises(RecomputeMismatchError, match="modified in place"):
                        loss.backward()
                del loss
            if how.startswith("error"):
                gc.collect()  # of the traceback that pytest holds
            assert _living() == 0
            x = torch.randn(3, 16)
            after = _small_step(model, x)
        assert_same(_small_step(model, x), after)
    finally:
        gc.enable()


def test_an_input_that_is_written_to_is_refused() -> None:
    model = _Break(lambda x: x)
    x = torch.randn(3, 16)
    with _small_group(model, (0, 4)):
        loss = model(x)
        x.add_(1)
        with pytest.raises(RecomputeMismatchError, match=r"layers\.0: an argument of shape \(3, 16\)"):
            loss.backward()


def test_a_forward_that_changes_is_refused() -> None:
    model = _Break(lambda x: x)
    with _small_group(model, (0, 4)):
        loss = model(torch.randn(3, 16))
        model.layers[1][1].forward = lambda x: x[:2]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        with pytest.raises(RecomputeMismatchError, match=r"layers\.1: run again with its group"):
            loss.backward()
        del model.layers[1][1].forward  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
        _small_step(model, torch.randn(3, 16))


def test_a_saved_tensor_can_be_looked_at() -> None:
    """Outside of backward, and twice."""
    model = _Break(lambda x: x)
    x = torch.randn(3, 16)
    with _small_group(model, (0, 4)):
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(x)
        node = loss.grad_fn.next_functions[0][0].next_functions[0][0]  # of the last linear layer
        first, second = node._saved_mat1, node._saved_mat1
        assert torch.equal(first, second)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(_small_step(model, x), found)


def test_user_hooks_around_get_the_groups_input() -> None:
    model = _Break(lambda x: x)
    x = torch.randn(3, 16)
    expected = _small_step(model, x)
    packed: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with _small_group(model, (0, 4)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.manual_seed(5)
            model.zero_grad()
            loss = model(x)
        loss.backward()
        assert_same(expected, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert packed.count((3, 16)) == 2  # the group's input, and what the loss saves


def test_a_copy_has_groups_of_its_own() -> None:
    model = _Break(lambda x: x)
    x = torch.randn(3, 16)
    expected = _small_step(model, x)
    with _small_group(model, (0, 4)):
        copied = copy.deepcopy(model)
        assert_same(expected, _small_step(copied, x))
        assert_same(expected, _small_step(model, x))


@pytest.mark.parametrize("name", ["llama-lora", "gpt2-full", "gemma3-lora"])
@pytest.mark.parametrize("nesting", ["one", "two", "two levels"])
def test_the_peak_is_the_referees(name: str, nesting: str) -> None:
    model = MODELS[name]()
    batch = batch_for(model)
    groups, inside = NESTINGS[nesting]
    plan = grouped(model, batch, groups, inside)
    referee = Referee(Twin(model, batch, None), find_chain(model).blocks, COST, "none")
    predicted = referee.run(plan.levers).peak_bytes
    assert predicted < referee.run(Levers()).peak_bytes
    with rematree.apply(plan, model):
        gradients(model, batch)
        model.zero_grad(set_to_none=True)
        with PeakMeter(model, None, batch) as meter:
            model(**batch).loss.backward()
    assert abs(meter.peak_bytes - predicted) <= 0.01 * predicted + 4096


def test_the_peak_of_a_folded_chain_with_groups_is_that_of_the_whole_one() -> None:
    model = with_lora(build("llama", layers=14))
    batch = batch_for(model)
    twin, blocks = Twin(model, batch, None), find_chain(model).blocks
    folded, whole = Referee(twin, blocks, COST), Referee(twin, blocks, COST, folds=False)
    again = {index: {"": AGAIN} for index in range(14)}
    for groups, inside in (
        (((0, 3), (3, 6), (6, 9), (9, 12)), {}),
        (((1, 13), (1, 5)), again),
        (((0, 2), (2, 4), (4, 6), (6, 8), (9, 12)), again),
    ):
        levers = grouped(model, batch, groups, inside).levers
        one, other = folded.run(levers), whole.run(levers)
        assert one.peak_bytes == other.peak_bytes
        assert [s.label for s in one.segments] == [s.label for s in other.segments]
        assert [s.peak_bytes for s in one.segments] == [s.peak_bytes for s in other.segments]
        assert one.seconds == pytest.approx(other.seconds)


@pytest.fixture(scope="module")
def planners() -> tuple[nn.Module, dict[str, torch.Tensor], Planner, Planner]:
    model = with_lora(build("llama", layers=10))
    batch = batch_for(model)
    batch = {name: value.repeat(4, 1) for name, value in batch.items()}
    return model, batch, Planner(model, batch, cost=COST), Planner(model, batch, cost=COST, forbid=["groups"])


Planners = tuple[nn.Module, dict[str, torch.Tensor], Planner, Planner]


def test_the_smallest_peak_falls(planners: Planners) -> None:
    model, batch, with_groups, without = planners
    least = with_groups.min_peak_bytes()
    assert least < without.min_peak_bytes()
    plan = with_groups.plan(least)
    assert plan.groups
    assert "group 1 of" in str(plan)
    text, facts = explain_text(plan), explain_facts(plan)
    assert "Recomputed together:\n  layers.{" in text
    assert "certified: no choice of these options takes less than" in text
    assert facts["gap_seconds"] == plan.predicted_step_seconds - plan_facts(plan)["bound_seconds"]
    assert facts["groups"] == [list(group) for group in plan.groups]
    assert not without.plan(without.min_peak_bytes()).groups
    assert Plan.from_json(plan.to_json()) == plan
    chunked = dataclasses.replace(plan, loss_chunk_rows=None)  # the rest of it is exact
    expected = gradients(model, batch)
    with rematree.apply(chunked, model):
        assert_same(expected, gradients(model, batch))


@pytest.mark.parametrize("budgets", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_plan_says_how_far_it_is_from_the_bound(planners: Planners, budgets: int) -> None:
    """D5 on a small model: two percent of the step."""
    _, _, with_groups, without = planners
    for planner, lowest in ((with_groups, without.min_peak_bytes()), (without, without.min_peak_bytes())):
        plain, seconds = planner.plain_step()
        for plan in planner.plans([lowest + (plain - lowest) * part // (budgets - 1) for part in range(budgets)]):
            assert plan.bound_seconds is not None
            gap = plan.predicted_step_seconds - plan.bound_seconds
            assert -1e-12 <= gap <= 0.02 * seconds, (plan.budget_bytes, gap / seconds)


def test_what_the_solver_adds_up_is_the_referees_peak(planners: Planners) -> None:
    """To the byte, whatever blocks stand side by side, if the first one keeps what it is given."""
    *_, planner = planners
    known, problem = planner.survey, planner.survey.problem
    most = min(len(known.options[kind]) for kind in known.kinds)
    assert known.plain.released_bytes > 0
    for first in range(0, most, 3):
        blocks = [(first + 2 * block) % most for block in range(len(known.kinds))]
        for option, head in ((first, first % len(problem.heads)), (len(problem.stages[0]) - 1, 0)):
            blocks[0] = option
            choice = ChainChoice(tuple(blocks), head, 0.0)
            found = planner.observed.referee.run(known.levers(choice)).peak_bytes
            added = position_peak(problem, blocks, head)
            if known.options[known.kinds[0]][option].saves_all:  # the model's forward still holds it
                assert added <= found <= added + known.plain.released_bytes
            else:
                assert added == found


def test_every_option_of_the_survey_is_exact_in_nested_groups(planners: Planners) -> None:
    model, batch, planner, _ = planners
    known = planner.survey
    expected = gradients(model, batch)
    most = min(len(known.options[kind]) for kind in known.kinds)
    count = len(known.kinds)
    for first in range(most):
        blocks = tuple((first + block) % most for block in range(count))
        levers = known.levers(ChainChoice(blocks, 0, 0.0, ((0, count), (0, 4), (1, 3), (6, 9))))
        plan = Plan.of(levers, plan_of(model, batch, {}).fingerprint)
        with rematree.apply(plan, model):
            assert_same(expected, gradients(model, batch))


def test_lean_layers_that_read_the_input_of_a_group_under_autocast() -> None:
    """OLMo 2 norms what attention returns: its adapters read the block's own input, and autocast knows leaves."""
    model = with_lora(build("olmo2"))
    batch = batch_for(model)
    blocks = find_chain(model).blocks
    lean = tuple(f"{blocks[1]}.self_attn.{name}_proj" for name in "qkv")

    expected = under_autocast(model, batch)
    plan = dataclasses.replace(grouped(model, batch, ((1, 3),)), lean=lean)
    with rematree.apply(plan, model):
        assert_same(expected, under_autocast(model, batch))


class Scaled(nn.Module):
    """A block that is given a weight of the model, or a view of it, and saves it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) * table)


class GivenWeights(nn.Module):
    def __init__(self, views: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.rand(8))
        self.blocks = nn.ModuleList(Scaled() for _ in range(4))
        self.views = views

    def forward(self, x: torch.Tensor, **_: Any) -> Any:
        for block in self.blocks:
            x = block(x, self.table.unsqueeze(0).expand(len(x), -1) if self.views else self.table)
        return SimpleNamespace(loss=x.square().mean())


@pytest.mark.parametrize("views", [False, True])
def test_a_block_that_is_given_a_weight(views: bool) -> None:
    torch.manual_seed(0)
    model, batch = GivenWeights(views).train(), {"x": torch.randn(5, 8)}
    expected = gradients(model, batch)
    for groups in (((0, 4),), ((0, 4), (0, 2)), ((1, 3),)):
        with under(model, batch, groups):
            assert_same(expected, gradients(model, batch))
