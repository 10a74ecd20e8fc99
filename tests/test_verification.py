"""`verify` runs the promise: it passes what keeps it, names what does not, and leaves the model as it found it."""

import copy
import dataclasses
import functools
import math
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import rematree
from models import assert_same, batch_for, build, gradients, with_lora
from rematree.errors import PlanMismatchError, UsageError, VerificationError
from rematree.fingerprint import describe_batch, describe_model
from rematree.plans import Action, Decision, Plan
from rematree.pricing.cost import Roofline
from rematree.units import KIB, format_bytes
from rematree.verification import _coarsest, _equal, _judge_gradients, _largest_difference

COST = Roofline(5e10, 1e10)
Batch = dict[str, torch.Tensor]


def least_plan(model: nn.Module, batch: Batch, **options: Any) -> Plan:
    """The plan with the smallest peak: it recomputes most."""
    planner = rematree.Planner(model, batch, cost=COST, **options)
    plan = planner.plan(planner.min_peak_bytes())
    assert plan.recomputes
    return plan


def recompute(model: nn.Module, batch: Batch, *regions: str) -> Plan:
    """A plan by hand, for models whose peak is not of interest: it may be anything that was measured."""
    fingerprint = dataclasses.replace(describe_model(model), batch=describe_batch(batch))
    decisions = {region: Decision(Action.RECOMPUTE) for region in regions}
    return Plan(decisions, None, None, 0, 1.0, (), (), fingerprint)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A Llama under LoRA with dropout 0.1."""
    return with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def batch(model: nn.Module) -> Batch:
    return batch_for(model, rows=4)


@pytest.fixture(scope="module")
def plan(model: nn.Module, batch: Batch) -> Plan:
    return least_plan(model, batch, forbid=["chunked_loss"])


def test_a_right_plan_passes_and_prediction_stands_beside_measurement(
    model: nn.Module, batch: Batch, plan: Plan
) -> None:
    expected = gradients(model, batch, seed=0)
    result = rematree.verify(plan, model, batch, rounds=2)
    assert result.gradients_equal
    assert result.largest_difference == 0
    assert result.num_gradients == len(expected) - 1 == sum(p.requires_grad for p in model.parameters())
    assert result.loss_plain == result.loss_planned == float(expected["loss"])
    assert result.predicted_peak_bytes == plan.predicted_peak_bytes
    assert result.predicted_step_seconds == plan.predicted_step_seconds
    assert plan.predicted_peak_bytes - 256 * KIB <= result.measured_peak_bytes <= plan.predicted_peak_bytes
    assert result.plain_peak_bytes is not None
    assert result.measured_peak_bytes < result.plain_peak_bytes
    assert result.plain_step_seconds is not None
    assert min(result.measured_step_seconds, result.plain_step_seconds) > 0


def test_a_chunked_loss_passes_within_rounding(model: nn.Module) -> None:
    batch = batch_for(model, rows=8, tokens=64)
    planner = rematree.Planner(model, batch, cost=COST)
    plan = planner.plan(planner.min_peak_bytes())
    assert plan.loss_chunk_rows is not None
    assert plan.recomputes
    result = rematree.verify(plan, model, batch, rounds=1)
    assert result.num_gradients == sum(p.requires_grad for p in model.parameters())
    # fp32 carries 2**-23 of a number; the head's sums run in another order.
    assert result.largest_difference < 64 * 2**-23
    assert result.loss_planned == pytest.approx(result.loss_plain, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "none"])
def test_the_optimizer_of_the_plan_is_the_one_that_is_measured(optimizer: Any) -> None:
    model = build("llama", layers=2).train()
    batch = batch_for(model)
    plan = least_plan(model, batch, forbid=["chunked_loss"], optimizer=optimizer)
    assert rematree.verify(plan, model, batch, rounds=1, optimizer=optimizer).gradients_equal


@pytest.fixture(scope="module")
def accumulating() -> tuple[nn.Module, Batch, Plan]:
    """A model all of which is trained, with a plan for steps that begin with gradients."""
    model = build("llama", layers=2).train()
    batch = batch_for(model, rows=4)
    return model, batch, least_plan(model, batch, forbid=["chunked_loss"], accumulation_steps=2)


def test_accumulated_gradients_are_in_the_peak_that_is_measured(accumulating: tuple[nn.Module, Batch, Plan]) -> None:
    model, batch, plan = accumulating
    expected = gradients(model, batch, seed=0)
    result = rematree.verify(plan, model, batch, rounds=1, accumulation_steps=2)
    assert plan.predicted_peak_bytes - 256 * KIB <= result.measured_peak_bytes <= plan.predicted_peak_bytes
    assert result.gradients_equal
    assert result.num_gradients == len(expected) - 1
    assert result.loss_planned == float(expected["loss"])
    with pytest.raises(VerificationError, match=r"more than 3% below the prediction$"):
        rematree.verify(plan, model, batch, rounds=1)


def test_compared_steps_begin_without_gradients_and_measured_ones_with_zeros(
    accumulating: tuple[nn.Module, Batch, Plan],
) -> None:
    model, batch, plan = accumulating
    began: list[set[float | None]] = []

    def loss(output: Any) -> torch.Tensor:
        began.append({None if p.grad is None else float(p.grad.abs().max()) for p in model.parameters()})
        return output.loss

    rematree.verify(plan, model, batch, rounds=1, accumulation_steps=2, loss=loss)
    compared, measured = {None}, {0.0}
    assert began == [
        *[compared, compared, measured],  # the plain model, twice as it may not repeat itself
        *[compared, measured],  # under the plan
        *[measured, measured],  # timed
    ]


def test_gradients_of_earlier_batches_are_as_before(accumulating: tuple[nn.Module, Batch, Plan]) -> None:
    model, batch, plan = accumulating
    model = copy.deepcopy(model)
    optimizer = in_the_middle_of_training(model, batch)
    before = State.of(model, optimizer)
    rematree.verify(plan, model, batch, rounds=1, accumulation_steps=2)
    before.assert_equal(State.of(model, optimizer))


def test_a_peak_above_the_budget_fails() -> None:
    """Planned without an optimizer, trained with AdamW, whose state is two more numbers a weight."""
    model = build("llama", layers=4).train()
    batch = batch_for(model)
    plan = least_plan(model, batch, forbid=["chunked_loss"], optimizer="none")
    assert plan.budget_bytes is not None
    with pytest.raises(VerificationError) as caught:
        rematree.verify(plan, model, batch, rounds=1, optimizer="adamw")
    assert caught.value.exit_code == 4
    assert caught.value.message.startswith("measured peak ")
    predicted = plan.predicted_peak_bytes
    end = f", predicted {format_bytes(predicted)} ({predicted} B): above the prediction"
    assert caught.value.message.endswith(end)
    assert caught.value.details == (f"and above the budget of {format_bytes(plan.budget_bytes)}",)


def test_a_peak_far_below_the_prediction_fails(model: nn.Module, batch: Batch, plan: Plan) -> None:
    """A plan that promises less than it could have used has chosen slower steps than it needed to."""
    wrong = dataclasses.replace(plan, predicted_peak_bytes=2 * plan.predicted_peak_bytes)
    with pytest.raises(VerificationError, match=r"measured peak .* predicted .*: more than 3% below the prediction"):
        rematree.verify(wrong, model, batch, rounds=1)


class Noisy(nn.Module):
    """A linear layer with a gain that it draws from a generator of its own, which no checkpointing can know of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.random = random.Random(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) * (1 + self.random.random())) + x


