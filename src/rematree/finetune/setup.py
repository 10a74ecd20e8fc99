"""What a run needs before its first step: the model with its adapters on the device, and the data."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers.trainer_utils import SchedulerType

from rematree.errors import UsageError
from rematree.finetune.base import add_adapters, load_base, training_device
from rematree.finetune.callbacks import MakeMeter
from rematree.finetune.config import TrainConfig
from rematree.finetune.data import DataSplit, load_data, planning_batch
from rematree.plans import Plan


@dataclass(frozen=True)
class Engine:
    """The three things the job asks of the planner; tests put simpler ones in their place.

    Attributes:
        plan: (model, batch, config) -> Plan for the config's budget.
        apply: (plan, model) -> context manager under which the model follows the plan.
        meter: (model, optimizer) -> context manager that knows the peak of its block.
    """

    plan: Callable[[Any, Mapping[str, torch.Tensor], TrainConfig], Plan]
    apply: Callable[[Plan, Any], AbstractContextManager[Any]]
    meter: MakeMeter

    @classmethod
    def default(cls) -> Self:
        """The library's own."""
        from rematree.execute.handle import apply
        from rematree.measure import PeakMeter
        from rematree.planning import plan

        def make_plan(model: Any, batch: Mapping[str, torch.Tensor], config: TrainConfig) -> Plan:
            return plan(
                model,
                batch,
                budget=config.budget,
                accumulation_steps=config.gradient_accumulation_steps,
                forbid=config.forbid,
                steps=config.max_steps if config.max_steps > 0 else None,
                allow_compile=config.compile or None,
            )

        return cls(make_plan, apply, PeakMeter)


@dataclass(frozen=True)
class Setup:
    """Everything loaded.

    Attributes:
        model: PEFT model on the device, as it was initialised.
        tokenizer: Its tokenizer.
        data: Rows to train on and held-out examples.
        batch: A batch of the shape every step has, on the device.
    """

    model: Any
    tokenizer: Any
    data: DataSplit
    batch: dict[str, torch.Tensor]


def prepare(config: TrainConfig, say: Callable[[str], None]) -> Setup:
    """Load model and data and put the adapters on.

    Raises:
        UsageError: the model or the data is not there or not usable, or a setting does not fit them.
    """
    if config.lr_scheduler_type not in {item.value for item in SchedulerType}:
        names = ", ".join(sorted(item.value for item in SchedulerType))
        raise UsageError(f"--lr-scheduler-type is {config.lr_scheduler_type!r}", details=[f"it can be {names}"])
    loaded = load_base(config)
    data = load_data(
        config.data,
        loaded.tokenizer,
        max_length=config.max_length,
        packing=config.packing,
        heldout=config.heldout,
        seed=config.seed,
    )
    for line in data.report.lines():
        say(line)
    batch = planning_batch(data.train, config.per_device_train_batch_size)
    device = training_device()
    model = add_adapters(loaded.model, config).to(device)
    return Setup(model, loaded.tokenizer, data, {name: tensor.to(device) for name, tensor in batch.items()})
