"""What one rank holds under DeepSpeed's ZeRO-2, from the simulated step of one process.

Weights are whole on every rank. From `deepspeed/runtime/zero/stage_1_and_2.py` of 0.19.8, with its default settings
(`contiguous_gradients`, `reduce_scatter`, `use_multi_rank_bucket_allreduce`):

* always: a rank's part of the trained weights in fp32, the master weights, also where the weights are fp32 themselves;
  and the optimizer's state for that part.
* when the first gradient of a backward is there, a bucket of `reduce_bucket_size` elements is allocated (two with
  `overlap_comm`) and kept until backward is over. Each gradient is copied into it and freed. One that is larger than
  a bucket waits by itself.
* when the next gradient would not fit any more, and at the end, the bucket is reduced. If what is in it belongs to
  several ranks, it is first copied whole.
* when a bucket has been reduced, its gradients of which the rank has a part are copied into one buffer for all of
  these, whole parameters; that one is allocated with the first, and lives until the step. With accumulation the
  buffer of the first micro-batch is there all along, and each further one fills another.
* the step: a norm in fp64 of one parameter at a time; the part of the gradients flat, in fp32, beside the buffer;
  the optimizer's own step; then all weights are gathered, which on a CPU takes gloo's copy of them.

Which gradient comes when is what the simulated step shows. Ranks differ: the last one's buffer is needed first, and
a rank that two large parameters reach into has the largest. Counted is one that has the larger of both. DeepSpeed makes
a flat tensor of each group of the optimizer: one for all is assumed, or one for matrices and one for the rest, as
transformers' Trainer has them, whichever needs more.

Not covered: offload, ZeRO-1, gradients in another dtype than the weights. What NCCL allocates is not counted.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import nn

from rematree.memory.accounts import BUCKETS, GATHERING, GRADIENTS, REDUCING, STEP
from rematree.memory.ledger import Ledger
from rematree.memory.recipes import Recipes
from rematree.referee.at_work import Arrival, AtWork, Taking, whole_model
from rematree.referee.moments import Bytes, plus, with_moments
from rematree.referee.ranks import Ranks, works_in_copies
from rematree.trace import Segment

_FP32_BYTES: Final = 4
_NORM_BYTES: Final = 8  # of an element, in fp64


class ZeroTwo:
    """What ZeRO-2 does to the bytes of one model.

    Args:
        ranks: How many there are, and the size of a bucket.
        model: The model.
        blocks: Module paths of the blocks that run.
        accumulate: Gradients of an earlier micro-batch are there when the step begins.
    Attributes:
        takes_gradients, folds: As of `Layout`.
    """

    takes_gradients = True
    folds = True

    def __init__(self, ranks: Ranks, model: nn.Module, blocks: Sequence[str], accumulate: bool = False) -> None:
        self._model = model
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._elements = {id(p): p.numel() for p in self._trained}
        self._bytes = self._trained[0].itemsize if self._trained else _FP32_BYTES  # the engine casts all to one dtype
        self._bucket = ranks.bucket_elements
        self._buckets = self._bucket * self._bytes * (2 if ranks.overlaps else 1)
        total = sum(self._elements.values())
        self._part = _part_of(total, ranks.count)
        matrices = [p for p in self._trained if p.dim() > 1]
        rest = [p for p in self._trained if p.dim() <= 1]
        self._owners = [_owners([self._trained], ranks.count), _owners([matrices, rest], ranks.count)]
        largest = max((self._held_by(rank) for rank in range(ranks.count)), default=0)
        self._buffer = largest * self._bytes
        self._earlier = self._buffer if accumulate else 0
        self._staged = total * self._bytes if works_in_copies(model) else 0
        self._inside = [[id(p) for p in model.get_submodule(path).parameters()] for path in blocks]
        self._place = {key: place for inside in self._inside for place, key in enumerate(inside)}

    def masters(self) -> list[nn.Parameter]:
        """The rank's part of the trained weights, which the optimizer steps; as fake as these."""
        return [nn.Parameter(self._trained[0].new_empty(self._part, dtype=torch.float32))] if self._trained else []

    def resident(self, masters: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """What a rank holds of the model all along, by line."""
        yield from whole_model(self._model, masters)

    def at_work(self, recipes: Recipes, ledger: Ledger) -> AtWork:
        """The engine while a step runs: gradients go as soon as they are there."""
        return Taking(ledger)

    def gradients_left(self, block: int) -> int:
        """Bytes that the gradients of block number `block` take when its backward is over: they are in the bucket."""
        return 0

    def on_rank(self, segments: Sequence[Segment], arrivals: Sequence[Arrival], images: Sequence[int]) -> list[Segment]:
        """The timeline of a rank from that of one process that frees each gradient when it is there.

        Args:
            segments: Of the whole chain; the last is the step of an optimizer of the master weights.
            arrivals: Of gradients, in the segments that ran, in order.
            images: For every block the one that was run in its place.
        """
        *step, optimizer = segments
        state, outside = _State(self), set[int]()
        found: list[Segment] = []
        for segment in step:
            phase, _, number = segment.label.partition(" ")
            block = int(number) if phase == "backward" else None
            label = segment.label if block is None else f"backward {images[block]}"
            here: list[tuple[int, Arrival]] = []
            for arrival in arrivals:
                if arrival.label != label:
                    continue
                place = self._place.get(arrival.parameter)
                if place is not None and block is not None:
                    here.append((self._inside[block][place], arrival))
                elif arrival.parameter not in outside:  # a block that stands for others brings what is outside once
                    outside.add(arrival.parameter)
                    here.append((arrival.parameter, arrival))
            found.append(self._backward(segment, here, state))
        return [*found, self._stepped(optimizer, state)]

    def _backward(self, segment: Segment, arrivals: Sequence[tuple[int, Arrival]], state: "_State") -> Segment:
        moments = list[tuple[Bytes, Bytes]]()
        beside: Bytes | None = None  # what is held at the segment's own highest moment
        for parameter, arrival in arrivals:
            if beside is None and arrival.risen == segment.peak_bytes - segment.live_bytes:
                beside = state.held()
            live = plus(segment.live, arrival.change)
            moments += [(live, held) for held in state.took(parameter)]
        moments.append((segment.at_peak, state.held() if beside is None else beside))
        return with_moments(segment, {GRADIENTS: self._earlier} if self._earlier else {}, moments)

    def _stepped(self, segment: Segment, state: "_State") -> Segment:
        part = self._part * _FP32_BYTES
        backward = {GRADIENTS: -part}  # its gradient is not there yet
        buffer = {GRADIENTS: self._buffer}
        largest = max(self._elements.values(), default=0)
        flat = self._part * self._bytes if self._bytes != _FP32_BYTES else 0
        moments: list[tuple[Bytes, Bytes]] = [(segment.at_peak, {})]
        moments += [(segment.live, plus(backward, plus(held, {GRADIENTS: self._earlier}))) for held in state.ended()]
        moments.append((segment.live, plus(plus(backward, buffer), {STEP: largest * _NORM_BYTES})))
        moments.append((segment.live, plus(buffer, {STEP: flat})))
        moments.append((segment.live, plus(backward, {GATHERING: self._staged})))
        return with_moments(segment, {}, moments)

    def _held_by(self, rank: int) -> int:
        """Elements of the parameters that `rank` has a part of."""
        return max(sum(self._elements[key] for key, of in owners.items() if rank in of) for owners in self._owners)


class _State:
    """What is held while gradients come.

    Args:
        layout: Of the model.
    """

    def __init__(self, layout: ZeroTwo) -> None:
        self._layout = layout
        self._open = self._reduced = False
        self._waiting: list[int] = []
        self._elements = 0

    def held(self, copied: int = 0) -> dict[str, int]:
        """Bytes now, by category, with `copied` bytes of a bucket that is reduced."""
        layout = self._layout
        alone = self._elements * layout._bytes if self._elements > layout._bucket else 0
        return {
            BUCKETS: layout._buckets if self._open else 0,
            GRADIENTS: (layout._buffer if self._reduced else 0) + alone,
            REDUCING: copied,
        }

    def took(self, parameter: int) -> list[dict[str, int]]:
        """A gradient is there; what is held beside it until it has been taken."""
        self._open = True
        size = self._layout._elements[parameter]
        moments: list[dict[str, int]] = []
        if self._elements + size > self._layout._bucket:
            moments += self._reduce()
        moments.append(self.held())
        self._waiting.append(parameter)
        self._elements += size
        return moments

    def ended(self) -> list[dict[str, int]]:
        """Backward is over; what is held until what is left has been reduced."""
        return self._reduce()

    def _reduce(self) -> list[dict[str, int]]:
        if not self._waiting:
            return []
        layout = self._layout
        spans = any(
            len(frozenset[int]().union(*(owners[key] for key in self._waiting))) > 1 for owners in layout._owners
        )
        before = self.held(self._elements * layout._bytes if spans else 0)
        self._reduced = True
        after = self.held()  # in the bucket and in the buffer
        self._waiting, self._elements = [], 0
        return [before, after]


def _part_of(elements: int, count: int) -> int:
    """Elements of one rank of `count`; DeepSpeed aligns the flat tensor to two for each."""
    return -(-elements // (2 * count)) * 2


def _owners(groups: Sequence[Sequence[torch.Tensor]], count: int) -> dict[int, frozenset[int]]:
    """For each parameter, by identity, the ranks that have a part of it, if each of `groups` becomes a flat tensor."""
    found: dict[int, frozenset[int]] = {}
    for group in groups:
        part = _part_of(sum(p.numel() for p in group), count)
        start = 0
        for parameter in group:
            last = start + max(1, parameter.numel()) - 1
            found[id(parameter)] = frozenset(range(start // part, last // part + 1))
            start += parameter.numel()
    return found
