"""Predicted beside measured: run the live model plain and under the plan, from the same random state."""

import contextlib
import math
import statistics
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from rematree.errors import UsageError, VerificationError
from rematree.execute.handle import applied_handle, apply
from rematree.measure import PeakMeter
from rematree.memory.optimizers import Optimizer, make_optimizer
from rematree.observation.observe import LossFunction, loss_of
from rematree.planning.pace import now
from rematree.plans import Plan
from rematree.quantised import four_bit_linears
from rematree.units import KIB, format_bytes

PEAK_TOLERANCE: Final = 0.03
PEAK_SLACK: Final = 256 * KIB  # counted in every prediction; it matters for toy models only
# Chunked loss: the head's matmul runs on fewer rows, so other kernels may sum in another order. In units of the dtype's
# rounding step, relative to the largest entry of each gradient.
_ROUNDING_STEPS: Final = 64
_COARSE_STEPS: Final = 4  # of what computes them, where gradients have a finer dtype: fp32 adapters in a bf16 model
# Attention's backward on a GPU adds up in any order, and no step gives the same bits again. What differs by more than
# this from run to run does not differ by rounding.
_TIMES_ITSELF: Final = 4
_MOST_OF_ITSELF: Final = 0.05

_Gradients = Mapping[str, torch.Tensor]  # the loss is called ""


@dataclass(frozen=True, slots=True)
class Verification:
    """What a plan promised and what it did.

    Attributes:
        gradients_equal: Loss and every gradient equal the plain model's bit for bit.
        num_gradients: How many were compared.
        largest_difference: Largest difference of any gradient, relative to its largest entry.
        loss_plain: Loss of the plain model.
        loss_planned: Loss under the plan.
        predicted_peak_bytes: From the plan; on a GPU what torch's allocator hands out of it.
        measured_peak_bytes: Of one step under the plan, optimizer included.
        predicted_step_seconds: From the plan.
        measured_step_seconds: Median of the timed steps under the plan.
        plain_peak_bytes: The same for the plain model; None when it was not asked for.
        plain_step_seconds: The same; interleaved with the steps under the plan.
    """

    gradients_equal: bool
    num_gradients: int
    largest_difference: float
    loss_plain: float
    loss_planned: float
    predicted_peak_bytes: int
    measured_peak_bytes: int
    predicted_step_seconds: float
    measured_step_seconds: float
    plain_peak_bytes: int | None
    plain_step_seconds: float | None


def verify(
    plan: Plan,
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    optimizer: Optimizer = "adamw",
    accumulation_steps: int = 1,
    clips: bool = True,
    rounds: int = 3,
    loss: LossFunction | None = None,
) -> Verification:
    """Compare gradients, peak and time of `plan` with the plain model, on the live model and its device.

    The model's weights, buffers, gradients and training flags and torch's random state are the same after as before:
    the optimizer steps with a learning rate of zero.

    Args:
        plan: A plan made for this model and a batch of exactly this shape.
        model: The model; it must fit plain, since the plain step is the reference.
        batch: One batch.
        optimizer: As planned.
        accumulation_steps: As planned; with more than one, steps whose peak and time are measured begin with gradients
            of zeros, in the place of those of earlier micro-batches. Compared are the gradients of one step alone.
        clips: As planned; whether timed steps clip gradients.
        rounds: Timed steps of each kind, interleaved; the median counts.
        loss: As planned.
    Returns:
        The comparison.
    Raises:
        PlanMismatchError: another model or batch shape.
        UsageError: a plan is in force, nothing is to be timed, or the plain model's gradients are not finite.
        VerificationError: an exact plan's gradients differ, a plan with chunked loss differs by more than rounding, or
            the measured peak is above the predicted one or more than 3 % below it.
    """
    if applied_handle(model) is not None:
        raise UsageError("a plan is in force on this model", remedies=["handle.remove() first"])
    if rounds < 1:
        raise UsageError(f"rounds is {rounds}; at least one step of each kind must be timed")
    with apply(plan, model, batch):
        pass  # refuses what the plan was not made for before anything runs
    with _restored(model):
        if not model.training:
            model.train()
        bench = _Bench(model, batch, optimizer, loss or loss_of, clips=clips, accumulates=accumulation_steps > 1)
        control, expected = bench.gradients(), bench.gradients()
        if not all(bool(tensor.isfinite().all()) for tensor in expected.values()):
            raise UsageError("the plain model's loss or gradients are not finite: there is nothing to compare with")
        plain_times, planned_times = list[float](), list[float]()
        plain_peak = bench.peak()
        with apply(plan, model, batch):
            found = bench.planned_gradients()
            measured_peak = bench.peak()
        for _ in range(rounds):
            plain_times.append(bench.seconds())
            with apply(plan, model, batch):
                if next(model.parameters()).device.type == "cuda" or plan.compiled:
                    bench.seconds()  # what a first step checks takes as long as a short one; compiling, much longer
                planned_times.append(bench.seconds())
    result = Verification(
        gradients_equal=_equal(expected, found),
        num_gradients=len(expected) - 1,
        largest_difference=_largest_difference(expected, found),
        loss_plain=float(expected[""]),
        loss_planned=float(found[""]),
        predicted_peak_bytes=plan.predicted_allocated_bytes,
        measured_peak_bytes=measured_peak,
        predicted_step_seconds=plan.predicted_step_seconds,
        measured_step_seconds=statistics.median(planned_times),
        plain_peak_bytes=plain_peak,
        plain_step_seconds=statistics.median(plain_times),
    )
    _judge_gradients(plan, result, control, expected, _coarsest(model))
    _judge_peak(plan, measured_peak)
    return result


