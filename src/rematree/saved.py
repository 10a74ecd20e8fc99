"""List what autograd keeps: one line for every saved tensor of a forward pass, on fake tensors."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from types import FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rematree.cost import Free
from rematree.execute.attention import attention_modules
from rematree.execute.override import ForwardOverride
from rematree.ledger import Ledger
from rematree.observe import LossFunction, RegionStack, Twin
from rematree.quantised import frozen_int8_linears, hidden_tensors
from rematree.regions import ATTENTION_SUFFIX, inner_regions

# Frames that only pass a call on; the line a reader wants is the first one above them.
_PLUMBING: Final = ("/torch/", "/rematree/", "/accelerate/")


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor autograd holds for backward.

    Attributes:
        num_bytes: Bytes it adds: 0 for weights and for memory an earlier line already counts.
        dtype: Its dtype, without "torch.".
        shape: Its shape.
        region: Path of the innermost region that saved it.
        source: "file.py:line" of the model code that ran the op.
    """

    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    region: str
    source: str


def saved_tensors(model: nn.Module, batch: Mapping[str, Any], *, loss: LossFunction | None = None) -> list[SavedTensor]:
    """Every tensor autograd would hold after the forward of a training step, in the order it was saved.

    The sum of `num_bytes` is the activation memory of the plain model: distinct storages, weights and batch left out.

    Args:
        model: The live model; it is read, not run.
        batch: One batch with labels.
        loss: The scalar to differentiate, from the model's output; default: its `loss`.
    Raises:
        UsageError: the model returns no loss.
        UnsupportedModelError: the model cannot be observed.
    """
    twin = Twin(model, batch, loss)
    if not twin.model.training:
        twin.model.train()
    ledger = Ledger(Free(), twin.device.type)
    found: list[SavedTensor] = []
    counted: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage, num_bytes = ledger.size(tensor)
        found.append(
            SavedTensor(
                0 if storage in counted else num_bytes,
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape),
                stack.path,
                _source(sys._getframe(1)),
            )
        )
        counted.add(storage)
        return tensor

    def keep_input(inner: Callable[..., Any], x: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and x.requires_grad:
            pack(x)  # bitsandbytes does, in an attribute of its autograd node: no hook is told
        return inner(x)

    overrides = [ForwardOverride(layer, keep_input) for _, layer in frozen_int8_linears(twin.model)]
    stack = RegionStack(
        dict(inner_regions(twin.model)),
        {f"{path}{ATTENTION_SUFFIX}": module for path, module in attention_modules(twin.model)},
    )
    try:
        with twin.mode:
            statics = [*twin.model.parameters(), *twin.model.buffers(), *hidden_tensors(twin.model)]
            statics += [t for t in twin.batch.values() if isinstance(t, torch.Tensor)]
            ledger.adopt(statics, "static")
            counted.update(ledger.known())
            with ledger, saved_tensors_hooks(pack, lambda tensor: tensor):
                kept = twin.loss()
            del kept
    finally:
        stack.remove()
        for override in overrides:
            override.remove()
    return found


def _source(frame: FrameType | None) -> str:
    while frame is not None and any(part in frame.f_code.co_filename for part in _PLUMBING):
        frame = frame.f_back
    if frame is None:
        return "?"
    return f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno}"
