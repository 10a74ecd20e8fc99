"""Adapters that recomputation cannot serve."""

from typing import Any, Final

from torch import nn

from rematree.errors import UnsupportedModelError

_PREFIXES: Final = ("PREFIX_TUNING", "CARTRIDGE")  # they hand their prefix to the layers as a key-value cache


def refuse_prefixes(model: nn.Module) -> None:
    """Refuse adapters whose numbers enter the layers by a cache: transformers empties it where layers are recomputed.

    Raises:
        UnsupportedModelError: names the kind of adapter.
    """
    for module in model.modules():
        configs: Any = module.__dict__.get("_peft_config") or {}  # only prompt learning keeps them here
        kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()]
        if found := [kind for kind in kinds if kind in _PREFIXES]:
            raise UnsupportedModelError(
                f"{found[0]} does not work with checkpointing: the prefix reaches the layers as a key-value cache, "
                "and a recomputed layer has none"
            )
