"""The attention core as a region, reached through transformers' attention interface.

transformers looks the attention function up by the name in `config._attn_implementation`. A model whose core is to be
a region gets the name "rematree:<name>" in its own config; that name stands for a function which asks the calling
module what to do and then calls what <name> stands for. Other models keep their names and notice nothing.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import nn

_PREFIX: Final = "rematree:"
_ATTRIBUTE: Final = "_rematree_attention"
_UNPACKED: Final = "_rematree_unpacked"

AttentionAround = Callable[..., Any]  # around(inner, *args, **kwargs), like ForwardOverride's


class _Core:
    """The function registered under "rematree:<name>"."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = _resolve(self._name, module)
        around: AttentionAround | None = module.__dict__.get(_ATTRIBUTE)
        if around is None:
            return inner(module, *args, **kwargs)
        return around(inner, module, *args, **kwargs)


class _Mask:
    """The mask function registered under "rematree:<name>".

    Under fake tensors transformers cannot see that a batch is not packed, and builds the mask it would skip. Whoever
    knows better writes it into the config of its copy of the model (`declare_unpacked`).
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        if getattr(kwargs.get("config"), _UNPACKED, False) and "allow_is_causal_skip" in kwargs:
            kwargs["allow_is_causal_skip"] = True
        return ALL_MASK_ATTENTION_FUNCTIONS[self._name](*args, **kwargs)


def _resolve(name: str, module: nn.Module) -> Callable[..., Any]:
    """What `name` stands for when `module` asks; "eager" is whatever the module's own file defines."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


def _register(name: str) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    alias = _PREFIX + name
    AttentionInterface.register(alias, _Core(name))
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(alias, _Mask(name))
    return alias


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that may call the attention interface: they hold a config naming an implementation we can stand for."""
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        config = module.__dict__.get("config")
        name = getattr(config, "_attn_implementation", None)
        if name is None or any(hasattr(child, "config") for child in module.modules() if child is not module):
            continue
        if getattr(config, "reorder_and_upcast_attn", False):  # GPT-2 calls another function when it sees "eager"
            continue
        if name.removeprefix(_PREFIX) == "eager" and not hasattr(
            sys.modules.get(type(module).__module__), "eager_attention_forward"
        ):
            continue
        found.append((path, module))
    return found


class AttentionRegions:
    """Makes the attention core of some modules of one model a region; `remove()` restores the configs."""

    def __init__(self, arounds: Iterable[tuple[nn.Module, AttentionAround]]) -> None:
        self._modules: list[nn.Module] = []
        self._names: list[tuple[Any, str]] = []
        for module, around in arounds:
            module.__dict__[_ATTRIBUTE] = around
            self._modules.append(module)
            config = module.__dict__["config"]
            name: str = config._attn_implementation
            if not name.startswith(_PREFIX):
                self._names.append((config, name))
                config._attn_implementation = _register(name)

    def remove(self) -> None:
        """Undo. Does nothing the second time."""
        for module in self._modules:
            module.__dict__.pop(_ATTRIBUTE, None)
        for config, name in self._names:
            config._attn_implementation = name
        self._modules.clear()
        self._names.clear()


def forget_attention(model: nn.Module) -> None:
    """Take the regions off a copy of a model (its config was copied with it)."""
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
        config = module.__dict__.get("config")
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name.startswith(_PREFIX):
            config._attn_implementation = name.removeprefix(_PREFIX)  # pyright: ignore[reportOptionalMemberAccess]


def declare_unpacked(model: nn.Module) -> None:
    """Tell the attention of a copy of a model that its batch holds one sequence a row and no padding."""
    for _, module in attention_modules(model):
        config: Any = module.__dict__["config"]
        name: str = config._attn_implementation
        if not name.startswith(_PREFIX):
            config._attn_implementation = _register(name)
        setattr(config, _UNPACKED, True)
