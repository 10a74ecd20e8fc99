"""The ways to compute the loss: all logits at once, or chunks of rows; what each takes, measured on the twin."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from rematree.execute.loss.head import find_head
from rematree.observation.observe import Twin
from rematree.planning.head_pace import HeadClock
from rematree.plans import Levers
from rematree.referee.simulate import Referee
from rematree.solve.chain import HeadOption
from rematree.units import MIB

_CHUNK_ROWS: Final = (4096, 2048, 1024, 512, 256, 128, 64, 32)
_MAX_CHUNKS: Final = 32  # more make the logits smaller than what else is live beside them, and the step slower
_OF_TOKENS: Final = frozenset({"input_ids", "inputs_embeds"})
_LITTLE: Final = 32 * MIB  # what glibc keeps at most of one request
_CLEARLY_FASTER: Final = 0.85  # of the seconds of a head with smaller chunks


def tokens_of(batch: Mapping[str, Any]) -> int:
    """B*T of `batch`; 1 where nothing says it."""
    return math.prod(rows_and_tokens_of(batch))


def rows_and_tokens_of(batch: Mapping[str, Any]) -> tuple[int, int]:
    """B and T of `batch`: of the largest of its ids, embeddings and labels; without ids of any [B, T, ...] tensor.

    Pictures may be [patches, pixels], which are no tokens. 1 and 1 without any.
    """
    tensors = {name: t for name, t in batch.items() if isinstance(t, torch.Tensor) and t.dim() >= 2}
    known = tensors.keys() & _OF_TOKENS
    said = [tensors[name] for name in (known | {"labels"}) & tensors.keys()] if known else [*tensors.values()]
    return max(((each.shape[0], each.shape[1]) for each in said), key=math.prod, default=(1, 1))


def chunk_rows_of(twin: Twin) -> list[int]:
    """Rows at once in which the loss can be computed, falling; none where it cannot."""
    if "labels" not in twin.batch or find_head(twin.model) is None:
        return []
    labels = twin.batch["labels"]
    return chunk_rows_for(labels.numel() if labels.dim() >= 2 else 1)


def chunk_rows_for(tokens: int) -> list[int]:
    """Rows at once that are worth considering for so many in all, falling."""
    smaller = [count for count in _CHUNK_ROWS if count < tokens]
    return [count for count in smaller if tokens <= count * _MAX_CHUNKS] or smaller[:1]


def trains_tied_head(model: nn.Module) -> bool:
    """Whether the head's weight is the input embedding's and is trained."""
    found = find_head(model)
    if found is None:
        return False
    causal, head = found
    embedding_of: Callable[[], Any] | None = getattr(causal, "get_input_embeddings", None)
    weight = getattr(head, "weight", None)
    if embedding_of is None or not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return False
    return getattr(embedding_of(), "weight", None) is weight


def measure_heads(
    short: Referee, chunks: Sequence[int], clock: HeadClock | None
) -> tuple[list[int | None], list[HeadOption], dict[int | None, float]]:
    """Ways to compute the loss, what each takes, and its measured over its predicted seconds."""
    rows: list[int | None] = [None, *chunks]
    runs = {count: short.run(Levers(loss_chunk_rows=count)) for count in rows}
    found = {count: run.head for count, run in runs.items()}
    workspaces = {count: head.peak_bytes - head.live_bytes for count, head in found.items()}
    timed = clock.seconds(workspaces) if clock is not None else {}
    pace = {count: seconds / found[count].seconds for count, seconds in timed.items() if found[count].seconds > 0}
    known = list(pace.values()) or [1.0]
    pace = {count: pace.get(count, known[0 if count is None else -1]) for count in rows}
    heads = {count: HeadOption(workspaces[count], head.seconds * pace[count]) for count, head in found.items()}
    worth = _worth_their_memory(heads) if timed and short.twin.device.type == "cpu" else rows
    # What the model's forward alone holds as it begins is gone by its peak (`stages._released`).
    above = [replace(heads[count], peak=heads[count].peak + runs[count].released_bytes) for count in worth]
    return worth, above, pace


def _worth_their_memory(heads: Mapping[int | None, HeadOption]) -> list[int | None]:
    """Losses to choose from: chunks that need much only where they are clearly faster than those that need little.

    What needs more than the C library keeps for the next request is given back after each chunk and mapped again, in a
    step far more often than in a head that runs alone: what such a chunk seems to win is lost again there.
    """
    whole, *chunks = heads
    chunks.reverse()  # in rising order
    kept = chunks[:2]  # two, so that what a row takes can be told
    for count in chunks[2:]:
        fastest = min(heads[each].seconds for each in kept)
        if heads[count].peak <= _LITTLE or heads[count].seconds < _CLEARLY_FASTER * fastest:
            kept.append(count)
    return [whole, *kept[::-1]]
