"""Checkpointing switched on for one live model, and everything that takes it off again.

transformers' layers look at two attributes of their own, `gradient_checkpointing` and `_gradient_checkpointing_func`:
these are set, so that the library, its Trainer and PEFT see that checkpointing is on. Blocks of other models get the
same two attributes and a forward that looks at them.

While it is on, the model's own methods lead here: whoever calls `model.activation_checkpointing_enable(...)`, as the
Trainer does, changes this switch's options, and `model.activation_checkpointing_disable()` pauses it.
"""

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn

from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.input_grads import add_input_grad_hooks, remove_input_grad_hooks
from rematree.execute.layer_checkpoint import CheckpointOptions, LayerCheckpoint
from rematree.execute.override import ForwardOverride
from rematree.execute.quantised import keep_no_input
from rematree.execute.self_check import AdapterCheck
from rematree.quantised import frozen_int8_linears
from rematree.regions import find_chain, is_checkpointing_layer, parent_path, unwrap
from rematree.units import Bytes

FLAG: Final = "gradient_checkpointing"
FUNCTION: Final = "_gradient_checkpointing_func"
_SWITCH: Final = "_rematree_checkpointing"
_KEEPS_CACHE: Final = "_can_checkpoint_with_cache"
_WRAPPERS: Final = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


