"""Models that their user has compiled: refused by name, before anything is planned or applied, or run under a plan.

A plan is Python around the forward of modules: it counts calls, keeps tensors, restores generators. A graph of the
whole model, or of a layer, has no place for that. Blocks are compiled inside a plan instead (`execute/compiled.py`),
where the recomputation stays outside the graph.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import nn

from rematree.errors import UsageError

_WRAPPER: Final = "OptimizedModule"  # of torch.compile(model); importing its module takes a second
_callback: Final = torch._C._dynamo.eval_frame.get_eval_frame_callback  # pyright: ignore


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that `torch.compile` or `compile()` was called on, as a whole or in parts.

    Raises:
        UsageError: names the first module that is compiled.
    """
    for path, module in model.named_modules():
        if type(module).__name__ == _WRAPPER:
            raise compiled_elsewhere(f"torch.compile({path or 'model'}) was called")
        if _is_compiled(module):
            raise compiled_elsewhere(f"{path or 'model'}.compile() was called")


def refuse_compiling(modules: Iterable[nn.Module]) -> None:
    """Refuse to run under a plan where `torch.compile` came after it; to be called when a forward begins.

    Args:
        modules: What the plan is around.
    Raises:
        UsageError: one of them is compiled, or torch's compiler traces the caller or looks at every frame it enters.
    Cost:
        A lookup for each module.
    """
    if torch.compiler.is_dynamo_compiling() or _callback() is not None or any(map(_is_compiled, modules)):
        raise compiled_elsewhere("torch.compile was called on a model under a plan, or on what calls it")


def _is_compiled(module: nn.Module) -> bool:
    return module.__dict__.get("_compiled_call_impl") is not None


def compiled_elsewhere(how: str) -> UsageError:
    """The error for a model that is, or will be, compiled by other means than a plan; `how` says by which."""
    return UsageError(
        f"{how}: a plan cannot be put around regions inside a graph",
        details=["no torch.compile, and no TrainingArguments(torch_compile=True), on what a plan is for"],
        remedies=[
            "rematree.plan(model, batch, budget, allow_compile=True)   (compiles blocks, recomputes around them)",
            "rematree.BudgetCallback(budget, allow_compile=True)   (the same in a Trainer)",
            "plan and apply to the model as it was before it was compiled",
        ],
    )