class Undecided(Noisy):
    """Another activation now and then: with the first number of seed 0, not with its second one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        return torch.nn.functional.gelu(x) * x if self.random.random() > 0.8 else torch.tanh(x)


class Counted(nn.Module):
    """Batch statistics: buffers that every training step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.linear(x))) + x


class Stack(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], *, reset: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.reset = reset

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            if self.reset and isinstance(block, Noisy):
                block.random.seed(0)  # every step draws the same, so the plain model repeats itself
            x = block(x)
        return {"loss": x.square().mean()}


X = {"x": torch.linspace(-1, 1, 64).reshape(4, 16)}


def test_gradients_that_differ_fail() -> None:
    model = Stack(Noisy)
    plan = recompute(model, X, "blocks.1")
    assert_no_trace_is_left(model, X)
    with pytest.raises(VerificationError) as caught:
        rematree.verify(plan, model, X, rounds=1)
    assert caught.value.exit_code == 4
    text = (
        r"gradients differ from the plain model's by up to ([\d.e-]+) of their largest entry; this plan must be exact"
    )
    assert_difference_is_large(caught.value.message, text)
    assert_no_trace_is_left(model, X)


def assert_difference_is_large(message: str, pattern: str) -> None:
    match = re.fullmatch(pattern, message)
    assert match is not None, message
    assert float(match[1]) > 0.01


