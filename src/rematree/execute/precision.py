"""Which 16-bit parameters of a quantised model are numbers, and the ways to hold them in fp32.

A packed weight may be stored in bf16 so that FSDP can shard it; casting it would turn its bytes into nonsense. It is
recognised by what it carries and where it sits, not by its class's name alone, because sharding changes the class.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map_only

from rematree.errors import UnsupportedModelError

Upcast = Literal["all", "norms", "none"]

_SIXTEEN_BITS: Final = (torch.float16, torch.bfloat16)
_PACKED_MODULES: Final = ("Linear4bit", "Embedding4bit")  # bitsandbytes; FSDP puts a subclass in their place
_TORCH_NORMS: Final = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class Fp32Forward:
    """A module's `forward` with floating-point inputs in fp32 and outputs in the input's dtype again.

    Held as the instance attribute `module.forward`. The residual stream stays in 16 bits this way: a norm that hands on
    what its fp32 weight makes of it would lift every later tensor to fp32.
    """

    def __init__(self, module: nn.Module) -> None:
        self._inner: Callable[..., Any] = module.forward
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        dtype = next((x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), torch.float32)
        args, kwargs = _cast((args, kwargs), torch.float32)
        return _cast(self._inner(*args, **kwargs), dtype)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def sixteen_bit_parameters(model: nn.Module, upcast: Upcast) -> list[tuple[nn.Module, nn.Parameter]]:
    """(owner, parameter) of the 16-bit numbers that `upcast` names, each once; packed storage is left out.

    "all": every one. "norms": the vectors of normalisation modules, so neither embeddings nor stacks of experts.

    Raises:
        UnsupportedModelError: FSDP has flattened parameters, so that packed ones cannot be told from others.
    """
    found: list[tuple[nn.Module, nn.Parameter]] = []
    if upcast == "none":
        return found
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype not in _SIXTEEN_BITS or id(parameter) in seen or is_packed(module, name, parameter):
                continue
            if upcast == "all" or is_norm(module):
                seen.add(id(parameter))
                found.append((module, parameter))
    return found


def is_packed(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether the 16-bit dtype of `module.<name>` is only the container of packed bytes."""
    if getattr(parameter, "_is_flat_param", False):
        raise UnsupportedModelError(
            "FSDP has flattened the weights, and packed ones cannot be told from others any more",
            remedies=["prepare the model before FSDP wraps it", 'upcast="none"'],
        )
    if any(kind.__name__ in _PACKED_MODULES for kind in type(module).__mro__) and name == "weight":
        return True
    local = getattr(parameter, "_local_tensor", None)  # of a DTensor
    if local is None and is_traceable_wrapper_subclass(parameter):
        return True  # a quantised tensor that shows the dtype of the numbers it stands for
    return any(
        type(tensor).__name__ == "Params4bit" or getattr(tensor, "quant_state", None) is not None
        for tensor in (parameter, local)
    )


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation: torch's, or called so and holding nothing but vectors."""
    if isinstance(module, _TORCH_NORMS):
        return True
    vectors = all(parameter.dim() == 1 for parameter in module.parameters())
    return vectors and not module._modules and "norm" in type(module).__name__.lower()


def cast_to_fp32(parameters: Sequence[tuple[nn.Module, nn.Parameter]], *, hand_on_input_dtype: bool) -> None:
    """Cast what `sixteen_bit_parameters` found, in place.

    A parameter that accelerate keeps on the host or on disk is cast in name here, and in fact each time it is loaded.

    Args:
        parameters: With the modules that own them.
        hand_on_input_dtype: The owners' outputs keep the dtype of their inputs.
    """
    owners: dict[int, nn.Module] = {}
    for module, parameter in parameters:
        parameter.data = parameter.data.to(torch.float32)
        owners[id(module)] = module
    if hand_on_input_dtype:
        for module in owners.values():
            Fp32Forward(module)
