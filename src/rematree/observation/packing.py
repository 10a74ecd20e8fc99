"""What a model finds out about its batch by looking at values, which fake tensors do not have.

transformers skips the causal mask when the attention mask is all ones and no row holds several sequences. Under tracing
it cannot look and assumes the dearer case: a mask of tokens x tokens, and another attention kernel.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Collection, Generator, Mapping
from typing import Any, Final

import torch

from rematree.fingerprint import left_out

_FAKE: Final = torch._C._TorchDispatchModeKey.FAKE
_ONE_AT_A_TIME: Final = threading.RLock()  # what is replaced is seen by all threads


def visible_to_a_trace(batch: Mapping[str, Any], kept: Collection[str] = ()) -> dict[str, Any]:
    """`batch` without what the model would find to be trivial by looking at values, which fake tensors do not have.

    Leaving it out has the same result. Names in `kept` stay: what counted in one batch is planned for in all.
    """
    trivial = left_out(batch)
    return {name: value for name, value in batch.items() if name in kept or name not in trivial}


def may_pack(visible: Mapping[str, Any]) -> bool:
    """Whether the model may find padding, or several sequences, in a row."""
    return visible.get("attention_mask") is not None or visible.get("position_ids") is not None


@contextlib.contextmanager
def one_sequence_a_row() -> Generator[None]:
    """Have transformers find, in code above a fake mode, that no row of positions holds several sequences.

    Whether a mask is built is then what the model asks for: some, with sparse attention, always want one. Positions in
    other threads are looked at as ever.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    if masks is None:  # whose model would build any
        yield
        return
    with _ONE_AT_A_TIME:
        looks = masks.find_packed_sequence_indices

        @functools.wraps(looks)
        def found(position_ids: torch.Tensor) -> torch.Tensor | None:
            return looks(position_ids) if torch._C._get_dispatch_mode(_FAKE) is None else None

        masks.find_packed_sequence_indices = found
        try:
            yield
        finally:
            masks.find_packed_sequence_indices = looks
