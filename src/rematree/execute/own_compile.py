"""Models that their user has compiled: refused by name, before anything is planned or applied.

A plan is Python around the forward of modules: it counts calls, keeps tensors, restores generators. A graph of the
whole model, or of a layer, has no place for that. Blocks are compiled inside a plan instead (`execute/compiled.py`),
where the recomputation stays outside the graph.
"""

from typing import Final

from torch import nn

from rematree.errors import UsageError

_WRAPPER: Final = "OptimizedModule"  # of torch.compile(model); importing its module takes a second


def refuse_compiled(model: nn.Module) -> None:
    """Refuse a model that `torch.compile` or `compile()` was called on, as a whole or in parts.

    Raises:
        UsageError: names the first module that is compiled.
    """
    for path, module in model.named_modules():
        if type(module).__name__ == _WRAPPER:
            how = f"torch.compile({path or 'model'})"
        elif module.__dict__.get("_compiled_call_impl") is not None:
            how = f"{path or 'model'}.compile()"
        else:
            continue
        raise compiled_elsewhere(f"{how} was called")


def compiled_elsewhere(how: str) -> UsageError:
    """The error for a model that is, or will be, compiled by other means than a plan; `how` says by which."""
    return UsageError(
        f"{how}: a plan cannot be put around regions inside a graph",
        details=["no torch.compile, and no TrainingArguments(torch_compile=True), on what a plan is for"],
        remedies=[
            "rematree.plan(model, batch, budget, allow_compile=True)   (compiles blocks, recomputes around them)",
            "plan and apply to the model as it was before it was compiled",
        ],
    )
