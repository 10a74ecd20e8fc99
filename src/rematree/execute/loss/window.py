"""A window of rows, whole against chunked: what the chunked loss relies on, checked on the first loss.

Chunks are the same numbers only if the head treats every row by itself and reads no trainable tensor but its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rematree.errors import VerificationError
from rematree.execute.loss.chunked import chunked_loss
from rematree.execute.loss.head import autocast_as
from rematree.execute.loss.logit_rows import LogitRows
from rematree.execute.loss.row_loss import RowLoss

_WINDOW_ROWS = 8  # few: whole, they must not need more than the smallest chunk does
_WINDOW_CHUNK_ROWS = 4
# Largest difference, relative to the largest gradient, that rounding can explain: a head that mixes rows is off by
# tenths. fp32 allows for TF32 products.
_WINDOW_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def verify_window(rows: LogitRows, job: RowLoss, name: str) -> bool:
    """Compare a window of rows, whole against chunked.

    Returns:
        False if the batch had too few rows that count, a loss that is not finite, or only rows that are too sure of
        their labels, to say anything.

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
    gradient = errors["gradient"]
    if errors["loss"] <= tolerance < gradient and _explained(rows, whole, hidden, chunk_rows, gradient):
        return False  # all sure of their labels: what is left of their gradients is the rounding of logits
    if not all(error <= tolerance for error in errors.values()):
        raise VerificationError(
            f"the loss of {name} in chunks differs from the whole by more than {tolerance:g} (relative)",
            details=[f"{what}: {error:.3g}" for what, error in errors.items()],
            remedies=["apply a plan without the chunked loss: this head does not treat every row by itself"],
        )
    return True


def _explained(
    rows: LogitRows, whole: Callable[[Tensor], Tensor], hidden: Tensor, chunk_rows: int, error: float
) -> bool:
    """Whether rounding of logits alone explains an `error` of gradients, those of rows that are sure of their labels.

    1 - p, p near 1, goes with e to its logits, which may move by two units in the last place of the head's output.
    """
    with torch.no_grad():
        logits = whole(hidden).float()
        chunked = torch.cat([rows.logits(part) for part in hidden.split(chunk_rows)]).float()
    units = 2 * torch.finfo(rows.source.head.dtype).eps
    largest = logits.topk(min(2, logits.shape[-1])).values.abs().max()
    moved = (chunked - logits).abs() > units * logits.abs().clamp(min=largest)
    return error <= float((units * largest).expm1()) and not bool(moved.any()) and _rows_apart(whole, hidden)


def _rows_apart(whole: Callable[[Tensor], Tensor], hidden: Tensor) -> bool:
    """Whether no row of logits depends on another row: then such gradients are exactly zero."""
    with torch.enable_grad():
        here = hidden.clone().requires_grad_()
        (grad,) = torch.autograd.grad(whole(here)[0].float().sum(), here)
    return not bool(grad[1:].any())


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
