"""RMS norms that keep their input, in its own dtype, and one number a row.

Written in PyTorch, as Llama and many after it have it, a norm keeps its input once more in fp32, and its backward is
some fifteen passes over fp32 numbers, of which a power of one, a product with two and a division spread over all
features compute nothing. Here it is one node of the graph: the same operations on the same shapes, in the same order
and dtypes, less those, so output and gradient are the same bits. What is 16-bit stays so; fp32 is made again.

Only for a frozen norm: a trained one keeps its normalised input anyway. Only for 16-bit inputs: in fp32 the norm's two
gradients of its input are summed with those of others, in autograd's order.

Letters: D features.

Source: transformers/models/llama/modeling_llama.py, 5.23; torch's derivatives.yaml (mul, rsqrt, mean, pow), 2.13.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# What the forward must be, line by line: classes of many models have it under names of their own, and others in this
# place compute something else.
_LINES: Final = (
    "def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:",
    "input_dtype = hidden_states.dtype",
    "hidden_states = hidden_states.to(torch.float32)",
    "variance = hidden_states.pow(2).mean(-1, keepdim=True)",
    "hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)",
    "return self.weight * hidden_states.to(input_dtype)",
)
_HALF: Final = (torch.bfloat16, torch.float16)


def lean_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every norm of `model` that can run lean."""
    return [(path, module) for path, module in model.named_modules() if why_no_norm(module) is None]


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is an RMS norm of the kind that is known here."""
    return _is_known(type(module).forward)


def why_no_norm(module: nn.Module) -> str | None:
    """Why `module` cannot run as a lean norm. None if it can."""
    if not is_norm(module):
        return f"{type(module).__qualname__} is not a norm that is known"
    norm: Any = module
    weight = norm._parameters.get("weight")
    if weight is None or weight.requires_grad:
        return "its weight is trained"
    if weight.dtype not in _HALF:
        return f"its weight is in {weight.dtype}"
    return None


@functools.cache
def _is_known(forward: Callable[..., Any]) -> bool:
    if getattr(forward, "__name__", "") != "forward" or not inspect.isfunction(forward):
        return False
    if forward.__globals__.get("torch") is not torch or forward.__code__.co_names.count("variance_epsilon") != 1:
        return False
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):  # written in a console
        return False
    return tuple(line.strip() for line in source.strip().splitlines()) == _LINES


def lean_norm(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Forward of a norm that keeps for backward its input and one number a row. Same bits as `inner(x)`.

    Args:
        module: The norm.
        inner: Its own forward; runs where the call cannot run lean.
        args: [..., D], its input.
        kwargs: With anything, `inner` runs.
    Returns:
        [..., D].
    Raises:
        RuntimeError: (in backward) a second derivative is asked for, or the input or weight was written to since.
    Cost:
        Backward casts the input once more; six passes over fp32 numbers fewer.
    """
    norm: Any = module
    x = args[0] if len(args) == 1 and not kwargs else None
    own = getattr(inner, "__func__", None) is type(module).forward and is_norm(module)
    if not own or not isinstance(x, Tensor) or not x.requires_grad or not torch.is_grad_enabled():
        return inner(*args, **kwargs)
    weight: Tensor = norm.weight
    plain = weight.dtype == x.dtype and x.dtype in _HALF and weight.dim() == 1 and weight.shape[0] == x.shape[-1]
    if not plain or weight.requires_grad or not x.is_contiguous() or type(norm.variance_epsilon) is not float:
        return inner(*args, **kwargs)
    return cast("Callable[..., Tensor]", _Norm.apply)(x, weight, norm.variance_epsilon)


class _Norm(torch.autograd.Function):
    """`weight * (x / root mean square of x)`, the division in fp32, its result in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.set_materialize_grads(False)
        wide = x.to(torch.float32)
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, root)
        return wide.mul_(root).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        if grad is None:
            return None, None, None
        x, weight, root = ctx.saved_tensors
        grad = (grad * weight).to(torch.float32)
        wide = x.to(torch.float32)
        of_root = (grad * wide).sum(-1, keepdim=True)
        of_mean = -0.5 * of_root * root.pow(3)
        # Of x as it is squared: of_mean / D * 2 x. A product with two has no rounding, wherever it stands.
        wide.mul_(of_mean.div_(x.shape[-1]).mul_(2.0))
        return grad.mul_(root).add_(wide).to(x.dtype), None, None
