"""Rows of a head's output that are not computed: from which hidden states they would be, and how.

Letters: D model width, V vocabulary, N rows. [..., D] is any number of leading row dimensions.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from rematree.execute.loss.head import HeadCall, Unary, autocast_as


@dataclass(eq=False)
class Source:
    """What one storage would be for real logits: shared by all views of it, so that in-place changes reach them all.

    Attributes:
        head: How to run the head.
        hidden: [..., D], contiguous.
        dtype: Of the logits after `ops`.
        ops: Row-wise operations to do after the head.
        real: The logits [..., V], once somebody needed them in full.
    """

    head: HeadCall
    hidden: Tensor
    dtype: torch.dtype
    ops: tuple[Unary, ...] = ()
    real: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], through the head and all recorded operations."""
        return self.finished(self.raw(hidden))

    def raw(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], through the head alone."""
        with autocast_as(hidden.device.type, self.head.autocast):
            return self.head.forward(hidden)

    def finished(self, logits: Tensor) -> Tensor:
        """[..., V] -> [..., V], through the recorded operations, each of which treats every element by itself."""
        with autocast_as(logits.device.type, self.head.autocast):
            for op in self.ops:
                logits = op(logits)
        return logits


@dataclass(eq=False)
class LogitRows:
    """Some rows of the head's output, not computed.

    Attributes:
        source: The storage they belong to.
        hidden: [..., D], the rows they are computed from.
        views: How to get them from the source's real logits.
        tracked: A gradient flows into them.
    """

    source: Source
    hidden: Tensor
    views: tuple[Unary, ...] = ()
    tracked: bool = field(init=False)

    def __post_init__(self) -> None:
        needs_grad = self.source.hidden.requires_grad or bool(self.source.head.params)
        self.tracked = torch.is_grad_enabled() and needs_grad

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.source.head.num_classes))

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        # autograd asks for streams, which a device that a twin only imagines does not have (`absent.py`)
        return getattr(getattr(self.hidden, "fake_mode", None), "engine_device", None) or self.source.head.device

    @property
    def whole(self) -> bool:
        """These are all rows of the source."""
        return self.hidden.shape[:-1].numel() == self.source.hidden.shape[:-1].numel()

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V]; the head sees as many dimensions as it would have seen."""
        return self.source.finished(self.raw(hidden))

    def raw(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V], of the head alone."""
        lead = (1,) * (self.source.hidden.ndim - 2)
        logits = self.source.raw(hidden.reshape(*lead, *hidden.shape))
        return logits.reshape(hidden.shape[0], logits.shape[-1])

    def real(self, *, shared: bool = False) -> Tensor:
        """The logits [..., V], with their graph if they are tracked and grad mode is on.

        Args:
            shared: They will be written to, so every view must see the same memory.
        Raises:
            RecomputeMismatchError: an adapter of the head was merged or deleted since the forward.
        """
        if self.source.real is not None:
            return self._real(shared=shared)
        with self.source.head.switches.restored("the logits"):
            return self._real(shared=shared)

    def _real(self, *, shared: bool) -> Tensor:
        source = self.source
        tracked = torch.is_grad_enabled() and self.tracked
        if source.real is None and (shared or (tracked and self.whole)):
            with torch.set_grad_enabled(self.tracked):
                source.real = source.logits(source.hidden)
        if source.real is None:
            with torch.set_grad_enabled(tracked):
                logits = self.logits(self.hidden.reshape(-1, self.hidden.shape[-1]))
                return logits.reshape(*self.hidden.shape[:-1], logits.shape[-1])
        real = source.real
        for view in self.views:
            real = view(real)
        return real if tracked else real.detach()

    def view(self, view: Unary) -> Self:
        """The same memory seen otherwise; `view` keeps the last dimension whole."""
        return type(self)(self.source, view(self.hidden), (*self.views, view))

    def copy(self, hidden: Tensor, op: Unary | None = None, dtype: torch.dtype | None = None) -> Self:
        """New memory: these rows of hidden states [..., D], one more operation."""
        ops = self.source.ops if op is None else (*self.source.ops, op)
        hidden = hidden.contiguous()
        return type(self)(Source(self.source.head, hidden, dtype or self.source.dtype, ops), hidden)
