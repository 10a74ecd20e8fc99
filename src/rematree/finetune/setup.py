"""What a run needs before its first step: the model with its adapters on the device, and the data."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch

from rematree.finetune.base import add_adapters, load_base, training_device
from rematree.finetune.callbacks import MakeMeter
from rematree.finetune.config import TrainConfig
from rematree.finetune.data import DataSplit, load_data, planning_batch
from rematree.finetune.packing import refuse_leaks
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.report.stored_frontier import StoredFrontier, stored_frontier


@dataclass(frozen=True)
class Engine:
    """What the job asks of the planner; tests put simpler ones in its place.

    Attributes:
        plan: (model, batch, config) -> Plan for the config's budget.
        apply: (plan, model) -> context manager under which the model follows the plan.
        meter: (model, optimizer) -> context manager that knows the peak of its block.
        frontier: The plan that was just made -> what else could be had, for the page about the run; None for no page.
    """

    plan: Callable[[Any, Mapping[str, torch.Tensor], TrainConfig], Plan]
    apply: Callable[[Plan, Any], AbstractContextManager[Any]]
    meter: MakeMeter
    frontier: Callable[[Plan], StoredFrontier] | None = None

    @classmethod
    def default(cls) -> Self:
        """The library's own."""
        from rematree.execute.handle import apply
        from rematree.measure import PeakMeter

        planning = _Planning()
        return cls(planning.plan, apply, PeakMeter, planning.frontier)


class _Planning:
    """One planner for the plan of a run and for what else could be had: the step is observed once."""

    def __init__(self) -> None:
        self._planner: Planner | None = None

    def plan(self, model: Any, batch: Mapping[str, torch.Tensor], config: TrainConfig) -> Plan:
        """The plan for the config's budget."""
        self._planner = Planner(
            model,
            batch,
            accumulation_steps=config.gradient_accumulation_steps,
            clips=config.max_grad_norm > 0,
            forbid=config.forbid,
            steps=config.max_steps if config.max_steps > 0 else None,
            allow_compile=config.compile or None,
        )
        return self._planner.plan(config.budget)

    def frontier(self, plan: Plan) -> StoredFrontier:
        """What else could be had; the planner is let go."""
        assert self._planner is not None
        planner, self._planner = self._planner, None
        return stored_frontier(planner, plan)


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
    loaded = load_base(config)
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    data = load_data(
        config.data,
        loaded.tokenizer,
        max_length=config.max_length,
        packing=config.packing,
        heldout=config.heldout,
        seed=config.seed,
        longest_prompt=None if positions is None else positions - config.max_new_tokens,
    )
    for line in data.report.lines():
        say(line)
    batch = planning_batch(data.train, config.per_device_train_batch_size)
    device = training_device()
    model = add_adapters(loaded.model, config).to(device)
    if config.packing:
        refuse_leaks(model, config.per_device_train_batch_size)
    return Setup(model, loaded.tokenizer, data, {name: tensor.to(device) for name, tensor in batch.items()})
