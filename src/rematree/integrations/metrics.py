"""Memory, and the plan in force, among what a Trainer logs.

    trainer = Trainer(..., callbacks=[rematree.BudgetCallback("14GiB")])
    rematree.log_memory(trainer)
    trainer.train()

Memory has the names of torchtitan, so that the panels of a dashboard line up. TensorBoard and Weights & Biases put
"train/" in front, as they do with the loss.
"""

from typing import Any, Final

import torch
from transformers import TrainerCallback

from rematree.execute.handle import applied_handle
from rematree.measure import resident_peak_bytes
from rematree.plans import Plan
from rematree.units import GIB

_PLAN: Final = "rematree/plan"


def log_memory(trainer: Any) -> "MemoryMetrics":
    """Have `trainer` log memory and the plan in force with every training loss.

    The callback goes in front of those that report: one passed as `callbacks=[...]` would come behind them, and add
    its figures to logs that TensorBoard and the others have already sent.

    Args:
        trainer: A transformers `Trainer`, or TRL's.
    Returns:
        The callback, for `trainer.remove_callback`.
    """
    handler = trainer.callback_handler
    found = next((each for each in handler.callbacks if isinstance(each, MemoryMetrics)), None)
    if found is None:
        found = MemoryMetrics()
    else:
        handler.remove_callback(found)
    handler.callbacks.insert(0, found)
    return found


class MemoryMetrics(TrainerCallback):
    """Adds to the logs of every training loss; `log_memory` puts it where reports see that.

    On a GPU, by its allocator, since the log before:
        `memory/max_active(GiB)`, `memory/max_active(%)` of the device, `memory/max_reserved(GiB)`,
        `memory/max_reserved(%)`, `memory/num_alloc_retries`, `memory/num_ooms`.
    On a CPU torch counts nothing, so there is another name for another thing:
        `memory/max_resident(GiB)`, the largest the whole process has been (VmHWM), which never falls.
    While a plan is in force, predicted:
        `rematree/predicted_peak(GiB)`, `rematree/recompute_share` (of the step, from 0 to 1), with a budget also
        `rematree/budget(GiB)` and `rematree/headroom(GiB)` (budget minus predicted peak).
    When another plan has come into force:
        `rematree/plan`, its summary as text.
    """

    def __init__(self) -> None:
        self._said: Plan | None = None
        self._counting = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counting = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What loading and planning took is no part of the first log."""
        if not self._counting:
            self._counting = True
            reset_peak(next(kwargs["model"].parameters()).device)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:  # of an evaluation, or the sums at the end of training
            return
        model: Any = kwargs["model"]
        found = device_memory(next(model.parameters()).device)
        handle = applied_handle(model)
        if handle is not None:
            plan = handle.in_force
            found |= plan_metrics(plan)
            if plan is not self._said:
                self._said = plan
                found[_PLAN] = _described(plan)
        logs.update(found)
        if state.log_history:  # made before the callbacks are asked; checkpoints keep it
            state.log_history[-1].update(found)


def device_memory(device: torch.device) -> dict[str, Any]:
    """What is known of the memory of `device` since the last call, by the names of torchtitan where they mean that."""
    if device.type != "cuda":
        return {"memory/max_resident(GiB)": resident_peak_bytes() / GIB}
    counted = torch.cuda.memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    found: dict[str, Any] = {}
    for name, counter in (("max_active", "active_bytes.all.peak"), ("max_reserved", "reserved_bytes.all.peak")):
        found[f"memory/{name}(GiB)"] = counted[counter] / GIB
        found[f"memory/{name}(%)"] = 100 * counted[counter] / total
    found["memory/num_alloc_retries"] = counted["num_alloc_retries"]
    found["memory/num_ooms"] = counted["num_ooms"]
    reset_peak(device)
    return found


def reset_peak(device: torch.device) -> None:
    """Count the peak of `device` from now on; nothing, where it does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def plan_metrics(plan: Plan) -> dict[str, Any]:
    """The prediction of `plan` in numbers."""
    seconds = plan.predicted_step_seconds
    found: dict[str, Any] = {
        "rematree/predicted_peak(GiB)": plan.predicted_peak_bytes / GIB,
        "rematree/recompute_share": plan.extra_seconds / seconds if seconds else 0.0,
    }
    if plan.budget_bytes is not None and plan.headroom_bytes is not None:
        found["rematree/budget(GiB)"] = plan.budget_bytes / GIB
        found["rematree/headroom(GiB)"] = plan.headroom_bytes / GIB
    return found


def _described(plan: Plan) -> str:
    parts = [plan.summary(), *(f"{row.regions}: {row.option}" for row in plan.folded_rows())]
    if plan.loss_chunk_rows is not None:
        parts.append(f"loss in chunks of {plan.loss_chunk_rows} rows")
    return "; ".join(parts)
