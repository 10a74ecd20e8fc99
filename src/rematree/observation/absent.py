"""Run a model on fake tensors of a device that torch was not built for, or that is not in this machine.

Fake tensors carry any device, but three things below Python ask the device itself and find nobody: autograd's engine
wants its streams, some composite operations pick a kernel by `is_cuda`, and attention asks the backend. Therefore code
below Python is told `meta`, whose streams exist, and code in Python sees the real device; where the two meet (`to`,
factories, dropout, attention) `DeviceView` and `TwinMode` translate. Models may ask for the compute capability, as
transformers' experts do before a grouped product: while the view is in force it is the stated one.
"""

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rematree.memory.recipes import META
from rematree.observation.attention_kernels import Capability, choose_kernel, run_kernel

_F: Final = torch.nn.functional
_ATTENTION: Final = _F.scaled_dot_product_attention
_DROPOUT: Final = _F.dropout
_TORCH_DROPOUT: Final = torch.dropout
_TO: Final = Tensor.to
_IS_CUDA: Final = Tensor.is_cuda.__get__  # pyright: ignore[reportAttributeAccessIssue]
_FAKE: Final = torch._C._TorchDispatchModeKey.FAKE
_ONE_AT_A_TIME: Final = threading.RLock()  # what a view replaces is seen by all threads


def is_absent(device: torch.device) -> bool:
    """Whether nothing can run on `device` in this process."""
    if device.type in {"cpu", "meta"}:
        return False
    present = torch.accelerator.current_accelerator(check_available=True)
    return present is None or present.type != device.type


class DeviceView:
    """What Python code does on a CUDA device that is not there.

    The functions that answer otherwise there are replaced while the view is in force. A function mode would also see
    every other call and every look at a tensor, some 170,000 for one plan. They are replaced under every name that a
    module has for them, and answer otherwise only where a function mode would be asked: in code above a fake mode. So
    other threads find them doing what they always do, but wait with views of their own.

    Args:
        device: The device.
        capability: Its compute capability, which decides between attention kernels.
        absent: It is not there. If it is, only `capability` is another one's.
    """

    def __init__(self, device: torch.device, capability: Capability, *, absent: bool = True) -> None:
        self._device = device
        self._absent = absent
        self._capability = capability
        handlers = ((_ATTENTION, self._attention), (_DROPOUT, self._dropout), (_TORCH_DROPOUT, self._dropout))
        answers = {id(own): _answer(own, handler) for own, handler in handlers}
        with _ONE_AT_A_TIME:
            self._replaced: list[tuple[Any, str, Any]] = [
                (module, name, answers[id(value)])
                for module in [*sys.modules.values()]
                if module is not sys.modules[__name__]
                for name, value in [*getattr(module, "__dict__", {}).items()]
                if id(value) in answers
            ]
        if {answer for _, _, answer in self._replaced} != {*answers.values()}:
            raise RuntimeError("a view of a device was made while another was in force")
        self._replaced += [
            (Tensor, "to", _answer(_TO, self._to)),
            (Tensor, "is_cuda", property(_answer(_IS_CUDA, self._is_cuda))),
            (torch.cuda, "get_device_capability", self._capability_of),
        ]
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        _ONE_AT_A_TIME.acquire()
        for holder, name, answer in self._replaced:
            if name in vars(holder):
                self._undo.callback(setattr, holder, name, vars(holder)[name])
            else:  # inherited
                self._undo.callback(delattr, holder, name)
            setattr(holder, name, answer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        _ONE_AT_A_TIME.release()

    def _capability_of(self, device: Any = None) -> Capability:
        """`torch.cuda.get_device_capability`, which is no operation on tensors."""
        return self._capability

    def _here(self, tensor: Any) -> bool:
        return isinstance(tensor, FakeTensor) and tensor.fake_device.type == self._device.type

    def _is_cuda(self, func: Any, tensor: Tensor) -> bool:
        return tensor.device.type == "cuda"

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`to`, whose C++ side compares with the device that code below Python was told."""
        told = tuple(self._told(value) for value in args)
        if "device" in kwargs:
            kwargs["device"] = self._told(kwargs["device"])
        return func(tensor, *told, **kwargs)

    def _told(self, value: Any) -> Any:
        if isinstance(value, str):
            value = torch.device(value)
        if isinstance(value, torch.device):
            return META if self._absent and value.type == self._device.type else value
        return value

    def _dropout(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One kernel, which keeps a mask of a byte an element."""
        return self._fused_dropout(*args, **kwargs) if self._fuses(*args, **kwargs) else func(*args, **kwargs)

    def _fuses(self, input: Tensor, p: float = 0.5, *args: Any, **kwargs: Any) -> bool:
        training = args[0] if args else kwargs.get("training", kwargs.get("train", True))
        inplace = args[1] if len(args) > 1 else kwargs.get("inplace", False)
        return training and not inplace and 0 < p < 1 and input.numel() > 0 and self._here(input)

    def _fused_dropout(self, input: Tensor, p: float = 0.5, *_: Any, **__: Any) -> Tensor:
        return torch.native_dropout(input, p, True)[0]

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not self._here(query):
            return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        kernel = choose_kernel(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            enable_gqa=enable_gqa,
            capability=self._capability,
        )
        return run_kernel(
            kernel, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def _answer(own: Callable[..., Any], handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler(own, ...)` in code above a fake mode, else `own`."""

    @functools.wraps(own)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if torch._C._get_dispatch_mode(_FAKE) is None or torch._C._is_torch_function_all_disabled():
            return own(*args, **kwargs)
        return handler(own, *args, **kwargs)

    return answer
