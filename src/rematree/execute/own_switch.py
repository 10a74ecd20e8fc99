"""A model's own checkpointing, off while a plan is in force: it would recompute the recomputation."""

import functools
import warnings
from typing import Any, Final

from torch import nn

from rematree.regions import unwrap

_METHODS: Final = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


class OwnSwitch:
    """Off on `model` from now on, and its methods that would switch it on do nothing, until `remove()`.

    Attributes:
        was_on: Whether any layer will be checkpointed again after `remove()`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._off: list[nn.Module] = []
        for module in model.modules():
            if module.__dict__.get("gradient_checkpointing") is True:
                module.__dict__["gradient_checkpointing"] = False
                self._off.append(module)
        self.was_on = bool(self._off)
        self._base = unwrap(model)
        self._methods: list[tuple[str, Any]] = []
        for name in _METHODS:
            if callable(getattr(self._base, name, None)):
                self._methods.append((name, self._base.__dict__.get(name)))
                self._base.__dict__[name] = functools.partial(_nothing_changes, name)

    def remove(self) -> None:
        """Put back what was there."""
        for name, before in self._methods:
            if before is None:
                self._base.__dict__.pop(name, None)
            else:
                self._base.__dict__[name] = before
        for module in self._off:
            module.__dict__["gradient_checkpointing"] = True


def _nothing_changes(name: str, *_: Any, **__: Any) -> None:
    """What the model's own methods of checkpointing do while a plan is in force."""
    warnings.warn(
        f"{name}: a plan is in force on this model and decides which regions are recomputed; nothing changes",
        UserWarning,
        stacklevel=2,
    )
