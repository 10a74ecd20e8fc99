"""The batch to plan for: the largest one that a data loader can give."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from rematree.errors import UsageError

_LENGTH_COLUMNS: Final = ("input_ids", "tokens", "labels")


def longest_batch(loader: Any) -> tuple[dict[str, Any], str]:
    """The batch of the longest examples, collated as `loader` does it, and a phrase that says how it was found.

    The longest examples in one batch need at least as much as any batch of the run: padding goes to the longest.

    Args:
        loader: A `torch.utils.data.DataLoader`, or accelerate's.
    Returns:
        The batch on the host, and what it is ("the 4 longest of 812 examples").
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
        with torch.random.fork_rng(devices=[]):  # data and collator may draw; the run must not notice
            lengths = _lengths(data)
            if lengths is not None:
                longest = sorted(range(len(lengths)), key=lambda index: -lengths[index])[:size]
                batch = loader.collate_fn([data[index] for index in longest])
                return _as_mapping(batch), f"the {len(longest)} longest of {len(lengths)} examples"
    with torch.random.fork_rng(devices=[]):
        for batch in loader:
            return _as_mapping(batch), "the first batch; the lengths of the others cannot be read beforehand"
    raise UsageError("the training data is empty: there is no batch to plan for")


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size


def _lengths(data: Any) -> Sequence[int] | None:
    columns: Iterable[str] | None = getattr(data, "column_names", None)
    if columns is not None:
        name = next((name for name in _LENGTH_COLUMNS if name in columns), None)
        return None if name is None else [len(row) for row in data[name]]
    first = data[0]
    if not isinstance(first, Mapping):
        return None
    name = next((name for name in _LENGTH_COLUMNS if name in first), None)
    return None if name is None else [len(data[index][name]) for index in range(len(data))]


def _as_mapping(batch: Any) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise UsageError(f"the data loader gives {type(batch).__name__}, not a mapping of names to tensors")
    return dict(batch)
