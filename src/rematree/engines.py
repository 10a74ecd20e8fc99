"""What engines for several ranks do to a model: wrappers, sharded parameters, and how to see through both.

DistributedDataParallel and DeepSpeed's engine are modules around the model; under ZeRO-2 the trained weights are views
of one tensor, each of them whole. Under ZeRO-3 a parameter has no data but while it is used; its part, and the shape of
the whole, are attributes of it. FSDP2 (`fully_shard`) changes the class of the modules it shards
(`FSDPLlamaForCausalLM`), hooks that gather their weights before forward and before backward, and parameters that are
`DTensor`s in between: their shape is that of the whole tensor, their storage a shard.

A region that is recomputed in the backward pass of its own block finds the weights there: FSDP2 has gathered them for
that backward. A group is recomputed in the backward pass of its last block, where the others are shards; `gathered`
brings them back for as long as one block runs.
"""

import contextlib
import copy
from collections.abc import Generator, Iterator
from typing import Any, Final

import torch
from torch import nn

from rematree.errors import UsageError

_HOOKS: Final = ("torch.distributed.fsdp", "deepspeed.")
# Attributes that engines put on modules, by the beginnings of their names: FSDP2's and ZeRO-3's.
_MARKS: Final = (
    "__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params",
    "ds_", "pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_external_params", "all_parameters",
    "_original_parameters",
)  # fmt: skip
_META: Final = torch.device("meta")


