"""What one rank of several holds: the simulated step of one process, with what DDP or FSDP2 adds and takes away.

No collective is simulated. Each engine allocates by a rule that depends on the bytes of a unit (a block, or all that is
outside the blocks) and on the phase of the step; the rules are applied to the segments of the simulated step, so that
the solver and the referee see a rank's bytes. Nothing is assumed about which phase is the highest.

DDP, from `torch/csrc/distributed/c10d/reducer.cpp`. The buckets hold a gradient for every trained parameter and live as
long as the wrapper. Gradients exist beside them, or, with `gradient_as_bucket_view=True`, are views of them: then what
autograd computes is copied and freed parameter by parameter.

FSDP2, from `torch/distributed/fsdp/_fully_shard`. Parameters, their gradients and optimizer state are shards, rounded
up in the first dimension (rank 0 holds the largest). With U a unit's weights whole and padded:

* outside the blocks: gathered at the start of the forward, whole until backward is over (the root is not resharded).
* forward of block k: its weights (U), and the buffer they were gathered in (another U), which is only freed when the
  next block has been gathered (`FSDPParamGroup.wait_for_unshard`).
* between the last forward and the first backward: the buffer of the last block, first that of its forward, then, as
  soon as the backward begins, one that it is gathered into ahead.
* backward of block k: its weights, the buffer of block k-1, gathered ahead, and the input of the reduce-scatter of
  block k+1, which is freed when block k has come to its own (`reduce_scatter_max_input_buffers` is 1). At the end the
  weights are freed before the input of its own reduce-scatter is made from its gradients, which go before it is
  reduced. What is outside the blocks comes to its own last.
* gradients outside the blocks are whole until backward is over.
* on a CPU, gloo's copy of a buffer while it is gathered, and of the input of a reduce-scatter while it is summed.
  gloo's threads may let go of either, and of a buffer, a little later; that is a race, and it is not counted. It is
  `rematree.gloo` that measures without it.

Not covered: mixed precision by `MixedPrecisionPolicy`, CPU offload, HSDP, units smaller or larger than a block.
accelerate makes units of their own of the input embedding and of norm and output embedding; here they are part of what
is outside the blocks, which is at most too high by the embedding. What NCCL allocates for itself is not counted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rematree.memory.accounts import BUCKETS, GATHERED, GATHERING, GRADIENTS, REDUCING, STATE, STEP, weights
from rematree.memory.ledger import Ledger
from rematree.memory.recipes import Recipes
from rematree.referee.at_work import Arrival, AtWork, whole_model
from rematree.referee.moments import plus, with_moments
from rematree.referee.ranks import Ranks, works_in_copies
from rematree.referee.zero.stage2 import ZeroTwo
from rematree.referee.zero.stage3 import ZeroThree
from rematree.trace import Segment


@dataclass(frozen=True, slots=True)
class _Unit:
    """Bytes of what is gathered and reduced as one.

    Attributes:
        whole: Weights as a rank gathers them, padded.
        gradients: Of its trained parameters.
        gradient_shards: What is left of these on a rank.
        reduced: Input of their reduce-scatter, padded.
    """

    whole: int
    gradients: int
    gradient_shards: int
    reduced: int


class Layout:
    """What the ranks do to the bytes of one model, under DDP or FSDP2.

    Args:
        ranks: How it is distributed; None: not at all, and nothing changes.
        model: The model.
        blocks: Module paths of the blocks that run.
        accumulate: Gradients of an earlier micro-batch are there when the step begins; under FSDP2, their shards.
    Attributes:
        takes_gradients: Whether the engine takes each gradient as soon as it is there.
        folds: Whether blocks may be left out of a simulated step.
    """

    takes_gradients = False  # autograd's gradients stay until the optimizer's step
    folds = True

    def __init__(self, ranks: Ranks | None, model: nn.Module, blocks: Sequence[str], accumulate: bool = False) -> None:
        self._model = model
        self._ranks = ranks
        self._accumulates = accumulate
        # A copy of the buffer that is gathered into, and of what is summed; both go when the collective is over.
        self._staged = int(works_in_copies(model))
        inside = [list(model.get_submodule(path).parameters()) for path in blocks]
        known = {id(p) for each in inside for p in each}
        self._blocks = [self._unit(each) for each in inside]
        if ranks is None:  # nothing else is asked, and a survey makes a few of these
            return
        self._outside = self._unit(p for p in model.parameters() if id(p) not in known)
        self._static: dict[str, int] = {}
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        shards = sum(self._shard(p) for p in model.parameters() if p.requires_grad)
        self._trained, self._trained_shards = trained, shards
        seen: set[int] = set()
        for tensor, line in weights(model):
            storage = tensor.untyped_storage()
            if isinstance(tensor, nn.Parameter) and storage._cdata not in seen:
                self._static[line] = self._static.get(line, 0) + self._shard(tensor) - storage.nbytes()
            seen.add(storage._cdata)

    def _shard(self, parameter: torch.Tensor) -> int:
        """Bytes that a rank keeps of `parameter`. Packed weights are not sharded."""
        count = self._ranks.count if self._ranks is not None and self._ranks.engine == "fsdp2" else 1
        if count == 1 or not parameter.is_floating_point() or parameter.dim() == 0:
            return parameter.nbytes
        rows = parameter.shape[0]
        return -(-rows // count) * (parameter.nbytes // max(1, rows))

    def _unit(self, parameters: Iterable[torch.Tensor]) -> _Unit:
        count = 1 if self._ranks is None else self._ranks.count
        every = list({id(p): p for p in parameters}.values())
        sharded = [p for p in every if p.is_floating_point()]
        trained = [p for p in every if p.requires_grad]
        kept = sum(self._shard(p) for p in trained)
        return _Unit(sum(self._shard(p) for p in sharded) * count, sum(p.nbytes for p in trained), kept, kept * count)

    def gradients_left(self, block: int) -> int:
        """Bytes that the gradients of block number `block` take when its backward is over."""
        if self._ranks is None:
            return self._blocks[block].gradients
        if self._ranks.engine == "ddp":
            return 0 if self._ranks.bucket_view else self._blocks[block].gradients
        return self._blocks[block].gradient_shards

    def masters(self) -> list[nn.Parameter]:
        """What the optimizer steps in place of the trained parameters; nothing: it steps these."""
        return []

    def resident(self, masters: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """What a process holds of the model all along, by line; `on_rank` puts parts in its place."""
        yield from whole_model(self._model, masters)

    def at_work(self, recipes: Recipes, ledger: Ledger) -> AtWork:
        """The engine while a step runs: it changes the timeline later, in `on_rank`."""
        return AtWork()

    def on_rank(self, segments: Sequence[Segment], arrivals: Sequence[Arrival], images: Sequence[int]) -> list[Segment]:
        """The timeline of a rank from that of one process.

        Args:
            segments: Of the whole chain; the last is the optimizer's.
            arrivals: Of gradients; not asked for here.
            images: For every block the one that was run in its place.
        """
        if self._ranks is None:
            return list(segments)
        if self._ranks.engine == "ddp":
            return [self._replicated(segment) for segment in segments]
        following = [*segments[1:], segments[-1]]
        return [self._sharded(one, after) for one, after in zip(segments, following, strict=True)]

    # -- DDP --------------------------------------------------------------------------------------------------------

    def _replicated(self, segment: Segment) -> Segment:
        assert self._ranks is not None
        changes = {BUCKETS: self._trained}
        if self._ranks.bucket_view:
            # Of the gradients at the peak those of earlier blocks have certainly been freed.
            changes[GRADIENTS] = -segment.live.get(GRADIENTS, 0)
        return with_moments(segment, changes, [(segment.at_peak, {})])

    # -- FSDP2 ------------------------------------------------------------------------------------------------------

    def _sharded(self, segment: Segment, after: Segment) -> Segment:
        phase, _, number = segment.label.partition(" ")
        blocks = self._blocks
        always = self._always(segment, range(0))
        if phase == "optimizer":
            always = {**self._always(segment, range(0)), GRADIENTS: self._trained_shards - self._trained}
            step = -(-(segment.peak_bytes - segment.live_bytes) * self._trained_shards // max(1, self._trained))
            return with_moments(segment, always, [(segment.live, {STEP: step})])
        if phase == "start":
            return with_moments(segment, always, [(segment.at_peak, {})])
        always[GATHERED] = self._outside.whole
        if phase == "embedding":
            gather = {GATHERED: -self._outside.whole, GATHERING: self._staging(self._outside.whole)}
            moments = [(segment.live, gather), (segment.at_peak, {GATHERING: self._outside.whole})]
            return with_moments(segment, always, moments)
        if phase == "forward":
            return self._forward(segment, always, int(number))
        if phase == "backward":
            return self._backward(segment, after, int(number))
        always = plus(always, {GATHERED: self._kept_whole(len(blocks)), GRADIENTS: self._added(self._outside)})
        last_one = blocks[-1].whole
        moments = [(segment.at_peak, {GATHERING: last_one})]
        if self._ranks is not None and self._ranks.reshard:
            moments.append((segment.turn or segment.at_peak, {GATHERING: self._staging(last_one)}))
        return with_moments(segment, always, moments)

    def _forward(self, segment: Segment, always: dict[str, int], k: int) -> Segment:
        always[GATHERED] += self._kept_whole(k)
        own, before = self._blocks[k].whole, self._blocks[k - 1].whole if k else self._outside.whole
        moments = [
            (segment.live, {GATHERING: before + self._staging(own)}),
            (segment.at_peak, {GATHERED: own, GATHERING: own}),
        ]
        return with_moments(segment, always, moments)

    def _backward(self, segment: Segment, after: Segment, k: int) -> Segment:
        assert self._ranks is not None
        blocks, own, reshard = self._blocks, self._blocks[k], self._ranks.reshard
        always = self._always(segment, range(k + 1, len(blocks)))
        always[GATHERED] = self._outside.whole + self._kept_whole(k)
        always[GRADIENTS] += self._added(self._outside) + self._added(own)
        ahead = blocks[k - 1].whole if k and reshard else 0
        earlier = {REDUCING: blocks[k + 1].reduced if k + 1 < len(blocks) else 0}
        here = {**earlier, GATHERED: own.whole}
        moments = [
            (segment.live, {**here, GATHERING: own.whole if reshard else 0}),
            (segment.live, {**here, GATHERING: self._staging(ahead)}),
            (segment.at_peak, {**here, GATHERING: ahead}),
            (after.live, {GATHERING: ahead, REDUCING: own.reduced}),
            (after.live, {GATHERING: ahead, **self._summed(own)}),
        ]
        if not after.label.startswith("backward"):  # what is outside the blocks is last, and its weights go first
            kept = 0 if self._accumulates else own.gradient_shards
            left = {GRADIENTS: kept - own.gradients, GATHERED: -self._outside.whole}
            moments.append((after.live, {**left, REDUCING: self._outside.reduced}))
            moments.append((after.live, plus(left, self._summed(self._outside))))
        return with_moments(segment, always, moments)

    def _added(self, unit: _Unit) -> int:
        """Bytes of the gradients of `unit` while they are whole, if its shards are there beside them."""
        return unit.gradients if self._accumulates else 0

    def _staging(self, whole: int) -> int:
        """Bytes of a buffer of `whole` bytes while it is gathered into."""
        return whole * (1 + self._staged)

    def _summed(self, unit: _Unit) -> dict[str, int]:
        """What the reduce-scatter of `unit` changes: its gradients have become its input."""
        return {GRADIENTS: -unit.gradients, REDUCING: self._staging(unit.reduced) + unit.gradient_shards}

    def _always(self, segment: Segment, done: Iterable[int]) -> dict[str, int]:
        """What is different in all of a segment: shards of weights, of state, and of the gradients of `done` blocks."""
        state = segment.live.get(STATE, 0)
        shards = -(-state * self._trained_shards // max(1, self._trained))
        gone = sum(self._blocks[k].gradients - self._blocks[k].gradient_shards for k in done)
        if self._accumulates:  # none is whole that is not being made
            gone = self._trained - self._trained_shards
        return {**self._static, STATE: shards - state, GRADIENTS: -gone}

    def _kept_whole(self, blocks: int) -> int:
        """Bytes of the first `blocks` blocks whole, if they stay so after their forward."""
        assert self._ranks is not None
        return 0 if self._ranks.reshard else sum(unit.whole for unit in self._blocks[:blocks])


def layout_of(
    ranks: Ranks | None, model: nn.Module, blocks: Sequence[str], accumulate: bool = False
) -> Layout | ZeroTwo | ZeroThree:
    """What `ranks` do to the bytes of `model`; arguments as for `Layout`."""
    if ranks is not None and ranks.engine == "zero2":
        return ZeroTwo(ranks, model, blocks, accumulate)
    if ranks is not None and ranks.engine == "zero3":
        return ZeroThree(ranks, model)
    return Layout(ranks, model, blocks, accumulate)
