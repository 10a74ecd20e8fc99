"""The fake mode that a twin lives in: torch's, where its kernels are stricter than the real ones, absent, or blind."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from rematree.memory.recipes import META, Recipes
from rematree.observation import values
from rematree.observation.absent import DeviceView, is_absent
from rematree.observation.attention_kernels import DEFAULT_CAPABILITY, Capability

_GROUPED_MM: Final = torch.ops.aten._grouped_mm.default
_DEVICE: Final = torch.ops.prim.device.default
_BITSANDBYTES: Final = "bitsandbytes"


class TwinMode(FakeTensorMode):
    """Fake tensors, where fake kernels are stricter than the real ones.

    The grouped matmul of mixture-of-experts layers runs in fp32 on a CPU; its fake kernel insists on bf16. LLM.int8 on
    a GPU sets columns with outliers apart. How many there are is in the values, and the fake kernels give up; here
    there are none, so a few columns of each input, live during the matmul, are not counted.

    Args:
        device: The device all tensors of the model are on, if it may be one that is not here.
        capability: Its compute capability; None: that of the device that is here.
    Attributes:
        engine_device: Where code below Python believes tensors of an absent device to be; None: where they are.
        recipes: What ops make of tensors of given layouts, remembered.
    """

    def __init__(self, device: torch.device | None = None, capability: Capability | None = None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False  # `recipes` remembers, at less than the price of torch's keys
        absent = device is not None and is_absent(device)
        self._device = device
        self.engine_device: torch.device | None = META if absent else None
        self._view: DeviceView | None = None
        self._entered = 0
        self.recipes = Recipes(self, self.engine_device, device)
        if device is not None and (absent or capability is not None):
            self._view = DeviceView(device, capability or DEFAULT_CAPABILITY, absent=absent)

    @property
    def knows_values(self) -> bool:
        """Whether values that are known are asked (`values`), at twice the cost of an op."""
        return self.recipes.has_value is not None

    def know_values(self) -> None:
        """Ask them from now on."""
        self.recipes.has_value = values.has_value

    def __enter__(self) -> Self:
        if self._view is not None and self._entered == 0:
            self._view.__enter__()
        self._entered += 1
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._entered -= 1
        if self._view is not None and self._entered == 0:
            self._view.__exit__(kind, error, trace)

    def fake(self, tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
        """A fake copy of `tensor`, which may itself be on `meta`; `storages` remembers which copies share memory."""
        storage = tensor.untyped_storage()
        shadow = storages.get(storage._cdata)
        if shadow is None:
            shadow = storages[storage._cdata] = torch.UntypedStorage(storage.nbytes(), device=META)
        with no_dispatch():
            bare = torch.empty(0, dtype=tensor.dtype, device=META)
            bare.set_(shadow, tensor.storage_offset(), tensor.size(), tensor.stride())  # pyright: ignore[reportCallIssue, reportArgumentType]
            bare.requires_grad_(tensor.requires_grad)
        copied = self.recipes.wrap(bare, self._device if self._device is not None else tensor.device)
        if isinstance(tensor, nn.Parameter):
            copied._is_param = True  # pyright: ignore[reportAttributeAccessIssue]
        return copied

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # `DeviceView` is for code above
            if self.engine_device is not None:
                if func is _DEVICE and isinstance(args[0], FakeTensor):
                    return self.engine_device if args[0].fake_device == self._device else args[0].fake_device
                kwargs = self.recipes.device_seen(kwargs)
            found = self.recipes.key(func, args, kwargs)
            if found is None or not found[1]:
                if self.knows_values:
                    return self._by_values(func, types, args, kwargs or {})
                return self.dispatch(func, types, args, kwargs or {})
            key, tensors = found
            recipe = self.recipes.known(key)
            if recipe:
                return self.recipes.make(recipe, tensors)
            out = self.dispatch(func, types, args, kwargs or {})
            if recipe is None:
                self.recipes.learn(key, func, tensors, out)
            return out

    def _by_values(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        known = values.computed(func, args, kwargs)
        if known is values.UNKNOWN:
            return self.dispatch(func, types, values.with_places(func, args, self._like(args)), kwargs)
        if not isinstance(known, torch.Tensor) and not isinstance(known, tuple | list):
            return known  # a number
        if values.needs_values(func):
            return values.attach(tree_map_only(torch.Tensor, self._like(args), known), known)
        return values.attach(self.dispatch(func, types, args, kwargs), known)

    def _like(self, args: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        """Makes a fake tensor of a real one, where the first tensor of `args` is."""
        device = next((t.device for t in tree_leaves(args) if isinstance(t, torch.Tensor)), torch.device("cpu"))

        def fake(real: torch.Tensor) -> torch.Tensor:
            with no_dispatch():
                bare = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=META)
            return self.recipes.wrap(bare, device)

        return fake

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _GROUPED_MM and args[0].dtype != torch.bfloat16:
            dtype = args[0].dtype
            with self:
                return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {})).to(dtype)
        if func.namespace == _BITSANDBYTES:
            out = self._without_outliers(func, args)
            if out is not None:
                return out
        return super().dispatch(func, types, args, kwargs)

    def _without_outliers(self, func: Any, args: Any) -> Any:
        x = args[0]
        if func.__name__ == "int8_vectorwise_quant.default" and len(args) > 1:  # the threshold of outliers
            with self:
                packed, scales, _ = func(x)
                return packed, scales, x.new_empty(0, dtype=torch.int64)
        if func.__name__ == "int8_mixed_scaled_mm.default":
            with self:
                bias = args[6] if len(args) > 6 else None
                return torch.ops.bitsandbytes.int8_scaled_mm(*args[1:5], bias=bias, dtype=x.dtype), x.new_empty(0)
        return None
