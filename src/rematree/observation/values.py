"""Values of fake tensors, where they are known: those of the batch, and whatever follows from them alone.

Image-text models look at where the image tokens are, how many patches each picture has and whether the numbers agree.
What they look at is in the batch, which is there. So beside a fake tensor of the batch its values are kept, every op on
tensors whose values are known is also done on them, and where shapes or Python follow from values, they are asked.

Values that a weight has a part in stay unknown. It is on only for models that cannot be observed without it: each op
costs twice, and holds host memory for what it knows.
"""

from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

_VALUE: Final = "_rematree_value"
_LARGEST: Final = 1 << 24  # elements: a mask of 4096 x 4096
_aten: Any = torch.ops.aten
_ITEM: Final = _aten._local_scalar_dense.default
_INDEX: Final = _aten.index.Tensor
_NO_MEMORY: Final = "its data is not allocated yet"
_MASKS: Final = (torch.bool, torch.uint8)
# Of the ops that make a tensor of none, those whose values are not drawn and not left over.
_FACTORIES: Final = frozenset(
    {
        _aten.arange.default,
        _aten.arange.start,
        _aten.arange.start_step,
        _aten.full.default,
        _aten.ones.default,
        _aten.scalar_tensor.default,
        _aten.zeros.default,
    }
)
UNKNOWN: Final = object()


class NumbersOfTensors(TorchFunctionMode):
    """Makes `torch.tensor` of a list of fake tensors, whose memory it would read, one of their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args)):
            args = tree_map_only(FakeTensor, _numbers, args)
        return func(*args, **(kwargs or {}))


def _numbers(fake: FakeTensor) -> Any:
    value = value_of(fake)
    return fake if value is None else value.tolist()


def asks_for_values(error: RuntimeError) -> bool:
    """Whether `error` says that a fake tensor was asked for what it does not have."""
    asked = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
    return asked or _NO_MEMORY in str(error)


def know(fake: Tensor, value: Tensor) -> None:
    """Keep a copy of `value` as the values of `fake`."""
    with no_dispatch():
        setattr(fake, _VALUE, value.detach().cpu().clone())


def has_value(tensor: Tensor) -> bool:
    """Whether its values are known."""
    return not isinstance(tensor, FakeTensor) or hasattr(tensor, _VALUE)


def value_of(tensor: Tensor) -> Tensor | None:
    """Its values, on the host, or None."""
    if isinstance(tensor, FakeTensor):
        return getattr(tensor, _VALUE, None)
    if tensor.is_meta:
        return None
    with no_dispatch():
        return tensor.detach().cpu()


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What `func` makes of the known values of its arguments; `UNKNOWN` if one is unknown, or it draws."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    known = func in _FACTORIES if not tensors else all(value_of(tensor) is not None for tensor in tensors)
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    if func.namespace != "aten" or not known or drawn or any(t.numel() > _LARGEST for t in tensors):
        _forget(func, args)
        return UNKNOWN
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    real_args, real_kwargs = tree_map_only(Tensor, value_of, (args, kwargs))
    with no_dispatch():
        return func(*real_args, **real_kwargs)


def _forget(func: Any, args: Any) -> None:
    """Whatever `func` writes to is unknown from now on."""
    for argument, given in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and hasattr(given, _VALUE):
            delattr(given, _VALUE)


def needs_values(func: Any) -> bool:
    """Whether the shape of what `func` returns, or a number, follows from values."""
    return func is _ITEM or torch.Tag.dynamic_output_shape in func.tags


def attach(out: Any, values: Any) -> Any:
    """`out`, whose fake tensors know their `values`."""
    for fake, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
        if isinstance(fake, FakeTensor) and value.numel() <= _LARGEST:
            setattr(fake, _VALUE, value)
    return out


def with_places(func: Any, args: Any, fake: Any) -> Any:
    """`args` of an index by masks whose values are known: by the places instead, whose number is known.

    Args:
        func: The op.
        args: Its arguments.
        fake: Makes a fake tensor of a real one, where the first argument is.
    """
    if func is not _INDEX:
        return args
    places: list[Tensor | None] = []
    for index in args[1]:
        value = value_of(index) if index is not None and index.dtype in _MASKS else None
        if value is None:
            places.append(index)
            continue
        with no_dispatch():
            found = value.bool().nonzero(as_tuple=True)
        places += [attach(fake(each), each) for each in found]
    return (args[0], places)
