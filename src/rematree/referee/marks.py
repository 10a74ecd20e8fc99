"""Where the blocks of a step begin and end on its timeline."""

import functools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves

from rematree.memory.accounts import BACKWARD, LOGITS
from rematree.memory.ledger import Ledger

HEAD: Final = "head"  # the mark of everything between the last block's forward and its backward


class BlockMarks:
    """Marks on the ledger's timeline where blocks begin and end.

    Args:
        ledger: Of the step.
        blocks: Numbers of those that run.
    Attributes:
        graph: For each block that ran, whether its input and its output require grad.
    """

    def __init__(self, ledger: Ledger, blocks: Sequence[int]) -> None:
        self._ledger = ledger
        self._first, self._last = blocks[0], blocks[-1]
        self._behind_first: float | None = None
        self.graph: dict[int, tuple[bool, bool]] = dict.fromkeys(blocks, (False, False))

    def around(self, index: int) -> Any:
        def run(inner: Any, *args: Any, **kwargs: Any) -> Any:
            ledger = self._ledger
            ledger.mark(f"forward {index}")
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.requires_grad]
            if given and index == self._first:
                given[0].register_hook(self._first_is_done)
            out = inner(*args, **kwargs)
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            self.graph[index] = (bool(given), bool(tensors))
            if tensors:
                tensors[0].register_hook(functools.partial(_mark, ledger, f"backward {index}"))
            if index == self._last:
                ledger.mark(HEAD)
                ledger.category = LOGITS
            return out

        return run

    def _first_is_done(self, _: torch.Tensor) -> None:
        self._behind_first = self._ledger.seconds

    def tail_seconds(self) -> float:
        """Seconds since the gradient of what the first block was given; 0 if it got none."""
        return 0.0 if self._behind_first is None else self._ledger.seconds - self._behind_first


def _mark(ledger: Ledger, label: str, _: torch.Tensor) -> None:
    ledger.mark(label)
    ledger.category = BACKWARD  # what came before was the head's
