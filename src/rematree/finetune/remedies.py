"""What would fit when a budget does not: changes of a run that were planned and found to work."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from rematree.errors import InfeasibleBudgetError
from rematree.finetune.config import TrainConfig
from rematree.finetune.synthetic import Shape, prepare_shape, synthetic_batch_like
from rematree.finetune.target import Target
from rematree.measure import storage_bytes
from rematree.quantised import hidden_tensors
from rematree.referee.ranks import Ranks
from rematree.units import MIB

_SHORTEST: Final = 8


def working_changes(
    error: InfeasibleBudgetError,
    config: TrainConfig,
    say: Callable[[str], None],
    *,
    target: Target | None = None,
    shape: Shape | None = None,
) -> list[dict[str, Any]]:
    """Changes of `config`, each of which makes its budget reachable: a larger budget, shorter rows, fewer rows.

    Args:
        error: What planning `config` raised.
        config: The run.
        say: Takes a line of progress.
        target: What it was planned for; by default the device that is here.
        shape: Model and batch, when they are loaded.
    Returns:
        New values by field name.
    Cost:
        Two further plans, of half the tokens each: seconds. None when the weights alone are above the budget.
    """
    enough = -(-error.min_peak // MIB)
    has = None if target is None or target.device is None else target.device.usable_bytes
    changes: list[dict[str, Any]] = [{"budget": f"{enough}MiB"}] if has is None or enough * MIB <= has else []
    rows, length, passes = config.per_device_train_batch_size, config.max_length, config.gradient_accumulation_steps
    smaller: list[tuple[dict[str, Any], int, int, int]] = []
    if length // 2 >= _SHORTEST:
        smaller.append(({"max_length": length // 2}, rows, length // 2, passes))
    if rows > 1:
        # Twice the passes keep the tokens in an optimizer step.
        fewer = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": passes * 2}
        smaller.append((fewer, rows // 2, length, passes * 2))
    if not smaller:
        return changes
    target = target or Target()
    shape = shape or prepare_shape(config)
    if _static_bytes(shape.model, target.ranks) >= error.budget:
        return changes
    say("checking whether shorter or fewer rows would fit")
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


def _static_bytes(model: Any, ranks: Ranks | None) -> int:
    """Weights and the optimizer's two moments, or a rank's share of them: there whatever the batch."""
    whole = storage_bytes([*model.parameters(), *model.buffers(), *hidden_tensors(model)])
    state = 2 * storage_bytes([p for p in model.parameters() if p.requires_grad])
    if ranks is None or ranks.engine == "ddp":
        return whole + state
    if ranks.engine == "zero2":
        return whole + state // ranks.count
    return (whole + state) // ranks.count
