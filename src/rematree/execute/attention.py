"""The attention core as a region, reached through transformers' attention interface.

transformers looks the attention function up by the name in `config._attn_implementation`. A module whose core is to be
a region sees the name "rematree:<name>" in its config; that name stands for a function which asks the calling module
what to do and then calls what <name> stands for. The config itself, and whoever else reads it, keeps <name>.

Some modules also read the name: those with sparse attention mask keys themselves where it is "eager" or "sdpa", and
Falcon calls torch's function then. So the name is a string that is equal to <name>, too; in a dictionary it is not.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import nn

from rematree.engines import own_class

_PREFIX: Final = "rematree:"
_ATTRIBUTE: Final = "_rematree_attention"
_EAGER: Final = "eager_attention_forward"

AttentionAround = Callable[..., Any]  # around(inner, *args, **kwargs), like ForwardOverride's


class _Alias(str):
    """The name "rematree:<name>", equal to itself and to <name>; hashed as what it spells."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or str.__eq__(self.removeprefix(_PREFIX), other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


class _View:
    """A config as one module sees it: all of it, but with an alias for the name of the attention function."""

    def __init__(self, config: Any) -> None:
        vars(self)["_rematree_config"] = config

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(vars(self)["_rematree_config"])

    @property
    def _attn_implementation(self) -> str:
        return _register(vars(self)["_rematree_config"]._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_rematree_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_rematree_config"], name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_View":
        return _View(copy.deepcopy(vars(self)["_rematree_config"], memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _View, (vars(self)["_rematree_config"],)


def _plain(config: Any) -> Any:
    """What `config` is a view of, or itself."""
    return vars(config)["_rematree_config"] if type(config) is _View else config


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


def _resolve(name: str, module: nn.Module) -> Callable[..., Any]:
    """What `name` stands for when `module` asks; "eager" is whatever the module's own file defines."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    own = _own_eager(module)
    assert own is not None  # else it is none of `attention_modules`
    return own


def _own_eager(module: nn.Module) -> Callable[..., Any] | None:
    """The function that the forward of `module` names for "eager"; None if it names another.

    A file may have several, each with its own scaling and softmax.
    """
    forward = inspect.unwrap(own_class(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or _EAGER not in code.co_names:
        return None
    return forward.__globals__.get(_EAGER)


@functools.cache
def _register(name: str) -> str:
    """The alias of `name`, known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = name.removeprefix(_PREFIX)
    alias = _Alias(_PREFIX + name)
    AttentionInterface.register(str(alias), _Core(name))  # a plain key: dynamo goes through them all
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(str(alias), ALL_MASK_ATTENTION_FUNCTIONS[name])
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
        if name.removeprefix(_PREFIX) == "eager" and _own_eager(module) is None:
            continue
        found.append((path, module))
    return found


def eager_core(module: nn.Module) -> Callable[..., Any] | None:
    """The function, of the file that defines `module`, which it calls as its attention; None if it calls another.

    Others than attentions hold a config, too; they do not name that function.
    """
    config = _plain(module.__dict__.get("config"))
    return _own_eager(module) if getattr(config, "_attn_implementation", None) == "eager" else None


class AttentionRegions:
    """Makes the attention core of some modules of one model a region; `remove()` restores their configs."""

    def __init__(self, arounds: Iterable[tuple[nn.Module, AttentionAround]]) -> None:
        self._modules: list[nn.Module] = []
        self._viewed: list[nn.Module] = []
        for module, around in arounds:
            own = module.__dict__
            own[_ATTRIBUTE] = around
            self._modules.append(module)
            if type(own["config"]) is not _View:
                own["config"] = _View(own["config"])
                self._viewed.append(module)

    def remove(self) -> None:
        """Undo. Does nothing the second time."""
        for module in self._modules:
            module.__dict__.pop(_ATTRIBUTE, None)
        for module in self._viewed:
            module.__dict__["config"] = _plain(module.__dict__["config"])
        self._modules.clear()
        self._viewed.clear()


def forget_attention(model: nn.Module) -> None:
    """Take the regions off a copy of a model (its config was copied with it)."""
    for module in model.modules():
        own = module.__dict__
        own.pop(_ATTRIBUTE, None)
        if "config" in own:
            own["config"] = _plain(own["config"])
