"""An adapter's products in a compiled block, made where they are read instead of by a kernel of their own.

The second product of a LoRA layer and the gradient of its input have as many terms a sum as the adapter has ranks. As
a kernel each writes an fp32 number for every token and feature, which the loop behind it reads once. Written as
multiplications and a sum they become part of that loop, and the fp32 numbers are never in memory. The terms are summed
in another order than in the kernel.

Imported only to compile.
"""

import contextlib
from typing import Any, Final

import torch
from torch._guards import detect_fake_mode
from torch._inductor import inductor_prims

_ATEN: Final = torch.ops.aten
_PRODUCT: Final = _ATEN.mm.default
MOST_TERMS: Final = 16  # of a sum, all written out; with more the kernel is as fast
# Settings of torch's compiler. A sum of so many terms becomes part of the loop that reads it, and is not stored for its
# many reads and operations: stored, its loop over rows and columns would not be joined with one over all elements.
FUSED: Final = {
    "unroll_reductions_threshold": MOST_TERMS + 1,
    "realize_acc_reads_threshold": 8 * MOST_TERMS,
    "realize_opcount_threshold": 16 * MOST_TERMS,
}


def write_out_products(graph: Any) -> int:
    """Write out the products in a graph that have few terms a sum. fp32 on a CPU only.

    Args:
        graph: torch.fx's; its nodes have their fake values in `meta["val"]`.
    Returns:
        How many were written out.
    """
    found = [node for node in graph.nodes if node.target is _PRODUCT and _few_terms(node)]
    for node in found:
        _write_out(graph, node)
    return len(found)


def _few_terms(node: Any) -> bool:
    left, right = (argument.meta["val"] for argument in node.args)
    (rows, terms), columns = left.shape, right.shape[1]
    if left.device.type != "cpu" or left.dtype is not torch.float32 or not isinstance(terms, int):
        return False
    # As many rows or columns as terms: a gradient of weights in a batch of few tokens. There is nothing to be won.
    return terms <= MOST_TERMS and all(not isinstance(n, int) or n > terms for n in (rows, columns))


def _write_out(graph: Any, node: Any) -> None:
    left, right = node.args

    def call(function: Any, *args: Any) -> Any:
        made = graph.call_function(function, args)
        values = [argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument for argument in args]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        with detect_fake_mode(tensors) or contextlib.nullcontext():
            made.meta["val"] = function(*values)
        return made

    with graph.inserting_before(node):
        value = right.meta["val"]
        if value.stride(1) != 1:  # the loop goes along columns
            right = call(inductor_prims.force_stride_order, right, (value.shape[1], 1))
        left, right = (call(_ATEN.unsqueeze.default, side, dim) for side, dim in ((left, 2), (right, 0)))
        each = call(_ATEN.mul.Tensor, left, right)
        total = call(_ATEN.sum.dim_IntList, each, [1])
    total.meta = {**node.meta, "val": total.meta["val"]}
    node.replace_all_uses_with(total)
    graph.erase_node(node)
