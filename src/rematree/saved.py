"""List what autograd keeps: one line for every saved tensor of a forward pass, on fake tensors."""

import re
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rematree.execute.attention import attention_modules
from rematree.execute.override import ForwardOverride
from rematree.fingerprint import dtype_name
from rematree.memory.ledger import Ledger
from rematree.observation.observe import LossFunction, RegionStack, Twin, is_plumbing, source_line
from rematree.pricing.cost import Free
from rematree.quantised import frozen_int8_linears, hidden_tensors
from rematree.regions import ATTENTION_SUFFIX, inner_regions
from rematree.table import fold_paths, render_table
from rematree.units import format_bytes

_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")


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


@dataclass(frozen=True, slots=True)
class FoldedTensor:
    """One saved tensor of every layer that saves the same.

    Attributes:
        region: Regions that save it, folded.
        count: How many they are.
        num_bytes: Bytes of each; 0 where it is a weight, or memory an earlier line counts.
        dtype: Dtype.
        shape: Shape.
        source: "file.py:line" of the op that saved it.
    """

    region: str
    count: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    source: str


class SavedTensors(list[SavedTensor]):
    """Saved tensors in the order they were saved; prints as a table, folded over equal layers."""

    def folded(self) -> list[FoldedTensor]:
        """One entry for every saved tensor, equal layers written once.

        The k-th tensor of one layer folds only with the k-th equal one of another, so a layer that saves the same
        shape twice keeps two entries.
        """
        groups: dict[tuple[Any, ...], list[SavedTensor]] = {}
        seen: dict[tuple[Any, ...], int] = {}
        for tensor in self:
            what = (tensor.num_bytes, tensor.dtype, tensor.shape, tensor.source)
            turn = seen[tensor.region, what] = seen.get((tensor.region, what), 0) + 1
            groups.setdefault((_NUMBER.sub("#", tensor.region), what, turn), []).append(tensor)
        return [
            FoldedTensor(
                ", ".join(fold_paths([tensor.region for tensor in members])),
                len(members),
                members[0].num_bytes,
                members[0].dtype,
                members[0].shape,
                members[0].source,
            )
            for members in groups.values()
        ]

    def __str__(self) -> str:
        rows = [
            [
                line.region or "(outside any region)",
                line.dtype,
                "x".join(map(str, line.shape)) or "scalar",
                ("" if line.count == 1 else f"{line.count} x ") + format_bytes(line.num_bytes),
                line.source,
            ]
            for line in self.folded()
        ]
        total = ["sum", "", "", format_bytes(sum(tensor.num_bytes for tensor in self)), ""]
        return render_table(("region", "dtype", "shape", "bytes", "source"), [*rows, total], right={3})


def saved_tensors(model: nn.Module, batch: Mapping[str, Any], *, loss: LossFunction | None = None) -> SavedTensors:
    """Every tensor autograd would hold after the forward of a training step, in the order it was saved.

    The sum of `num_bytes` is the activation memory of the plain model: distinct storages, weights and batch left out.

    Args:
        model: The live model; it is read, not run.
        batch: One batch with labels.
        loss: The scalar to differentiate, from the model's output; default: its `loss`.
    Returns:
        A list; printed, it is one line a tensor, equal layers folded.
    Raises:
        UsageError: the model returns no loss.
        UnsupportedModelError: the model cannot be observed.
    """
    twin = Twin(model, batch, loss)
    if not twin.model.training:
        twin.model.train()
    ledger = Ledger(Free(), twin.device.type)
    found: list[_Found] = []

    def pack(tensor: torch.Tensor) -> _Held:
        held = _Held(tensor.detach())  # with its history, what an op saves of its own output would never die
        storage, num_bytes = ledger.size(tensor)
        found.append(_Found(weakref.ref(held), storage, num_bytes, stack.path, _source(sys._getframe(1))))
        return held

    def keep_input(inner: Callable[..., Any], x: torch.Tensor) -> Any:
        out = inner(x)
        if out.grad_fn is not None:
            # bitsandbytes keeps it in an attribute of its autograd node: no hook is told
            out.grad_fn.metadata["rematree_input"] = pack(x)
        return out

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
            counted = set(ledger.known())
            with ledger, saved_tensors_hooks(pack, lambda held: held.tensor):
                kept = twin.loss()
            lines = _held_still(found, counted)
            del kept
    finally:
        stack.remove()
        for override in overrides:
            override.remove()
    return lines


class _Held:
    """What autograd holds in place of a tensor; dies with the graph's node."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True, slots=True)
class _Found:
    held: "weakref.ref[_Held]"
    storage: int
    num_bytes: int
    region: str
    source: str


def _held_still(found: list[_Found], counted: set[int]) -> SavedTensors:
    """Lines for what the graph of the loss holds; what was computed beside it and dropped is gone by now."""
    lines = SavedTensors()
    for item in found:
        held = item.held()
        if held is None:
            continue
        lines.append(
            SavedTensor(
                0 if item.storage in counted else item.num_bytes,
                dtype_name(held.tensor.dtype),
                tuple(held.tensor.shape),
                item.region,
                item.source,
            )
        )
        counted.add(item.storage)
    return lines


def _source(frame: FrameType | None) -> str:
    while frame is not None and is_plumbing(frame):
        frame = frame.f_back
    return "?" if frame is None else source_line(frame, frame.f_lineno)
