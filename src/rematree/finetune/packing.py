"""Rows of one fixed shape out of examples of any length.

The plan holds for one batch shape, so every row has exactly `max_length` tokens. Packed rows carry no attention mask:
transformers reads from the restarting `position_ids` where one example ends and the next begins, and lets none attend
to another. It looks only when there is no key-value cache: with `use_cache` on, packed examples would leak into each
other, so the job switches the cache off before anything else. What a model makes of that is tried before it is trained.
"""

import bisect
from collections.abc import Sequence
from typing import Any, Final, cast

import torch

from rematree.errors import UsageError
from rematree.finetune.tokens import IGNORED, TokenizedExample

_EACH: Final = 8  # tokens of an example that is made up


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`, each put where the least room is left behind it.

    Bins come in the order they were opened, so the longest items are in the first ones.

    Cost:
        O(n log n) comparisons.
    Source:
        Johnson 1973; at most 11/9 of the optimal number of bins, plus one.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"item {index} has length {length}, above the capacity {capacity}")
        at = bisect.bisect_left(open_bins, (length, 0))
        if at == len(open_bins):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = open_bins.pop(at)
        bins[number].append(index)
        bisect.insort(open_bins, (room - length, number))
    return bins


def pack(examples: Sequence[TokenizedExample], max_length: int, pad_id: int) -> dict[str, list[list[int]]]:
    """Columns `input_ids`, `labels`, `position_ids`, several examples a row, every example whole."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for members in best_fit_decreasing([len(example.input_ids) for example in examples], max_length):
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for index in members:
            example = examples[index]
            ids += example.input_ids
            # The label of a first token would be predicted from the end of the example before it.
            labels += [IGNORED, *example.labels[1:]]
            positions += range(len(example.input_ids))
        room = max_length - len(ids)
        columns["input_ids"].append(ids + [pad_id] * room)
        columns["labels"].append(labels + [IGNORED] * room)
        columns["position_ids"].append([*positions, *range(room)])
    return columns


def pad(examples: Sequence[TokenizedExample], max_length: int, pad_id: int) -> dict[str, list[list[int]]]:
    """Columns `input_ids`, `labels`, `attention_mask`, one example a row."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for example in examples:
        length = len(example.input_ids)
        room = max_length - length
        columns["input_ids"].append(example.input_ids + [pad_id] * room)
        columns["labels"].append([IGNORED, *example.labels[1:]] + [IGNORED] * room)
        columns["attention_mask"].append([1] * length + [0] * room)
    return columns


def refuse_leaks(model: Any, rows: int) -> None:
    """Refuse a model in which what one example of a row predicts depends on another example of that row.

    A gradient tells: that of the logits of the last of two examples is zero on the embeddings of the first, exactly,
    unless something leads from one to the other, be it a mask that was not made, a convolution or a recurrence. Not
    found is what leads there in longer rows alone.

    Args:
        model: With its weights; their gradients and all random generators are left as they were.
        rows: In a batch: some kernels keep examples apart in one row alone.
    Raises:
        UsageError: there is such a dependence.
    Cost:
        A forward and a backward of at most 2 rows of 16 tokens.
    """
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    ids = torch.arange(2 * _EACH, device=device).remainder(embedding.weight.shape[0]).repeat(min(rows, 2), 1)
    positions = torch.arange(_EACH, device=device).repeat(len(ids), 2)
    hook = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            logits: torch.Tensor = model(input_ids=ids, position_ids=positions).logits
            found = torch.autograd.grad(logits[:, _EACH:].float().sum(), embedded[:1], allow_unused=True)
            found = cast("tuple[torch.Tensor | None, ...]", found)
    finally:
        hook.remove()
    if any(gradient is not None and (gradient[:, :_EACH].nan_to_num() != 0).any() for gradient in found):
        raise not_kept_apart("in this model an example depends on those before it in its row")


def not_kept_apart(why: str) -> UsageError:
    """The error for a model that must not be given several examples in one row."""
    return UsageError(f"{why}, so examples cannot be packed", remedies=["--no-packing"])
