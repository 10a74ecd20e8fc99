"""rematree: say how many bytes you have; get the fastest exact training step that fits.

The public surface is this page. Names are loaded on first use, so that `import rematree` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rematree.checkpointing import (
        activation_checkpointing_disable,
        activation_checkpointing_enable,
        disable_input_require_grads,
        enable_input_require_grads,
        gradient_checkpointing_disable,
        gradient_checkpointing_enable,
        is_activation_checkpointing,
    )
    from rematree.errors import (
        InfeasibleBudgetError,
        OutOfMemoryError,
        PlanMismatchError,
        RecomputeMismatchError,
        RematreeError,
        UnsupportedModelError,
        UsageError,
        VerificationError,
    )
    from rematree.execute.handle import Handle, apply
    from rematree.execute.quantised import keep_trainable
    from rematree.in_effect import CheckpointingInEffect, checkpointing_in_effect, requested_budget
    from rematree.integrations.metrics import log_memory
    from rematree.integrations.survival import survive_out_of_memory
    from rematree.integrations.trainer import BudgetCallback
    from rematree.measure import PeakMeter
    from rematree.planning.agreement import agreed_plan
    from rematree.planning.planner import Planner, frontier, plan
    from rematree.plans import Plan
    from rematree.prepare import prepare_model_for_kbit_training
    from rematree.pricing.cost import Measured
    from rematree.pricing.roofline import Roofline
    from rematree.referee.ranks import Ranks
    from rematree.saved import SavedTensor, saved_tensors
    from rematree.verification import Verification, verify

_HOMES: Final = {
    "BudgetCallback": "rematree.integrations.trainer",
    "CheckpointingInEffect": "rematree.in_effect",
    "Handle": "rematree.execute.handle",
    "InfeasibleBudgetError": "rematree.errors",
    "Measured": "rematree.pricing.cost",
    "PeakMeter": "rematree.measure",
    "Plan": "rematree.plans",
    "PlanMismatchError": "rematree.errors",
    "OutOfMemoryError": "rematree.errors",
    "Planner": "rematree.planning.planner",
    "Ranks": "rematree.referee.ranks",
    "RecomputeMismatchError": "rematree.errors",
    "RematreeError": "rematree.errors",
    "Roofline": "rematree.pricing.roofline",
    "SavedTensor": "rematree.saved",
    "UnsupportedModelError": "rematree.errors",
    "UsageError": "rematree.errors",
    "Verification": "rematree.verification",
    "VerificationError": "rematree.errors",
    "activation_checkpointing_disable": "rematree.checkpointing",
    "activation_checkpointing_enable": "rematree.checkpointing",
    "agreed_plan": "rematree.planning.agreement",
    "apply": "rematree.execute.handle",
    "checkpointing_in_effect": "rematree.in_effect",
    "disable_input_require_grads": "rematree.checkpointing",
    "enable_input_require_grads": "rematree.checkpointing",
    "frontier": "rematree.planning.planner",
    "gradient_checkpointing_disable": "rematree.checkpointing",
    "gradient_checkpointing_enable": "rematree.checkpointing",
    "is_activation_checkpointing": "rematree.checkpointing",
    "keep_trainable": "rematree.execute.quantised",
    "log_memory": "rematree.integrations.metrics",
    "plan": "rematree.planning.planner",
    "prepare_model_for_kbit_training": "rematree.prepare",
    "requested_budget": "rematree.in_effect",
    "saved_tensors": "rematree.saved",
    "survive_out_of_memory": "rematree.integrations.survival",
    "verify": "rematree.verification",
}

__all__ = [
    "BudgetCallback",
    "CheckpointingInEffect",
    "Handle",
    "InfeasibleBudgetError",
    "Measured",
    "OutOfMemoryError",
    "PeakMeter",
    "Plan",
    "PlanMismatchError",
    "Planner",
    "Ranks",
    "RecomputeMismatchError",
    "RematreeError",
    "Roofline",
    "SavedTensor",
    "UnsupportedModelError",
    "UsageError",
    "Verification",
    "VerificationError",
    "activation_checkpointing_disable",
    "activation_checkpointing_enable",
    "agreed_plan",
    "apply",
    "checkpointing_in_effect",
    "disable_input_require_grads",
    "enable_input_require_grads",
    "frontier",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "is_activation_checkpointing",
    "keep_trainable",
    "log_memory",
    "plan",
    "prepare_model_for_kbit_training",
    "requested_budget",
    "saved_tensors",
    "survive_out_of_memory",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'rematree' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # `rematree.plan` is the function, also after the module of that name was imported
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
