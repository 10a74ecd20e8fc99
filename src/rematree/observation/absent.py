"""Run a model on fake tensors of a device that torch was not built for, or that is not in this machine.

Fake tensors carry any device, but three things below Python ask the device itself and find nobody: autograd's engine
wants its streams, some composite operations pick a kernel by `is_cuda`, and attention asks the backend. Therefore code
below Python is told `meta`, whose streams exist, and code in Python sees the real device; where the two meet (`to`,
factories, dropout, attention) `DeviceView` and `TwinMode` translate. Models may ask for the compute capability, as
transformers' experts do before a grouped product: while the view is in force it is the stated one.
"""

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from rematree.memory.recipes import META
from rematree.observation.attention_kernels import Capability, choose_kernel, run_kernel

_F: Final = torch.nn.functional
_ATTENTION: Final = _F.scaled_dot_product_attention
_IS_CUDA: Final = Tensor.is_cuda.__get__  # pyright: ignore[reportAttributeAccessIssue]


def is_absent(device: torch.device) -> bool:
    """Whether nothing can run on `device` in this process."""
    if device.type in {"cpu", "meta"}:
        return False
    present = torch.accelerator.current_accelerator(check_available=True)
    return present is None or present.type != device.type


class DeviceView(TorchFunctionMode):
    """What Python code does on a CUDA device that is not there.

    Args:
        device: The device.
        capability: Its compute capability, which decides between attention kernels.
    """

    def __init__(self, device: torch.device, capability: Capability) -> None:
        super().__init__()
        self._device = device
        self._capability = capability
        self._handlers: Mapping[Any, Callable[..., Any]] = {
            _ATTENTION: self._attention,
            _F.dropout: self._dropout,
            torch.dropout: self._dropout,
            Tensor.to: self._to,
            _IS_CUDA: self._is_cuda,
            Tensor.backward: self._backward,
        }
        self._asked: list[Callable[..., Any]] = []  # who answered for the capability before each entry

    def __enter__(self) -> Self:
        self._asked.append(torch.cuda.get_device_capability)
        torch.cuda.get_device_capability = self._capability_of
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.cuda.get_device_capability = self._asked.pop()

    def _capability_of(self, device: Any = None) -> Capability:
        """`torch.cuda.get_device_capability`, which is no operation on tensors: no function mode sees it."""
        return self._capability

    def __torch_function__(self, func: Any, types: Iterable[Any], args: Any = (), kwargs: Any = None) -> Any:
        handler = self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, *args, **(kwargs or {}))

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

    def _backward(
        self,
        func: Any,
        tensor: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """`Tensor.backward` is Python: while it runs no function mode is in force, but it may run recomputations."""
        seed = torch.ones_like(tensor) if gradient is None else gradient
        keep = create_graph if retain_graph is None else retain_graph
        into = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        with self:
            _engine_run_backward(
                (tensor,), (seed,), keep, create_graph, into, allow_unreachable=True, accumulate_grad=True
            )

    def _told(self, value: Any) -> Any:
        if isinstance(value, str):
            value = torch.device(value)
        if isinstance(value, torch.device):
            return META if value.type == self._device.type else value
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
