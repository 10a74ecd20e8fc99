"""The batches to plan for: the largest one that a data loader can give, and the ones of other lengths.

A batch of the longest examples needs at least as much as any batch of the run: padding goes to the longest. How long
the batches of a run are follows from the lengths of the examples and the size of a batch.

A stream has no lengths to read. If the trainer cuts its rows ("max_length"), the longest batch has rows of that many
tokens; else the first batch is a beginning, and the ones that turn out larger are planned for as they come, with room
for some more (`roomier`).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from rematree.errors import UsageError
from rematree.execute.random_state import nothing_drawn
from rematree.fingerprint import describe_batch
from rematree.planning.ladder import batch_weights

_LENGTHS: Final = 8  # that are planned for where only a bound is known
_LENGTH_COLUMNS: Final = ("input_ids", "tokens", "labels")
# Of TRL's DPO and KTO, and of its rewards without a prompt of their own: a row is the prompt and the longest of these.
_PROMPT_COLUMN: Final = "prompt_ids"
_ANSWER_COLUMNS: Final = (("chosen_ids", "rejected_ids"), ("completion_ids", "KL_completion_ids"), ("completion_ids",))


@dataclass(frozen=True)
class Batches:
    """What a data loader can give.

    Attributes:
        longest: The largest batch, on the host.
        note: How it was found ("the 4 longest of 812 examples").
        weights: Share of the batches whose longest example has each length; empty if lengths cannot be read.
        of: A batch of the longest examples that are not longer than a length.
        otherwise: What is known where `longest` is a bound that no batch may ever reach, and nothing fits it.
    """

    longest: dict[str, Any]
    note: str
    weights: Mapping[int, float]
    of: Callable[[int], dict[str, Any]]
    otherwise: "Batches | None" = None


def read_batches(loader: Any, most: int | None = None) -> Batches:
    """The batches of `loader`, collated as it does it.

    Args:
        loader: A `torch.utils.data.DataLoader`, or accelerate's.
        most: Tokens that rows are cut to, where that is known.
    Raises:
        UsageError: the data is empty, or batches are not mappings.
    Cost:
        Reads every example's length once; the columns of a `datasets.Dataset` without decoding the others.
    """
    data = loader.dataset
    size = _batch_size(loader)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and size is not None and loader.collate_fn is not None:
        if len(data) == 0:
            raise UsageError("the training data is empty: there is no batch to plan for")
        with nothing_drawn():  # data and collator may draw; the run must not notice
            lengths = _lengths(data)
            if lengths is not None:
                return _of_known_lengths(loader, lengths, size, most)
    if isinstance(data, Iterator) and not getattr(loader, "num_workers", 0):  # workers read copies of it
        warnings.warn(
            "the training data is its own iterator: if it can be gone through once, its first batch, which is read to "
            "plan for, is not trained on",
            UserWarning,
            stacklevel=2,
        )
    # accelerate's loader around it remembers an iterator that was begun and not ended
    with nothing_drawn():
        found = next(iter(getattr(loader, "base_dataloader", loader)), None)
    if found is None:
        raise UsageError("the training data is empty: there is no batch to plan for")
    return _of_unknown_lengths(padded(_as_mapping(found)), most)


def _of_unknown_lengths(first: dict[str, Any], most: int | None) -> Batches:
    note = "the first batch; the lengths of the others cannot be read beforehand"
    alone = Batches(first, note, {}, lambda _: first)
    tokens = _tokens(first)
    if most is None or tokens is None or tokens > most:
        return alone
    note = f"rows of {most} tokens, to which they are cut; their lengths cannot be read beforehand"
    return Batches(stretched(first, most), note, evenly(most), lambda length: stretched(first, length), alone)


def evenly(most: int, before: int = 0) -> dict[int, float]:
    """Weights of a few lengths up to `before` tokens, which every row has, and `most` more, of which any share is."""
    lengths = [before + -(-most * part // _LENGTHS) for part in range(1, _LENGTHS + 1)]
    return dict.fromkeys(lengths, 1 / len(lengths))


def rounded_up(count: int, multiple: int | None) -> int:
    """The least multiple that is no smaller than `count`; `count` where there is none to keep to."""
    return -(-count // multiple) * multiple if multiple else count


def roomier(batch: Mapping[str, Any], most: int | None) -> dict[str, Any]:
    """`batch` with rows longer by an eighth or less, to steps of 8 tokens or more: where one is larger, others will be.

    No longer than `most` tokens, and as it is if it holds anything else than words: pictures cannot be made up.
    """
    tokens = _tokens(batch)
    if tokens is None:
        return padded(dict(batch))
    step = max(8, 1 << max(0, tokens.bit_length() - 4))
    wished = rounded_up(tokens, step)
    return stretched(batch, wished if most is None or tokens > most else min(wished, most))


def stretched(batch: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """`batch` with rows of so many tokens: its own, over and over, so that packed rows begin again, too.

    No row of a longer batch is padded but the last, by one token: others of that shape may have as many words.
    """
    ids = batch["input_ids"]
    times, ends_early = -(-tokens // ids.shape[1]), _is_padded(batch)
    wide = {
        name: value.repeat(1, times)[:, :tokens] if _goes_along(value, ids) else value for name, value in batch.items()
    }
    if tokens > ids.shape[1] and isinstance(mask := wide.get("attention_mask"), torch.Tensor):
        wide["attention_mask"] = torch.ones_like(mask)
        if isinstance(labels := wide.get("labels"), torch.Tensor) and labels.shape == mask.shape:
            wide["labels"] = torch.where(mask == 0, wide["input_ids"], labels)
    return padded(wide, always=ends_early)


def _tokens(batch: Mapping[str, Any]) -> int | None:
    """Tokens of a row, if every tensor of the batch is made of [rows, tokens] integers, of a number a row, or one."""
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.numel() == 0:
        return None
    counted = {name for name, _, _ in describe_batch(batch)}
    others = [value for name, value in batch.items() if name in counted and not _goes_along(value, ids)]
    return ids.shape[1] if all(value.shape == ids.shape[:1] for value in others) else None


def _goes_along(value: Any, ids: torch.Tensor) -> bool:
    """Whether `value` has an integer, or a truth, for every token."""
    return isinstance(value, torch.Tensor) and value.shape == ids.shape and not value.dtype.is_floating_point


def _of_known_lengths(loader: Any, lengths: Sequence[int], size: int, most: int | None) -> Batches:
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cut = lengths if most is None else [min(length, most) for length in lengths]
    mixed = cut[order[0]] != cut[order[-1]]

    def as_given(indices: Sequence[int]) -> dict[str, Any]:
        with nothing_drawn():
            return _as_mapping(loader.collate_fn([loader.dataset[index] for index in indices]))

    odd = next((index for index in order if cut[index] % 2), order[-1])
    always = mixed and size == 1 and _is_padded(as_given([odd]))  # to a multiple of some length

    def collated(indices: Sequence[int]) -> dict[str, Any]:
        batch = as_given(indices)
        return padded(batch, always=always) if mixed else batch

    def of(length: int) -> dict[str, Any]:
        short = [index for index in order if cut[index] <= length]
        return collated((short * size)[:size])  # however few are as short: shapes are what counts

    longest = order[:size]
    note = f"the {len(longest)} longest of {len(lengths)} examples"
    return Batches(collated(longest), note, batch_weights(cut, len(longest)), of)


def _is_padded(batch: Mapping[str, Any]) -> bool:
    """Whether there is a hole in the attention mask of `batch`."""
    mask = batch.get("attention_mask")
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool((mask == 1).all())


def padded(batch: dict[str, Any], *, always: bool = False) -> dict[str, Any]:
    """`batch` with a hole in its attention mask if it has none: another batch of this size will have one.

    Models skip a mask that is all ones, so examples that happen to be equally long need less than those that do not. A
    row that is alone in its batch gets a hole only if such rows are padded, too (`always`).
    """
    mask = batch.get("attention_mask")
    several = isinstance(mask, torch.Tensor) and mask.dim() == 2 and (always or mask.shape[0] > 1)
    if isinstance(mask, torch.Tensor) and several and bool((mask == 1).all()):
        mask = mask.clone()
        mask[-1, -1] = 0
        return {**batch, "attention_mask": mask}
    return batch


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size


def _lengths(data: Any) -> Sequence[int] | None:
    columns: Iterable[str] | None = getattr(data, "column_names", None)
    known = columns
    if known is None:
        first = data[0]
        if not isinstance(first, Mapping):
            return None
        known = list(first)
    answers = next((names for names in _ANSWER_COLUMNS if all(name in known for name in names)), None)
    if answers is not None:
        longest = [max(map(len, each)) for each in zip(*(_column(data, n, columns) for n in answers), strict=True)]
        if _PROMPT_COLUMN not in known:
            return longest
        return [len(p) + n for p, n in zip(_column(data, _PROMPT_COLUMN, columns), longest, strict=True)]
    present = [name for name in _LENGTH_COLUMNS if name in known]
    first = data[0] if present else {}
    name = next((name for name in present if _has_length(first[name])), None)
    return None if name is None else [len(row) for row in _column(data, name, columns)]


def _has_length(row: Any) -> bool:
    """Whether `row` is a list of tokens, or an array of them, and not one number: the class of a picture."""
    return hasattr(row, "__len__") and getattr(row, "ndim", 1) > 0


def _column(data: Any, name: str, columns: Iterable[str] | None) -> Iterable[Any]:
    return data[name] if columns is not None else (data[index][name] for index in range(len(data)))


def _as_mapping(batch: Any) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise UsageError(f"the data loader gives {type(batch).__name__}, not a mapping of names to tensors")
    return dict(batch)
