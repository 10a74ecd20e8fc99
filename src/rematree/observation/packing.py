"""What a model finds out about its batch by looking at values, which fake tensors do not have.

transformers skips the causal mask when the attention mask is all ones and no row holds several sequences. Under tracing
it cannot look and assumes the dearer case: a mask of tokens x tokens, and another attention kernel.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Generator, Mapping
from typing import Any, Final

import torch

_FAKE: Final = torch._C._TorchDispatchModeKey.FAKE
_ONE_AT_A_TIME: Final = threading.RLock()  # what is replaced is seen by all threads


def visible_to_a_trace(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` without what the model would find to be trivial by looking at values, which fake tensors do not have.

    Leaving it out has the same result.
    """
    kept = dict(batch)
    mask, positions = kept.get("attention_mask"), kept.get("position_ids")
    if isinstance(positions, torch.Tensor) and mask is None and positions.dim() == 2 and not positions.is_meta:
        plain = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        if torch.equal(positions, plain.to(positions.dtype)):
            del kept["position_ids"]
            positions = None
    if isinstance(mask, torch.Tensor) and positions is None and not mask.is_meta and bool((mask == 1).all()):
        del kept["attention_mask"]
    return kept


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
