"""LoRA layers that keep their input once, in its own dtype, and nothing else.

PEFT's forward keeps for every adapted layer a copy of the input in the adapter's dtype, that copy behind its dropout,
the dropout's mask as floating point numbers, and the rank-r product. All of it follows from the input, which the layers
of one norm share, and from one bit an element. Here backward makes it again.

The adapter's branch and its sum with the base layer's result are one node of the graph. It does the operations PEFT and
autograd do, on the same shapes, in the same order and dtypes, so output and gradients are the same bits; where memory
is its own it works in place. The node stands where PEFT's nodes stood, right behind the base layer's, so gradients of
an input that several layers share are summed in the same order.

A layer that cannot run so at this call (adapters disabled or merged, a mixed batch, a DoRA adapter active, a hook on
one of its parts) is run as PEFT runs it.

Letters: T tokens (all leading dimensions), I and O features in and out, r rank.

Source: peft/tuners/lora/layer.py and bnb.py, 0.21.2; torch/csrc/autograd/FunctionsManual.cpp, 2.13.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as modules

from rematree.execute.adapter_branch import Branch, Branches, add_adapters
from rematree.execute.dropout import draw_bits, drawn_apart
from rematree.execute.override import runs_bare
from rematree.execute.stash import is_placeholder
from rematree.regions import DRAW_SUFFIX

# Layer classes by where PEFT defines them: it need not be imported, and what inherits from them may differ.
_LAYER: Final = ("peft.tuners.lora.layer", "Linear")
_PACKED: Final = {("peft.tuners.lora.bnb", "Linear4bit"), ("peft.tuners.lora.bnb", "Linear8bitLt")}
_DROPOUT: Final = "lora_dropout"
_PARTS: Final = ("lora_A", "lora_B", _DROPOUT)

DrawBits = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def why_not(module: nn.Module) -> str | None:
    """Why the LoRA layer `module`, with the adapters that are active now, cannot run lean. None if it can."""
    kind = (type(module).__module__, type(module).__name__)
    if kind != _LAYER and kind not in _PACKED:
        return f"{type(module).__qualname__} is not a LoRA layer over a linear one"
    layer: Any = module
    active = _active(layer)
    if not active:
        return "no adapter of it is active"
    for name in active:
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None:
            return f"adapter {name} is {_readable(variant)}"
        parts = [getattr(layer, part)[name] for part in _PARTS]
        reason = _odd_part(*parts)
        if reason is not None:
            return f"adapter {name}: {reason}"
        if type(layer.scaling[name]) not in (int, float):
            return f"adapter {name}: its scaling is no plain number"
    if len({layer.lora_A[name].weight.dtype for name in active}) > 1:
        return "its active adapters have different dtypes"
    return None


def lean_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every layer of `model` that can run lean."""
    return [(path, module) for path, module in model.named_modules() if why_not(module) is None]


def dropouts_of(path: str, layer: nn.Module) -> list[tuple[str, str]]:
    """Adapter name and region that draws its mask, for each adapter of the LoRA layer at `path` that has dropout."""
    dropouts: Any = layer.lora_dropout
    return [
        (name, f"{path}.{_DROPOUT}.{name}{DRAW_SUFFIX}")
        for name, dropout in dropouts.items()
        if isinstance(dropout, nn.Dropout)
    ]


def adapted_layer(path: str) -> str:
    """Path of the LoRA layer that the dropout at `path` belongs to."""
    return path.rpartition(f".{_DROPOUT}.")[0]


def is_part(path: str, layer: str) -> bool:
    """Whether `path` is a region inside the LoRA layer at `layer` that does not run when the layer is lean."""
    return any(path.startswith(f"{layer}.{part}.") for part in _PARTS)


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _readable(variant: object) -> str:
    name = type(variant).__name__
    return {"DoraLinearVariant": "DoRA", "ALoraLinearVariant": "aLoRA"}.get(name, name)


def _odd_part(first: nn.Module, second: nn.Module, dropout: nn.Module) -> str | None:
    for part in (first, second):
        if type(part) is not nn.Linear:
            return f"{type(part).__qualname__} in place of a linear layer"
        if getattr(part, "bias", None) is not None:
            return "lora_bias"
    if first.weight.dtype != second.weight.dtype:
        return "A and B have different dtypes"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is {type(dropout).__qualname__}"
    return None


