"""What of a predicted peak torch's allocator hands out: that is what its counters can be compared with.

A budget is compared with more: on a GPU also with the rest of the allocator's segments and with the CUDA context.
"""

from contextlib import AbstractContextManager, nullcontext

from rematree.execute.input_grads import as_leaves
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers
from rematree.referee.simulation import Simulation


def recomputed(planner: Planner, blocks: list[str], *, hooked: bool = False) -> Simulation:
    """The step in which `blocks` are recomputed, simulated; `hooked`: with a frozen input embedding's hook."""
    around: AbstractContextManager[object] = as_leaves(planner.observed.twin.model) if hooked else nullcontext()
    with around:
        return planner.observed.referee.run(Levers({path: Decision(Action.RECOMPUTE) for path in blocks}))


def every_layer(planner: Planner) -> Simulation:
    """The step as Hugging Face's flag makes it, simulated."""
    return recomputed(planner, list(planner.survey.chain.blocks), hooked=True)


def budget_bytes(planner: Planner, simulation: Simulation) -> int:
    """What a budget is compared with: as `Planner.plain_step` and `every_layer_step` give it."""
    return simulation.peak_bytes + simulation.slack_bytes + planner.observed.fixed_bytes


def allocated_bytes(planner: Planner, simulation: Simulation, *, libraries: bool = True) -> int:
    """Of the peak of `simulation`, weights included; `libraries`: with the workspaces that cuBLAS keeps."""
    overhead = planner.observed.overhead
    kept = 0 if libraries else overhead.library_bytes
    return simulation.peak_bytes + planner.observed.fixed_bytes - overhead.context_bytes - kept
