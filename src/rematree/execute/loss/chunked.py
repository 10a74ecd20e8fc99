"""The loss over rows of deferred logits, computed with its gradient a few rows at a time.

Two sizes matter. A chunk is what the head is multiplied with at once: every chunk reads the whole output embedding, so
few large ones are fast, and its logits and their gradient are what it needs memory for. What lies between these two is
done a tile of rows at a time (`row_loss`), and never exists for a whole chunk.
"""

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rematree.execute.loss.head import autocast_as
from rematree.execute.loss.head_weight import add_product, is_product_with, past_views
from rematree.execute.loss.row_loss import RowLoss, first_gradient, tile_losses, tile_rows
from rematree.execute.loss.running_sum import added_in_place

_PRODUCTS = frozenset({"MmBackward0", "AddmmBackward0"})


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
        late = job.late_factor() if mean and job.scale_late else None
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
    seed = functools.cache(functools.partial(first_gradient, job, divide))
    tile = tile_rows(raw)
    for start in range(0, max(raw.shape[0], 1), tile):
        rows = slice(start, start + tile)
        one = functools.partial(_losses_at, job, rows, raw, target, seed, grad_raw)
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


def _losses_at(
    job: RowLoss,
    rows: slice,
    raw: Tensor,
    target: Tensor,
    seed: Callable[[torch.dtype], Tensor],
    grad_raw: Tensor | None,
) -> Tensor:
    return tile_losses(job, raw.detach()[rows], target[rows], seed, None if grad_raw is None else grad_raw[rows])


def _is_product(raw: Tensor) -> bool:
    """Whether `raw` is a matrix product, whose derivative does not read it: it may be overwritten before backward."""
    node = past_views(raw.grad_fn)
    return node is not None and node.name() in _PRODUCTS and raw.is_contiguous()


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
