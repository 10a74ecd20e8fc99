"""Linear layers as ZeRO-3 makes them: what autograd keeps of one is its input and the parameter, not the weight's data.

torch's own keeps the transposed weight, a view of the data that was gathered for the forward, which would hold that
until the backward. DeepSpeed puts a function of its own in the place of `torch.nn.functional.linear`
(`deepspeed/runtime/zero/linear.py`), for the whole process. It keeps the input of a frozen layer too, which torch's
does not. This is the same for a simulated step, and in force for that alone.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

_LINEAR: Final[Any] = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]
Whole = Callable[[torch.Tensor], AbstractContextManager[None]]


class Stage3Linear(TorchFunctionMode):
    """Linear layers inside are ZeRO-3's.

    Args:
        whole: Gathers a weight for as long as it is entered, if it is not whole: before backward of most modules it is.
    """

    def __init__(self, whole: Whole) -> None:
        super().__init__()
        self._whole = whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _LINEAR:
            return _linear(self._whole, *args, **(kwargs or {}))
        if func is torch.Tensor.backward:  # Python, which leaves no function mode in force for what it reruns
            return self._backward(args[0])
        return func(*args, **(kwargs or {}))

    def _backward(self, loss: torch.Tensor) -> None:
        seed = torch.ones_like(loss)
        with self:
            _engine_run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _linear(whole: Whole, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return _Linear.apply(whole, input, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Whole, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.whole = whole
        ctx.save_for_backward(x, weight, bias)
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        with ctx.whole(weight) if isinstance(weight, torch.nn.Parameter) else contextlib.nullcontext():
            if ctx.needs_input_grad[1]:
                of_x = gradient.matmul(weight)
            if ctx.needs_input_grad[2]:
                of_weight = gradient.reshape(-1, gradient.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1]))
            if bias is not None and ctx.needs_input_grad[3]:
                of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return None, of_x, of_weight, of_bias
