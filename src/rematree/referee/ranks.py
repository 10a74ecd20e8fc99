"""Over how many ranks, and by which engine, a step is run; and how a live model shows it.

What an engine does to the bytes of a rank is in `layout` (DDP, FSDP2) and `zero` (DeepSpeed's ZeRO-2 and -3).
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from rematree.engines import any_partitioned, any_sharded, is_deepspeed, not_counted, refuse_pipeline
from rematree.errors import UsageError

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
ENGINES: Final[tuple[str, ...]] = get_args(Engine)
BUCKET_ELEMENTS: Final = 500_000_000  # DeepSpeed's default
_TITLES: Final = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
_ZERO: Final = frozenset({"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"})
_OTHERS: Final = {"MiCS_Optimizer": "MiCS"}
_OTHER_DTYPE: Final = "gradients summed or sent in another dtype than the weights'"


@dataclass(frozen=True, slots=True)
class Stage3:
    """ZeRO-3's settings for its all-gathers, in elements, with DeepSpeed's defaults.

    Attributes:
        prefetch: `stage3_prefetch_bucket_size`: as many are gathered before they are needed.
        persistence_threshold: `stage3_param_persistence_threshold`: none larger is gathered once a step.
        max_live: `stage3_max_live_parameters`: nothing is gathered ahead where more are whole.
        max_reuse: `stage3_max_reuse_distance`: a weight that is needed again within as many stays whole.
    Raises:
        UsageError: one of them is negative.
    """

    prefetch: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000

    def __post_init__(self) -> None:
        if min(self.prefetch, self.persistence_threshold, self.max_live, self.max_reuse) < 0:
            raise UsageError(f"settings of ZeRO-3 count elements; none is negative, as in {self}")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Over how many ranks, and by which engine, a step is run. A rank is a process with a device of its own.

    Attributes:
        engine: "ddp" (`torchrun`, `accelerate launch --multi_gpu`: every rank holds the model), "fsdp2"
            (`fully_shard` on every block and on the model; `accelerate launch --use_fsdp --fsdp_version 2`), "zero2" or
            "zero3" (`deepspeed.initialize` with stage 2 or 3; `accelerate launch --use_deepspeed`).
        count: Number of ranks.
        bucket_view: DDP's `gradient_as_bucket_view`.
        reshard: FSDP2's `reshard_after_forward` of the blocks.
        bucket_elements: DeepSpeed's `reduce_bucket_size`: elements, not bytes.
        overlaps: ZeRO-2's `overlap_comm`: there are two buckets. ZeRO-3 has one in any case.
        stage3: ZeRO-3's settings for its all-gathers.
    Raises:
        UsageError: no such engine, fewer than one rank, or a bucket that holds nothing.
    """

    engine: Engine
    count: int
    bucket_view: bool = False
    reshard: bool = True
    bucket_elements: int = BUCKET_ELEMENTS
    overlaps: bool = False
    stage3: Stage3 = Stage3()

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
        return self.engine == "zero3" or (self.engine == "fsdp2" and self.reshard)

    @property
    def title(self) -> str:
        """The engine, for a reader."""
        return _TITLES[self.engine]

    def __str__(self) -> str:
        return f"one of {self.count} ranks under {self.title}"


def works_in_copies(model: nn.Module) -> bool:
    """Whether collectives of `model` gather and sum in copies: those of gloo, which a CPU has; NCCL's do not."""
    return next((p.device.type for p in model.parameters()), "") == "cpu"