def without_engine(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel or DeepSpeed's engine; any other is returned as it is."""
    if torch.distributed.is_available() and isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    if is_deepspeed(model):
        inner: Any = model.module
        return inner
    return model


def is_deepspeed(model: nn.Module) -> bool:
    """Whether `model` is DeepSpeed's engine around a model. It is known by its name: nothing of it is imported."""
    return "DeepSpeedEngine" in {base.__name__ for base in type(model).__mro__}


def refuse_pipeline(model: nn.Module) -> None:
    """Refuse a model that DeepSpeed runs as a pipeline.

    Raises:
        UsageError: names its engine.
    """
    if is_deepspeed(model) and type(model).__name__ != "DeepSpeedEngine":
        raise not_counted(f"DeepSpeed's {type(model).__name__}")


def refuse_copies(model: nn.Module, count: int = 1) -> None:
    """Refuse a model that `nn.DataParallel` runs in copies: under a plan each copy would run the weights of the model.

    Args:
        model: The model.
        count: Devices that a trainer would run copies on.
    Raises:
        UsageError: says what to use instead.
    """
    if isinstance(model, nn.DataParallel) or count > 1:
        raise UsageError(
            "nn.DataParallel runs copies of the model, which a plan on the model does not reach",
            remedies=[
                f"torchrun --nproc_per_node {max(count, 2)} ..., or accelerate launch: a process for each GPU",
                "CUDA_VISIBLE_DEVICES=0: one GPU",
            ],
        )


def refuse_spread(model: nn.Module) -> None:
    """Refuse a model whose weights are on several devices: a plan's bytes are those of one.

    Raises:
        UsageError: names the devices.
    """
    stated = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    whole = (p for p in model.parameters() if not p.is_meta and not is_partitioned(p))
    found = {str(parameter.device) for parameter in whole}
    places = stated if len(stated) > 1 else found
    if len(places) > 1:
        raise UsageError(
            f"the model is spread over {', '.join(sorted(places))}; a plan is for one device",
            remedies=['device_map={"": 0} (accelerate), where it fits one', "FSDP2, which shards weights over ranks"],
        )


def not_counted(what: str) -> UsageError:
    """The error for a model that DeepSpeed trains in a way whose bytes are not counted."""
    return UsageError(
        f"plans do not cover {what}: what a rank holds under it is not counted",
        remedies=[
            'DeepSpeed with {"zero_optimization": {"stage": 2}}, or 3, and its defaults otherwise',
            "FSDP2 (fully_shard; accelerate launch --use_fsdp --fsdp_version 2), which shards weights too",
        ],
    )


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 keeps a part of `parameter` on each rank; its data is then whole only while it is used."""
    return "ds_shape" in parameter.__dict__


def any_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has made parts of weights of `model`."""
    return any(is_partitioned(parameter) for parameter in model.parameters())


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Shape of `tensor`, or of the whole that this rank has a part of."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]


def is_flattened(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-2 has made `parameter` a view of the one tensor that holds all weights it trains."""
    return "param_idx_in_group" in parameter.__dict__


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to `module` itself."""
    return "FSDPModule" in {base.__name__ for base in type(module).__mro__}


def any_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to `model` or to anything inside it."""
    return any(is_sharded(module) for module in model.modules())


def own_class(module: nn.Module) -> type:
    """The class of `module` without what `fully_shard` makes of it."""
    if not is_sharded(module):
        return type(module)
    return next(base for base in type(module).__bases__ if base.__name__ != "FSDPModule")


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a part of a larger one that other ranks hold the rest of."""
    return hasattr(tensor, "_local_tensor")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`."""
    return getattr(tensor, "_local_tensor", tensor)


def parts_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """What ZeRO-3's optimizer keeps beside its state from step to step: parts of weights, masters, room for gradients.

    Args:
        optimizer: DeepSpeed's. Others keep nothing of that kind.
    """
    if not hasattr(optimizer, "fp16_partitioned_groups_flat"):
        return
    for parameter in optimizer.module.parameters():
        yield parameter.ds_tensor
    yield from optimizer.fp16_partitioned_groups_flat
    yield from optimizer.fp32_partitioned_groups_flat
    yield optimizer.grad_partitions_flat_buffer
    for bucket in optimizer.ipg_buckets.values():
        yield bucket.buffer


def whole_on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on `meta` like the whole that `tensor` is a shard of."""
    whole = torch.empty(whole_shape(tensor), dtype=tensor.dtype, device=_META)
    return nn.Parameter(whole, requires_grad=tensor.requires_grad)


def copy_without_engine(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(model, memo)`, also of a model that FSDP2 or DeepSpeed trains; the copy is an ordinary one.

    Args:
        model: Read, not changed.
        memo: Copies of tensors by identity; parameters must be in it.
    """
    changed = [module for module in model.modules() if is_sharded(module) or _is_hooked(module)]
    for module in changed:
        kind: Any = own_class(module)
        memo[id(module)] = kind.__new__(kind)
    for module in changed:
        entries = {name: _without_hooks(value) for name, value in vars(module).items() if not name.startswith(_MARKS)}
        entries["_parameters"] = dict(module._parameters.items())  # ZeRO-3's is a class of its own
        vars(memo[id(module)]).update({name: copy.deepcopy(value, memo) for name, value in entries.items()})
    return copy.deepcopy(model, memo)


def _is_hooked(module: nn.Module) -> bool:
    """Whether an engine has hooks on `module`; DeepSpeed's are on the outermost, and tell it of each forward."""
    return any(_theirs(hooks) for hooks in (module._forward_pre_hooks, module._forward_hooks))


def _theirs(hooks: dict[Any, Any]) -> list[Any]:
    """Keys of an engine's hooks in a dict of hooks."""
    return [key for key, hook in hooks.items() if callable(hook) and _of_an_engine(hook)]


def _without_hooks(value: Any) -> Any:
    """`value` without an engine's hooks, if it is a dict of hooks."""
    if not isinstance(value, dict):
        return value
    theirs = _theirs(value)
    if not theirs:
        return value
    return type(value)((key, hook) for key, hook in value.items() if key not in theirs)


def _of_an_engine(hook: Any) -> bool:
    if isinstance(hook, nn.Module | torch.Tensor):
        return False
    inner = getattr(hook, "hook", hook)  # torch wraps the hooks of state dicts
    owner = type(getattr(inner, "__self__", None)).__module__
    return str(getattr(inner, "__module__", "")).startswith(_HOOKS) or owner.startswith(_HOOKS)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Generator[None]:
    """The weights of `module` whole inside, sharded again after, if FSDP2 shards it and they are not whole already.

    Cost:
        One all-gather. All ranks must come here in the same order, as they do under equal plans.
    """
    found = [part for part in module.modules() if is_sharded(part) and _holds_shards(part)]
    for part in found:
        part.unshard()  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        for part in found:
            part.reshard()  # pyright: ignore[reportCallIssue]


def _holds_shards(module: nn.Module) -> bool:
    """Whether the weights that `module` gathers are shards now; a sharded child gathers its own."""
    if any(is_shard(p) for p in module._parameters.values() if p is not None):
        return True
    return any(_holds_shards(child) for child in module.children() if not is_sharded(child))
