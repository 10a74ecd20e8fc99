"""What the referee has found out about one simulated step."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rematree.referee.held import Held
from rematree.referee.marks import HEAD, OPTIMIZER
from rematree.trace import Segment


@dataclass(frozen=True)
class Simulation:
    """One simulated step.

    Attributes:
        peak_bytes: Largest live sum; what the allocator would hand out at once.
        seconds: Sum of the prices of all ops.
        at_peak: Bytes by category at the peak; the sum is `peak_bytes`.
        segments: The timeline, by what was running.
        misread: Regions whose placeholder was read outside a recomputation: their output must be stashed.
        written: Saved regions whose output the recomputed region around them writes to: they cannot be saved alone.
        graph: For each block, whether its input and its output require grad.
        held: Segments of a GPU's allocator; None where memory comes from another.
        tail_seconds: Of the backward of the first block, what comes after it: gradients of embeddings.
        released_bytes: Of what the first block was given, what is held until the model's forward ends and no longer.
        gathers: All-gathers of ZeRO-3; 0 under other engines, whose number no plan changes.
    """

    peak_bytes: int
    seconds: float
    at_peak: Mapping[str, int]
    segments: tuple[Segment, ...]
    misread: frozenset[str]
    written: frozenset[str]
    graph: tuple[tuple[bool, bool], ...]
    held: Held | None = field(default=None, compare=False)  # follows from the rest
    tail_seconds: float = 0.0
    released_bytes: int = 0
    gathers: int = 0

    @property
    def slack_bytes(self) -> int:
        """Beyond the peak, what a GPU's allocator holds in segments that are in use."""
        return 0 if self.held is None else self.held.slack_bytes

    def segment(self, label: str) -> Segment | None:
        """The segment called `label`, if the step had one."""
        return next((s for s in self.segments if s.label == label), None)

    def forward(self, block: int) -> Segment:
        """Forward of block number `block`."""
        segment = self.segment(f"forward {block}")
        assert segment is not None
        return segment

    def backward(self, block: int) -> Segment | None:
        """Backward of block number `block`; None when it builds no graph."""
        return self.segment(f"backward {block}")

    def block_seconds(self, block: int) -> float:
        """Seconds of block number `block`, forward and backward."""
        backward = self.backward(block)
        tail = self.tail_seconds if block == 0 else 0.0
        return self.forward(block).seconds + (backward.seconds - tail if backward else 0.0)

    @property
    def optimizer_seconds(self) -> float:
        """Seconds of clipping and of the optimizer's step, which come once however many passes are accumulated."""
        segment = self.segment(OPTIMIZER)
        return 0.0 if segment is None else segment.seconds

    @property
    def head(self) -> Segment:
        """Everything between the last block's forward and its backward."""
        segment = self.segment(HEAD)
        assert segment is not None
        return segment

    def with_head(self, ratio: float) -> "Simulation":
        """The same with the seconds of the head multiplied by `ratio`."""
        head = replace(self.head, seconds=self.head.seconds * ratio)
        segments = tuple(head if segment.label == HEAD else segment for segment in self.segments)
        return replace(self, segments=segments, seconds=sum(segment.seconds for segment in segments))
