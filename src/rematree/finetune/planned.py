"""A plan with what was asked for: the settings of the run, so that a reader and an export know them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rematree.finetune.config import TrainConfig
from rematree.finetune.synthetic import Shape
from rematree.finetune.target import Target
from rematree.fingerprint import dtype_name
from rematree.plans import Plan

_ADAPTERS: Final = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
_PACKED: Final = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def described(plan: Plan, config: TrainConfig, target: Target, shape: Shape, *, full: bool) -> Plan:
    """`plan` with the settings it was made for and, for a model made of its config or another device, notes on that."""
    notes = list(plan.notes)
    if shape.source:
        notes.insert(0, f"made of the config alone: {shape.source}")
        notes[1:1] = shape.notes
    if target.device is not None:
        rates = "the rates of its profile" if target.device.is_measured else "its published rates (rematree devices)"
        notes.insert(0, f"for {target.device.title}, timed by {rates}")
    # "auto" is another dtype elsewhere; of packed weights it is what they are computed in.
    settings = {**settings_of(config, target, full=full), "dtype": dtype_name(shape.model.dtype)}
    return replace(plan, run=settings, notes=tuple(notes))


def settings_of(config: TrainConfig, target: Target, *, full: bool) -> Mapping[str, str]:
    """What decides a plan, as text by the name of the setting; what does not apply is left out."""
    names = ["model", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing", "dtype"]
    if config.quantised_bits is not None:
        names.append(f"load_in_{config.quantised_bits}bit")
    if config.load_in_4bit:
        names += _PACKED
    if config.revision is not None:
        names.append("revision")
    if not full:
        names += _ADAPTERS
    found = {name: _text(getattr(config, name)) for name in names}
    if full:
        found["full"] = "true"
    if target.device is not None:
        found["device"] = target.device.name
    if target.ranks is not None:
        found |= {"ranks": str(target.ranks.count), "engine": target.ranks.engine}
        match target.ranks.engine:
            case "fsdp2":
                found["reshard"] = _text(target.ranks.reshard)
            case "ddp":
                found["gradient_as_bucket_view"] = _text(target.ranks.bucket_view)
            case "zero2":
                found["reduce_bucket_size"] = _text(target.ranks.bucket_elements)
                found["overlap_comm"] = _text(target.ranks.overlaps)
            case "zero3":
                settings = target.ranks.stage3
                found["reduce_bucket_size"] = _text(target.ranks.bucket_elements)
                found["stage3_prefetch_bucket_size"] = _text(settings.prefetch)
                found["stage3_param_persistence_threshold"] = _text(settings.persistence_threshold)
                found["stage3_max_live_parameters"] = _text(settings.max_live)
                found["stage3_max_reuse_distance"] = _text(settings.max_reuse)
    return found


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(str(item) for item in value) if isinstance(value, tuple) else str(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