def assert_no_trace_is_left(model: nn.Module, batch: Batch) -> None:
    assert rematree.execute.handle.applied_handle(model) is None
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_differ_in_a_model_that_does_not_repeat_itself_fail_and_say_so() -> None:
    model = Stack(Noisy, reset=False)
    with pytest.raises(VerificationError) as caught:
        rematree.verify(recompute(model, X, "blocks.1"), model, X, rounds=1)
    pattern = (
        r"gradients differ from the plain model's by up to ([\d.e-]+) of their largest entry; rounding explains .*"
    )
    assert_difference_is_large(caught.value.message, pattern)
    assert caught.value.details[0].startswith("the plain model, run twice, differs from itself by up to ")


@pytest.mark.parametrize(
    ("itself", "off", "passes"), [(0.0, 1e-5, False), (0.001, 0.003, True), (0.001, 0.005, False), (0.5, 0.06, False)]
)
def test_what_differs_from_itself_is_held_to_that_within_limits(itself: float, off: float, passes: bool) -> None:
    """As attention's backward on a GPU; fp32, whose rounding explains 7.6e-6."""
    one, plan = torch.ones(8), SimpleNamespace(exact=False)
    expected, control, found = {"": one}, {"": one + itself}, {"": one + off}
    result: Any = SimpleNamespace(
        largest_difference=_largest_difference(expected, found), gradients_equal=_equal(expected, found)
    )
    judged = functools.partial(_judge_gradients, cast("Any", plan), result, control, expected)
    if passes:
        judged(0.0)
    else:
        with pytest.raises(VerificationError):
            judged(0.0)
    if off < 0.05:
        judged(off / 2)  # fp32 gradients of what is computed in a coarser dtype


def test_the_coarsest_dtype_is_of_what_computes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert _coarsest(model) == torch.finfo(torch.float32).eps
    model.register_buffer("scales", torch.ones(2, dtype=torch.float8_e4m3fn))
    model.register_buffer("table", torch.ones(2, dtype=torch.bfloat16))
    assert _coarsest(model) == torch.finfo(torch.float32).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert _coarsest(model) == torch.finfo(torch.bfloat16).eps
    assert _coarsest(model[0].to(torch.float16)) == torch.finfo(torch.float16).eps


def test_a_recomputation_that_takes_another_way_fails() -> None:
    model = Stack(Undecided)
    with pytest.raises(VerificationError) as caught:
        rematree.verify(recompute(model, X, "blocks.0", "blocks.1", "blocks.2"), model, X, rounds=1)
    assert caught.value.message == "the recomputation differs from the forward pass"
    assert "tensors" in caught.value.details[0]
    assert_no_trace_is_left(model, X)


def test_gradients_without_a_number_prove_nothing() -> None:
    model = Stack(Counted)
    with torch.no_grad():
        model.blocks[0].get_submodule("linear").weight[0, 0] = math.nan  # pyright: ignore[reportIndexIssue]
    with pytest.raises(UsageError, match=r"^the plain model's loss or gradients are not finite"):
        rematree.verify(recompute(model, X, "blocks.1"), model, X)


