"""What stands for a compiled block on fake tensors: a call that keeps, takes and returns what the measured one does.

Compiled code has no fake form. So the referee runs, in the place of each compiled block, one autograd function which
allocates the bytes that were measured on a real one, for as long as the real one holds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from rematree.errors import UsageError
from rematree.execute.context import builds_graph
from rematree.memory.accounts import COMPILED
from rematree.regions import block_kind


@dataclass(frozen=True, slots=True)
class CompiledProfile:
    """One kind of block, compiled with one budget and measured on the device.

    Bytes are above what was live when the forward, or the backward, began; they hold for the batch they were measured
    with.

    Attributes:
        kept_bytes: Stay from forward to backward, without the block's inputs and its output.
        kept_inputs: Which of the call's tensors stay, by their place among all of its arguments' leaves.
        keeps_output: Whether the output stays.
        forward_peak_bytes: Largest in forward, output included.
        backward_peak_bytes: Largest in backward, gradients included.
        forward_seconds: Of one call, on the scale of the price of ops.
        backward_seconds: Of one call, on the same scale.
        compile_seconds: Of the first call, which compiles.
        difference: Largest relative difference from the plain block, over its output and every gradient.
        draws: Whether it draws random numbers.
        outputs: Shape and dtype of every leaf of the output; None for one that is no tensor.
        structure: Of the output.
    """

    kept_bytes: int
    kept_inputs: frozenset[int]
    keeps_output: bool
    forward_peak_bytes: int
    backward_peak_bytes: int
    forward_seconds: float
    backward_seconds: float
    compile_seconds: float
    difference: float
    draws: bool
    outputs: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    structure: TreeSpec


Profiles = Mapping[tuple[Any, float], CompiledProfile]  # (kind of block, budget)


class Book(Protocol):
    """What is told of work that no op shows: the ledger."""

    draws: int

    def ran(self, seconds: float, workspace_bytes: int) -> None:
        """Something ran that took `seconds` and at its worst `workspace_bytes` beyond what is live now."""

    def move(self, tensor: torch.Tensor, category: str) -> None:
        """Change the category of a live tensor."""


class StandIns:
    """Runs profiles instead of compiled blocks.

    Args:
        profiles: By kind of block and budget.
        budgets: Budget of each compiled block, by path.
        book: Where seconds and bytes go.
    """

    def __init__(self, profiles: Profiles, budgets: Mapping[str, float], book: Book) -> None:
        self._profiles = profiles
        self._budgets = budgets
        self._book = book

    def run(self, path: str, block: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call what stands for the compiled `block`.

        Raises:
            UsageError: there is no profile of it.
        """
        if not block.training or not builds_graph(block, args, kwargs):
            return inner(*args, **kwargs)
        profile = self._profiles.get((block_kind(block), self._budgets[path]))
        if profile is None:
            raise UsageError(f"{path}: no profile of this block compiled with budget {self._budgets[path]}")
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        trained = [p for p in block.parameters() if p.requires_grad]
        run = cast("Callable[..., Any]", _StandIn.apply)
        made = iter(run(profile, self._book, len(leaves), *leaves, *trained))
        return tree_unflatten([next(made) if o is not None else None for o in profile.outputs], profile.structure)


class _StandIn(torch.autograd.Function):
    """Forward and backward of a profile.

    Inputs: the profile, the book, how many of the tensors are arguments, then these and the trained parameters.
    """

    @staticmethod
    def forward(ctx: Any, profile: CompiledProfile, book: Book, count: int, *tensors: torch.Tensor) -> Any:
        book.ran(profile.forward_seconds, profile.forward_peak_bytes)
        if profile.draws:
            book.draws += 1
        device = tensors[0].device
        out = tuple(torch.empty(*o, dtype=t, device=device) for o, t in (x for x in profile.outputs if x is not None))
        kept = torch.empty(profile.kept_bytes, dtype=torch.uint8, device=device)
        book.move(kept, COMPILED)
        inputs = [tensor for place, tensor in enumerate(tensors[:count]) if place in profile.kept_inputs]
        ctx.save_for_backward(kept, *inputs, *(out if profile.keeps_output else ()))
        ctx.profile, ctx.book = profile, book
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        held = ctx.saved_tensors  # refilled here if the block is recomputed
        ctx.book.ran(ctx.profile.backward_seconds, ctx.profile.backward_peak_bytes)
        needed = ctx.needs_input_grad[3:]
        found = [
            torch.empty(shape, dtype=dtype, device=device) if needs else None
            for needs, (shape, dtype, device) in zip(needed, ctx.like, strict=True)
        ]
        del held
        return None, None, None, *found
