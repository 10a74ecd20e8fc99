"""The arguments of a region's call, kept so that the rerun is given what the forward was given.

A layer may take things out of a list, or write into a dict that the layers share (Gemma's shared keys and values), or
append to a key-value cache. Run again with the same object it would find what its own forward left. Every mutable
container is therefore copied before the forward, which itself gets the caller's own.

Not covered: other mutable objects; they are passed on as they are.
"""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Final

import torch
from torch import Tensor

from rematree.errors import RecomputeMismatchError, UnsupportedModelError

# transformers' caches that grow by making new tensors; a copy of the object keeps what it held. The others write into
# tensors of a fixed size.
_GROWING: Final = ("DynamicLayer", "DynamicSlidingWindowLayer")


class Arguments:
    """What one call of a region was given.

    Args:
        region: The region's path, for messages.
        args: Positional arguments.
        kwargs: Keyword arguments.
    Raises:
        UnsupportedModelError: a cache that cannot be copied is among them.
    Cost:
        A walk over the containers; no tensor is copied.
    """

    __slots__ = ("_args", "_kwargs", "_mutable", "_region", "_versions")

    def __init__(self, region: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._region = region
        self._mutable = any(_holds_mutable(value) for value in (*args, *kwargs.values()))
        # torch's checkpoint keeps positional tensors itself, where outer saved-tensor hooks reach them.
        self._args = tuple(None if isinstance(value, Tensor) else self._copy(value) for value in args)
        self._kwargs = {name: self._copy(value) for name, value in kwargs.items()}
        self._versions = [(tensor, tensor._version) for tensor in self._own_tensors() if not tensor.is_inference()]

    def _copy(self, value: Any) -> Any:
        return _copy(value, self._region) if self._mutable else value

    def _own_tensors(self) -> Iterator[Tensor]:
        return _tensors((self._args, self._kwargs))

    def again(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for a rerun.

        Args:
            args: What torch's checkpoint hands back: its tensors are used, the containers are this object's.
        Raises:
            RecomputeMismatchError: a tensor among them was written to since the forward.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RecomputeMismatchError(
                    f"{self._region}: an argument of shape {tuple(tensor.shape)} was modified in place after the "
                    "forward pass; running the region again would use other values",
                    remedies=["pass a copy to the model, or write to it after backward"],
                )
        own = tuple(self._copy(value) for value in self._args)
        given = tuple(there if isinstance(there, Tensor) else here for there, here in zip(args, own, strict=True))
        return given, {name: self._copy(value) for name, value in self._kwargs.items()}

    def refuse_outputs_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse a region that handed tensors on through its arguments: reentrant checkpointing loses their gradients.

        Args:
            args: Positional arguments as the forward left them.
            kwargs: Keyword arguments likewise.
        Raises:
            UnsupportedModelError: such a tensor is there.
        """
        if not self._mutable:
            return
        known = {id(tensor) for tensor in (*self._own_tensors(), *(a for a in args if isinstance(a, Tensor)))}
        named = [*((f"argument {position}", value) for position, value in enumerate(args)), *kwargs.items()]
        for name, value in named:
            if any(id(tensor) not in known for tensor in _tensors(value)):
                raise UnsupportedModelError(
                    f"{self._region} hands tensors on through {name}, and reentrant checkpointing gives those no "
                    "gradient",
                    remedies=['gradient_checkpointing_kwargs={"use_reentrant": False}'],
                )


def is_cache(value: object) -> bool:
    """Whether `value` is one of transformers' key-value caches."""
    return any(base.__name__ == "Cache" and base.__module__.startswith("transformers") for base in type(value).__mro__)


def _holds_mutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_holds_mutable(item) for item in value)
    return isinstance(value, list | set | MutableMapping) or is_cache(value)


def _copy(value: Any, region: str) -> Any:
    match value:
        case tuple():
            items = [_copy(item, region) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        case list():
            return [_copy(item, region) for item in value]
        case set():
            return set(value)
        case MutableMapping():
            copied = copy.copy(value)
            for key, item in value.items():
                copied[key] = _copy(item, region)
            return copied
        case _:
            return _copy_cache(value, region) if is_cache(value) else value


def _copy_cache(cache: Any, region: str) -> Any:
    copied = copy.copy(cache)
    for name, value in vars(cache).items():
        if is_cache(value):
            setattr(copied, name, _copy_cache(value, region))
        elif isinstance(value, dict):
            setattr(copied, name, dict(value))
    layers = vars(cache).get("layers")
    if layers is not None:
        fixed = sorted({type(layer).__name__ for layer in layers} - set(_GROWING))
        if fixed:
            raise UnsupportedModelError(
                f"{region}: a {type(cache).__name__} of {fixed[0]} reaches a recomputed region in training; running "
                "the region again would write into it a second time",
                remedies=["train without past_key_values"],
            )
        copied.layers = [copy.copy(layer) for layer in layers]
    return copied


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif is_cache(value):
        for layer in getattr(value, "layers", ()):
            yield from (item for item in vars(layer).values() if isinstance(item, torch.Tensor))
