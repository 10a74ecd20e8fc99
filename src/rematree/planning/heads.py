"""The ways to compute the loss: all logits at once, or chunks of rows; what each takes, measured on the twin."""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import nn

from rematree.execute.loss.head import find_head
from rematree.observation.observe import Twin
from rematree.planning.head_pace import HeadClock
from rematree.plans import Levers
from rematree.referee.folding import shortened
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.regions import Chain, block_kind
from rematree.solve.chain import HeadOption
from rematree.units import MIB

_CHUNK_ROWS: Final = (4096, 2048, 1024, 512, 256, 128, 64, 32)
_MAX_CHUNKS: Final = 32  # more make the logits smaller than what else is live beside them, and the step slower
_OF_TOKENS: Final = frozenset({"input_ids", "inputs_embeds"})
_LITTLE: Final = 32 * MIB  # what glibc keeps at most of one request
_CLEARLY_FASTER: Final = 0.85  # of the seconds of a head with smaller chunks


@dataclass(frozen=True)
class Heads:
    """The ways to compute the loss.

    Attributes:
        rows: Of a chunk, by way; None, the first, is the model's own loss.
        options: The same in numbers.
        pace: Measured over predicted seconds, by rows.
        plain_seconds: Of the model's own loss in the whole step. Its price there is not quite that of a short chain:
            in the first simulated step no weight is in a cache yet.
    """

    rows: tuple[int | None, ...]
    options: tuple[HeadOption, ...]
    pace: Mapping[int | None, float]
    plain_seconds: float


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


def survey_heads(referee: Referee, chain: Chain, plain: Simulation, *, chunk: bool, live: nn.Module | None) -> Heads:
    """The ways to compute the loss behind the blocks of `chain`.

    Args:
        referee: Runs the whole step.
        chain: Its blocks.
        plain: What it says of a step without any lever.
        chunk: Whether chunked loss may be used.
        live: The model itself, if its head may be run for its time.
    Cost:
        A simulated step of the fewest blocks for each way; with `live` that of `HeadClock`.
    """
    twin = referee.twin
    few = _fewest(twin.model, chain, referee.kinds) if chain.container else range(len(chain.blocks))
    clock = None if live is None else HeadClock(live, twin, chain.blocks, plain)
    rows: list[int | None] = [None, *(chunk_rows_of(twin) if chunk else [])]
    with shortened_chain(twin.model, chain, few) as blocks:
        kinds = [referee.kinds[index] for index in few]
        short = Referee(twin, blocks, referee.cost, "none", referee.accumulate, kinds=kinds, ranks=referee.ranks)
        runs = {count: short.run(Levers(loss_chunk_rows=count)) for count in rows}
    found = {count: run.head for count, run in runs.items()}
    workspaces = {count: head.peak_bytes - head.live_bytes for count, head in found.items()}
    timed = clock.seconds(workspaces) if clock is not None else {}
    pace = {count: seconds / found[count].seconds for count, seconds in timed.items() if found[count].seconds > 0}
    known = list(pace.values()) or [1.0]
    pace = {count: pace.get(count, known[0 if count is None else -1]) for count in rows}
    heads = {count: HeadOption(workspaces[count], head.seconds * pace[count]) for count, head in found.items()}
    worth = _worth_their_memory(heads) if timed and twin.device.type == "cpu" else rows
    # What the model's forward alone holds as it begins is gone by its peak (`stages._released`).
    above = [replace(heads[count], peak=heads[count].peak + runs[count].released_bytes) for count in worth]
    return Heads(tuple(worth), tuple(above), pace, heads[None].seconds if clock is not None else plain.head.seconds)


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


def _fewest(model: nn.Module, chain: Chain, kinds: Sequence[int]) -> Sequence[int]:
    """The fewest blocks behind which the head is what it is in the whole chain: one that trains something.

    And one of every make: a model of attention and other layers may ask its cache for an attention's.
    """
    makes: dict[Any, int] = {}
    for index in sorted({kinds.index(kind) for kind in kinds}):
        makes.setdefault(block_kind(model.get_submodule(chain.blocks[index])), index)
    trains = (any(p.requires_grad for p in model.get_submodule(path).parameters()) for path in chain.blocks)
    trained = next((index for index, each in enumerate(trains) if each), None)
    return range(len(chain.blocks)) if trained is None else sorted({trained, *makes.values()})


@contextlib.contextmanager
def shortened_chain(model: nn.Module, chain: Chain, kept: Sequence[int]) -> Generator[tuple[str, ...]]:
    """Only the blocks `kept` inside, if the model holds them in a list."""
    if chain.container is None or len(kept) == len(chain.blocks):
        yield chain.blocks
        return
    with shortened(model, chain.container, kept):
        yield tuple(chain.blocks[index] for index in kept)
