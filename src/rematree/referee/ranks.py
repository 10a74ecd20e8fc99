"""Over how many ranks, and by which engine, a step is run; and how a live model shows it.

What an engine does to the bytes of a rank is in `layout` (DDP, FSDP2) and `zero` (DeepSpeed's ZeRO-2).
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from rematree.engines import any_sharded, is_deepspeed, not_counted, refuse_partitioned
from rematree.errors import UsageError

Engine = Literal["ddp", "fsdp2", "zero2"]
ENGINES: Final[tuple[str, ...]] = get_args(Engine)
BUCKET_ELEMENTS: Final = 500_000_000  # DeepSpeed's default
_TITLES: Final = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2"}


@dataclass(frozen=True, slots=True)
class Ranks:
    """Over how many ranks, and by which engine, a step is run. A rank is a process with a device of its own.

    Attributes:
        engine: "ddp" (`torchrun`, `accelerate launch --multi_gpu`: every rank holds the model), "fsdp2"
            (`fully_shard` on every block and on the model; `accelerate launch --use_fsdp --fsdp_version 2`) or "zero2"
            (`deepspeed.initialize` with stage 2; `accelerate launch --use_deepspeed`).
        count: Number of ranks.
        bucket_view: DDP's `gradient_as_bucket_view`.
        reshard: FSDP2's `reshard_after_forward` of the blocks.
        bucket_elements: ZeRO-2's `reduce_bucket_size`: elements, not bytes.
        overlaps: ZeRO-2's `overlap_comm`: there are two buckets.
    Raises:
        UsageError: no such engine, fewer than one rank, or a bucket that holds nothing.
    """

    engine: Engine
    count: int
    bucket_view: bool = False
    reshard: bool = True
    bucket_elements: int = BUCKET_ELEMENTS
    overlaps: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UsageError(f"no engine {self.engine!r} for several ranks; engines: {', '.join(ENGINES)}")
        if self.count < 1:
            raise UsageError(f"{self.count} ranks: at least one is needed")
        if self.bucket_elements < 1:
            raise UsageError(f"a reduce bucket of {self.bucket_elements} elements holds no gradient")

    @property
    def gathers_for_groups(self) -> bool:
        """Whether a group of blocks is recomputed where the weights of all but its last block must be gathered anew."""
        return self.engine == "fsdp2" and self.reshard

    @property
    def title(self) -> str:
        """The engine, for a reader."""
        return _TITLES[self.engine]

    def __str__(self) -> str:
        return f"one of {self.count} ranks under {self.title}"


def ranks_of(model: nn.Module, optimizer: Any = None) -> Ranks | None:
    """How `model` is distributed, read off the live objects: by DDP, FSDP2 or ZeRO-2. None if by none of them.

    Args:
        model: The model, or what an engine has put around it.
        optimizer: DeepSpeed's, where a training loop keeps it apart from the model; otherwise its engine has it.
    Raises:
        UsageError: DeepSpeed distributes it in a way that is not covered.
    """
    refuse_partitioned(model)
    distributed = torch.distributed
    if not distributed.is_available():
        return None
    engine: Any = model if is_deepspeed(model) else None
    zero = _zero_optimizer(optimizer if engine is None else engine.optimizer)
    if zero is not None or engine is not None:
        return _under_zero(zero)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return Ranks("ddp", distributed.get_world_size(model.process_group), bucket_view=model.gradient_as_bucket_view)
    if any_sharded(model):
        shard = next((p for p in model.parameters() if hasattr(p, "device_mesh")), None)
        count = distributed.get_world_size() if shard is None else shard.device_mesh.size()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        return Ranks("fsdp2", int(count))
    return None


def launched_ranks(model: nn.Module, optimizer: Any = None) -> Ranks | None:
    """As `ranks_of`; a model that shows nothing, in one of several processes, is one that DDP wraps elsewhere.

    For training loops that keep the model and its wrapper apart, as transformers' Trainer does.
    """
    found = ranks_of(model, optimizer)
    distributed = torch.distributed
    if found is None and distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        return Ranks("ddp", count) if count > 1 else None
    return found


def base_optimizer(optimizer: Any) -> Any:
    """What steps inside the wrappers of accelerate and DeepSpeed around `optimizer`."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def _zero_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's optimizer for stages 1 and 2 in what wraps it; None if there is none."""
    while optimizer is not None and type(optimizer).__name__ != "DeepSpeedZeroOptimizer":
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _under_zero(zero: Any) -> Ranks:
    """The ranks that `zero`, DeepSpeed's optimizer for stages 1 and 2, works for.

    Raises:
        UsageError: names what it does that the ledger does not count.
    """
    if zero is None:
        raise not_counted("DeepSpeed without ZeRO-2")
    told = {
        "ZeRO-1": not zero.partition_gradients,
        "an optimizer offloaded to the CPU or a disk": zero.cpu_offload,
        "ZenFlow": zero.zenflow,
        "contiguous_gradients=false": not zero.contiguous_gradients,
        "reduce_scatter=false": not zero.reduce_scatter,
        "round_robin_gradients": zero.round_robin_gradients,
        "parameter_alignment": zero.parameter_alignment,
        "experts of its own": zero.has_moe_layers,
        "tensor parallelism": zero.model_parallel_world_size > 1,
        "sequence parallelism": zero.sequence_parallel_size > 1,
        "master weights in 16 bit": zero.low_precision_master_weights_and_grads,
        "gradients summed or sent in another dtype than the weights'": {
            zero.gradient_accumulation_dtype,
            zero.communication_data_type,
        }
        != {zero.dtype},
    }
    for what, is_so in told.items():
        if is_so:
            raise not_counted(f"DeepSpeed with {what}")
    count = torch.distributed.get_world_size(zero.dp_process_group)
    return Ranks("zero2", count, bucket_elements=zero.reduce_bucket_size, overlaps=bool(zero.overlap_comm))
