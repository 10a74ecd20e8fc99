"""Checkpointing as one switch for the whole model, with transformers' names and arguments.

This is the switch without a budget: every layer, or the first of every n, keeps only its input and is run again in
backward. `rematree.plan` and `apply` choose per region instead. At any moment `checkpointing_in_effect(model)` says
which of the two is in force.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.checkpoint_switch import FLAG, FUNCTION, Switch, has_flag, innermost, switches
from rematree.execute.handle import Handle, applied_handle
from rematree.execute.input_grads import add_input_grad_hooks, remove_input_grad_hooks
from rematree.execute.layer_checkpoint import CheckpointOptions, LayerCheckpoint
from rematree.plans import Action, Plan
from rematree.regions import is_checkpointing_layer
from rematree.units import Bytes, format_bytes, parse_bytes

_BUDGET: Final = "_rematree_budget"
_PREFIXES: Final = ("PREFIX_TUNING", "CARTRIDGE")  # they hand their prefix to the layers as a key-value cache


def activation_checkpointing_enable(
    model: nn.Module,
    activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
) -> None:
    """Run the model's layers again in backward instead of keeping what they compute.

    Works before and after adapters are added, on a `PeftModel`, on a model with `add_adapter`, and on any module with
    an `nn.ModuleList` of blocks. transformers' own flags are set, so its Trainer sees the truth. Doing it again
    replaces the options; what disabling goes back to stays.

    Gradients are those of the plain model, also when adapters or training flags change between forward and backward,
    and also with `preserve_rng_state=False`: where a layer drew random numbers, their state is kept all the same.
    A layer is called plainly when it would record nothing: under `no_grad`, in evaluation mode, below the lowest
    trained parameter.

    Args:
        model: The model, possibly wrapped by PEFT, `torch.compile` or data parallelism.
        activation_checkpointing_kwargs: `use_reentrant` (default False, honoured as given), `preserve_rng_state`,
            `determinism_check`, `context_fn`, `debug`, `early_stop`, `every_n_layers`; see `torch.utils.checkpoint`.
            None and `{}` mean the same.
        every_n_layers: Run only the first of every n layers again, counted in each list of blocks by itself: the
            decoder's count does not depend on how many layers the encoder or a vision tower has.
    Raises:
        UsageError: an unknown or impossible argument, or a plan is in force on the model.
        UnsupportedModelError: nothing in the model can be recomputed, or its adapter is prefix tuning.
    Warns:
        FutureWarning: the model's own `gradient_checkpointing_enable()` takes no arguments; they are ignored.
    Cost:
        One more forward of every recomputed layer in each backward.
    """
    _switch_on(model, activation_checkpointing_kwargs, every_n_layers)


def gradient_checkpointing_enable(
    model: nn.Module,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
) -> None:
    """The older name of `activation_checkpointing_enable`; the same in every respect."""
    _switch_on(model, gradient_checkpointing_kwargs, every_n_layers)


def _switch_on(model: nn.Module, kwargs: Mapping[str, Any] | None, every_n_layers: int) -> None:
    options = CheckpointOptions.parse(kwargs, every_n_layers)
    check_can_switch(model)
    for switch in switches(model):
        switch.remove()
    Switch(innermost(model), options, tuple(kwargs or ()))


def check_can_switch(model: nn.Module) -> None:
    """Refuse a model whose checkpointing somebody else decides about.

    Raises:
        UsageError: a plan is in force.
        UnsupportedModelError: prefix tuning.
    """
    if _handle(model) is not None:
        raise UsageError(
            "a plan is in force on this model, and decides which regions are recomputed",
            remedies=["handle.remove() first; handle is what rematree.apply returned"],
        )
    for module in model.modules():
        configs: Any = module.__dict__.get("_peft_config") or {}  # only prompt learning keeps them here
        kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()]
        if found := [kind for kind in kinds if kind in _PREFIXES]:
            raise UnsupportedModelError(
                f"{found[0]} does not work with checkpointing: the prefix reaches the layers as a key-value cache, "
                "and a recomputed layer has none"
            )


def activation_checkpointing_disable(model: nn.Module) -> None:
    """Undo `activation_checkpointing_enable`: every attribute and hook is what it was before.

    If transformers' own checkpointing was on before, it is on again. If only transformers' own is on, it is switched
    off, with its hooks on the embeddings. Does nothing on a model without either.

    Raises:
        UsageError: a plan is in force on the model.
    """
    if _handle(model) is not None:
        raise UsageError("a plan is in force on this model", remedies=["handle.remove() takes it off"])
    ours = switches(model)
    for switch in ours:
        switch.remove()
    if ours or not any(_is_on(module) for module in model.modules()):
        return
    root: Any = innermost(model)
    new, old = (getattr(root, f"{name}_checkpointing_disable", None) for name in ("activation", "gradient"))
    if disable := new or old:
        disable()
        if hasattr(root, "disable_input_require_grads"):
            root.disable_input_require_grads()


def gradient_checkpointing_disable(model: nn.Module) -> None:
    """The older name of `activation_checkpointing_disable`."""
    activation_checkpointing_disable(model)


def is_activation_checkpointing(model: nn.Module) -> bool:
    """Whether anything is recomputed in a training step now: by this switch, by transformers' own, or by a plan."""
    return bool(checkpointing_in_effect(model).layers)


