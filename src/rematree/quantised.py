"""Quantised layers of bitsandbytes: what they hold beside their parameters, seen without importing the library.

A packed weight is a parameter of whole bytes. Its scales and code tables are neither parameters nor buffers: they hang
on the parameter (`Params4bit.quant_state`) or, after the first forward of an 8-bit layer, on the module
(`Linear8bitLt.state`). A model can only hold such layers once the library is imported, so names are enough.
"""

import functools
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

_LIBRARY: Final = "bitsandbytes"
_INT8: Final = "Linear8bitLt"
_FOUR_BIT: Final = "Linear4bit"


def _from_library(value: object) -> bool:
    return _is_of_library(type(value))


@functools.cache
def _is_of_library(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == _LIBRARY for base in kind.__mro__)


def _has_base(module: nn.Module, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith(_LIBRARY) for base in type(module).__mro__)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in model.named_modules() if _from_library(module))


def four_bit_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every `bitsandbytes.nn.Linear4bit` (NF4, FP4) of `model`."""
    return [(path, module) for path, module in _modules(model) if _has_base(module, _FOUR_BIT)]


def frozen_int8_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every `bitsandbytes.nn.Linear8bitLt` of `model` that is packed and trains nothing."""
    return [
        (path, module)
        for path, module in _modules(model)
        if _has_base(module, _INT8)
        and not any(p.requires_grad for p in module.parameters(recurse=False))
        and not module.state.has_fp16_weights  # pyright: ignore[reportAttributeAccessIssue]
    ]


def attributes_of(parameter: nn.Parameter) -> dict[str, Any]:
    """What bitsandbytes has put on a packed parameter; empty for any other."""
    return dict(vars(parameter)) if _from_library(parameter) else {}


def hidden_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that quantised layers of `model` hold beside its parameters and buffers: scales, code tables, offsets.

    They may share storage with a parameter or with each other; count storages, not tensors.
    """
    for _, module in _modules(model):
        yield from held_by(vars(module))
        for parameter in module.parameters(recurse=False):
            yield from held_by(vars(parameter))


def held_by(attributes: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Tensors among `attributes` of a quantised layer or of its weight, and inside the library's objects there."""
    for value in attributes.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif _from_library(value) and not isinstance(value, nn.Module | type):
            yield from held_by(vars(value))


def recast_biases(model: nn.Module) -> set[str]:
    """Names of the biases whose dtype a forward of `model` changes: a quantised layer casts its own to its input's."""
    return {
        f"{path}.bias"
        for path, module in _modules(model)
        if (_has_base(module, _FOUR_BIT) or _has_base(module, _INT8)) and getattr(module, "bias", None) is not None
    }


def describe_packing(model: nn.Module) -> list[str]:
    """One line for every quantised layer: what of its packing the shape and dtype of its parameters do not show.

    The same before and after the layer's first forward, which moves its scales about.
    """
    lines: list[str] = []
    for path, module in _modules(model):
        line = f"{path} {type(module).__name__}"
        weight = getattr(module, "weight", None)
        state = vars(weight).get("quant_state") if isinstance(weight, torch.Tensor) else None
        if state is not None:
            line += f" {state.quant_type} {state.blocksize} {state.nested} {state.dtype}"
        lines.append(line)
    return lines
