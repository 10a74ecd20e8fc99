"""Where the blocks of a step begin and end on its timeline."""

import functools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.utils._pytree import tree_leaves

from rematree.memory.accounts import BACKWARD, LOGITS
from rematree.memory.ledger import Ledger

OPTIMIZER: Final = "optimizer"  # the mark of its step
HEAD: Final = "head"  # the mark of everything between the last block's forward and its backward


class BlockMarks:
    """Marks on the ledger's timeline where blocks begin and end.

    Args:
        ledger: Of the step.
        blocks: Numbers of those that run.
    Attributes:
        graph: For each block that ran, whether its input and its output require grad.
        released_bytes: Of what the first block was given, what is live when the last one ends and not any more when
            backward begins: the model's forward holds it as long as it runs, and a block only if it is recomputed.
    """

    def __init__(self, ledger: Ledger, blocks: Sequence[int]) -> None:
        self._ledger = ledger
        self._first, self._last = blocks[0], blocks[-1]
        self._behind_first: float | None = None
        self._given: dict[int, int] = {}
        self._live_at_the_end = 0
        self.released_bytes = 0
        self.graph: dict[int, tuple[bool, bool]] = dict.fromkeys(blocks, (False, False))

    def around(self, index: int) -> Any:
        def run(inner: Any, *args: Any, **kwargs: Any) -> Any:
            ledger = self._ledger
            ledger.mark(f"forward {index}")
            arguments = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            if index == self._first and not self._given:
                self._given = dict(ledger.size(tensor) for tensor in arguments)
            given = [t for t in arguments if t.requires_grad]
            if given and index == self._first:
                given[0].register_hook(self._first_is_done)
            del arguments
            out = inner(*args, **kwargs)
            tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
            self.graph[index] = (bool(given), bool(tensors))
            if tensors:
                tensors[0].register_hook(functools.partial(_mark, ledger, f"backward {index}"))
            if index == self._last:
                ledger.mark(HEAD)
                ledger.category = LOGITS
                self._live_at_the_end = self._still_live()
            return out

        return run

    def turn(self) -> None:
        """The forward pass is over, the backward pass begins."""
        self._ledger.turn()
        self.released_bytes = self._live_at_the_end - self._still_live()

    def _still_live(self) -> int:
        return sum(self._given[uid] for uid in self._given.keys() & self._ledger.known())

    def _first_is_done(self, _: torch.Tensor) -> None:
        self._behind_first = self._ledger.seconds

    def tail_seconds(self) -> float:
        """Seconds since the gradient of what the first block was given; 0 if it got none."""
        return 0.0 if self._behind_first is None else self._ledger.seconds - self._behind_first


def _mark(ledger: Ledger, label: str, _: torch.Tensor) -> None:
    ledger.mark(label)
    ledger.category = BACKWARD  # what came before was the head's
