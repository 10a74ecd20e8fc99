"""Cross-entropy over rows of deferred logits, computed with its gradient a few rows at a time.

Two sizes matter. A chunk is what the head is multiplied with at once: every chunk reads the whole output embedding, so
few large ones are fast, and its logits and their gradient are what it needs memory for. What lies between these two is
done a tile of rows at a time: softmax and loss in fp32 are some ten passes over three to four times the bytes of 16-bit
logits, which stay in the caches of a processor that way, and never exist for a whole chunk.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rematree.errors import VerificationError
from rematree.execute.deferred import LogitRows
from rematree.execute.head import Unary, autocast_as
from rematree.execute.head_weight import add_product, is_product_with, past_views
from rematree.execute.running_sum import added_in_place
from rematree.units import MIB

# Of logits in fp32: what stays in the caches of a processor's cores, or what keeps a GPU busy.
_TILE_BYTES = {"cpu": 3 * MIB // 2}
_TILE_BYTES_ELSEWHERE = 64 * MIB
_WIDE = frozenset({torch.float32, torch.float64})
_aten: Any = torch.ops.aten
_NONE = 0  # reduction="none" to the kernels
_PRODUCTS = frozenset({"MmBackward0", "AddmmBackward0"})
_WINDOW_ROWS = 8  # few: whole, they must not need more than the smallest chunk does
_WINDOW_CHUNK_ROWS = 4
# Largest difference, relative to the largest gradient, that rounding can explain: a head that mixes rows is off by
# tenths. fp32 allows for TF32 products.
_WINDOW_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


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

    def reduce(self, losses: Tensor) -> Tensor:
        """[N] -> the loss. Goes through the plain kernel on one class, so that it adds in the plain order."""
        if self.weight is not None and self.reduction == "mean":
            return losses.sum() / self.denominator(losses.dtype)
        target = torch.where(self.target != self.ignore_index, 0, -100)
        return F.nll_loss(-losses[:, None], target, ignore_index=-100, reduction=self.reduction)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient in forward, chunk by chunk; backward only scales."""

    @staticmethod
    def forward(ctx: Any, job: RowLoss, hidden: Tensor, *params: Tensor) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        sums: list[Tensor | None] = [None] * len(params)
        losses: list[Tensor] = []
        mean = job.reduction == "mean"
        with _own_saved_tensors():
            for start in range(0, max(hidden.shape[0], 1), job.rows):
                part = slice(start, start + job.rows)
                rows, target = hidden[part], job.target[part]
                chunk_losses, chunk_grad = _chunk(
                    job, rows, target, hidden.requires_grad, mean and not job.scale_late, sums
                )
                losses.append(chunk_losses)
                if grad_hidden is not None:
                    assert chunk_grad is not None
                    grad_hidden[part] = chunk_grad
                del chunk_grad  # not beside the next chunk's logits
        loss = job.reduce(torch.cat(losses))
        late = job.denominator(torch.float32).reciprocal() if mean and job.scale_late else None
        ctx.save_for_backward(late, grad_hidden, *sums)
        ctx.dtypes = [param.dtype for param in params]
        ctx.given_away = job.given_away
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_loss,) = grad_outputs
        late, grad_hidden, *grad_params = ctx.saved_tensors
        # With retain_graph the buffers are needed again.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
        factor = grad_loss if late is None else grad_loss.float() * late
        row_factor = factor[:, None] if factor.ndim else factor

        def scaled(grad: Tensor | None, by: Tensor, dtype: torch.dtype) -> Tensor | None:
            if grad is None:
                return None
            return (grad * by if keep else grad.mul_(by)).to(dtype)

        hidden = None if grad_hidden is None else scaled(grad_hidden, row_factor, grad_hidden.dtype)
        found = [scaled(g, factor, d) for g, d in zip(grad_params, ctx.dtypes, strict=True)]
        if ctx.given_away is not None:
            for grad in found:
                if grad is not None:
                    ctx.given_away(grad)
        return None, hidden, *found


def chunked_loss(job: RowLoss, hidden: Tensor) -> Tensor:
    """The loss of all rows [N, D]."""
    apply = cast("Callable[..., Tensor]", _ChunkedCrossEntropy.apply)
    return apply(job, hidden, *job.params)


