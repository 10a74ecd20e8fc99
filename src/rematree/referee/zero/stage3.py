"""What one rank holds under DeepSpeed's ZeRO-3: the step is simulated with the engine's own doings in it.

From `deepspeed/runtime/zero/stage3.py` of 0.19.8, with its default settings (`contiguous_gradients`,
`reduce_scatter`). Which weights are whole is in `gathering`. Beside them a rank holds

* always: its part of every weight, parameter by parameter, the trained ones in one flat tensor; of these master weights
  in fp32, also where they are fp32 themselves, and the optimizer's state; a flat tensor for that part of the gradients;
  a bucket of `reduce_bucket_size` elements, which with the default setting is 2 GB of fp32.
* each gradient until it has been copied into the bucket. One that is larger than the bucket waits by itself.
* when the next gradient would not fit any more, and when backward is over, a copy of what waits, in which each rank's
  parts stand together, and which is reduced: none where a single gradient waits that needs no padding. Where gloo
  reduces, that makes a copy of its own.
* the step: no weight is whole; a norm in fp64 of one part of a gradient at a time; the gradients flat, once more, in
  fp32; then small weights are gathered again, which stay whole until the next step.

Where the optimizer has several groups of parameters, or `sub_group_size` is less than a rank's part, the last flat copy
is of one group at a time: up to that much more is predicted than needed.

Not covered: offload, hpZ, MiCS, quantised weights or gradients, leaf modules, gradients in another dtype than the
weights. What NCCL allocates is not counted.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

import torch
from torch import nn

from rematree.memory.accounts import BUCKETS, GRADIENTS, MASTERS, REDUCING, STEP, weights
from rematree.memory.ledger import Ledger
from rematree.memory.recipes import Recipes
from rematree.referee.at_work import Arrival, AtWork
from rematree.referee.ranks import Ranks, works_in_copies
from rematree.referee.zero.at_modules import AtModules
from rematree.referee.zero.gathering import Gathering
from rematree.referee.zero.linear import Stage3Linear
from rematree.referee.zero.weights import Learned
from rematree.trace import Segment

_NORM_BYTES: Final = 8  # of an element, in fp64


class ZeroThree:
    """What ZeRO-3 does to the bytes of one model.

    Args:
        ranks: How many there are, and the engine's settings.
        model: The model.
    Attributes:
        takes_gradients: As of `Layout`.
        model: The model.
        folds: Whether blocks may be left out of a simulated step.
    """

    takes_gradients = True
    folds = False  # what is whole depends on all modules around, not on neighbours alone

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        self._ranks = ranks
        self.model = model
        self._staged = works_in_copies(model)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._part = sum(self._part_of(p) for p in self._trained)
        self._learned: Learned | None = None

    def _part_of(self, parameter: torch.Tensor) -> int:
        return -(-parameter.numel() // self._ranks.count)

    def masters(self) -> list[nn.Parameter]:
        """The rank's part of the trained weights, which the optimizer steps; as fake as these."""
        return [nn.Parameter(self._trained[0].new_empty(self._part, dtype=torch.float32))] if self._trained else []

    def resident(self, masters: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """What a rank holds of the model all along, by line; beside it, what its gradients go into."""
        trained = {id(p) for p in self._trained}
        line_of_trained = MASTERS
        seen = set[int]()
        for tensor, line in weights(self.model):
            if id(tensor) in trained:
                line_of_trained = line
            elif not isinstance(tensor, nn.Parameter):
                yield line, [tensor]
            elif id(tensor) not in seen:
                yield line, [tensor.new_empty(self._part_of(tensor))]
            seen.add(id(tensor))
        if not self._trained:
            return
        first = self._trained[0]
        yield line_of_trained, [first.new_empty(self._part)]
        yield MASTERS, [*masters]
        yield GRADIENTS, [first.new_empty(self._part)]
        yield BUCKETS, [first.new_empty(self._ranks.bucket_elements)]

    def gradients_left(self, block: int) -> int:
        """Bytes that gradients of block number `block` leave behind: there is room for them already."""
        return 0

    def on_rank(self, segments: Sequence[Segment], arrivals: Sequence[Arrival], images: Sequence[int]) -> list[Segment]:
        """The timeline of a rank: it is the one that was simulated."""
        return list(segments)

    def at_work(self, recipes: Recipes, ledger: Ledger) -> AtWork:
        """The engine around a step of the model, whose fake mode has `recipes`."""
        gathering = Gathering(
            self._ranks.stage3, self._ranks.count, self._staged, self.model, recipes, ledger, self._learned
        )
        return _Working(gathering, ledger, self._ranks.bucket_elements, self._ranks.count, self._staged, self)

    def forget(self) -> None:
        """The next step is a first one."""
        self._learned = None

    def learned(self, what: Learned) -> None:
        """A step has shown `what`; the ones after it know."""
        if self._learned is None:
            self._learned = what


class _Working(AtWork):
    """ZeRO-3 in one step.

    Args:
        gathering: Of its weights.
        ledger: Of the step.
        bucket: Elements of the bucket.
        count: Of ranks.
        staged: A collective works in a copy.
        layout: Told what the step has shown.
    """

    def __init__(
        self, gathering: Gathering, ledger: Ledger, bucket: int, count: int, staged: bool, layout: ZeroThree
    ) -> None:
        super().__init__()
        self._gathering, self._ledger, self._layout = gathering, ledger, layout
        self._bucket, self._count, self._staged = bucket, count, staged
        self._waiting: list[torch.Tensor] = []  # larger than the bucket
        self._parts: list[tuple[int, int]] = []  # elements, and bytes of all ranks' parts, of what waits
        self._elements = 0
        trained = [each for each in gathering.weights.values() if each.parameter.requires_grad]
        self._itemsize = trained[0].whole.itemsize if trained else 0
        self._part = sum(each.part for each in trained)
        self._largest = max((each.part for each in trained), default=0)
        self._linear = Stage3Linear(gathering.whole)
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._gathering.begin()
        self._undo.callback(self._gathering.end)
        self._undo.callback(AtModules(self._layout.model, self._gathering).remove)
        self._undo.enter_context(self._linear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()
        if error is None:
            self._layout.learned(self._gathering.learned)

    def arrived(self, parameter: torch.Tensor) -> None:
        weight = self._gathering.weights[id(parameter)]
        if self._elements and self._elements + weight.elements > self._bucket:
            self._reduce()
        if self._elements + weight.elements > self._bucket and parameter.grad is not None:
            self._waiting.append(parameter.grad)
        self._parts.append((weight.elements, weight.part * self._count * self._itemsize))
        self._elements += weight.elements
        parameter.grad = None

    def _reduce(self) -> None:
        """Reduce what waits."""
        size = sum(num_bytes for _, num_bytes in self._parts)
        alone = len(self._parts) == 1 and self._parts[0][0] * self._itemsize == size
        self._ledger.ran(0.0, size * (int(not alone) + int(self._staged)), REDUCING)
        self._waiting.clear()
        self._parts.clear()
        self._elements = 0

    def backward_is_over(self) -> None:
        if self._parts:
            self._reduce()
        self._gathering.backward_is_over()
        self.gathers = self._gathering.gathers

    def step_begins(self) -> None:
        self._gathering.release_all()

    def stepping(self) -> None:
        flat = self._part * 4  # in fp32: what the optimizer's gradients are, which are not there yet during the norm
        cast = self._part * self._itemsize if self._itemsize != 4 else 0
        self._ledger.ran(0.0, max(0, self._largest * _NORM_BYTES - flat, cast), STEP)

    def stepped(self) -> None:
        self._gathering.gather_persistent()
        self.gathers = self._gathering.gathers
