"""One run planned for several devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rematree.errors import InfeasibleBudgetError
from rematree.finetune.config import TrainConfig
from rematree.finetune.planned import described
from rematree.finetune.target import Target
from rematree.plans import Plan


@dataclass(frozen=True)
class DevicePlan:
    """What a run is on one device.

    Attributes:
        device: Its title.
        budget_bytes: What the run may take there.
        least_bytes: Smallest peak that any plan reaches.
        tokens: In one forward and backward pass.
        plan: The fastest within the budget; None where nothing fits.
        passes: That are accumulated before the optimizer's step.
        optimizer_seconds: Of a pass as predicted, what comes once in a step: clipping and the optimizer.
    """

    device: str
    budget_bytes: int
    least_bytes: int
    tokens: int
    plan: Plan | None
    passes: int = 1
    optimizer_seconds: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.plan is not None

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are trained on in a second; 0 where nothing fits."""
        if self.plan is None:
            return 0.0
        once = self.optimizer_seconds
        seconds = self.passes * (self.plan.predicted_step_seconds - once) + once
        return self.passes * self.tokens / seconds if seconds > 0 else 0.0

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        plan = self.plan
        return {
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "least_peak_bytes": self.least_bytes,
            "fits": self.fits,
            "predicted_peak_bytes": None if plan is None else plan.predicted_peak_bytes,
            "predicted_step_seconds": None if plan is None else plan.predicted_step_seconds,
            "extra_seconds": None if plan is None else plan.extra_seconds,
            "tokens_per_second": None if plan is None else self.tokens_per_second,
        }


def plan_each(
    config: TrainConfig,
    targets: Sequence[Target],
    budget: int | None,
    *,
    full: bool = False,
    say: Callable[[str], None],
) -> list[DevicePlan]:
    """Plan `config` for each of `targets`.

    Args:
        config: The run.
        targets: Devices, here or not.
        budget: For each of them; None takes all that a device has.
        full: All parameters are trained.
        say: Takes a line of progress.
    Raises:
        UsageError: there is no such model, or a device has less than the budget.
    """
    found: list[DevicePlan] = []
    tokens = config.per_device_train_batch_size * config.max_length
    for target in targets:
        say(f"planning for {target.place}")
        shape = target.shape(config, full=full)  # what weights are kept in depends on the device
        limit = target.budget(budget)
        planner = target.planner(shape, config)
        try:
            plan = described(planner.plan(limit), config, target, shape, full=full)
        except InfeasibleBudgetError as error:
            found.append(DevicePlan(target.name, limit, error.min_peak, tokens, None))
        else:
            passes, once = config.gradient_accumulation_steps, planner.survey.plain.optimizer_seconds
            found.append(DevicePlan(target.name, limit, planner.min_peak_bytes(), tokens, plan, passes, once))
    return found
