"""What an op makes of tensors of given layouts, remembered, so that most ops of a simulated step cost microseconds.

Torch's fake tensors remember too, but look up by more than a dozen attributes of every argument; a step of a few
layers is thousands of ops, and a plan some twenty steps. Here an op is remembered by its arguments' shapes, strides,
dtypes and devices. What is remembered is how to make each output: a new storage, a view of an argument, or an
argument itself.

Not remembered: outputs that depend on values, outputs whose storage is larger than their layout, anything but dense
tensors of one fake mode. What factories make is remembered where a step calls them, not where the fake mode does: its
own kernels call them for tensors of other kinds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from rematree.pricing.price import tensors_in

META: Final = torch.device("meta")
_PLAIN: Final = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)
_NEVER: Final = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)
# Their outputs' offsets are arguments; all other views begin at a fixed distance from their base.
_ABSOLUTE: Final = frozenset(
    id(getattr(packet, name))
    for packet in (torch.ops.aten.as_strided, torch.ops.aten.as_strided_, torch.ops.aten.as_strided_copy)
    for name in packet.overloads()
)
_INDEX: Final = torch.ops.aten.index.Tensor  # as many outputs as its masks have true values, but for numbers one shape
_MASKS: Final = frozenset({torch.bool, torch.uint8})
_NONDETERMINISTIC: Final = torch.Tag.nondeterministic_seeded
_VALUES: Final = (int, float, bool, type(None))


class _UnknownError(Exception):
    """An argument or output of a kind that is not remembered."""


@dataclass(frozen=True, slots=True)
class _Output:
    """How to make one output.

    Attributes:
        source: Number of the argument it is, or is a view of; -1 for a new storage.
        same: It is that argument itself.
        shape: Shape.
        stride: Strides.
        offset: Elements between the beginning of the argument and that of the view.
        dtype: Dtype.
        device: Fake device.
    """

    source: int
    same: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class Recipes:
    """Remembers ops of one fake mode.

    Args:
        mode: The mode.
        told: Where code below Python believes tensors on `device` to be, if not there.
        device: That device.
    Attributes:
        has_value: Whether more than its layout is known of a tensor. Ops on such a one are not remembered, nor those
            that make a tensor of none. None: nothing is known of any.
    """

    def __init__(self, mode: FakeTensorMode, told: torch.device | None, device: torch.device | None) -> None:
        self._mode = mode
        self._told = told
        self._device = device
        self.has_value: Callable[[Any], bool] | None = None
        self._known: dict[Any, Any] = {}
        self.facts: dict[Any, Any] = {}  # what the ledger found out about an op, by key
        self._ops: dict[int, Any] = {}  # held, so that no other op is ever found under the number of one of them
        self._looks: dict[torch.device, tuple[dict[str, Any], bool]] = {}

    def key(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[torch.Tensor]] | None:
        """What the op is remembered by, and its tensor arguments; None if it cannot be remembered."""
        name = id(func)  # an op's own hash is computed in Python
        if name in _ABSOLUTE or (self.has_value is not None and self._depends_on_values(args, kwargs)):
            return None
        mode, strided = self._mode, torch.strided
        tensors: list[torch.Tensor] = []
        parts: list[Any] = [name]
        try:
            for value in args:
                if type(value) is FakeTensor:  # as in `_part`, without a call
                    if value.fake_mode is not mode or value.constant is not None or value.layout is not strided:
                        return None
                    tensors.append(value)
                    parts.append((value.shape, value.stride(), value.dtype, value.fake_device))
                else:
                    parts.append(self._part(value, tensors))
            parts.append(self._part(kwargs, tensors) if kwargs else None)
        except _UnknownError:
            return None
        return tuple(parts), tensors

    def _part(self, value: Any, tensors: list[torch.Tensor]) -> Any:
        kind = type(value)
        if kind is FakeTensor:
            if value.fake_mode is not self._mode or value.constant is not None or value.layout is not torch.strided:
                raise _UnknownError
            tensors.append(value)
            return value.shape, value.stride(), value.dtype, value.fake_device
        if kind is tuple or kind is list or kind is torch.Size:
            return tuple([self._part(item, tensors) for item in value])
        if kind is dict:
            return tuple([(name, self._part(item, tensors)) for name, item in value.items()])
        if kind in _PLAIN:
            return kind, value
        raise _UnknownError

    def device_seen(self, kwargs: Any) -> Any:
        """`kwargs` as code in Python means them: where code below it was told another device, that is put right."""
        if self._told is not None and kwargs and kwargs.get("device") == self._told:
            return {**kwargs, "device": self._device}
        return kwargs

    def _depends_on_values(self, args: Any, kwargs: Any) -> bool:
        assert self.has_value is not None
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return not tensors or any(map(self.has_value, tensors))

    def known(self, key: Any) -> Any:
        """The recipe of `key`: None if the op has not been seen, False if it cannot be remembered."""
        return self._known.get(key)

    def learn(self, key: Any, func: Any, tensors: list[torch.Tensor], out: Any) -> None:
        """Remember that the op of `key` made `out` of `tensors`."""
        self._ops[id(func)] = func
        try:
            numbers = func is _INDEX and all(tensor.dtype not in _MASKS for tensor in tensors[1:])
            if not numbers and any(tag in func.tags for tag in _NEVER):
                raise _UnknownError
            fresh: set[int] = set()
            places = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(tensors)}
            self._known[key] = self._recipe(out, tensors, places, fresh)
        except _UnknownError:
            self._known[key] = False

    def _recipe(self, out: Any, tensors: list[torch.Tensor], places: dict[int, int], fresh: set[int]) -> Any:
        if isinstance(out, tuple | list):
            return list if isinstance(out, list) else tuple, [
                self._recipe(item, tensors, places, fresh) for item in out
            ]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        if type(out) in _VALUES:
            return None, out
        if type(out) is not FakeTensor or out.constant is not None or out.layout is not torch.strided:
            raise _UnknownError
        if out.is_conj() or out.is_neg() or out.fake_mode is not self._mode:
            raise _UnknownError
        for place, tensor in enumerate(tensors):
            if out is tensor:
                return self._output(place, True, out, 0)
        storage = out.untyped_storage()
        place = places.get(storage._cdata)
        if place is not None:
            return self._output(place, False, out, int(out.storage_offset() - tensors[place].storage_offset()))
        natural = 0 if out.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
        if storage._cdata in fresh or out.storage_offset() or storage.nbytes() != natural * out.element_size():
            raise _UnknownError
        fresh.add(storage._cdata)
        return self._output(-1, False, out, 0)

    def _output(self, source: int, same: bool, out: FakeTensor, offset: int) -> _Output:
        return _Output(source, same, out.shape, out.stride(), offset, out.dtype, out.fake_device)

    def make(self, recipe: Any, tensors: list[torch.Tensor]) -> Any:
        """The outputs again, of other tensors of the same layouts."""
        if type(recipe) is not _Output:
            kind, parts = recipe
            return parts if kind is None else kind([self.make(part, tensors) for part in parts])
        if recipe.same:
            return tensors[recipe.source]
        if recipe.source < 0:
            bare = torch.empty_strided(recipe.shape, recipe.stride, dtype=recipe.dtype, device=META)
        else:
            base = tensors[recipe.source]
            bare = torch.empty(0, dtype=recipe.dtype, device=META)
            offset = base.storage_offset() + recipe.offset
            bare.set_(base.untyped_storage(), offset, recipe.shape, recipe.stride)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self.wrap(bare, recipe.device)

    def of_new(self, tensor: torch.Tensor) -> Any:
        """How to make a tensor like `tensor` with a storage of its own; None where that cannot be remembered."""
        try:
            return self._recipe(tensor, [], {}, set())
        except _UnknownError:
            return None

    def wrap(self, bare: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A fake tensor on `device` around a tensor on `meta`."""
        look = self._looks.get(device)
        if look is None:
            made = FakeTensor(self._mode, bare, device)
            # An absent device has nothing to tell but "meta", which is what the bare tensor says by itself.
            self._looks[device] = {**vars(made)}, self._told is None or device != self._device
            return made
        attributes, tells = look
        made = torch.Tensor._make_subclass(
            FakeTensor, bare, bare.requires_grad, dispatch_device=tells, device_for_backend_keys=device
        )
        vars(made).update(attributes)
        return made


def draws_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op draws random numbers: attention and dropout do not at a probability of zero."""
    if _NONDETERMINISTIC not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in {"dropout_p", "p"}:
            value = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return value != 0
    return True


def mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that an op writes to."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found
