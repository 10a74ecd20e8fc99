"""Replace one module's `forward` on this instance only, and put it back exactly."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Around = Callable[..., Any]  # around(inner, *args, **kwargs)


class ForwardOverride:
    """A callable stored as the instance attribute `module.forward`.

    Overrides nest: the innermost is the class's method or whatever was there before (accelerate puts its own). They
    survive `copy.deepcopy` of the module, because they hold the module, not a closure over it, and can be removed in
    any order.

    Args:
        module: Whose forward is replaced.
        around: Called with what `forward` was before, and its arguments.
        when: Asked at every call; if it says no, the call goes to what `forward` was before. None: always.
    """

    def __init__(self, module: nn.Module, around: Around, when: Callable[[], bool] | None = None) -> None:
        self._module = module
        self._when = when
        self._had_own = "forward" in module.__dict__
        self._inner: Forward = module.forward
        self._around = around
        self._removed = False
        # inspect.signature(model.forward) must keep working; __dict__ must not be copied from another override
        functools.update_wrapper(self, self._inner, updated=())
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.idle:
            return self._inner(*args, **kwargs)
        return self._around(self._inner, *args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """Whose forward is replaced."""
        return self._module

    @property
    def conditional(self) -> bool:
        """Whether it asks before it does anything."""
        return self._when is not None

    @property
    def idle(self) -> bool:
        """Whether a call now goes straight to what `forward` was before."""
        return self._removed or (self._when is not None and not self._when())

    @property
    def inner(self) -> Forward:
        """What `forward` was before."""
        return self._inner

    def remove(self) -> None:
        """Restore what `forward` was before. Does nothing the second time.

        Under a wrapper of somebody else's (accelerate's, put around it since) it stays, and only calls that.
        """
        self._removed = True
        current = self._module.__dict__.get("forward")
        if current is self:
            if self._had_own:
                self._module.forward = self._inner
            else:
                del self._module.__dict__["forward"]
            return
        while isinstance(current, ForwardOverride):  # someone overrode after us: unlink from the middle of the chain
            if current._inner is self:
                current._inner = self._inner
                current._had_own = self._had_own
                functools.update_wrapper(current, self._inner, updated=())
                return
            current = current._inner


def runs_bare(module: nn.Module) -> bool:
    """Whether a call of `module` now runs its class's own forward and nothing around it."""
    own = module.__dict__.get("forward")
    while isinstance(own, ForwardOverride) and own.idle:
        own = own.inner
        if getattr(own, "__func__", None) is type(module).forward:
            return True
    return own is None


def remove_overrides(root: nn.Module) -> None:
    """Take every override of this library off `root` and its submodules (used on copies of a model)."""
    for module in root.modules():
        while isinstance(override := module.__dict__.get("forward"), ForwardOverride):
            override.remove()
