"""Which experts a token goes to is decided once, in forward; the rerun is told.

The scores of two experts can be nearly equal. Run again under another kernel, another batch layout or another
tensor-parallel order, the router may pick the other one, and then the rerun computes other rows than backward expects:
an error if the counts differ, wrong gradients if they do not. So the indices that a router's `topk`, `argmax`, `sort`
or `argsort` chose are kept (a few integers a token), and in the rerun the values are gathered by them.

Not covered: indices chosen by other means, such as `max` over a dimension or `multinomial`; they are chosen again.

Reports of it: transformers#47467, pytorch#171355.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rematree.errors import RecomputeMismatchError

_ROUTERS: Final = ("router", "moe")
_CHOICES: Final = frozenset({"top_k", "num_experts_per_tok", "topk_group", "num_experts"})
_TOPK: Final = (torch.topk, Tensor.topk)
_SORT: Final = (torch.sort, Tensor.sort)
_INDICES: Final = (torch.argmax, Tensor.argmax, torch.argsort, Tensor.argsort)


def has_router(module: nn.Module) -> bool:
    """Whether something inside `module` chooses experts: it is called so, or has the settings of a choice."""
    for part in module.modules():
        name = type(part).__name__.lower()
        if any(word in name for word in _ROUTERS) or not _CHOICES.isdisjoint(vars(part)):
            return True
    return False


class _Chosen(torch.autograd.Function):
    """x.gather(dim, indices) that keeps the indices only, with the gradient that `topk` has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.dim, ctx.shape = dim, x.shape
        return x.gather(dim, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        (indices,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter(ctx.dim, indices, grad), None, None


class Routing:
    """The choices of one call of a region, in the order they were made."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Size, Tensor]] = []
        self._paused = 0

    @contextlib.contextmanager
    def recorded(self) -> Generator[None]:
        """Inside, choices are made and noted."""
        with _Mode(self._record):
            yield

    @contextlib.contextmanager
    def replayed(self, region: str) -> Generator[None]:
        """Inside, choices are those that were noted.

        Raises:
            RecomputeMismatchError: more choices are made than in forward, or among others.
        """
        rest = iter(self._kept)

        def choose(x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
            if self._paused:
                return make(x)
            shape, indices = next(rest, (None, x))
            if shape != x.shape:
                raise RecomputeMismatchError(f"{region}: the recomputation routes other tokens than the forward did")
            return indices

        with _Mode(choose):
            yield

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Inside, choices are left alone: a saved region is not run again."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _record(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        indices = make(x)
        if not self._paused:
            self._kept.append((x.shape, indices))
        return indices


class _Mode(TorchFunctionMode):
    """Hands every choice among a tensor's entries to `choose`; values follow from the indices."""

    def __init__(self, choose: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "out" in kwargs or not (func in _TOPK or func in _SORT or func in _INDICES):
            return func(*args, **kwargs)
        x, *rest = args if args else (kwargs.pop("input"),)
        if not isinstance(x, Tensor) or x.dim() == 0:
            return func(*args, **kwargs)
        if func in _INDICES:
            return self._choose(x, lambda x: func(x, *rest, **kwargs))
        place = 1 if func in _TOPK else 0  # of `dim` behind the tensor
        dim: int = kwargs.get("dim", rest[place] if len(rest) > place and isinstance(rest[place], int) else -1)
        indices = self._choose(x, lambda x: func(x.detach(), *rest, **kwargs)[1])
        gather = cast("Callable[[Tensor, Tensor, int], Tensor]", _Chosen.apply)
        result = torch.return_types.topk if func in _TOPK else torch.return_types.sort
        return result((gather(x, indices, dim), indices))  # pyright: ignore[reportCallIssue]
