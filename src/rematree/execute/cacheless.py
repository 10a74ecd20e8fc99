"""Training without a key-value cache while regions are recomputed (R7): a rerun would write into it a second time."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from rematree.regions import find_module, parent_path, split_function

_CACHE: Final = "use_cache"


class Cacheless:
    """What runs the forward of a module that takes `use_cache`: with False in a training step, as it is elsewhere.

    Args:
        place: Of `use_cache` among the positions of the forward.
        trains: Whether this is a training step.
    Warns:
        UserWarning: a cache was asked for in training; said once.
    """

    def __init__(self, place: int, trains: Callable[[], bool]) -> None:
        self._place = place
        self._trains = trains
        self._said = False

    def __call__(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not self._trains():
            return inner(*args, **kwargs)
        by_position = len(args) > self._place
        if (args[self._place] if by_position else kwargs.get(_CACHE)) and not self._said:
            self._said = True
            warnings.warn(f"{_CACHE}=True is set to False while training with recomputation", stacklevel=4)
        if by_position:
            return inner(*args[: self._place], False, *args[self._place + 1 :], **kwargs)
        return inner(*args, **{**kwargs, _CACHE: False})


def decides_on_cache(model: nn.Module, region: str) -> tuple[nn.Module, int] | None:
    """The outermost module around `region` whose forward takes `use_cache`, and its place among the positions."""
    path = ""
    for name in ("", *parent_path(split_function(region)[0]).split(".")):
        path = f"{path}.{name}".strip(".")
        module = find_module(model, path)
        taken = list(inspect.signature(module.forward).parameters)
        if _CACHE in taken:
            return module, taken.index(_CACHE)
    return None
