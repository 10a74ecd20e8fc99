"""What a step did, as it was observed: its segments, its ops, and one forward of a block. Plain data; no tensors."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Segment:
    """What happened between two marks.

    Attributes:
        label: The mark that began it.
        live_bytes: Live when it began.
        peak_bytes: Largest live sum within it.
        seconds: Price of the ops within it.
        live: `live_bytes` by category.
        at_peak: `peak_bytes` by category.
        turn: What was live when the backward pass began, by category; empty if it did not begin within.
    """

    label: str
    live_bytes: int
    peak_bytes: int
    seconds: float
    live: dict[str, int]
    at_peak: dict[str, int]
    turn: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One op as the ledger saw it: storage ids read, storages written (id -> bytes), and its price."""

    name: str
    reads: frozenset[int]
    writes: dict[int, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class TraceOp:
    """One op that ran in a block's forward.

    Attributes:
        region: Relative path of the innermost region it ran in ("" is the block itself).
        reads: Storage ids it read.
        writes: Storage ids it created or changed.
        seconds: Its price.
    """

    region: str
    reads: frozenset[int]
    writes: frozenset[int]
    seconds: float


@dataclass(frozen=True, slots=True)
class TraceSave:
    """One tensor autograd kept.

    Attributes:
        op: Number of ops that had run when it was kept.
        region: Region of the op that kept it.
        storage: Storage id.
    """

    op: int
    region: str
    storage: int


@dataclass(frozen=True, slots=True)
class BlockTrace:
    """Forward of one block.

    Attributes:
        ops: In order.
        saves: In order.
        sizes: Bytes of every storage born in the block. Storages that are not here (weights, the block's inputs) are
            live anyway and cost nothing to keep.
        regions: Relative paths of all regions that ran, parents before children.
        packed: Bytes that keeping the output of a region takes, where that is less than the output: the masks drawn
            by "#draw" regions.
    """

    ops: tuple[TraceOp, ...]
    saves: tuple[TraceSave, ...]
    sizes: dict[int, int]
    regions: tuple[str, ...]
    packed: dict[str, int]
