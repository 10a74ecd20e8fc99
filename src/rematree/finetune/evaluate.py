"""Held-out loss and a generated answer, in less memory than a training step."""

import inspect
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy

from rematree.finetune.tokens import IGNORED, prompt_tokens

# Logits of one example can be larger than everything a budgeted step holds: 512 tokens by 49152 words in float32 are
# 96 MiB, and the loss makes copies. 128 rows are 24 MiB.
_LOGIT_ROWS: Final = 128


@torch.no_grad()
def heldout_loss(model: Any, heldout: Any, max_examples: int) -> float | None:
    """Mean loss over the answer tokens of the first `max_examples` examples, or None when nothing is held out.

    One example at a time, at its own length, and never more than a few rows of logits: an example whose answer is
    longer goes through the layers again for the next rows.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    count = 0
    try:
        for row in heldout.select(range(min(max_examples, len(heldout)))):
            ids = torch.tensor([row["input_ids"]], device=device)
            labels = torch.tensor(row["labels"], device=device)
            # The logits at a position predict the token behind it.
            positions = (labels[1:] != IGNORED).nonzero().flatten()
            for start in range(0, len(positions), _LOGIT_ROWS):
                rows = positions[start : start + _LOGIT_ROWS]
                logits = _logits_at(model, ids, rows)
                total += cross_entropy(logits.float(), labels[rows + 1], reduction="sum").item()
            count += len(positions)
    finally:
        model.train(was_training)
    return total / count if count else None


@torch.no_grad()
def generate_answer(model: Any, tokenizer: Any, text: str, max_new_tokens: int) -> str:
    """The most likely answer to the prompt `text`."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    tokens = prompt_tokens(text, tokenizer, return_tensors="pt").to(device)
    try:
        output = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    finally:
        model.train(was_training)
    return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _logits_at(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits (rows, V) at the given positions; the head runs on these positions only where the model allows it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        return model(input_ids=ids, logits_to_keep=rows, use_cache=False).logits[0]
    return model(input_ids=ids, use_cache=False).logits[0, rows]
