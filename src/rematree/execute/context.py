"""What the recomputation must find as it was in forward: random state, flags, adapters, hooks, captured values.

Design rules R4 and R5. Autocast is restored by `torch.utils.checkpoint` itself.
"""

import contextlib
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.utils._pytree import tree_any

from rematree.errors import RecomputeMismatchError
from rematree.execute.module_state import ChangingBuffers, ModuleState, replace_entries
from rematree.execute.routing import has_router

_STATE_BYTES: Final = 5056  # of torch.get_rng_state()
_HOOKS: Final = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True)
class Captured:
    """One value the user asked to be restored around recomputation."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


class RandomState:
    """State of the generators an op of this region could draw from: the CPU's and the current accelerator's.

    Under fake tensors nothing is drawn and there is no state; a stand-in of the same size takes its place, so that the
    referee counts its bytes, and the number of draws seen so far tells two of them apart.
    """

    __slots__ = ("_accelerator", "_cpu", "_draws")

    def __init__(self, draws: int | None = None) -> None:
        self._draws = draws
        self._cpu = torch.get_rng_state() if draws is None else torch.empty(_STATE_BYTES, dtype=torch.uint8)
        self._accelerator = torch.cuda.get_rng_state() if draws is None and torch.cuda.is_initialized() else None

    @classmethod
    def now(cls, draws: int | None = None) -> "RandomState | None":
        """The present state. Under fake tensors a stand-in if `draws`, their number so far, is known, else None."""
        if detect_fake_mode() is None:
            return cls()
        return None if draws is None else cls(draws)

    def same_as(self, other: "RandomState | None") -> bool:
        """Whether nothing was drawn between the two."""
        if other is None:
            return False
        if self._draws is not None or other._draws is not None:
            return self._draws == other._draws
        if not torch.equal(self._cpu, other._cpu):
            return False
        if self._accelerator is None or other._accelerator is None:
            return self._accelerator is other._accelerator
        return torch.equal(self._accelerator, other._accelerator)

    def restore(self) -> None:
        """Set the generators to this state."""
        if self._draws is not None:
            return
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.cuda.set_rng_state(self._accelerator)


def builds_graph(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether calling `module` now records anything for backward; if not, there is nothing to recompute (R6, R7)."""
    if not torch.is_grad_enabled():
        return False
    if tree_any(lambda x: isinstance(x, torch.Tensor) and x.requires_grad, (args, kwargs)):
        return True
    return any(p.requires_grad for p in module.parameters())


class _Adapters:
    """What a PEFT layer's forward depends on besides its weights."""

    __slots__ = ("_active", "_disabled", "_layer", "_merged", "_names", "_scaling")

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._active: Any = _copied(layer._active_adapter)
        self._disabled: bool = layer._disable_adapters
        self._merged = tuple(getattr(layer, "merged_adapters", ()))
        self._scaling: dict[str, Any] = dict(getattr(layer, "scaling", {}))
        self._names = _names_of(layer)

    def restore(self, region: str, undo: contextlib.ExitStack) -> None:
        """Put it back until `undo` closes.

        Raises:
            RecomputeMismatchError: adapters were merged, unmerged or deleted since.
        """
        layer = self._layer
        merged = tuple(getattr(layer, "merged_adapters", ()))
        if merged != self._merged:
            raise RecomputeMismatchError(
                f"{region}: adapters {list(merged)} are merged now, {list(self._merged)} were in forward; "
                "gradients through the recomputation would belong to other weights",
                remedies=["call backward before merging or unmerging adapters"],
            )
        if gone := sorted(self._names - _names_of(layer)):
            raise RecomputeMismatchError(
                f"{region}: adapter {gone[0]!r} was deleted between forward and backward",
                remedies=["call backward before deleting adapters"],
            )
        for name, then in (("_active_adapter", self._active), ("_disable_adapters", self._disabled)):
            present = getattr(layer, name)
            if present != then:
                undo.callback(setattr, layer, name, present)
                setattr(layer, name, _copied(then))
        present = getattr(layer, "scaling", {})
        if present != self._scaling:
            replace_entries(present, self._scaling, undo)


def _copied(value: Any) -> Any:
    return list(cast("list[str]", value)) if isinstance(value, list) else value


def _names_of(layer: Any) -> frozenset[str]:
    return frozenset(name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute, ()))


def _adapters_of(modules: list[nn.Module]) -> list[_Adapters]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return []
    kinds = (tuners.BaseTunerLayer, sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper)  # modules_to_save
    return [_Adapters(m) for m in modules if isinstance(m, kinds)]


class _Hooks:
    """The forward hooks of some modules, each with its place in them: they are part of what a module computes."""

    __slots__ = ("_kept",)

    def __init__(self, modules: list[nn.Module]) -> None:
        self._kept = [(m, [dict(getattr(m, name)) for name in _HOOKS]) for m in modules if _has_hooks(m)]

    def restore(self, modules: list[nn.Module], undo: contextlib.ExitStack) -> None:
        """Put the hooks of then in the place of those of now, until `undo` closes."""
        then = {id(module): kept for module, kept in self._kept}
        for module in modules:
            kept = then.get(id(module))
            if kept is None and not _has_hooks(module):
                continue
            for position, name in enumerate(_HOOKS):
                live, wanted = getattr(module, name), {} if kept is None else kept[position]
                if live != wanted:
                    replace_entries(live, wanted, undo)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


class Known:
    """What does not change from call to call of a region.

    Attributes:
        routes: It chooses experts.
        buffers: Those its own forward changes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.routes = has_router(module)
        self.buffers = ChangingBuffers()


class World:
    """Snapshot of everything around a region's forward except random state.

    Args:
        module: The region.
        captured: What the user asked to be restored.
        changing: What is known of the region's buffers.
    """

    __slots__ = ("_adapters", "_captured", "_hooks", "_modules", "_requires_grad", "_state", "_training")

    def __init__(self, module: nn.Module, captured: list[Captured], changing: ChangingBuffers) -> None:
        self._modules = modules = list(module.modules())
        self._training = [(m, m.training) for m in modules]
        self._requires_grad = [(p, p.requires_grad) for p in module.parameters()]
        self._adapters = _adapters_of(modules)
        self._hooks = _Hooks(modules[1:])  # the region's own hooks run around it, and once
        self._state = ModuleState(module, changing)
        self._captured = [(item, item.read()) for item in captured]

    def settle(self) -> None:
        """The forward is over."""
        self._state.settle()

    @contextlib.contextmanager
    def restored(self, region: str) -> Generator[None]:
        """The world of the forward pass inside, the present one again after.

        Raises:
            RecomputeMismatchError: adapters were merged into or unmerged from the base weights since forward, or
                deleted, or weights were written to: what the forward used no longer exists.
        """
        with contextlib.ExitStack() as undo:
            for module, training in self._training:
                if module.training != training:
                    undo.callback(setattr, module, "training", module.training)
                    module.training = training
            for adapters in self._adapters:
                adapters.restore(region, undo)
            for parameter, flag in self._requires_grad:
                if parameter.requires_grad != flag:
                    undo.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_(flag)
            self._hooks.restore(self._modules[1:], undo)
            for item, value in self._captured:
                present = item.read()
                undo.callback(item.write, present)
                item.write(value)
            undo.enter_context(self._state.restored(region))
            yield
