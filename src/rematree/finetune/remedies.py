"""What would fit when a budget does not: changes of a run that were planned and found to work."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Final

from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.finetune.config import TrainConfig
from rematree.finetune.synthetic import Shape, prepare_shape, synthetic_batch_like
from rematree.finetune.target import Target, all_targets
from rematree.measure import storage_bytes
from rematree.quantised import hidden_tensors
from rematree.referee.ranks import Ranks
from rematree.units import MIB

_SHORTEST: Final = 8
_MOST: Final = 3


def working_changes(
    error: InfeasibleBudgetError,
    config: TrainConfig,
    say: Callable[[str], None],
    *,
    target: Target | None = None,
    shape: Shape | None = None,
    full: bool = False,
) -> list[dict[str, Any]]:
    """Changes of `config`, each of which makes its budget reachable: a larger budget, shorter rows, fewer rows.

    Where there are fewer than three of these and the device is not the one that is here: adapters in place of all
    parameters, weights packed into 4 bits, the next larger device.

    Args:
        error: What planning `config` raised.
        config: The run.
        say: Takes a line of progress.
        target: What it was planned for; by default the device that is here.
        shape: Model and batch, when they are loaded.
        full: All parameters are trained.
    Returns:
        New values by field name, None for an option to leave out.
    Cost:
        Two further plans, of half the tokens each: seconds. For a device that is not here up to three more.
    """
    enough = -(-error.min_peak // MIB)
    has = None if target is None or target.device is None else target.device.usable_bytes
    changes: list[dict[str, Any]] = [{"budget": f"{enough}MiB"}] if has is None or enough * MIB <= has else []
    target = target or Target()
    changes += _fewer_tokens(error, config, say, target, shape)
    if target.device is not None and len(changes) < _MOST:
        say("checking whether it would fit otherwise")
        shape = shape or target.shape(config, full=full)
        others = [*islice(_smaller_models(error.budget, config, target, full), 1)]
        if not changes or "budget" not in changes[0]:
            others += islice(_larger_devices(error.min_peak, config, target, shape), 1)
        changes += others
    return changes[:_MOST]


def _fewer_tokens(
    error: InfeasibleBudgetError, config: TrainConfig, say: Callable[[str], None], target: Target, shape: Shape | None
) -> list[dict[str, Any]]:
    rows, length, passes = config.per_device_train_batch_size, config.max_length, config.gradient_accumulation_steps
    smaller: list[tuple[dict[str, Any], int, int, int]] = []
    if length // 2 >= _SHORTEST:
        smaller.append(({"max_length": length // 2}, rows, length // 2, passes))
    if rows > 1:
        # Twice the passes keep the tokens in an optimizer step.
        fewer = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": passes * 2}
        smaller.append((fewer, rows // 2, length, passes * 2))
    if not smaller:
        return []
    shape = shape or prepare_shape(config)
    if _static_bytes(shape.model, target.ranks) >= error.budget:
        return []
    say("checking whether shorter or fewer rows would fit")
    changes: list[dict[str, Any]] = []
    for change, less_rows, less_length, more_passes in smaller:
        smaller_run = replace(
            config,
            per_device_train_batch_size=less_rows,
            max_length=less_length,
            gradient_accumulation_steps=more_passes,
        )
        planner = target.planner(synthetic_batch_like(shape, smaller_run), smaller_run)
        if planner.min_peak_bytes() <= error.budget:
            changes.append(change)
    return changes


def _smaller_models(budget: int, config: TrainConfig, target: Target, full: bool) -> Iterator[dict[str, Any]]:
    """The same run on less: adapters where everything was trained, and weights in 4 bits; those that fit."""
    assert target.device is not None
    ways: list[tuple[dict[str, Any], TrainConfig]] = [({"full": None}, config)] if full else []
    whole = target.ranks is None or target.ranks.engine in {"ddp", "zero2"}
    if config.quantised_bits is None and whole and target.device.backend in {"cuda", "rocm"}:
        change = {"load_in_4bit": True, **({"full": None} if full else {})}
        ways.append((change, replace(config, load_in_4bit=True)))
    for change, run in ways:
        try:
            shape = target.shape(run, full=False)
        except UsageError:  # bitsandbytes is not there, or the model takes no adapters without further options
            continue
        if _static_bytes(shape.model, target.ranks) < budget and target.planner(shape, run).min_peak_bytes() <= budget:
            yield change


def _larger_devices(least: int, config: TrainConfig, target: Target, shape: Shape) -> Iterator[dict[str, Any]]:
    """Devices that the run fits as it is, without a budget: of the same make the smallest first, then of another."""
    assert target.device is not None
    make = target.device.backend
    others = [other for other in all_targets() if other.dtype == target.dtype and other.budget(None) >= least]
    for other in sorted(others, key=lambda other: (_backend(other) != make, other.budget(None))):
        assert other.device is not None
        planner = other.among(target.ranks).planner(shape, config)
        if planner.min_peak_bytes() <= other.budget(None):
            yield {"device": other.device.name, "budget": None}


def _backend(target: Target) -> str:
    return "" if target.device is None else target.device.backend


def _static_bytes(model: Any, ranks: Ranks | None) -> int:
    """Weights and the optimizer's two moments, or a rank's share of them: there whatever the batch."""
    whole = storage_bytes([*model.parameters(), *model.buffers(), *hidden_tensors(model)])
    state = 2 * storage_bytes([p for p in model.parameters() if p.requires_grad])
    if ranks is None or ranks.engine == "ddp":
        return whole + state
    if ranks.engine == "zero2":
        return whole + state // ranks.count
    return (whole + state) // ranks.count
