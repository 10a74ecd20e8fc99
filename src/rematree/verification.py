"""Predicted beside measured: run the live model plain and under the plan, from the same random state."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from rematree.errors import UsageError, VerificationError
from rematree.execute.handle import applied_handle, apply
from rematree.measure import PeakMeter
from rematree.observe import LossFunction, loss_of
from rematree.plans import Plan
from rematree.simulate import Optimizer, make_optimizer
from rematree.units import KIB, format_bytes

PEAK_TOLERANCE: Final = 0.03
PEAK_SLACK: Final = 256 * KIB  # counted in every prediction; it matters for toy models only
# Chunked loss: the head's matmul runs on fewer rows, so other kernels may sum in another order. In units of the dtype's
# rounding step, relative to the largest entry of each gradient.
_ROUNDING_STEPS: Final = 64


@dataclass(frozen=True, slots=True)
class Verification:
    """What a plan promised and what it did.

    Attributes:
        gradients_equal: Loss and every gradient equal the plain model's bit for bit.
        num_gradients: How many were compared.
        largest_difference: Largest difference of any gradient, relative to its largest entry.
        loss_plain: Loss of the plain model.
        loss_planned: Loss under the plan.
        predicted_peak_bytes: From the plan.
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
    rounds: int = 3,
    loss: LossFunction | None = None,
) -> Verification:
    """Compare gradients, peak and time of `plan` with the plain model, on the live model and its device.

    The model's weights, gradients, random state and training flags are the same after as before: the optimizer steps
    with a learning rate of zero.

    Args:
        plan: A plan made for this model and a batch of exactly this shape.
        model: The model; it must fit plain, since the plain step is the reference.
        batch: One batch.
        optimizer: As planned.
        rounds: Timed steps of each kind, interleaved; the median counts.
        loss: As planned.
    Returns:
        The comparison.
    Raises:
        PlanMismatchError: another model or batch shape.
        VerificationError: an exact plan's gradients differ, a plan with chunked loss differs by more than rounding, or
            the measured peak is above the predicted one or more than 3 % below it.
    """
    if applied_handle(model) is not None:
        raise UsageError("a plan is in force on this model", remedies=["handle.remove() first"])
    with apply(plan, model, batch):
        pass  # refuses what the plan was not made for before anything runs
    was_training = [(module, module.training) for module in model.modules()]
    kept_gradients = [(p, p.grad) for p in model.parameters()]
    cpu_state = torch.get_rng_state()
    if not model.training:
        model.train()
    bench = _Bench(model, batch, optimizer, loss or loss_of)
    try:
        control, expected = bench.gradients(), bench.gradients()
        repeatable = all(torch.equal(control[name], expected[name]) for name in expected)
        plain_times, planned_times = list[float](), list[float]()
        plain_peak = bench.peak()
        with apply(plan, model, batch):
            found = bench.gradients()
            measured_peak = bench.peak()
        for _ in range(rounds):
            plain_times.append(bench.seconds())
            with apply(plan, model, batch):
                planned_times.append(bench.seconds())
    finally:
        torch.set_rng_state(cpu_state)
        for module, flag in was_training:
            module.training = flag
        for parameter, gradient in kept_gradients:
            parameter.grad = gradient
    result = Verification(
        gradients_equal=all(torch.equal(expected[name], found[name]) for name in expected),
        num_gradients=len(expected) - 1,
        largest_difference=max(_difference(expected[name], found[name]) for name in expected),
        loss_plain=float(expected[""]),
        loss_planned=float(found[""]),
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=measured_peak,
        predicted_step_seconds=plan.predicted_step_seconds,
        measured_step_seconds=statistics.median(planned_times),
        plain_peak_bytes=plain_peak,
        plain_step_seconds=statistics.median(plain_times),
    )
    _judge(plan, result, repeatable, expected)
    return result


def _judge(plan: Plan, result: Verification, repeatable: bool, expected: Mapping[str, torch.Tensor]) -> None:
    if plan.exact and repeatable and not result.gradients_equal:
        raise VerificationError(
            f"gradients differ from the plain model's by up to {result.largest_difference:.3g}; this plan must be exact"
        )
    step = max(torch.finfo(t.dtype).eps for t in expected.values())
    if result.largest_difference > _ROUNDING_STEPS * step:
        raise VerificationError(
            f"gradients differ from the plain model's by up to {result.largest_difference:.3g} of their largest entry; "
            f"rounding explains {_ROUNDING_STEPS * step:.3g}"
        )
    measured, predicted = result.measured_peak_bytes, result.predicted_peak_bytes
    if measured > predicted or measured < predicted * (1 - PEAK_TOLERANCE) - PEAK_SLACK:
        raise VerificationError(
            f"measured peak {format_bytes(measured)}, predicted {format_bytes(predicted)}: "
            f"outside the promised {PEAK_TOLERANCE:.0%}"
        )


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    largest = float(expected.abs().max())
    return float((expected - found).abs().max()) / largest if largest > 0 else float(found.abs().max())


class _Bench:
    """Steps of one model, always from the same random state."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any], kind: Optimizer, loss: LossFunction) -> None:
        self._model, self._batch, self._loss = model, batch, loss
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = make_optimizer(kind, trained, learning_rate=0.0)
        if self._optimizer is not None:
            self._optimizer.step()  # its state exists from the first step on
        self._clear()

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
            self._optimizer.step()
        self._clear()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Loss under "" and gradients by name."""
        loss = self._forward_backward()
        found = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        self._clear()
        return {"": loss, **found}

    def peak(self) -> int:
        """Measured peak of one step."""
        with PeakMeter(self._model, self._optimizer, self._batch) as meter:
            self._step()
        return meter.peak_bytes

    def seconds(self) -> float:
        """Wall time of one step."""
        start = time.perf_counter()
        self._step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - start
