"""Outputs of saved regions, for the rerun of the recomputed region around them.

A rerun skips a saved region and is handed its output: the stash, or, if nobody reads the values, a placeholder of the
right shape. Inside a group neither the stash nor what autograd saves there stays: both are given to the group.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import torch

from rematree.errors import RecomputeMismatchError

_PLACEHOLDER: Final = "_rematree_placeholder"


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is what a saved region returned in a rerun without anybody reading the values."""
    return getattr(tensor, _PLACEHOLDER, False)


class Watcher(Protocol):
    """What the referee wants to know while the executor runs on fake tensors.

    Attributes:
        draws: How many ops that draw random numbers lead from the beginning of the step to the state that the
            generators are in. Whatever puts them back into a state of before says so here.
    """

    draws: int

    def placeholder(self, region: str, tensor: torch.Tensor) -> None:
        """`tensor` stands in for an output of `region`; its values mean nothing."""

    def recomputation(self, entered: bool) -> None:
        """A recomputation begins or ends."""

    def written(self, region: str) -> None:
        """The recomputed region around `region`, a saved one, has written to its output."""

    def again(self, known: dict[Hashable, Any], layouts: Hashable, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`run()`, a new tensor, for one of many equal pieces of work; the watcher may tell it by repetition."""
        ...

    def given_away(self, gradient: torch.Tensor) -> None:
        """Nobody but autograd will hold `gradient`: on real tensors it adds to it in place."""


class Around(Protocol):
    """The group that a recomputed region is in: what would be kept in the region is given to it."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """What to hold instead of `tensor`."""

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor again, in backward."""
        ...


@dataclass(slots=True)
class Leaf:
    """One tensor of a saved region's output: the stash, or what a placeholder needs to look like it."""

    stash: Any  # a tensor, or what `Around.pack` made of it
    counter: torch.Tensor | None  # shares the output's version, not its memory; until the region around it has run
    version: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    written: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor, stash: bool, around: Around | None) -> Self:
        """`tensor`, with its values if they must be kept."""
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
        counter = tensor.detach()
        counter.data = torch.empty(0, dtype=dtype, device=device)
        kept: Any = tensor.detach() if stash else None
        if kept is not None and around is not None:
            kept = around.pack(kept)
        return cls(kept, counter, tensor._version, shape, dtype, device, tensor.requires_grad)

    def again(self, region: str, around: Around | None, watcher: Watcher | None) -> torch.Tensor:
        """What the rerun gets in the place of `region`'s output.

        Raises:
            RecomputeMismatchError: the stash was written to since.
        """
        if self.stash is not None:
            stash: torch.Tensor = self.stash if around is None else around.unpack(self.stash)
            if watcher is None and around is None and stash._version != self.version:
                raise RecomputeMismatchError(
                    f"{region}: its output was modified in place after the forward pass kept it; save a larger region"
                )
            given = stash.detach().requires_grad_(self.requires_grad)
        else:
            given = torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)
            if watcher is not None:
                watcher.placeholder(region, given)
            given = given.requires_grad_(self.requires_grad)
        if self.written:
            return given.clone()  # what writes to it again needs memory that is no leaf's
        # An output that requires grad is no leaf in the forward, and autocast treats the two differently.
        given = given.view_as(given) if self.requires_grad else given
        if self.stash is None:
            setattr(given, _PLACEHOLDER, True)
        return given


def hooks_within(around: Around | None) -> tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]:
    """Hooks for what autograd saves in a saved region: it stays, unless there is a group around."""
    return (_pack, _unpack) if around is None else (around.pack, around.unpack)


# Identity hooks switch off autograd's own check for in-place changes, so the version travels along.
def _pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tensor.detach(), tensor._version


def _unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"tensor of shape {tuple(tensor.shape)} is at version {tensor._version}, saved at {version}"
        )
    return tensor