def _judge_gradients(plan: Plan, result: Verification, control: _Gradients, expected: _Gradients, eps: float) -> None:
    repeatable = _equal(expected, control)
    if plan.exact and repeatable and not result.gradients_equal:
        raise VerificationError(
            f"gradients differ from the plain model's by up to {result.largest_difference:.3g} of their largest entry; "
            "this plan must be exact"
        )
    itself = _largest_difference(expected, control)
    own = max(torch.finfo(t.dtype).eps for t in expected.values())
    rounding = max(_ROUNDING_STEPS * own, min(max(_COARSE_STEPS * eps, _TIMES_ITSELF * itself), _MOST_OF_ITSELF))
    if result.largest_difference > rounding:
        raise VerificationError(
            f"gradients differ from the plain model's by up to {result.largest_difference:.3g} of their largest entry; "
            f"rounding explains {rounding:.3g}",
            details=[] if repeatable else [f"the plain model, run twice, differs from itself by up to {itself:.3g}"],
        )


def _coarsest(model: nn.Module) -> float:
    """The rounding step of the coarsest dtype that anything is computed in: that of weights, or autocast's."""
    device = next(model.parameters()).device.type
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtypes |= {getattr(module, "compute_dtype", None) for _, module in four_bit_linears(model)}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    # Of one byte are scales and packed weights: nothing is added up in them.
    return max(torch.finfo(d).eps for d in dtypes if d is not None and d.is_floating_point and d.itemsize > 1)


def _judge_peak(plan: Plan, measured: int) -> None:
    predicted, budget = plan.predicted_allocated_bytes, plan.budget_bytes
    sizes = (
        f"measured peak {format_bytes(measured)} ({measured} B), predicted {format_bytes(predicted)} ({predicted} B)"
    )
    if measured > predicted:
        outside = plan.predicted_peak_bytes - predicted  # in a budget, not in what is measured
        over = budget is not None and measured > budget - outside
        raise VerificationError(
            f"{sizes}: above the prediction",
            details=[f"and above the budget of {format_bytes(budget or 0)}"] if over else [],
        )
    if measured < predicted * (1 - PEAK_TOLERANCE) - PEAK_SLACK:
        raise VerificationError(f"{sizes}: more than {PEAK_TOLERANCE:.0%} below the prediction")


def _equal(expected: _Gradients, found: _Gradients) -> bool:
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def _largest_difference(expected: _Gradients, found: _Gradients) -> float:
    """In units of each gradient's largest entry; infinite where a gradient is missing, not expected, or no number."""
    if expected.keys() != found.keys():
        return math.inf
    return max(_difference(expected[name], found[name]) for name in expected)


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    largest = float(expected.abs().max())
    ratio = float((expected - found).abs().max()) / largest if largest > 0 else float(found.abs().max())
    return math.inf if math.isnan(ratio) else ratio


@contextlib.contextmanager
def _restored(model: nn.Module) -> Generator[None]:
    """Put back what training steps change besides weights: buffers, gradients, training flags, random state."""
    flags = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.to("cpu", copy=True))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer.cpu(), value):
                    buffer.copy_(value)


class _Bench:
    """Steps of one model, always from the same random state."""

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        kind: Optimizer,
        loss: LossFunction,
        *,
        clips: bool,
        accumulates: bool,
    ) -> None:
        self._model, self._batch, self._loss = model, batch, loss
        self._clips, self._accumulates = clips, accumulates
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._fill()
        self._optimizer = make_optimizer(kind, self._trained, learning_rate=0.0)
        if self._optimizer is not None:
            self._optimizer.step()  # its state exists from the first step on
        self._clear()

    def _fill(self) -> None:
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)

    def _clear(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None

    def _forward_backward(self) -> torch.Tensor:
        torch.manual_seed(0)
        loss = self._loss(self._model(**self._batch))
        loss.backward()
        return loss.detach()

    def _step(self) -> None:
        self._forward_backward()
        if self._optimizer is not None:
            if self._clips:
                torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
        self._clear()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Loss under "" and gradients by name, off the device: its peak is measured while they are kept."""
        loss = self._forward_backward()
        found = {name: p.grad.cpu() for name, p in self._model.named_parameters() if p.grad is not None}
        self._clear()
        return {"": loss.cpu(), **found}

    def planned_gradients(self) -> dict[str, torch.Tensor]:
        """`gradients` under a plan.

        Raises:
            VerificationError: the recomputation does not save what the forward saved.
        """
        try:
            return self.gradients()
        except CheckpointError as error:
            reason = str(error).strip().splitlines()[0]
            raise VerificationError("the recomputation differs from the forward pass", details=[reason]) from error

    def peak(self) -> int:
        """Measured peak of one step."""
        if self._accumulates:
            self._fill()
        with PeakMeter(self._model, self._optimizer, self._batch) as meter:
            self._step()
        return meter.peak_bytes

    def seconds(self) -> float:
        """Wall time of one step."""
        device = next(self._model.parameters()).device
        if self._accumulates:
            self._fill()
        start = now(device)
        self._step()
        return now(device) - start
