"""What the recomputation must find as it was in forward: random state, flags, adapters, hooks, captured values.

Design rules R4 and R5. Autocast is restored by `torch.utils.checkpoint` itself.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import nn
from torch.utils._pytree import tree_any

from rematree.errors import RecomputeMismatchError
from rematree.execute.module_state import ChangingBuffers, ModuleState, replace_entries
from rematree.execute.routing import has_router

_HOOKS: Final = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


_KERNELS: Final = tuple(
    (getattr(torch.backends.cuda, f"{name}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{name}_sdp"))
    for name in ("flash", "mem_efficient", "math", "cudnn")
)


@dataclass(frozen=True)
class Captured:
    """One value the user asked to be restored around recomputation."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


class Autocast:
    """Autocast as it is now, on the CPU and on the accelerator."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        devices = ("cpu", "cuda") if torch.cuda.is_initialized() else ("cpu",)
        self._kept = tuple((device, *self._of(device)) for device in devices)

    @staticmethod
    def _of(device: str) -> tuple[bool, torch.dtype, bool]:
        enabled = torch.is_autocast_enabled(device)
        return enabled, torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """Like this inside."""
        with contextlib.ExitStack() as undo:
            for device, enabled, dtype, caches in self._kept:
                if (enabled, dtype, caches) != self._of(device):
                    undo.enter_context(torch.autocast(device, dtype, enabled, caches))
            yield


class AttentionKernels:
    """Which of torch's attention kernels may be chosen now (`torch.nn.attention.sdpa_kernel`)."""

    __slots__ = ("_allowed",)

    def __init__(self) -> None:
        self._allowed = self._now()

    @staticmethod
    def _now() -> tuple[bool, ...]:
        return tuple(asked() for asked, _ in _KERNELS)

    def restore(self, undo: contextlib.ExitStack) -> None:
        """Put the choice back until `undo` closes."""
        for (_, allow), then, present in zip(_KERNELS, self._allowed, self._now(), strict=True):
            if then != present:
                undo.callback(allow, present)
                allow(then)


