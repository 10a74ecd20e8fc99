"""What the training arguments, the model and the optimizer of a trainer say about memory."""

import warnings
from collections.abc import Callable
from typing import Any, Final

from rematree.errors import UsageError
from rematree.in_effect import BUDGET_KEY, requested_budget
from rematree.integrations.batches import rounded_up
from rematree.memory.found import found_optimizer
from rematree.memory.optimizers import Found, Optimizer
from rematree.referee.ranks import base_optimizer
from rematree.units import format_bytes, parse_bytes

_KINDS: Final = ("activation_checkpointing", "gradient_checkpointing")  # names of arguments, new and old


def wanted_budget(own: int | None, args: Any, model: Any) -> int | None:
    """The one budget; None if only the arguments name one, and they switch checkpointing off.

    Args:
        own: The callback's, in bytes.
        args: Of the training.
        model: What trains.
    Raises:
        UsageError: there is none, or there are two.
    """
    named = [parse_bytes(given[BUDGET_KEY]) for given in _arguments(args) if BUDGET_KEY in given]
    found = named if _is_asked_for(args) else []
    found += [size for size in (own, requested_budget(model)) if size is not None]
    if named and not found:
        return None
    if not found:
        raise UsageError(
            "no budget: neither BudgetCallback nor the training arguments nor the model name one",
            remedies=[
                'rematree.BudgetCallback("14GiB")',
                'TrainingArguments(activation_checkpointing=True, activation_checkpointing_kwargs={"budget": '
                '"14GiB"}, ...)',
            ],
        )
    if len(set(found)) > 1:
        shown = " and ".join(format_bytes(size) for size in dict.fromkeys(found))
        raise UsageError(f"two budgets: {shown}; name one, in one place")
    return found[0]


def warn_of_what_has_no_effect(args: Any) -> None:
    """Warn if the arguments ask for checkpointing in a way that a plan does not follow."""
    if not _is_asked_for(args):
        return
    given = {name: value for kwargs in _arguments(args) for name, value in kwargs.items()}
    plain = {"use_reentrant": False, "every_n_layers": 1, "offload": False}  # what a plan amounts to
    idle = [name for name, value in given.items() if name != BUDGET_KEY and plain.get(name, ...) != value]
    if idle:
        shown = ", ".join(f"{name}={given[name]!r}" for name in idle)
        warnings.warn(
            f"{shown} among the arguments of checkpointing: no effect while a plan is in force, which decides what is "
            "recomputed",
            UserWarning,
            stacklevel=2,
        )


def warn_of_losses_outside(args: Any) -> None:
    """Warn if the Trainer takes the labels away and computes the loss from all logits, which no plan counts."""
    smoothing = getattr(args, "label_smoothing_factor", 0.0)
    if smoothing:
        warnings.warn(
            f"label_smoothing_factor={smoothing}: the Trainer computes that loss from all logits, outside the model, "
            "and the plan is for the model's own; the peak may be above the prediction",
            UserWarning,
            stacklevel=2,
        )


def _arguments(args: Any) -> list[dict[str, Any]]:
    """Of checkpointing, among the training arguments; by either name, which transformers keeps equal."""
    given = [getattr(args, f"{kind}_kwargs", None) for kind in _KINDS]
    return [value for value in given if isinstance(value, dict)]


def _is_asked_for(args: Any) -> bool:
    return any(bool(getattr(args, kind, False)) for kind in _KINDS)


def most_tokens(args: Any) -> int | None:
    """Tokens that rows are cut to, and then padded to a multiple (TRL's `max_length`); None if they are not."""
    most = getattr(args, "max_length", None)
    return rounded_up(most, getattr(args, "pad_to_multiple_of", None)) if isinstance(most, int) else None


def kind_of(optimizer: Any, model: Any, say: Callable[[str], None]) -> Optimizer | Found:
    """What the optimizer keeps for each trained parameter; what is not known counts as AdamW, and that is said."""
    inner = base_optimizer(optimizer)
    if inner is None:
        return "adamw"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = found_optimizer(inner, trained, trained[0].device.type if trained else "cpu")
    if found is None and not type(inner).__module__.startswith("deepspeed"):  # whose engine decides on dtype and place
        say(
            f"what {type(inner).__name__} keeps is not known: counted as AdamW's, two numbers for each trained one, in "
            "its dtype"
        )
    return found or "adamw"
