"""Cross-entropy of one call over rows, and its arithmetic on a tile of them: losses and their gradient at once.

Softmax and loss in fp32 are some ten passes over three to four times the bytes of 16-bit logits. A tile is as many rows
as stay in the caches of a processor that way; how many rows the head is multiplied with is `chunked`'s matter.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rematree.execute.loss.head import Unary, autocast_as
from rematree.units import MIB

# Of logits in fp32: what stays in the caches of a processor's cores, or what keeps a GPU busy.
_TILE_BYTES = {"cpu": 3 * MIB // 2}
_TILE_BYTES_ELSEWHERE = 64 * MIB
_WIDE = frozenset({torch.float32, torch.float64})
_aten: Any = torch.ops.aten
_NONE = 0  # reduction="none" to the kernels


@dataclass(frozen=True)
class RowLoss:
    """One call of cross-entropy over rows.

    Attributes:
        head: [n, D] -> [n, V].
        finish: [n, V] -> [n, V], what is done to the head's output, element by element.
        params: Trainable parameters of the head.
        target: Class of each row, [N].
        rows: Rows a chunk.
        scale_late: Multiply by 1/N in backward, not before the head's gradient.
        again: Runs a tile, given what it depends on; or tells it by repetition, where there are no real numbers.
        given_away: Told of a gradient that nobody but autograd holds, which adds the next one to it in place; not so
            where there are no real numbers.
    """

    head: Unary
    finish: Unary
    params: tuple[nn.Parameter, ...]
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    rows: int
    scale_late: bool
    again: Callable[[Hashable, Callable[[], Tensor]], Tensor] | None = None
    given_away: Callable[[Tensor], None] | None = None

    def losses(self, logits: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
        """[n, V], [n] -> [n], or a scalar for another reduction."""
        return F.cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=reduction,
            label_smoothing=self.label_smoothing,
        )

    def denominator(self, dtype: torch.dtype) -> Tensor:
        """What `reduction="mean"` divides by: the number of rows that count, or their weight."""
        counts = self.target != self.ignore_index
        if self.weight is None:
            return counts.sum().to(dtype)
        return (self.weight[self.target.where(counts, 0)] * counts).sum().to(dtype)

    def late_factor(self) -> Tensor:
        """1/N in fp32, for `scale_late`; 0 where no row counts: plain gradients are 0 there, not 0/0."""
        counts = (self.target != self.ignore_index).any()
        return torch.where(counts, self.denominator(torch.float32).reciprocal(), 0.0)

    def reduce(self, losses: Tensor) -> Tensor:
        """[N] -> the loss. Goes through the plain kernel on one class, so that it adds in the plain order."""
        if self.weight is not None and self.reduction == "mean":
            return losses.sum() / self.denominator(losses.dtype)
        target = torch.where(self.target != self.ignore_index, 0, -100)
        return F.nll_loss(-losses[:, None], target, ignore_index=-100, reduction=self.reduction)


def tile_rows(raw: Tensor) -> int:
    """How many rows of the head's output [n, V] are done at once."""
    return max(1, _TILE_BYTES.get(raw.device.type, _TILE_BYTES_ELSEWHERE) // (4 * max(raw.shape[-1], 1)))


def first_gradient(job: RowLoss, divide: bool, dtype: torch.dtype) -> Tensor:
    """What the gradient of each row's loss begins with; the plain kernel, too, divides by N before the log-softmax."""
    return job.denominator(dtype).reciprocal() if divide else torch.ones((), dtype=dtype, device=job.target.device)


def tile_losses(
    job: RowLoss, raw: Tensor, target: Tensor, seed: Callable[[torch.dtype], Tensor], into: Tensor | None
) -> Tensor:
    """Losses [n] of the head's output [n, V]; their gradient goes `into` [n, V], if it is wanted."""
    device = raw.device.type
    with torch.set_grad_enabled(into is not None):
        logits = job.finish(raw.requires_grad_(into is not None))
        if into is None or job.label_smoothing or logits.dtype not in _WIDE:
            losses = job.losses(logits, target)
            del logits
            if into is not None:
                with autocast_as(device, None):
                    into.copy_(torch.autograd.grad(losses, raw, seed(losses.dtype).expand(losses.shape))[0])
            return losses.detach()
    # The kernels that autograd would run, and so the same bits, without the buffers and copies around them.
    with torch.no_grad(), autocast_as(device, None):
        edge = None if _only_cast(logits, raw) else torch.autograd.graph.get_gradient_edge(logits)
        log_probabilities = _aten._log_softmax(logits, 1, False)
        del logits
        losses, total = _aten.nll_loss_forward(log_probabilities, target, job.weight, _NONE, job.ignore_index)
        each = seed(losses.dtype).expand(losses.shape)
        grad = _aten.nll_loss_backward(each, log_probabilities, target, job.weight, _NONE, job.ignore_index, total)
        grad = _aten._log_softmax_backward_data(grad, log_probabilities, 1, grad.dtype)
        del log_probabilities
        into.copy_(grad if edge is None else torch.autograd.grad(edge, raw, grad)[0])
    return losses


def _only_cast(logits: Tensor, raw: Tensor) -> bool:
    """Whether `logits` are `raw` in another dtype at most, so that a copy brings their gradient back."""
    node: Any = logits.grad_fn
    if node is None:
        return logits is raw
    (before, _), *others = node.next_functions
    return node.name() == "ToCopyBackward0" and not others and getattr(before, "variable", None) is raw
