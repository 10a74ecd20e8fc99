"""The base model of a run, loaded or made of its config alone, and the adapters on it."""

import contextlib
import inspect
import warnings
from dataclasses import replace
from typing import Any, Final

import torch

from rematree.catalogue.configs import ModelConfig, read_config
from rematree.catalogue.meta_model import build_meta_model, on_meta
from rematree.errors import UsageError
from rematree.finetune.config import TrainConfig
from rematree.finetune.model import LoadedModel, load_model, preferred_dtype, refuse_other_quantisation
from rematree.finetune.packing import not_kept_apart
from rematree.fingerprint import dtype_name
from rematree.integrations.bitsandbytes import Quantisation
from rematree.measure import storage_bytes
from rematree.units import format_bytes

# Of transformers' kinds of layers those that mix tokens by a convolution or a recurrence.
_RUN_ON: Final = frozenset({"linear_attention", "conv", "mamba", "recurrent", "hybrid", "hybrid_sliding"})
_STACK_DIMENSIONS: Final = 3  # of the weights of all experts in one: linear layers have two


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
    loaded = load_model(config.model, dtype=config.dtype, revision=config.revision, quantisation=_packing(config))
    _check_rows(loaded.model, config)
    return loaded


def meta_base(config: TrainConfig, dtype: torch.dtype | None = None) -> tuple[Any, ModelConfig]:
    """The model without adapters on the meta device, made of its config alone, and where the config is from.

    Args:
        config: Model and shape of the run.
        dtype: Of the weights where `config` leaves it open; default: what suits the device that is here.
    Raises:
        UsageError: there is no such config, no model can be made of it, or it does not take rows of that length.
    """
    read = read_config(config.model, revision=config.revision)
    quantisation = _packing(config)
    if read.quantised:
        if quantisation is not None:
            refuse_other_quantisation(config.model, read.quantised, quantisation)
        quantisation = _stored_packing(config.model, read.quantised)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    chosen = names.get(config.dtype) or dtype or preferred_dtype()
    model = build_meta_model(read.config, dtype=chosen, quantisation=quantisation, name=config.model)
    _check_rows(model, config)
    return model, read if quantisation is None else replace(read, notes=(*read.notes, *_left_whole(model, chosen)))


def _left_whole(model: Any, dtype: torch.dtype) -> list[str]:
    """That packing leaves most of a mixture of experts as it was, which nobody who asks for 4 bits expects."""
    stacks = storage_bytes([weight for weight in model.parameters() if weight.dim() == _STACK_DIMENSIONS])
    if not stacks:
        return []
    return [f"experts, {format_bytes(stacks)}, stay in {dtype_name(dtype)}: bitsandbytes packs linear layers alone"]


def _packing(config: TrainConfig) -> Quantisation | None:
    if config.quantised_bits is None:
        return None
    return Quantisation(config.quantised_bits, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)


def _stored_packing(name: str, stored: Any) -> Quantisation:
    """How the files that a config belongs to are packed; they are loaded as they are.

    Raises:
        UsageError: in another way than bitsandbytes packs.
    """
    method = stored.get("quant_method")
    if method != "bitsandbytes" and not (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        raise UsageError(
            f"the weights of {name} are quantised by {method}; a config alone says how bitsandbytes packs, not how "
            "others do",
            remedies=["the config of the model with plain weights"],
        )
    if stored.get("load_in_8bit"):
        return Quantisation(8)
    return Quantisation(
        4, stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant", False))
    )


def _check_rows(model: Any, config: TrainConfig) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_length > positions:
        raise UsageError(
            f"--max-length is {config.max_length}, the model has {positions} positions",
            remedies=[f"--max-length {positions}"],
        )
    if not config.packing:
        return
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError("the model takes no position_ids, so examples cannot be packed", remedies=["--no-packing"])
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if running := sorted(_RUN_ON.intersection(layers)):
        raise not_kept_apart(f"the model has layers of {', '.join(running)}, whose state runs on along a row")


def leave_caches_out(base: Any) -> None:
    """Switch the cache off, also where a model inside of `base` reads it.

    With it on, packed examples are not kept apart. The Trainer switches it off too, but after the planning.
    """
    for config in (base.config, base.config.get_text_config()):
        config.use_cache = False


def add_adapters(base: Any, config: TrainConfig) -> Any:
    """`base` under LoRA as `config` says, in training mode; on the meta device if it is there."""
    from peft import LoraConfig, get_peft_model

    leave_caches_out(base)
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
    absent = next(base.parameters()).is_meta
    if not absent:
        from transformers import set_seed

        set_seed(config.seed)
    try:
        with warnings.catch_warnings(), on_meta() if absent else contextlib.nullcontext():
            # PEFT asks transformers by the old name of the property.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # It finds out which of a model's layers are stored transposed, and says so of each kind.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
            # What it says of modules is for stacks of experts, which are none, and it is followed there.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            model: Any = get_peft_model(base, lora)
    except ValueError as error:
        said = (str(error).splitlines() or [""])[0]
        if "lora_dropout" in said:
            raise UsageError(
                f"--lora-dropout is {config.lora_dropout}; adapters on stacks of experts have no dropout",
                details=[f"PEFT: {said}"],
                remedies=["--lora-dropout 0"],
            ) from error
        raise UsageError(
            f"--lora-target-modules {targets}: {said}", remedies=["--lora-target-modules all-linear"]
        ) from error
    return model.train()
