"""What is recomputed now: by this library's switch, by transformers' own, by a plan, or nothing.

Read from the live model, not from what was once asked for, so that whoever changed it last is named.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

from rematree.execute.checkpoint_switch import FUNCTION, has_flag, innermost, is_on, switches
from rematree.execute.handle import Handle, applied_handle
from rematree.execute.layer_checkpoint import LayerCheckpoint
from rematree.execute.override import ForwardOverride
from rematree.plans import Action, Plan
from rematree.regions import is_checkpointing_layer
from rematree.units import Bytes, format_bytes, parse_bytes

_BUDGET: Final = "_rematree_budget"
BUDGET_KEY: Final = "budget"  # among the keyword arguments of checkpointing


def request_budget(model: nn.Module, budget: int | str) -> Bytes:
    """Write on the model how many bytes it may train in, for whoever plans once a batch is known.

    Raises:
        UsageError: not a size.
    """
    parsed = parse_bytes(budget)
    innermost(model).__dict__[_BUDGET] = parsed
    return parsed


def requested_budget(model: nn.Module) -> Bytes | None:
    """Bytes that `prepare_model_for_kbit_training` or the arguments of checkpointing name on this model, or None."""
    written = written_budget(model)
    if written is not None:
        return written
    return switched_budget(model)


def switched_budget(model: nn.Module) -> Bytes | None:
    """What the arguments of checkpointing that is on named."""
    return next((switch.budget for switch in switches(model) if switch.budget is not None), None)


def written_budget(model: nn.Module) -> Bytes | None:
    """What `request_budget` wrote."""
    return next((m.__dict__[_BUDGET] for m in model.modules() if _BUDGET in m.__dict__), None)


@dataclass(frozen=True, slots=True)
class CheckpointingInEffect:
    """What is recomputed now. `str()` is one line; true if anything is.

    Attributes:
        layers: Paths of the layers that are run again in backward, or under a plan, in which something is.
        num_layers: How many there are to choose from.
        kwargs: Keyword arguments of the recomputation, as far as they were given.
        set_by: Who decides: this library's switch, transformers' own, a plan, or nobody.
        budget: Bytes that were asked for: by the plan in force, on the model, or in the arguments of checkpointing.
        plan: The plan in force.
    """

    layers: tuple[str, ...]
    num_layers: int
    kwargs: Mapping[str, Any]
    set_by: Literal["rematree", "transformers", "plan", "nobody"]
    budget: Bytes | None
    plan: Plan | None

    def __bool__(self) -> bool:
        return bool(self.layers)

    def __str__(self) -> str:
        parts = ["no layer is recomputed"]
        if self.layers:
            parts = [f"{len(self.layers)} of {self.num_layers} layers recomputed ({fold(self.layers)})"]
            parts += [f"{name}={value!r}" for name, value in self.kwargs.items()]
        if self.plan is not None:
            parts.append(f"by a plan with a predicted peak of {format_bytes(self.plan.predicted_peak_bytes)}")
        elif self.layers:
            parts.append(f"set by {self.set_by}")
        if self.budget is not None:
            waiting = "" if self.plan is not None else ", no plan applied yet"
            parts.append(f"budget {format_bytes(self.budget)}{waiting}")
        return "; ".join(parts)


def checkpointing_in_effect(model: nn.Module) -> CheckpointingInEffect:
    """What the next training step recomputes, read from the live model and not from what was once asked for.

    Returns:
        Paths in it are relative to `model`.
    """
    handle = handle_on(model)
    if handle is not None:
        plan = handle.plan
        active = [path for path, decision in plan.decisions.items() if decision.action is Action.RECOMPUTE]
        active += [path for group in plan.groups for path in group]
        layers = tuple(row.path for row in plan.rows if any(_within(path, row.path) for path in active))
        budget = None if plan.budget_bytes is None else Bytes(plan.budget_bytes)
        return CheckpointingInEffect(layers, len(plan.rows), {}, "plan", budget, plan)
    candidates = dict(_layers(model))
    layers = tuple(path for path, module in candidates.items() if is_on(module))
    budget = requested_budget(model)
    if not layers:
        return CheckpointingInEffect((), len(candidates), {}, "nobody", budget, None)
    function: Any = getattr(candidates[layers[0]], FUNCTION, None)
    if isinstance(function, LayerCheckpoint):
        return CheckpointingInEffect(layers, len(candidates), function.options.shown(), "rematree", budget, None)
    # transformers binds them with functools.partial, and does not know a budget
    kwargs = dict(getattr(function, "keywords", {}))
    if BUDGET_KEY in kwargs:
        budget = parse_bytes(kwargs.pop(BUDGET_KEY))
    return CheckpointingInEffect(layers, len(candidates), kwargs, "transformers", budget, None)


def handle_on(model: nn.Module) -> Handle | None:
    """The plan in force on `model`, on a module of it, or on a wrapper around it."""
    for module in model.modules():
        if (handle := applied_handle(module)) is not None:
            return handle
        # A plan is written on the outermost wrapper; what it hangs on the model inside leads back to it.
        forward = module.__dict__.get("forward")
        while isinstance(forward, ForwardOverride):
            owner = getattr(forward.__dict__.get("_around"), "__self__", None)
            if isinstance(owner, Handle):
                return owner
            forward = getattr(forward, "__wrapped__", None)
    return None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are recomputed one by one; without any, those that decide for their layers."""
    flagged = [(path, module) for path, module in model.named_modules() if has_flag(module)]
    layers = [item for item in flagged if is_checkpointing_layer(item[1])]
    return iter(layers or flagged)


def _within(path: str, block: str) -> bool:
    return path == block or path.startswith((f"{block}.", f"{block}#"))


def fold(paths: tuple[str, ...]) -> str:
    """Paths with neighbouring numbers joined: "model.layers.0-3", "encoder.0,2,4 decoder.0,2"."""
    parts: list[str] = []
    for parent, members in itertools.groupby(paths, key=lambda path: path.rpartition(".")[0]):
        names = [path.rpartition(".")[2] for path in members]
        runs: list[list[str]] = []
        for name in names:
            if runs and name.isdigit() and runs[-1][-1].isdigit() and int(name) == int(runs[-1][-1]) + 1:
                runs[-1].append(name)
            else:
                runs.append([name])
        shown = ",".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        parts.append(f"{parent}.{shown}" if parent else shown)
    return " ".join(parts)