def builds_graph(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether calling `module` now records anything for backward; if not, there is nothing to recompute (R6, R7)."""
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
        return True
    if tree_any(lambda x: isinstance(x, torch.Tensor) and x.requires_grad, (args, kwargs)):
        return True
    return any(p.requires_grad for p in module.parameters())


class _Adapters:
    """What a PEFT layer's forward depends on besides its weights."""

    __slots__ = ("_active", "_disabled", "_layer", "_merged", "_names", "_scaling")

    def __init__(self, layer: Any, holders: tuple[Any, ...]) -> None:
        self._layer = layer
        self._active: Any = _copied(layer._active_adapter)
        self._disabled: bool = layer._disable_adapters
        self._merged = tuple(getattr(layer, "merged_adapters", ()))
        self._scaling: dict[str, Any] = dict(getattr(layer, "scaling", {}))
        self._names = frozenset(itertools.chain.from_iterable(holders))

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
        if gone := sorted(self._names.difference(*_holders_of(layer))):
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


def _holders_of(layer: Any) -> tuple[Any, ...]:
    """The containers of a PEFT layer's adapters; their keys are the adapters' names."""
    return tuple(getattr(layer, attribute, ()) for attribute in layer.adapter_layer_names)


def _adapter_layers(modules: Iterable[nn.Module]) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    """Every PEFT layer among `modules`, with its containers if those are its children: then they are known with it."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return ()
    kinds = (tuners.BaseTunerLayer, sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper)  # modules_to_save
    found: list[tuple[Any, tuple[Any, ...]]] = []
    for module in modules:
        if isinstance(module, kinds):
            holders = _holders_of(module)
            found.append((module, holders if all(isinstance(each, nn.Module) for each in holders) else ()))
    return tuple(found)


class _Hooks:
    """The forward hooks of some modules, each with its place in them: they are part of what a module computes."""

    __slots__ = ("_kept",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._kept = [(m, [dict(getattr(m, name)) for name in _HOOKS]) for m in modules if _has_hooks(m)]

    def restore(self, modules: Sequence[nn.Module], undo: contextlib.ExitStack) -> None:
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


class _Contents:
    """The modules inside a region, walked once. Not the region itself, which may be the weak key of what holds this.

    Attributes:
        parts: They, in the order of `named_modules()`.
        paths: Their paths within the region.
        adapters: Those of them that are PEFT layers, each with the containers of its adapters.
        own: The same of the region itself; the layer is left to be put in.
    """

    __slots__ = ("_children", "adapters", "own", "parts", "paths")

    def __init__(self, module: nn.Module) -> None:
        (_, *named) = module.named_modules()
        self.paths = tuple(path for path, _ in named)
        self.parts = tuple(part for _, part in named)
        self.adapters = _adapter_layers(self.parts)
        self.own = tuple(holders for _, holders in _adapter_layers([module]))
        self._children = _children(module, self.parts)

    def still_there(self, module: nn.Module) -> bool:
        """Whether no module was put in, taken out or replaced since. Cost: a microsecond for ten modules."""
        return _children(module, self.parts) == self._children


def _children(module: nn.Module, parts: Sequence[nn.Module]) -> list[int]:
    """Identities of all children; they are those of living modules as long as `parts` are held."""
    held: list[Mapping[str, Any]] = [module._modules, *[part._modules for part in parts]]
    return [id(child) for children in held if children for child in children.values()]


class Known:
    """What does not change from call to call of a region, as long as the modules in it are the same.

    Attributes:
        routes: It chooses experts.
        draws_on_host: Its first call drew from Python's or NumPy's generator; None: there was none.
        buffers: Those its own forward changes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.routes = False
        self.draws_on_host: bool | None = None
        self.buffers = ChangingBuffers()
        self._contents: _Contents | None = None
        self.contents(module)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_contents": None}  # a copy belongs to copied modules

    def contents(self, module: nn.Module) -> _Contents:
        """The modules inside `module`, the region, as they are now."""
        known = self._contents
        if known is None or not known.still_there(module):
            known = self._contents = _Contents(module)
            self.routes = has_router(module)
        return known


class Switches:
    """What a user switches in a region: whether it trains, what of it does, and which adapters are on, by how much.

    Args:
        module: The region.
        known: What is known of the region.
    """

    __slots__ = ("_adapters", "_modules", "_requires_grad", "_training")

    def __init__(self, module: nn.Module, known: Known) -> None:
        contents = known.contents(module)
        self._modules = (module, *contents.parts)
        self._training = [part.training for part in self._modules]
        self._requires_grad = [
            (p, p.requires_grad)
            for part in self._modules
            if part._parameters
            for p in part._parameters.values()
            if p is not None
        ]
        layers = [*((module, holders) for holders in contents.own), *contents.adapters]
        self._adapters = [_Adapters(layer, holders or _holders_of(layer)) for layer, holders in layers]

    def restore(self, region: str, undo: contextlib.ExitStack) -> None:
        """Put it back until `undo` closes.

        Raises:
            RecomputeMismatchError: adapters were merged, unmerged or deleted since.
        """
        for module, training in zip(self._modules, self._training, strict=True):
            if module.training != training:
                undo.callback(setattr, module, "training", module.training)
                module.training = training
        for adapters in self._adapters:
            adapters.restore(region, undo)
        for parameter, flag in self._requires_grad:
            if parameter.requires_grad != flag:
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(flag)

    @contextlib.contextmanager
    def restored(self, region: str) -> Generator[None]:
        """As it was inside, as it is now again after; raises what `restore` does."""
        with contextlib.ExitStack() as undo:
            self.restore(region, undo)
            yield


class World(Switches):
    """Snapshot of everything around a region's forward except random state.

    Args:
        module: The region.
        captured: What the user asked to be restored.
        known: What is known of the region.
    Cost:
        A pass over the region's modules and parameters; no walk down the tree unless a module was exchanged.
    """

    __slots__ = ("_captured", "_hooks", "_kernels", "_state")

    def __init__(self, module: nn.Module, captured: list[Captured], known: Known) -> None:
        super().__init__(module, known)
        contents = known.contents(module)
        self._hooks = _Hooks(contents.parts)  # the region's own hooks run around it, and once
        self._state = ModuleState(self._modules, ("", *contents.paths), known.buffers)
        self._kernels = AttentionKernels()
        self._captured = [(item, item.read()) for item in captured]

    def settle(self, skipped: Collection[str] = ()) -> None:
        """The forward is over; its rerun will not run the modules at the paths `skipped` within the region."""
        self._state.settle(skipped)

    @contextlib.contextmanager
    def restored(self, region: str) -> Generator[None]:
        """The world of the forward pass inside, the present one again after.

        Raises:
            RecomputeMismatchError: adapters were merged into or unmerged from the base weights since forward, or
                deleted, or weights were written to: what the forward used no longer exists.
        """
        with contextlib.ExitStack() as undo:
            self.restore(region, undo)
            self._hooks.restore(self._modules[1:], undo)
            self._kernels.restore(undo)
            for item, value in self._captured:
                present = item.read()
                undo.callback(item.write, present)
                item.write(value)
            self._state.restore(region, undo)
            yield
