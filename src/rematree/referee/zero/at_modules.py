"""Where ZeRO-3 looks at a model: before and after the forward and the backward of every module.

As DeepSpeed does it (`deepspeed/runtime/zero/parameter_offload.py`): hooks around each forward, and on tensors that a
module is given by position, or returns, functions of autograd that hand them on and tell of their gradients. Backward
of a module begins with the gradient of an output, and is over when all those of its inputs have come.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rematree.referee.zero.gathering import Gathering


class AtModules:
    """Has weights gathered as the modules of a model run.

    Args:
        model: Fake.
        gathering: Of its weights.
    """

    def __init__(self, model: nn.Module, gathering: Gathering) -> None:
        self._model = model
        self._gathering = gathering
        self._undo: list[Callable[[], Any]] = []
        self._running: list[nn.Module] = []  # modules whose forward is on the stack
        self._in_forward = False
        self._inputs: collections.Counter[nn.Module] = collections.Counter()  # whose gradients are still to come
        for module in model.modules():
            self._undo.append(module.register_forward_pre_hook(self._begins).remove)
            self._undo.append(module.register_forward_hook(self._ended).remove)
            own = module._parameters
            module.__dict__["_parameters"] = _Watched(own, self._read)
            self._undo.append(functools.partial(module.__dict__.__setitem__, "_parameters", own))

    def remove(self) -> None:
        """Take all of it off the model."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _begins(self, module: nn.Module, args: Any) -> Any:
        if module is self._model:
            self._gathering.restart()
            self._in_forward = True
        self._running.append(module)
        self._gathering.begins(module, True)
        self._inputs[module] = 0

        def given(tensor: torch.Tensor) -> torch.Tensor:
            self._inputs[module] += 1
            return _Passing.apply(tensor, functools.partial(self._input_done, module))  # pyright: ignore[reportReturnType]

        return _mapped(args, given)

    def _ended(self, module: nn.Module, args: Any, output: Any) -> Any:
        self._running.pop()
        self._gathering.ended(module, True)
        self._in_forward = self._in_forward and module is not self._model

        def returned(tensor: torch.Tensor) -> torch.Tensor:
            return _Passing.apply(tensor, functools.partial(self._gathering.begins, module, False))  # pyright: ignore[reportReturnType]

        return _mapped(output, returned)

    def _input_done(self, module: nn.Module) -> None:
        self._inputs[module] -= 1
        if not self._inputs[module]:
            self._gathering.ended(module, False)

    def _read(self, parameter: Any) -> None:
        if self._in_forward:
            self._gathering.borrow(self._running[-1], parameter)


class _Watched(dict[str, Any]):
    """Parameters of a module, which tells of each that it is asked for."""

    def __init__(self, own: dict[str, Any], read: Callable[[Any], None]) -> None:
        super().__init__(own)
        self._tell = read

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        self._tell(found)
        return found


class _Passing(torch.autograd.Function):
    """A tensor handed on, which tells when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, then: Callable[[], None]) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.then = then
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.then()
        return gradient, None


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with tensors that require grad changed, in the containers that DeepSpeed looks into; dicts in place."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.requires_grad and torch.is_grad_enabled() else value
    if isinstance(value, tuple | list):
        items = [_mapped(item, change) for item in value]  # pyright: ignore[reportUnknownVariableType]
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType]
        return kind(*items) if hasattr(value, "_fields") else kind(items)  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, dict):
        for key in list(value):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            value[key] = _mapped(value[key], change)
    return value
