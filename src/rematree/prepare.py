"""The k-bit preparation contract: what PEFT's `prepare_model_for_kbit_training` promises, for every model.

Differences to PEFT 0.21, all of them towards what its documentation says: checkpointing is the non-reentrant variant
unless asked otherwise, `{}` included; there is one hook on an embedding and none where none is needed; models whose
quantisation PEFT does not know, or without any, get checkpointing as well; packed weights stay packed after sharding.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Final, TypeVar, get_args

import torch
from torch import nn

from rematree.adapters import refuse_prefixes
from rematree.checkpointing import (
    activation_checkpointing_enable,
    check_can_switch,
    parse_with_budget,
)
from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.precision import Upcast, cast_to_fp32, sixteen_bit_parameters
from rematree.in_effect import request_budget
from rematree.units import parse_bytes

_Model = TypeVar("_Model", bound=nn.Module)

# Their kernels want the dtypes they were made with; PEFT casts nothing in these models. A tuple, because the members of
# transformers' QuantizationMethod equal these texts but hash differently.
_NEVER_CAST: Final = ("gptq", "aqlm", "eetq", "hqq", "torchao")


def prepare_model_for_kbit_training(
    model: _Model,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
    *,
    upcast: Upcast = "all",
    budget: int | str | None = None,
) -> _Model:
    """Freeze a (quantised) model and make it ready for adapters; a drop-in for PEFT's function of this name.

    In this order: every parameter is frozen; 16-bit parameters are cast to fp32; the device's cache is emptied;
    checkpointing is switched on, and with the reentrant variant embedding outputs are made to require a gradient.

    What `upcast` costs, for Llama-3-8B (32 layers, width 4,096, vocabulary 128,256, untied head) in NF4:

    ========= ================================================== ================= =========================
    upcast    cast to fp32                                       more for weights  kept per layer and token
    ========= ================================================== ================= =========================
    "all"     2 x 525,336,576 embedding and head, 266,240 norms  2,101,878,784 B   16,384 B: fp32 residual
    "norms"   266,240 in 65 norms                                532,480 B         8,192 B: 16-bit residual
    "none"    nothing                                            0 B               8,192 B: 16-bit residual
    ========= ================================================== ================= =========================

    The last column is a checkpointed layer's input. 8,192 tokens through 32 layers keep 4.00 GiB with "all", 2.00 GiB
    otherwise, and the head's logits are 3.91 GiB in fp32, 1.96 GiB in 16 bits. "all" is PEFT's behaviour; it doubles
    stacks of experts too, which transformers keeps in one 3-D parameter that bitsandbytes does not quantise.

    Args:
        model: Any module; what is found out about its quantisation is what transformers wrote on it. It is changed in
            place.
        use_gradient_checkpointing: Switch checkpointing on, by `activation_checkpointing_enable`. Where that is not
            possible, one warning says why. Prefix tuning needs False: PEFT refuses it where checkpointing is on.
        gradient_checkpointing_kwargs: Its keyword arguments. None and `{}` both mean the non-reentrant variant; an
            explicit `use_reentrant` is honoured. A `budget` among them is the same as `budget=`.
        auto_clear_cache: Empty the accelerator's cache after the casts.
        upcast: "all", "norms" (computed in fp32, handed on in the dtype that came in) or "none". With quantisers that
            PEFT does not cast (GPTQ, AQLM, EETQ, HQQ, torchao), "all" casts nothing either.
        budget: Bytes, or a text such as "14GiB", that training may reach. A plan needs a batch, which is not here yet:
            the budget is written on the model, where `requested_budget(model)` and `rematree.BudgetCallback` find it.
            Until a plan is applied, `use_gradient_checkpointing=True` recomputes every layer, so that a script which
            never plans still saves memory; the plan takes its place, and removing the plan brings it back. With False
            nothing is recomputed before a plan says so.

    Returns:
        `model` itself.

    Raises:
        UsageError: a wrong argument, or a plan is in force; nothing has been changed.
        UnsupportedModelError: FSDP has flattened parameters that would be cast, or the adapter is prefix tuning;
            nothing has been changed.

    Source: peft/utils/other.py, 0.21.2.
    """
    if upcast not in get_args(Upcast):
        raise UsageError(f"upcast is {upcast!r}; it can be {', '.join(map(repr, get_args(Upcast)))}")
    _, given = parse_with_budget(gradient_checkpointing_kwargs)
    wanted = given if budget is None else parse_bytes(budget)
    if given not in (None, wanted):
        raise UsageError(
            f"two budgets: budget={budget!r} and {gradient_checkpointing_kwargs!r}; name one, in one place"
        )
    if use_gradient_checkpointing:
        check_can_switch(model)
    elif wanted is not None:
        refuse_prefixes(model)
    if upcast == "all" and _is_never_cast(model):
        upcast = "none"
    to_cast = sixteen_bit_parameters(model, upcast)

    for parameter in model.parameters():
        parameter.requires_grad = False
    if upcast != "none":
        cast_to_fp32(to_cast, hand_on_input_dtype=upcast == "norms")
        if auto_clear_cache:
            _clear_caches()
    if wanted is not None:
        request_budget(model, wanted)
    if use_gradient_checkpointing:
        try:
            activation_checkpointing_enable(model, gradient_checkpointing_kwargs)
        except UnsupportedModelError as error:
            warnings.warn(f"checkpointing is not switched on: {error.message}", UserWarning, stacklevel=2)
    return model


def _is_never_cast(model: nn.Module) -> bool:
    return getattr(model, "quantization_method", None) in _NEVER_CAST or bool(getattr(model, "hqq_quantized", False))


def _clear_caches() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()