@dataclasses.dataclass
class State:
    """Everything of a model in training that a step could change."""

    weights: dict[str, torch.Tensor]
    gradients: dict[str, tuple[int, torch.Tensor]]
    flags: list[bool]
    attributes: list[dict[str, Any]]
    hooks: list[int]
    optimizer: list[torch.Tensor]
    random: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "State":
        grads = {n: (id(p.grad), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
        state = [t.clone() for entry in optimizer.state.values() for t in entry.values()]
        return cls(
            copy.deepcopy(model.state_dict()),
            grads,
            [module.training for module in model.modules()],
            [{k: v for k, v in module.__dict__.items() if not k.startswith("_b")} for module in model.modules()],
            [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
            state,
            torch.get_rng_state(),
        )

    def assert_equal(self, other: "State") -> None:
        assert_same(self.weights, other.weights)
        assert {name: identity for name, (identity, _) in self.gradients.items()} == {
            name: identity for name, (identity, _) in other.gradients.items()
        }
        assert_same({n: g for n, (_, g) in self.gradients.items()}, {n: g for n, (_, g) in other.gradients.items()})
        assert self.flags == other.flags
        assert self.attributes == other.attributes
        assert self.hooks == other.hooks
        assert all(torch.equal(a, b) for a, b in zip(self.optimizer, other.optimizer, strict=True))
        assert torch.equal(self.random, other.random)


def in_the_middle_of_training(model: nn.Module, batch: Batch) -> torch.optim.Optimizer:
    """Some steps are done and gradients of the next are there; one part is in evaluation mode."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    model(**batch)["loss"].backward()
    next(module for module in model.modules() if not list(module.children())).eval()
    torch.rand(5)
    return optimizer


def test_everything_is_as_before(plan: Plan, model: nn.Module, batch: Batch) -> None:
    model = copy.deepcopy(model)
    optimizer = in_the_middle_of_training(model, batch)
    before = State.of(model, optimizer)
    rematree.verify(plan, model, batch, rounds=1)
    before.assert_equal(State.of(model, optimizer))


def test_everything_is_as_before_when_it_fails(plan: Plan, model: nn.Module, batch: Batch) -> None:
    model = copy.deepcopy(model)
    optimizer = in_the_middle_of_training(model, batch)
    before = State.of(model, optimizer)
    with pytest.raises(VerificationError):
        rematree.verify(dataclasses.replace(plan, predicted_peak_bytes=1), model, batch, rounds=1)
    with pytest.raises(UsageError, match="returned no loss"):
        rematree.verify(plan, model, batch, rounds=1, loss=lambda output: rematree.observation.observe.loss_of({}))
    with pytest.raises(PlanMismatchError, match="another model, batch shape or trainable set"):
        rematree.verify(plan, model, batch_for(model, rows=3), rounds=1)
    before.assert_equal(State.of(model, optimizer))


def test_statistics_of_the_batches_are_as_before() -> None:
    model = Stack(Counted).train()
    optimizer = in_the_middle_of_training(model, X)
    before = State.of(model, optimizer)
    with pytest.raises(VerificationError, match="above the prediction"):
        rematree.verify(recompute(model, X, "blocks.1"), model, X, rounds=1)
    before.assert_equal(State.of(model, optimizer))


def test_a_model_in_evaluation_mode_is_verified_in_training_mode(plan: Plan, model: nn.Module, batch: Batch) -> None:
    expected = gradients(model, batch, seed=0)
    model.eval()
    try:
        result = rematree.verify(plan, model, batch, rounds=1)
        assert not any(module.training for module in model.modules())
    finally:
        model.train()
    assert result.loss_plain == float(expected["loss"]), "dropout was on"


def test_a_plan_in_force_is_refused_and_stays(plan: Plan, model: nn.Module, batch: Batch) -> None:
    with rematree.apply(plan, model) as handle:
        with pytest.raises(UsageError) as caught:
            rematree.verify(plan, model, batch)
        assert rematree.apply(plan, model) is handle
    assert str(caught.value) == ("a plan is in force on this model\nWhat would work:\n  handle.remove() first")


def test_no_rounds_are_refused(plan: Plan, model: nn.Module, batch: Batch) -> None:
    with pytest.raises(UsageError, match=r"^rounds is 0; at least one step of each kind must be timed$"):
        rematree.verify(plan, model, batch, rounds=0)