def enable_input_require_grads(model: nn.Module) -> None:
    """Make the output of every input embedding require a gradient, each tower's.

    The embedding itself is not trained by this. Reentrant checkpointing asks for it by itself; call it for a loop of
    your own. One hook an embedding, however often it is called, and values keep their bits.

    Raises:
        UnsupportedModelError: no module of the model says which its input embeddings are.
    """
    if not add_input_grad_hooks(innermost(model), temporary=False):
        raise UnsupportedModelError(
            f"{type(innermost(model)).__name__} does not say which its input embeddings are",
            remedies=["give the model a method get_input_embeddings()"],
        )


def disable_input_require_grads(model: nn.Module) -> None:
    """Take the hooks of `enable_input_require_grads` off. Does nothing the second time."""
    remove_input_grad_hooks(innermost(model), temporary=False)


def request_budget(model: nn.Module, budget: int | str) -> Bytes:
    """Write on the model how many bytes it may train in, for whoever plans once a batch is known.

    Raises:
        UsageError: not a size.
    """
    parsed = parse_bytes(budget)
    innermost(model).__dict__[_BUDGET] = parsed
    return parsed


def requested_budget(model: nn.Module) -> Bytes | None:
    """Bytes of peak memory that `prepare_model_for_kbit_training(budget=...)` was given, or None."""
    return next((m.__dict__[_BUDGET] for m in model.modules() if _BUDGET in m.__dict__), None)


@dataclass(frozen=True, slots=True)
class CheckpointingInEffect:
    """What is recomputed now. `str()` is one line; true if anything is.

    Attributes:
        layers: Paths of the layers that are run again in backward, or under a plan, in which something is.
        num_layers: How many there are to choose from.
        kwargs: Keyword arguments of the recomputation, as far as they were given.
        set_by: Who decides: this library's switch, transformers' own, a plan, or nobody.
        budget: Bytes that were asked for, by the plan in force or by `prepare_model_for_kbit_training`.
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
    handle = _handle(model)
    if handle is not None:
        plan = handle.plan
        active = [path for path, decision in plan.decisions.items() if decision.action is Action.RECOMPUTE]
        layers = tuple(row.path for row in plan.rows if any(_within(path, row.path) for path in active))
        budget = None if plan.budget_bytes is None else Bytes(plan.budget_bytes)
        return CheckpointingInEffect(layers, len(plan.rows), {}, "plan", budget, plan)
    candidates = dict(_layers(model))
    layers = tuple(path for path, module in candidates.items() if _is_on(module))
    budget = requested_budget(model)
    if not layers:
        return CheckpointingInEffect((), len(candidates), {}, "nobody", budget, None)
    function: Any = getattr(candidates[layers[0]], FUNCTION, None)
    if isinstance(function, LayerCheckpoint):
        return CheckpointingInEffect(layers, len(candidates), function.options.shown(), "rematree", budget, None)
    kwargs: Mapping[str, Any] = getattr(function, "keywords", {})  # transformers binds them with functools.partial
    return CheckpointingInEffect(layers, len(candidates), dict(kwargs), "transformers", budget, None)


def _handle(model: nn.Module) -> Handle | None:
    return next((handle for module in model.modules() if (handle := applied_handle(module)) is not None), None)


def _is_on(module: nn.Module) -> bool:
    return has_flag(module) and bool(getattr(module, FLAG))


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