def _chunk(
    job: RowLoss, hidden: Tensor, target: Tensor, wants_hidden: bool, divide: bool, sums: list[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Losses [n] of one chunk and gradient of its hidden states [n, D]; those of the head's parameters go to `sums`."""
    hidden = hidden.detach().requires_grad_(wants_hidden)
    with torch.set_grad_enabled(wants_hidden or bool(job.params)):
        raw = job.head(hidden)
    grad_raw = edge = None
    alone, by_slices = len(target) == len(job.target), False
    if raw.requires_grad:
        # Taken before anything is written there: autograd would put a copy in front of the product for a view whose
        # memory has changed.
        edge = torch.autograd.graph.get_gradient_edge(raw)
        by_slices = not alone and is_product_with(edge.node, hidden, job.params)
        grad_raw = raw.detach() if _is_product(raw) else torch.empty_like(raw)  # tile by tile in the place of logits
    losses: list[Tensor] = []
    seed = functools.cache(functools.partial(_seed, job, divide))
    tile = max(1, _TILE_BYTES.get(raw.device.type, _TILE_BYTES_ELSEWHERE) // (4 * max(raw.shape[-1], 1)))
    for start in range(0, max(raw.shape[0], 1), tile):
        rows = slice(start, start + tile)
        one = functools.partial(_rows_of_tile, job, rows, raw, target, seed, grad_raw)
        if job.again is None or start == 0:  # the first one makes the seed
            losses.append(one())
        else:
            layouts = min(tile, raw.shape[0] - start), raw.dtype, raw.shape[1:], raw.stride(), grad_raw is None
            losses.append(job.again(layouts, one))
        del one  # it holds the logits
    whole = losses[0] if len(losses) == 1 else torch.cat(losses)
    if edge is None:
        return whole, None
    inputs = [*([hidden] if wants_hidden else []), *(() if by_slices else job.params)]
    with autocast_as(hidden.device.type, None):  # as backward usually is: it would cast products again
        grads = [*torch.autograd.grad(edge, inputs, grad_raw, allow_unused=True)]
        grad_hidden = grads.pop(0) if wants_hidden else None
        if by_slices:
            assert grad_raw is not None
            sums[0] = add_product(sums[0], grad_raw, hidden.detach())
        else:
            del raw, edge, grad_raw  # not beside a copy
            sums[:] = [_add(total, grad, alone=alone) for total, grad in zip(sums, grads, strict=True)]
    return whole, grad_hidden


def _rows_of_tile(
    job: RowLoss,
    rows: slice,
    raw: Tensor,
    target: Tensor,
    seed: Callable[[torch.dtype], Tensor],
    grad_raw: Tensor | None,
) -> Tensor:
    return _tile(job, raw.detach()[rows], target[rows], seed, None if grad_raw is None else grad_raw[rows])


def _is_product(raw: Tensor) -> bool:
    """Whether `raw` is a matrix product, whose derivative does not read it: it may be overwritten before backward."""
    node = past_views(raw.grad_fn)
    return node is not None and node.name() in _PRODUCTS and raw.is_contiguous()


def _seed(job: RowLoss, divide: bool, dtype: torch.dtype) -> Tensor:
    """What the gradient of each row's loss begins with; the plain kernel, too, divides by N before the log-softmax."""
    return job.denominator(dtype).reciprocal() if divide else torch.ones((), dtype=dtype, device=job.target.device)


def _tile(
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


def _add(total: Tensor | None, grad: Tensor | None, *, alone: bool) -> Tensor | None:
    """`total + grad` in one buffer, in at least fp32: 16-bit sums would lose a bit with every doubling of chunks.

    Args:
        total: Of the chunks before.
        grad: Of this chunk.
        alone: There is one chunk: nothing to sum.
    """
    if grad is None:
        return total
    if total is None:
        return grad.to(grad.dtype if alone else torch.promote_types(grad.dtype, torch.float32), copy=True)
    return added_in_place(total, grad)


@contextlib.contextmanager
def _own_saved_tensors() -> Generator[None]:
    """What a chunk saves is freed within the chunk: hooks of the caller (offload to host) must not see it."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def verify_window(rows: LogitRows, job: RowLoss, name: str) -> bool:
    """Compare a window of rows, whole against chunked.

    Returns:
        False if the batch had too few rows that count, or a loss that is not finite, to say anything.

    Raises:
        VerificationError: The two differ by more than rounding.
    """
    # Rows that count come first; an even number, because the plain run sees them as [n/2, 2, D] where the chunks are
    # [1, 4, D], so that no dimension can be mixed unnoticed.
    order = (job.target == job.ignore_index).to(torch.int8).argsort(stable=True)[:_WINDOW_ROWS]
    order = order[: len(order) // 2 * 2]
    target = job.target[order]
    if int((target != job.ignore_index).sum()) < 2:
        return False
    hidden = rows.hidden.detach().reshape(-1, rows.hidden.shape[-1])[order]
    chunk_rows = min(_WINDOW_CHUNK_ROWS, len(order) // 2)
    window = replace(job, target=target, params=(), rows=chunk_rows, reduction="mean")

    def whole(part: Tensor) -> Tensor:
        ndim = rows.source.hidden.ndim
        shape = part.shape if ndim == 2 else (*(1,) * (ndim - 3), len(order) // 2, 2, part.shape[-1])
        return rows.source.logits(part.reshape(shape)).flatten(0, -2)

    with torch.enable_grad():
        plain_hidden, chunked_hidden = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        plain = window.losses(whole(plain_hidden), target, "mean")
        _refuse_foreign_leaves(plain, [plain_hidden, *rows.source.head.params], name)
        chunked = chunked_loss(window, chunked_hidden)
    with autocast_as(hidden.device.type, None):
        (plain_grad,) = torch.autograd.grad(plain, plain_hidden)
        (chunked_grad,) = torch.autograd.grad(chunked, chunked_hidden)
    plain, chunked = plain.detach(), chunked.detach()
    if not (plain.isfinite() and plain_grad.isfinite().all()):
        return False
    tolerance = _WINDOW_TOLERANCE.get(rows.source.head.dtype, 5e-2)
    errors = {
        "loss": float((chunked - plain).abs() / plain.abs().clamp(min=1.0)),
        "gradient": float((chunked_grad - plain_grad).abs().max() / plain_grad.abs().max().clamp(min=1e-30)),
    }
    if not all(error <= tolerance for error in errors.values()):
        raise VerificationError(
            f"the loss of {name} in chunks differs from the whole by more than {tolerance:g} (relative)",
            details=[f"{what}: {error:.3g}" for what, error in errors.items()],
            remedies=["apply a plan without the chunked loss: this head does not treat every row by itself"],
        )
    return True


def _refuse_foreign_leaves(loss: Tensor, known: Sequence[Tensor], name: str) -> None:
    """Raise if a trainable tensor that is not among `known` feeds the loss: its gradient would be lost."""
    known_ids = {id(tensor) for tensor in known}
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known_ids:
            raise VerificationError(
                f"{name} uses a trainable tensor of shape {tuple(variable.shape)} that is not one of its parameters",
                remedies=["apply a plan without the chunked loss: the gradient of that tensor would be lost"],
            )
        nodes += [following for following, _ in node.next_functions]
