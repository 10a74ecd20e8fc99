"""Checkpointing as one switch for the whole model, with transformers' names and arguments.

This is the switch without a budget: every layer, or the first of every n, keeps only its input and is run again in
backward. `rematree.plan` and `apply` choose per region instead. At any moment `checkpointing_in_effect(model)` says
which of the two is in force.
"""

import functools
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.checkpoint_switch import FUNCTION, Switch, innermost, is_on, switches
from rematree.execute.input_grads import (
    add_input_grad_hooks,
    remove_hooks_of_transformers,
    remove_input_grad_hooks,
)
from rematree.execute.layer_checkpoint import CheckpointOptions
from rematree.in_effect import BUDGET_KEY, checkpointing_in_effect, handle_on, switched_budget, written_budget
from rematree.units import Bytes, format_bytes, parse_bytes

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
    trained parameter. Generation under `no_grad` keeps its key-value cache, also in training mode.

    While this is on, the model's own methods of these names lead here: the Trainer of transformers, which calls them,
    changes the options and nothing else.

    Args:
        model: The model, possibly wrapped by PEFT, `torch.compile` or data parallelism.
        activation_checkpointing_kwargs: `use_reentrant` (default False, honoured as given), `preserve_rng_state`,
            `determinism_check`, `context_fn`, `debug`, `early_stop`, `every_n_layers`; see `torch.utils.checkpoint`.
            None and `{}` mean the same. `budget` is not obeyed here: it is kept for `rematree.BudgetCallback`, as
            `requested_budget(model)`, until this is switched off.
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


def _switch_on(
    model: nn.Module, kwargs: Mapping[str, Any] | None, every_n_layers: int, budget: Bytes | None = None
) -> None:
    """Put the switch on; `budget` is that of a switch which was on before, if the arguments name none."""
    options, named = parse_with_budget(kwargs, every_n_layers)
    budget = budget if named is None else named
    check_can_switch(model)
    ours = switches(model)
    written = written_budget(model)
    if budget is not None and written is not None and budget != written:
        raise UsageError(
            f"two budgets: {format_bytes(written)} is written on the model, and {format_bytes(budget)} was given with "
            "the arguments of checkpointing; name one, in one place"
        )
    for switch in ours:
        switch.remove()
    Switch(innermost(model), options, tuple(kwargs or ()), budget=budget, methods=_METHODS)


def parse_with_budget(
    kwargs: Mapping[str, Any] | None, every_n_layers: int = 1
) -> tuple[CheckpointOptions, Bytes | None]:
    """Checked options of checkpointing, and the budget that is among them.

    Raises:
        UsageError: an unknown or impossible argument, or a budget that is no size.
    """
    given = dict(kwargs or {})
    budget = given.pop(BUDGET_KEY, None)
    return CheckpointOptions.parse(given, every_n_layers), None if budget is None else parse_bytes(budget)


def _again(root: nn.Module, kwargs: Mapping[str, Any] | None, every_n_layers: int, offload: bool) -> None:
    """What the model's own method for enabling does while the switch is on: a Trainer calls it, and names no budget."""
    if offload:  # transformers' own, which this library does not have: the last word is the user's
        for switch in switches(root):
            switch.remove()
        kind: Any = type(root)
        kind.activation_checkpointing_enable(root, kwargs, every_n_layers, offload=True)
    else:
        _switch_on(root, kwargs, every_n_layers, switched_budget(root))


def _again_by_new_name(
    root: nn.Module,
    activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    _again(root, activation_checkpointing_kwargs, every_n_layers, offload)


def _again_by_old_name(
    root: nn.Module,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    _again(root, gradient_checkpointing_kwargs, every_n_layers, offload)


def _pause(root: nn.Module) -> None:
    """What the model's own method for disabling does: TRL calls it around scoring, and enables again afterwards."""
    for switch in switches(root):
        switch.pause()


_METHODS: Final = {
    "activation_checkpointing_enable": _again_by_new_name,
    "gradient_checkpointing_enable": _again_by_old_name,
    "activation_checkpointing_disable": _pause,
    "gradient_checkpointing_disable": _pause,
}


def check_can_switch(model: nn.Module) -> None:
    """Refuse a model whose checkpointing somebody else decides about.

    Raises:
        UsageError: a plan is in force.
        UnsupportedModelError: prefix tuning.
    """
    if handle_on(model) is not None:
        raise UsageError(
            "a plan is in force on this model, and decides which regions are recomputed",
            remedies=["handle.remove() first; handle is what rematree.apply returned"],
        )
    _refuse_prefixes(model)


def _refuse_prefixes(model: nn.Module) -> None:
    """Refuse adapters that enter the layers by a cache; PEFT refuses them too, but only when they are made.

    Under a plan they are right: there a rerun finds the cache as the forward found it.
    """
    for module in model.modules():
        configs: Any = module.__dict__.get("_peft_config") or {}  # only prompt learning keeps them here
        kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()]
        if found := [kind for kind in kinds if kind in _PREFIXES]:
            raise UnsupportedModelError(
                f"{found[0]} does not work with checkpointing: the prefix reaches the layers as a key-value cache, "
                "and a recomputed layer has none",
                remedies=["rematree.plan(model, batch, budget=...) and apply; under a plan it works"],
            )


def activation_checkpointing_disable(model: nn.Module) -> None:
    """Undo `activation_checkpointing_enable`: every attribute and hook is what it was before.

    If transformers' own checkpointing was on before, it is on again. If only transformers' own is on, it is switched
    off, with its hooks on the embeddings. Does nothing on a model without either.

    Raises:
        UsageError: a plan is in force on the model.
    """
    if handle_on(model) is not None:
        raise UsageError("a plan is in force on this model", remedies=["handle.remove() takes it off"])
    ours = switches(model)
    for switch in ours:
        switch.remove()
    if ours or not any(is_on(module) for module in model.modules()):
        return
    root: Any = innermost(model)
    new, old = (getattr(root, f"{name}_checkpointing_disable", None) for name in ("activation", "gradient"))
    if disable := new or old:
        disable()
        remove_hooks_of_transformers(root)


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


def take_budget_from_transformers(model: nn.Module) -> None:
    """Take `budget` out of what transformers will hand to torch's checkpoint, which does not know the word.

    Its Trainer passes every key of `activation_checkpointing_kwargs` on. The rest means what it means to the Trainer:
    nothing else is the non-reentrant variant.
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        function = module.__dict__.get(FUNCTION)
        if isinstance(function, functools.partial) and BUDGET_KEY in function.keywords:
            if id(function) not in known:
                rest = {name: value for name, value in function.keywords.items() if name != BUDGET_KEY}
                known[id(function)] = functools.partial(function.func, **(rest or {"use_reentrant": False}))
            module.__dict__[FUNCTION] = known[id(function)]
