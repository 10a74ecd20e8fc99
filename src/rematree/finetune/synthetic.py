"""A model and a batch of a given shape without any data: what `plan`, `frontier` and `verify` work on.

Which tokens a batch holds changes neither memory nor time, only its shapes and whether it needs an attention mask do.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from rematree.errors import UsageError
from rematree.finetune.base import add_adapters, leave_caches_out, load_base, meta_base, training_device
from rematree.finetune.config import TrainConfig
from rematree.finetune.tokens import IGNORED

_SEED: Final = 0


@dataclass(frozen=True)
class Shape:
    """What a plan is made for.

    Attributes:
        model: In training mode on the device, with adapters or, for full fine-tuning, all its parameters trained. On
            the meta device if it was made of its config alone.
        batch: Of the run's shape, on the device; on the CPU for a model on the meta device.
        source: Where the config is from, for a model that was made of it; else empty.
        notes: In what that model is not the published one.
    """

    model: Any
    batch: dict[str, torch.Tensor]
    source: str = ""
    notes: tuple[str, ...] = ()

    def resized(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """A batch like this one, with other numbers of rows and of tokens in a row."""
        entries = [(name, (rows, length), tensor.dtype) for name, tensor in self.batch.items()]
        return synthetic_batch(self.model, entries)


def prepare_shape(config: TrainConfig, *, full: bool = False) -> Shape:
    """Load the model of `config` and make up a batch; its data is not read.

    Args:
        config: Model, adapters and shape.
        full: Train all parameters instead of adapters.
    Raises:
        UsageError: there is no such model, it does not fit the shape, or packed weights are to be trained.
    """
    return _with_batch(_load_trained(config, full), config)


def config_shape(config: TrainConfig, *, full: bool = False, dtype: torch.dtype | None = None) -> Shape:
    """Make the model of `config` on the meta device, of its config alone, and make up a batch.

    Args:
        config: Model, adapters and shape.
        full: Train all parameters instead of adapters.
        dtype: Of the weights where `config` leaves it open; default: what suits the device that is here.
    Raises:
        UsageError: there is no such config, no model can be made of it, it does not fit the shape, or packed weights
            are to be trained.
    Cost:
        No weights are read and none are held; one or two seconds for 80 layers.
    """
    _refuse_full_packed(config, full)
    base, read = meta_base(config, dtype)
    return replace(_with_batch(_trained(base, config, full), config), source=read.source, notes=read.notes)


def synthetic_batch_like(shape: Shape, config: TrainConfig) -> Shape:
    """The model of `shape` with a batch of the rows and the length that `config` says."""
    return replace(shape, batch=shape.resized(config.per_device_train_batch_size, config.max_length))


def _with_batch(model: Any, config: TrainConfig) -> Shape:
    size = (config.per_device_train_batch_size, config.max_length)
    names = ("input_ids", "labels", "position_ids" if config.packing else "attention_mask")
    return Shape(model, synthetic_batch(model, [(name, size, torch.int64) for name in names]))


def shape_of_plan(config: TrainConfig, entries: Iterable[tuple[str, tuple[int, ...], str]], *, full: bool) -> Shape:
    """Load the model of `config` and make up the batch that a stored plan was made for.

    Args:
        config: Model and adapters.
        entries: Name, shape and dtype of every tensor of the batch, from the plan's fingerprint.
        full: Train all parameters instead of adapters.
    """
    typed = [(name, shape, getattr(torch, dtype, torch.int64)) for name, shape, dtype in entries]
    length = max((shape[-1] for _, shape, _ in typed if shape), default=config.max_length)
    packed = any(name == "position_ids" for name, _, _ in typed)
    model = _load_trained(replace(config, max_length=length, packing=packed), full)
    return Shape(model, synthetic_batch(model, typed))


def synthetic_batch(model: Any, entries: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> dict[str, torch.Tensor]:
    """Random tokens in tensors of the given names, shapes and dtypes, on the model's device.

    Positions restart in the middle of a row and the last row ends in padding, so that the batch needs an attention
    mask as one of real data does: without one, attention saves less.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        device = torch.device("cpu")  # which tokens are masked is in the values
    random = torch.Generator().manual_seed(_SEED)
    batch: dict[str, torch.Tensor] = {}
    for name, shape, dtype in entries:
        if name == "position_ids":
            half = max(1, shape[-1] // 2)
            positions = torch.cat([torch.arange(half), torch.arange(shape[-1] - half)])
            value = positions.expand(shape).clone()
        elif name == "attention_mask":
            value = torch.ones(shape)
            value[..., -1, -max(1, shape[-1] // 8) :] = 0
        else:
            value = torch.randint(0, model.config.get_text_config().vocab_size, shape, generator=random)
        batch[name] = value.to(device, dtype)
    if "labels" in batch:
        if "input_ids" in batch and batch["input_ids"].shape == batch["labels"].shape:
            batch["labels"] = batch["input_ids"].to(batch["labels"].dtype, copy=True)
        # A prompt is not trained on, and neither is padding.
        batch["labels"][..., : batch["labels"].shape[-1] // 4] = IGNORED
        if "attention_mask" in batch and batch["attention_mask"].shape == batch["labels"].shape:
            batch["labels"][batch["attention_mask"] == 0] = IGNORED
    return batch


def _load_trained(config: TrainConfig, full: bool) -> Any:
    _refuse_full_packed(config, full)
    model = _trained(load_base(config).model, config, full)
    if full:
        from transformers import set_seed

        set_seed(config.seed)
    return model.to(training_device())


def _trained(base: Any, config: TrainConfig, full: bool) -> Any:
    if not full:
        return add_adapters(base, config)
    leave_caches_out(base)
    return base.requires_grad_(True).train()


def _refuse_full_packed(config: TrainConfig, full: bool) -> None:
    if full and config.quantised_bits is not None:
        option = f"--load-in-{config.quantised_bits}bit"
        raise UsageError(
            f"--full trains all parameters, and {option} packs them: packed weights have no gradient",
            remedies=[f"{option} without --full: adapters are trained", f"--full without {option}"],
        )
