"""How TRL's trainers call the model.

`SFTTrainer` and `DPOTrainer` replace the forward of the language model by one that takes `fused_lm_head=True` and
returns log-probabilities instead of logits, tile by tile. A plan for such a model has to observe the same call. DPO's
loss needs the sum of them for each row, which costs what the mean does; its reference model runs without a graph before
backward begins, and keeps two numbers a row.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch

from rematree.execute.override import ForwardOverride
from rematree.observation.observe import LossFunction
from rematree.regions import unwrap

_SWITCH: Final = "fused_lm_head"
_COMPLETION: Final = "completion_mask"
_OF_THE_TRAINER: Final = frozenset({_COMPLETION, "ref_chosen_logps", "ref_rejected_logps"})


def fused_head_call(model: Any) -> tuple[dict[str, Any], LossFunction | None]:
    """Arguments that the trainer will add to each batch, and the loss it will make of the output.

    Empty and None for a model that TRL has not patched: its own loss is differentiated.
    """
    forward: Any = unwrap(model).forward
    while isinstance(forward, ForwardOverride):  # this library's switch may lie around the patch
        forward = vars(forward)["__wrapped__"]
    patched = getattr(forward, "__func__", forward)
    # The patch keeps the original's signature for the outside, so look at its own.
    if _SWITCH not in inspect.signature(patched, follow_wrapped=False).parameters:
        return {}, None
    return {_SWITCH: True, "use_cache": False}, _negative_log_likelihood


def as_called(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with for a batch of the loader: `DPOTrainer` makes labels of its masks."""
    called = {name: value for name, value in batch.items() if name not in _OF_THE_TRAINER}
    if _COMPLETION in batch and "labels" not in batch:
        called["labels"] = batch["input_ids"].masked_fill(batch[_COMPLETION] == 0, -100)
    return called


def _negative_log_likelihood(output: Any) -> torch.Tensor:
    return -output.log_probs.sum() / output.label_mask.sum().clamp(min=1)
