"""What a compiled block keeps: torch's partitioner, kept from drawing a random number twice.

With an activation memory budget below 1 the partitioner recomputes whatever is cheap by its own reckoning. What it
knows as random are three of torch's many ops, and at a budget of 0 it does not ask. While torch's own generator draws
(`fallback_random`, so that a compiled block drops what the plain one does), a mask drawn again in backward is another
mask, and the gradient is wrong. Here every op that draws is marked as not to be recomputed. And of a
dropout its mask is enough: its output is made anew from the input, which the projections of a block share.

The other way round, a 4-bit weight is unpacked again in backward, as bitsandbytes does it: the partitioner knows
nothing of its ops and would keep every weight of the block unpacked.

Imported only to compile: torch takes seconds to load its compiler.
"""

import operator
from collections.abc import Sequence
from typing import Any, Final, cast

import torch
from torch._functorch import config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from rematree.execute import attention_backward
from rematree.execute.attention_backward import replace_attention_backward

_SEEDED: Final = torch.Tag.nondeterministic_seeded
_PROBABILITIES: Final = frozenset({"dropout_p", "p"})
_DROPOUT: Final = torch.ops.aten.native_dropout.default
# At 0 torch keeps the inputs and nothing else, marked or not.
_LEAST: Final = 1e-9


class Partitioner(CustomPartitionerFn):
    """torch's min-cut partitioner with one activation memory budget, for blocks whose dropout must not be redrawn.

    Args:
        budget: 0..1, as torch defines it: 1 keeps what makes the block fastest, 0 the inputs and what was drawn.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget

    def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        replace_attention_backward(gm.graph)
        drawn = [node for node in gm.graph.nodes if draws(node)]
        for node in drawn:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            if node.target is _DROPOUT and node.args[1] < 1:
                _remade_from_its_mask(gm.graph, node)
        for number, node in enumerate(node for node in gm.graph.nodes if _unpacks(node)):
            node.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": number}
        budget = max(self._budget, _LEAST) if drawn else self._budget
        with cast("Any", config).patch(activation_memory_budget=budget):
            return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, attention_backward.__file__), repr(self._budget))


def _remade_from_its_mask(graph: Any, node: Any) -> None:
    """Let everything read the output of the dropout `node` as input times mask times scale, as its kernel makes it."""
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    value = node.meta.get("val")
    if not {0, 1} <= parts.keys() or not isinstance(value, tuple):
        return
    source, probability = node.args[:2]
    after = max(parts.values(), key=list(graph.nodes).index)
    with graph.inserting_after(after):
        kept = graph.call_function(torch.ops.aten.mul.Tensor, (source, parts[1]))
    with graph.inserting_after(kept):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (kept, 1.0 / (1.0 - probability)))
    like = parts[0].meta["val"]
    for made in (kept, scaled):
        made.meta["val"] = like
    parts[0].replace_all_uses_with(scaled)


def _unpacks(node: Any) -> bool:
    func = node.target
    if node.op != "call_function" or not isinstance(func, torch._ops.OpOverload):
        return False
    return func.namespace == "bitsandbytes" and "dequant" in func.__name__


def draws(node: Any) -> bool:
    """Whether a node of a graph draws random numbers; attention and dropout do not at a probability of zero."""
    func = node.target
    if node.op != "call_function" or not isinstance(func, torch._ops.OpOverload) or _SEEDED not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in _PROBABILITIES:
            given = node.args[position : position + 1] or [node.kwargs.get(argument.name, argument.default_value)]
            return given[0] != 0
    return True
