"""The adapter's branch of a LoRA layer and its sum with the base layer's result, as one node of the graph.

Does the operations that PEFT's forward and autograd do, on the same shapes, in the same order and dtypes: the same
bits. Where memory is its own it works in place. Keeps x, weights, and one bit an element of a mask drawn on a CPU; the
rest is made again in backward.

Letters: T tokens (all leading dimensions), I and O features in and out, r rank.

Source: peft/tuners/lora/layer.py and bnb.py, 0.21.2; torch/csrc/autograd/FunctionsManual.cpp, 2.13.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from rematree.execute.dropout import byte_table, look_up, packed_bytes
from rematree.execute.loss.running_sum import added_in_place, as_rows
from rematree.execute.random_state import generator_state, set_generator_state

_unsafe_view: Final = torch.ops.aten._unsafe_view.default
_PER_BRANCH: Final = 3  # tensors: A, B, bits
_PIECES: Final = 4  # in which a mask is made and used
_SMALL: Final = 1 << 20  # elements of a mask that is one piece


@dataclass(frozen=True, slots=True)
class Branch:
    """What one adapter's branch needs beside tensors.

    Attributes:
        scaling: Factor of its output.
        p: Probability of its dropout, 0.0 without.
    """

    scaling: float
    p: float


@dataclass(frozen=True, slots=True)
class Branches:
    """How the branches of one node are computed.

    Attributes:
        branches: In the order their outputs are added.
        cast: Dtype of the adapters, to which the input is cast.
        compute: Dtype of the two products; another than `cast` under autocast.
        rounds_each: Every output is rounded to the dtype of the sum so far before it is added (quantised layers).
        out: Dtype of the node's output; None: whatever the sum has.
        unread: Nobody reads the node's output: this is a rerun, and the base layer's result is a placeholder.
    """

    branches: tuple[Branch, ...]
    cast: torch.dtype
    compute: torch.dtype
    rounds_each: bool
    out: torch.dtype | None
    unread: bool = False


def add_adapters(
    how: Branches, masks: list[Tensor | None], result: Tensor, x: Tensor, tensors: Sequence[Tensor | None]
) -> Tensor:
    """`result + B(A(dropout(x))) * scaling`, for one or several adapters.

    Args:
        how: Everything that is no tensor.
        masks: One a branch, what its dropout multiplies by, [..., I] in dtype `how.cast`; emptied and overwritten.
            None: no dropout, or one that is drawn here.
        result: [..., O], of the base layer.
        x: [..., I], contiguous.
        tensors: A [r, I], B [O, r] and the mask's bits (or None) of each branch, weights in dtype `how.compute`.
    """
    run = cast("Callable[..., Tensor]", _AddAdapters.apply)
    return run(how, masks, result, x, *tensors)


class _AddAdapters(torch.autograd.Function):
    """`result + B(A(dropout(x))) * scaling`, for one or several adapters; keeps x, the weights and the bits."""

    @staticmethod
    def forward(
        ctx: Any, how: Branches, masks: list[Tensor | None], result: Tensor, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.how, ctx.result_dtype = how, result.dtype
        if how.unread and not any(branch.p and mask is None for branch, mask in zip(how.branches, masks, strict=True)):
            ctx.save_for_backward(x, *tensors)
            ctx.states = [None] * len(how.branches)
            masks.clear()
            summed = result.dtype if how.rounds_each else torch.promote_types(result.dtype, how.compute)
            return result.to(how.out or summed, copy=True).contiguous()  # a placeholder of its own
        out, states = result, list[Tensor | None]()
        for index, branch in enumerate(how.branches):
            first, second, _ = tensors[index * _PER_BRANCH : (index + 1) * _PER_BRANCH]
            assert first is not None
            assert second is not None
            mask = masks.pop(0)
            draws = branch.p and mask is None and not isinstance(x, FakeTensor)
            states.append(generator_state(x.device) if draws else None)
            dropped, _ = _dropped(x, how, branch, mask)
            del mask
            delta = dropped.mm(first.t())
            del dropped
            # No view to autograd, as behind a linear layer: whoever gets the output may write to it.
            delta = _unsafe_view(delta.mm(second.t()), (*x.shape[:-1], second.shape[0])).mul_(branch.scaling)
            if how.rounds_each:
                delta = delta.to(out.dtype)
            # In place where the sum has its dtype; a sum of two numbers has no order.
            in_place = torch.promote_types(out.dtype, delta.dtype) == delta.dtype
            out = added_in_place(delta, out) if in_place else out + delta
        ctx.save_for_backward(x, *tensors)
        ctx.states = states  # of the generator, before each branch drew its mask
        return out if how.out is None else out.to(how.out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        how: Branches = ctx.how
        count = len(how.branches)
        if grad is None:
            return (None,) * (4 + _PER_BRANCH * count)
        needs = ctx.needs_input_grad
        x, *kept = ctx.saved_tensors
        of_input: Tensor | None = None
        of_tensors: list[Tensor | None] = [None] * (_PER_BRANCH * count)
        for index in reversed(range(count)):  # as autograd runs them: the last one first
            place = _PER_BRANCH * index
            first, second, bits = kept[place : place + _PER_BRANCH]
            wanted = (needs[3], needs[4 + place], needs[5 + place])
            if any(wanted):
                mask, branch = (bits, ctx.states[index]), how.branches[index]
                own, of_first, of_second = _branch_grads(how, branch, grad, x, first, second, mask, wanted)
                of_tensors[place : place + 2] = of_first, of_second
                if own is not None:
                    of_input = own if of_input is None else of_input.add_(own)
        if of_input is not None:
            of_input = of_input.to(x.dtype)
        return None, None, grad.to(ctx.result_dtype) if needs[2] else None, of_input, *of_tensors


def _dropped(x: Tensor, how: Branches, branch: Branch, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[T, I] in the dtype of the products: the input, cast and dropped out; on CUDA also the mask drawn here.

    `mask` is overwritten.
    """
    drawn = None
    if mask is not None:
        rows, wide = as_rows(mask), as_rows(x)
        for part in _pieces(rows):
            rows[part].mul_(wide[part].to(how.cast))
    else:
        rows = x.to(how.cast)
        if branch.p:
            rows, drawn = torch.native_dropout(rows, branch.p, True)
        rows = as_rows(rows)
    return rows.to(how.compute), drawn