class Switch:
    """Checkpointing on `root`, until `remove()`.

    Args:
        root: The model inside every wrapper.
        options: How to recompute.
        own_kwargs: What the user passed for checkpointing; a model whose own switch takes none gets to hear of it.
        budget: Bytes that were asked for with it, for whoever plans.
        methods: Stand in for the model's methods of these names while this is on; each gets `root` first.
    Raises:
        UnsupportedModelError: there is nothing in `root` that could be recomputed.
        UsageError: `every_n_layers` for a model whose layers cannot be told apart.
    """

    def __init__(
        self,
        root: nn.Module,
        options: CheckpointOptions,
        own_kwargs: tuple[str, ...] = (),
        *,
        budget: Bytes | None = None,
        methods: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.options = options
        self.budget = budget
        self._root = root
        self._methods = dict(methods or {})
        self._before: list[tuple[nn.Module, str, bool, Any]] = []
        self._overrides: list[ForwardOverride] = []
        self._own_disable: Callable[[], Any] | None = None
        self._check = AdapterCheck(root)
        try:
            self._install(own_kwargs)
        except BaseException:
            self.remove()
            raise
        self._set(root, _SWITCH, self)

    def _install(self, own_kwargs: tuple[str, ...]) -> None:
        root = self._root
        # Innermost, so that a layer that is run again runs it in this form.
        for _, layer in frozen_int8_linears(root):
            self._overrides.append(ForwardOverride(layer, functools.partial(keep_no_input, layer)))
        own = own_switch(root)
        if getattr(root, "supports_gradient_checkpointing", True) is False:
            raise UnsupportedModelError(
                f"{type(root).__name__} does not support checkpointing",
                details=["its class attribute supports_gradient_checkpointing is False"],
            )
        if own is not None:
            self._use_own(own, own_kwargs)
        elif flagged := [(path, module) for path, module in root.named_modules() if has_flag(module)]:
            self._use_flags(flagged)
        else:
            self._use_chain()
        self._overrides.append(ForwardOverride(root, self._outermost))
        if own is not None or self.options.use_reentrant:  # a model's own switch may be reentrant
            add_input_grad_hooks(root, temporary=True)
        # PEFT and the Trainer call these methods while checkpointing is on; the hooks they add would stay behind.
        if callable(getattr(root, "enable_input_require_grads", None)):
            self._set(root, "enable_input_require_grads", functools.partial(add_input_grad_hooks, root, temporary=True))
            self._set(root, "disable_input_require_grads", functools.partial(_disable_input_grads, root))
        if own is None:
            for name, method in self._methods.items():
                if callable(getattr(root, name, None)):
                    self._set(root, name, functools.partial(method, root))

    def _outermost(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return inner(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._without_graph(inner, *args, **kwargs)
        if self._root.training:
            self._check.forward_begins()
        return inner(*args, **kwargs)

    def _without_graph(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """`inner` with the flags down: transformers' models in training mode make no cache where they are up.

        Also under `no_grad`, where nothing is recomputed: text generated between two training steps would be another.
        """
        flagged = self.flagged()
        for module in flagged:
            module.__dict__[FLAG] = False
        try:
            return inner(*args, **kwargs)
        finally:
            for module in flagged:
                module.__dict__[FLAG] = True

    def _use_flags(self, flagged: list[tuple[str, nn.Module]]) -> None:
        layers = {path for path, module in flagged if is_checkpointing_layer(module)}
        every_n = self.options.every_n_layers
        if not layers and every_n > 1:
            raise UsageError(
                f"every_n_layers={every_n}: {type(self._root).__name__} decides for all its layers at once",
                remedies=["every_n_layers=1"],
            )
        chosen = every_nth(layers, every_n)
        for path, module in flagged:
            self._set(module, FLAG, path in chosen or path not in layers)
            self._set(module, FUNCTION, LayerCheckpoint(path, module, self.options))
            if path in layers:
                self._set(module, _KEEPS_CACHE, True)  # transformers would drop a cache, tokens in it or not

    def _use_chain(self) -> None:
        chain = find_chain(self._root)
        if chain.container is None:
            raise UnsupportedModelError(
                f"{type(self._root).__name__} has no list of blocks to recompute",
                details=["checkpointing looks for the layers of transformers, else for an nn.ModuleList of blocks"],
            )
        chosen = every_nth(chain.blocks, self.options.every_n_layers)
        for path in chain.blocks:
            block = self._root.get_submodule(path)
            self._set(block, FLAG, path in chosen)
            self._set(block, FUNCTION, LayerCheckpoint(path, block, self.options))
            self._overrides.append(ForwardOverride(block, functools.partial(_look_at_flag, block)))

    def _use_own(self, enable: Callable[[], Any], kwargs: tuple[str, ...]) -> None:
        if self.options.every_n_layers > 1:
            raise UsageError(
                f"{type(self._root).__name__}.gradient_checkpointing_enable() takes no arguments, so no every_n_layers"
            )
        if kwargs:
            warnings.warn(
                "gradient_checkpointing_kwargs is not supported in this version of transformers. The passed kwargs "
                f"({', '.join(kwargs)}) will be ignored: {type(self._root).__name__}.gradient_checkpointing_enable() "
                "takes none.",
                FutureWarning,
                stacklevel=5,
            )
        before = [(module, dict(module.__dict__)) for module in self._root.modules()]
        self._own_disable = getattr(self._root, "gradient_checkpointing_disable", None)
        enable()
        for module, old in before:
            for name in {**old, **module.__dict__}:
                if old.get(name) is not module.__dict__.get(name):
                    self._before.append((module, name, name in old, old.get(name)))

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._before.append((module, name, name in module.__dict__, module.__dict__.get(name)))
        module.__dict__[name] = value

    def flagged(self) -> list[nn.Module]:
        """The modules whose flag is set now."""
        return [module for module, name, _, _ in self._before if name == FLAG and module.__dict__.get(FLAG)]

    def pause(self) -> None:
        """Recompute nothing, and need no gradient of an embedding, until the model's own method enables it again."""
        for module in self.flagged():
            module.__dict__[FLAG] = False
        remove_input_grad_hooks(self._root, temporary=True)

    def remove(self) -> None:
        """Restore every attribute and hook. Does nothing the second time.

        Warns:
            UserWarning: the first training step left adapters without a gradient, and it was the only one so far.
        """
        if self._own_disable is not None:
            self._own_disable()
            self._own_disable = None
        for override in reversed(self._overrides):
            override.remove()
        self._overrides.clear()
        for module, name, had, value in reversed(self._before):
            if had:
                module.__dict__[name] = value
            else:
                module.__dict__.pop(name, None)
        self._before.clear()
        remove_input_grad_hooks(self._root, temporary=True)
        self._check.remove()


def _look_at_flag(block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    function: Any = block.__dict__.get(FUNCTION)
    if function is not None and block.__dict__.get(FLAG) and block.training:
        return function(functools.partial(inner, **kwargs), *args)
    return inner(*args, **kwargs)


def _disable_input_grads(root: nn.Module) -> None:
    remove_input_grad_hooks(root, temporary=True)
    kind: Any = type(root)
    kind.disable_input_require_grads(root)  # for hooks from before checkpointing was switched on


def own_switch(root: nn.Module) -> Callable[[], Any] | None:
    """`root.gradient_checkpointing_enable` if it takes no keyword arguments for checkpointing, else None."""
    enable = getattr(root, "gradient_checkpointing_enable", None)
    if not callable(enable) or "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters:
        return None
    return enable


def has_flag(module: nn.Module) -> bool:
    """Whether `module` itself, not what it wraps, has transformers' checkpointing attribute."""
    return FLAG in module.__dict__ or hasattr(type(module), FLAG)


def is_on(module: nn.Module) -> bool:
    """Whether `module` is to be recomputed, by anyone's switch."""
    return has_flag(module) and bool(getattr(module, FLAG))


def every_nth(paths: Iterable[str], n: int) -> frozenset[str]:
    """The first of every `n` paths, counted anew in every list of blocks."""
    lists = itertools.groupby(sorted(paths, key=_natural), key=parent_path)
    return frozenset(path for _, members in lists for path in list(members)[::n])


def _natural(path: str) -> tuple[str, int]:
    parent, _, last = path.rpartition(".")
    return parent, int(last) if last.isdigit() else -1


def innermost(model: nn.Module) -> nn.Module:
    """The model inside PEFT's, torch's and DeepSpeed's wrappers."""
    while True:
        inner = model._modules.get("_orig_mod")  # torch.compile
        if inner is None and type(model).__name__ in _WRAPPERS:
            inner = getattr(model, "module", None)
        if inner is None:
            inner = unwrap(model)
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def switches(model: nn.Module) -> list[Switch]:
    """What this library switched on in `model`: on itself, inside its wrappers, or on a tower of it."""
    found = [module.__dict__.get(_SWITCH) for module in model.modules()]
    return [switch for switch in found if isinstance(switch, Switch)]
