"""Make the quantised layers of one model fit for recomputation: keep nothing they need not keep, stay differentiable.

Three things bitsandbytes (0.46 to 0.50) does stand in the way.

`Linear8bitLt` keeps its whole input as a plain attribute of its autograd node (`ctx.A`), though a frozen weight's
backward reads packed weight and scales only. No saved-tensor hook sees it, so checkpointing frees nothing.

`Linear4bit` keeps its packed weight the same way. Autograd, which refuses a saved tensor that was written to, does not
know of it: whoever streams weights through one buffer gets gradients of another layer's weight (bitsandbytes#2034).

`Linear4bit`, evaluated on a CPU with bfloat16 instructions, rewrites its weight into a layout for inference: the scales
are rounded to bfloat16 for good, and from then on no gradient passes through the layer, in training mode neither.
"""

import functools
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import nn

from rematree.errors import RecomputeMismatchError, UnsupportedModelError
from rematree.quantised import four_bit_linears, held_by

_REPACKS: Final = "support_avx512bf16_for_cpu"
_REPACKED: Final = "packing_format_for_cpu"
_LARGEST_CODE: Final = 127.0


class _FrozenInt8Linear(torch.autograd.Function):
    """The layer's own forward; a backward that needs its packed weight and scales and nothing else.

    Same operations in the same order as bitsandbytes' `MatMul8bitFp` (CPU, XPU) and `MatMul8bitLt` (CUDA), so the same
    bits.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any, inner: Callable[..., torch.Tensor]) -> torch.Tensor:
        # A placeholder has the memory of one element, and the library's kernel reads rows x columns.
        out = inner(x.contiguous())  # grad mode is off here: the library's node, and what it keeps, is dropped at once
        ctx.state, ctx.dtype, ctx.shape = layer.state, x.dtype, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        if grad.dim() == 3:
            grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        scales = ctx.state.SCB.unsqueeze(1).mul(1.0 / _LARGEST_CODE)
        weight = ctx.state.CB.to(ctx.dtype, copy=True).mul_(scales)
        return torch.matmul(grad.to(ctx.dtype), weight).view(ctx.shape), None, None


def keep_no_input(layer: nn.Module, inner: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call `inner`, the forward of a frozen `Linear8bitLt`, without keeping `x` for backward.

    Args:
        layer: The layer.
        inner: Its forward.
        x: Its input.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return inner(x)
    run = cast("Callable[..., torch.Tensor]", _FrozenInt8Linear.apply)
    return run(x, layer, inner)


def watch_weight(path: str, layer: nn.Module, inner: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Call `inner`, the forward of a frozen `Linear4bit`, and refuse its backward if the packed weight has changed.

    Args:
        path: Of the layer, for messages.
        layer: The layer.
        inner: Its forward.
        x: Its input.
    """
    out = inner(x)
    if out.requires_grad:
        packed = (layer.weight, *held_by(vars(layer.weight)))
        versions = [(tensor, tensor._version) for tensor in packed if isinstance(tensor, torch.Tensor)]
        out.register_hook(functools.partial(_refuse_changed, path, versions))
    return out


def _refuse_changed(path: str, versions: list[tuple[torch.Tensor, int]], _: torch.Tensor) -> None:
    if any(tensor._version != version for tensor, version in versions):
        raise RecomputeMismatchError(
            f"{path}: its packed weight was modified in place between forward and backward",
            remedies=["call backward before loading or merging weights"],
        )


def refuse_repacked(model: nn.Module) -> None:
    """Refuse a model whose 4-bit weights an evaluation has rewritten.

    Raises:
        UnsupportedModelError: names the first of them.
    """
    layers = four_bit_linears(model)
    lost = [path for path, layer in layers if getattr(vars(layer.weight).get("quant_state"), _REPACKED, False)]
    if lost:
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UnsupportedModelError(
            f"{lost[0]}{others}: an evaluation on this CPU has rewritten the 4-bit weight for inference; "
            "no gradient passes through it any more",
            remedies=["load the model again, and call rematree.keep_trainable(model) before it is evaluated"],
        )


class TrainingLayout:
    """Keeps 4-bit weights of one model in the layout that has a gradient, while it is in force.

    Raises:
        UnsupportedModelError: an evaluation has already rewritten a weight.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_repacked(model)
        self._held: list[tuple[nn.Module, Any]] = []
        for _, layer in four_bit_linears(model):
            if vars(layer).get(_REPACKS):
                self._held.append((layer, vars(layer)[_REPACKS]))
                vars(layer)[_REPACKS] = False

    def remove(self) -> None:
        """Let evaluations rewrite weights again, as the library does. Does nothing the second time."""
        for layer, value in self._held:
            vars(layer)[_REPACKS] = value
        self._held.clear()


def keep_trainable(model: nn.Module) -> None:
    """Keep evaluations of `model` from rewriting its 4-bit weights, for as long as it lives.

    On a CPU with bfloat16 instructions bitsandbytes rewrites a 4-bit weight at its first evaluation; training it
    afterwards has no gradients behind that layer. Needed only where a model is evaluated outside an applied plan and
    then trained; does nothing to other models and on other devices.

    Raises:
        UnsupportedModelError: an evaluation has already rewritten a weight.
    """
    TrainingLayout(model)
