"""What an optimizer that is here keeps and takes: read off the object, before its first step."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from rematree.memory.optimizers import Found

_ADAM: Final = (torch.optim.Adam, torch.optim.AdamW)


def found_optimizer(optimizer: Any, trained: Sequence[nn.Parameter], device_type: str) -> Found | None:
    """`optimizer` as it counts; None if its state is not known.

    Known are torch's Adam, AdamW and SGD, and bitsandbytes' with one or two states. What a step takes beside, by their
    sources: where it runs "foreach" (the default on a GPU unless it is fused), Adam a copy of all second moments, or of
    all gradients before that; else two of one parameter after another, and one of its gradient under an L2 penalty. SGD
    copies gradients under an L2 penalty, and "foreach" not for Nesterov's momentum. Of groups of parameters the most
    counts, for all parameters.

    Args:
        optimizer: Without what accelerate and DeepSpeed wrap around it.
        trained: The parameters that have gradients, in the model's order.
        device_type: Where the step will run.
    """
    kind, name = type(optimizer), type(optimizer).__name__
    if kind not in (*_ADAM, torch.optim.SGD):
        of_bitsandbytes = kind.__module__.partition(".")[0] == "bitsandbytes"
        return _of_bitsandbytes(optimizer, trained) if of_bitsandbytes else None
    groups = optimizer.param_groups
    together = any(_runs_foreach(group, device_type) for group in groups)
    if kind is torch.optim.SGD:
        states: tuple[int, ...] = (1,) if any(group["momentum"] for group in groups) else ()
        beside = max(_beside_sgd(group, together=together) for group in groups)
    else:
        states = (1, 1, 1) if any(group["amsgrad"] for group in groups) else (1, 1)
        beside = max(_beside_adam(group, together=together) for group in groups)
    return Found(name, states, beside=beside, together=together)


def _runs_foreach(group: dict[str, Any], device_type: str) -> bool:
    wanted = group["foreach"]
    return device_type == "cuda" and not group["fused"] if wanted is None else bool(wanted)


def _beside_adam(group: dict[str, Any], *, together: bool) -> int:
    if group["fused"]:
        return 0
    penalised = group["weight_decay"] and not group.get("decoupled_weight_decay")
    return 1 if together else 2 + bool(penalised or group["maximize"])


def _beside_sgd(group: dict[str, Any], *, together: bool) -> int:
    if group["fused"]:
        return 0
    copied = bool(group["weight_decay"] or group["maximize"])
    return copied if together else copied + bool(group["nesterov"])


def _of_bitsandbytes(optimizer: Any, trained: Sequence[nn.Parameter]) -> Found | None:
    """By the rules of `bitsandbytes/optim/optimizer.py` and `ademamix.py`."""
    bases = {each.__name__ for each in type(optimizer).__mro__}
    if bases.isdisjoint({"Optimizer1State", "Optimizer2State"}) or not hasattr(optimizer, "args"):
        return None
    two = (2, 1) if "AdEMAMix" in bases else (1, 1)
    settings = optimizer.args
    return Found(
        type(optimizer).__name__,
        (1,) if "Optimizer1State" in bases else two,
        bits=settings.optim_bits,
        paged=optimizer.is_paged,
        least=settings.min_8bit_size,
        wide=_kept_wide(trained),
    )


def _kept_wide(trained: Sequence[nn.Parameter]) -> frozenset[int]:
    """Of those that somebody asked to have 32 bits for, as transformers' Trainer does for embeddings."""
    import bitsandbytes

    library: Any = bitsandbytes.optim
    asked = library.GlobalOptimManager.get_instance().module_weight_config_triple
    wide = {id(getattr(module, name)) for module, name, config in asked if config.get("optim_bits") == 32}
    return frozenset(number for number, parameter in enumerate(trained) if id(parameter) in wide)