def _bare(part: nn.Module) -> bool:
    """Whether calling `part` is its class's forward and nothing else."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return not any(hooks) and runs_bare(part)


def _runs_lean(layer: Any, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call can run lean: the layer's state, the input, and what else it is called with."""
    if not torch.is_grad_enabled() or args or any(value is not None for value in kwargs.values()):
        return False
    if layer.disable_adapters or layer.merged or why_not(layer) is not None:
        return False
    if not isinstance(x, Tensor) or x.dim() < 2 or x.numel() == 0 or not x.is_contiguous():
        return False
    parts = [getattr(layer, part)[name] for name in _active(layer) for part in _PARTS]
    if modules._has_any_global_hook() or not all(map(_bare, parts)):  # pyright: ignore[reportPrivateUsage]
        return False
    draws = any(0.0 < _probability(part) < 1.0 for part in parts)
    if any(_probability(part) == 1.0 for part in parts) or (draws and x.device.type not in ("cpu", "cuda")):
        return False
    dtype = parts[0].weight.dtype
    if not x.is_floating_point() or not dtype.is_floating_point:
        return False
    if torch.is_autocast_enabled(x.device.type):
        # It leaves fp64 alone, and casts a leaf that requires grad once for all who read it.
        return torch.float64 not in (x.dtype, dtype) and not (x.is_leaf and x.requires_grad)
    return x.dtype == dtype or layer.cast_input_dtype_enabled


def _probability(part: nn.Module) -> float:
    return part.p if isinstance(part, nn.Dropout) and part.training else 0.0


def lean_forward(
    module: nn.Module,
    draws: Mapping[str, DrawBits],
    inner: Callable[..., Any],
    /,
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Forward of a LoRA layer that keeps for backward `x`, and one bit an element where there is dropout on a CPU.

    Same bits as `inner(x)`, output and gradients. On CUDA the mask is drawn again from the generator's state of now.

    Args:
        module: The layer.
        draws: For adapters whose mask somebody else keeps or watches: what draws it, called like `draw_bits`.
        inner: The layer's own forward; runs where the call cannot run lean.
        x: [..., I], its input.
        args: What else the layer is called with; with anything, `inner` runs.
        kwargs: Likewise, except for what is None.
    Returns:
        [..., O]; a placeholder where the base layer returned one (R3).
    Raises:
        RuntimeError: (in backward) a second derivative is asked for, or `x` or a weight was written to since.
    Cost:
        Backward casts and drops out the input once more, 2 T I r FLOPs more.
    """
    if not _runs_lean(module, x, args, kwargs):
        return inner(x, *args, **kwargs)
    layer: Any = module
    result: Tensor = layer.base_layer(x)
    result_dtype, unread = result.dtype, is_placeholder(result)
    names = _active(layer)
    dtype: torch.dtype = layer.lora_A[names[0]].weight.dtype
    autocast = torch.is_autocast_enabled(x.device.type)
    packed = (type(module).__module__, type(module).__name__) in _PACKED
    plain_input = packed and torch.is_autocast_enabled()  # there PEFT asks for CUDA's autocast, whatever the device
    cast = x.dtype if plain_input or not layer.cast_input_dtype_enabled else dtype
    compute = torch.get_autocast_dtype(x.device.type) if autocast else cast
    branches: list[Branch] = []
    masks: list[Tensor | None] = []
    tensors: list[Tensor | None] = []
    for name in names:
        weights = [layer.lora_A[name].weight, layer.lora_B[name].weight]
        if autocast:
            weights = [_as_autocast_casts(weight, compute) for weight in weights]
        p = _probability(layer.lora_dropout[name])
        bits = None
        if p and drawn_apart(x):
            bits, mask = draws.get(name, draw_bits)(torch.empty_like(x, dtype=cast), p)
            masks.append(mask)
            del mask  # the node's alone
        else:
            masks.append(None)
        branches.append(Branch(layer.scaling[name], p))
        tensors += [*weights, bits]
        # Adapters behind one cast share its gradient, so they are one node. Without a cast each adds its own to that
        # of the input, as the layers around this one do.
        last = name == names[-1]
        if last or cast == x.dtype:
            out = result_dtype if last and not plain_input else None
            how = Branches(tuple(branches), cast, compute, packed and not plain_input, out, unread)
            result = add_adapters(how, masks, result, x, tensors)
            branches, tensors = [], []
    return result


def _as_autocast_casts(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, from autocast's own cache.

    Autocast casts a trained weight once for all its uses, so that the gradients of all uses are summed in `dtype`. The
    cache is not to be read from Python; but what a product packs for backward is.
    """
    if weight.dtype == dtype or not weight.requires_grad:
        return weight.to(dtype)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        nn.functional.linear(weight.new_empty(0, weight.shape[1], dtype=dtype).requires_grad_(), weight)
    (transposed,) = (tensor for tensor in packed if tensor.shape[0])
    return transposed.t()
