"""What a run needs before its first step: the model with its adapters on the device, and the data."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from transformers.trainer_utils import SchedulerType

from rematree.errors import UsageError
from rematree.finetune.callbacks import MakeMeter
from rematree.finetune.config import TrainConfig
from rematree.finetune.data import DataSplit, load_data, planning_batch
from rematree.finetune.model import LoadedModel, Quantisation, load_model
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


def training_device() -> torch.device:
    """The device that everything is put on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(config: TrainConfig) -> LoadedModel:
    """The model without adapters, checked against the shape of the run.

    Raises:
        UsageError: there is no such model, or it does not take rows of that length or packing.
    """
    if torch.cuda.device_count() > 1:
        raise UsageError(
            f"there are {torch.cuda.device_count()} GPUs; a plan is for one",
            remedies=["CUDA_VISIBLE_DEVICES=0 rematree train ..."],
        )
    quantisation = None
    if config.quantised_bits is not None:
        quantisation = Quantisation(config.quantised_bits, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
    loaded = load_model(config.model, dtype=config.dtype, revision=config.revision, quantisation=quantisation)
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise UsageError(
            f"--max-length is {config.max_length}, the model has {positions} positions",
            remedies=[f"--max-length {positions}"],
        )
    if config.packing and "position_ids" not in inspect.signature(loaded.model.forward).parameters:
        raise UsageError("the model takes no position_ids, so examples cannot be packed", remedies=["--no-packing"])
    return loaded


def add_adapters(base: Any, config: TrainConfig) -> Any:
    """`base` under LoRA as `config` says, in training mode."""
    # With the cache on, packed examples are not kept apart. The Trainer switches it off too, but after the planning.
    base.config.use_cache = False
    # The place of k-bit preparation. Freezing is all of it: norms, embeddings and head stay in the model's dtype, as
    # with upcast="none", so the residual stream, of which every recomputed layer keeps a piece, stays as narrow.
    base.requires_grad_(False)
    targets = config.lora_target_modules
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    set_seed(config.seed)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by the old name of the property.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model: Any = get_peft_model(base, lora)
    except ValueError as error:
        raise UsageError(
            f"--lora-target-modules {targets}: {(str(error).splitlines() or [''])[0]}",
            remedies=["--lora-target-modules all-linear"],
        ) from error
    return model.train()