def ranks_of(model: nn.Module, optimizer: Any = None) -> Ranks | None:
    """How `model` is distributed, read off the live objects: by DDP, FSDP2 or ZeRO. None if by none of them.

    Args:
        model: The model, or what an engine has put around it.
        optimizer: DeepSpeed's, where a training loop keeps it apart from the model; otherwise its engine has it.
    Raises:
        UsageError: DeepSpeed distributes it in a way that is not covered, or has only begun to.
    """
    refuse_pipeline(model)
    distributed = torch.distributed
    if not distributed.is_available():
        return None
    engine: Any = model if is_deepspeed(model) else None
    zero = _zero_optimizer(optimizer if engine is None else engine.optimizer)
    if zero is not None or engine is not None:
        return _under_zero(zero)
    if any_partitioned(model):
        raise UsageError(
            "weights of the model are parts of ZeRO-3's, and its engine is not there to say how it gathers them",
            remedies=["plan(engine, ...) behind deepspeed.initialize", 'plan(model, ..., ranks=Ranks("zero3", count))'],
        )
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
    """DeepSpeed's optimizer, of any of ZeRO's stages, in what wraps it; None if there is none."""
    while optimizer is not None and _ZERO.isdisjoint(each.__name__ for each in type(optimizer).__mro__):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _under_zero(zero: Any) -> Ranks:
    """The ranks that `zero`, DeepSpeed's optimizer, works for.

    Raises:
        UsageError: names what it does that the ledger does not count.
    """
    match type(zero).__name__:
        case "DeepSpeedZeroOptimizer":
            return _under_stage_2(zero)
        case "DeepSpeedZeroOptimizer_Stage3":
            return _under_stage_3(zero)
        case "NoneType":
            raise not_counted("DeepSpeed without ZeRO-2 or ZeRO-3")
        case name:
            raise not_counted(f"DeepSpeed with {_OTHERS.get(name, name)}")


def _refuse(told: Mapping[str, Any]) -> None:
    """Refuse the first that is so."""
    for what, is_so in told.items():
        if is_so:
            raise not_counted(f"DeepSpeed with {what}")


def _under_stage_2(zero: Any) -> Ranks:
    _refuse(
        {
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
            _OTHER_DTYPE: {zero.gradient_accumulation_dtype, zero.communication_data_type} != {zero.dtype},
        }
    )
    count = torch.distributed.get_world_size(zero.dp_process_group)
    return Ranks("zero2", count, bucket_elements=zero.reduce_bucket_size, overlaps=bool(zero.overlap_comm))


def _partitioner(model: nn.Module) -> Any:
    """What has made parts of the weights of `model`; only the functions that it has given them know it."""
    gather = next((vars(p)["all_gather"] for p in model.parameters() if "all_gather" in vars(p)), None)
    return None if gather is None else inspect.getclosurevars(gather).nonlocals.get("self")


def _under_stage_3(zero: Any) -> Ranks:
    weights = zero.parameter_offload
    partitioner = _partitioner(weights.module)
    _refuse(
        {
            "an optimizer offloaded to the CPU or a disk": zero.offload_optimizer,
            "parameters offloaded to the CPU or a disk": zero.offload_param,
            "ZenFlow": zero.zenflow,
            "contiguous_gradients=false": not zero.contiguous_gradients,
            "reduce_scatter=false": not zero.reduce_scatter,
            "ZeRO++'s hpZ (zero_hpz_partition_size)": zero.zero_hpz_partition_size > 1,
            "ZeRO++'s quantised weights": weights.zero_quantized_weights or zero.zero_quantized_nontrainable_weights,
            "ZeRO++'s quantised gradients": zero.all2all_process_group is not None,
            "stage3_use_all_reduce_for_fetch_params": getattr(partitioner, "use_all_reduce_for_fetch_params", False),
            "stage3_allgather_sequential": getattr(partitioner, "allgather_sequential", False),
            "leaf modules": any(getattr(module, "_z3_leaf", False) for module in weights.module.modules()),
            "stage3_model_persistence_threshold": weights.model_persistence_threshold != sys.maxsize,
            "Muon": zero.use_muon,
            "tensor parallelism": zero.model_parallel_group is not None,
            "sequence parallelism": zero.sequence_parallel_size > 1,
            "master weights in 16 bit": zero.master_weights_and_grads_dtype is not torch.float32,
            "torch_autocast": len(zero.ipg_buckets) > 1,
            _OTHER_DTYPE: {zero.gradient_accumulation_dtype, zero.communication_data_type} != {zero.dtype},
        }
    )
    settings = Stage3(
        prefetch=weights._prefetch_bucket_sz,
        persistence_threshold=weights.param_numel_persistence_threshold,
        max_live=weights._max_available_parameters_in_numel,
        max_reuse=weights._max_reuse_distance_in_numel,
    )
    return Ranks("zero3", zero.partition_count, bucket_elements=zero.reduce_bucket_size, stage3=settings)