def _dropped_again(
    x: Tensor, how: Branches, branch: Branch, bits: Tensor | None, state: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`_dropped` in backward: the mask of then from its bits, or drawn again from the generator's state of then."""
    if bits is not None and table is not None:
        wide = as_rows(x)
        pieces = _pieces(wide)
        rows = torch.empty_like(wide, dtype=how.cast) if len(pieces) > 1 else None
        for part in pieces:
            dropped = _mask(wide[part].shape, part.start * wide.shape[1], bits, table).mul_(wide[part].to(how.cast))
            if rows is None:
                return dropped.to(how.compute), None
            rows[part].copy_(dropped)
        assert rows is not None
        return rows.to(how.compute), None
    if state is None:
        return _dropped(x, how, branch, None)
    present = generator_state(x.device)
    set_generator_state(state, x.device)
    try:
        return _dropped(x, how, branch, None)
    finally:
        set_generator_state(present, x.device)


def _mask(shape: torch.Size, start: int, bits: Tensor, table: Tensor) -> Tensor:
    """What dropout multiplies by, from element number `start` on, which is at a whole byte of `bits`."""
    return look_up(bits[start // 8 : start // 8 + packed_bytes(shape.numel())], shape, table)


def _pieces(rows: Tensor) -> list[slice]:
    """Cuts of [T, I], each at a whole byte of the bits: a large mask is never there as a whole."""
    count = rows.shape[0]
    if rows.numel() < _SMALL:
        return [slice(0, count)]
    step = -(-count // (8 * _PIECES)) * 8
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _branch_grads(
    how: Branches,
    branch: Branch,
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    mask: tuple[Tensor | None, Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of one adapter's branch: of the input [..., I] in dtype `how.cast`, of A, of B; None if unwanted.

    Of `mask` its bits, or the state of the generator that draws it again.
    """
    bits, state = mask
    needs_input, needs_first, needs_second = wanted
    of_input = of_first = of_second = None
    table = None if bits is None else byte_table(how.cast, branch.p, bits.device)
    dropped, drawn = _dropped_again(x, how, branch, bits, state, table)
    product = dropped.mm(first.t())  # again
    scaled = grad.to(how.compute)
    scaled = as_rows(scaled * branch.scaling if scaled is grad else scaled.mul_(branch.scaling))
    if needs_second:
        of_second = _grad_of_right(scaled, product, second.t()).t()
    if needs_first or needs_input:
        of_product = _grad_of_left(scaled, _by_columns(product), second.t())
        del scaled, product
        if needs_first:
            of_first = _grad_of_right(of_product, dropped, first.t()).t()
        by_columns = _by_columns(dropped)
        del dropped  # not beside its gradient, which is as large
        if needs_input:
            of_dropped = _grad_of_left(of_product, by_columns, first.t())
            of_rows = of_dropped.to(how.cast)
            del of_dropped
            if bits is not None and table is not None:
                for part in _pieces(of_rows):
                    piece = of_rows[part]
                    piece.mul_(_mask(piece.shape, part.start * of_rows.shape[1], bits, table))
            of_input = of_rows.reshape(x.shape)
            if drawn is not None:
                of_input = torch.ops.aten.native_dropout_backward(of_input, drawn, 1.0 / (1.0 - branch.p))
    return of_input, of_first, of_second


# The derivatives of a product as autograd computes them: which of two equal formulas depends on strides, and a kernel
# that reads its operands in another order may round otherwise.
def _by_columns(matrix: Tensor) -> bool:
    return matrix.stride() == (1, matrix.shape[0])


def _grad_of_left(grad: Tensor, left_by_columns: bool, right: Tensor) -> Tensor:
    return right.mm(grad.t()).t() if left_by_columns else grad.mm(right.t())


def _grad_of_right(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return grad.t().mm(left).t() if _by_columns(right) else left.t().mm(grad)
