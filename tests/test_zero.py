"""DeepSpeed's ZeRO-2: what a rank holds, to the byte where it can be counted, and what is refused by name.

Real processes under its engine are in `test_zero_ranks`, which needs DeepSpeed.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ranked
import rematree
from rematree.engines import without_engine
from rematree.errors import UsageError
from rematree.memory.accounts import BUCKETS, GATHERING, GRADIENTS, MASTERS, REDUCING, STATE, STEP
from rematree.observation.observe import Twin
from rematree.plans import Levers
from rematree.referee.at_work import Arrival
from rematree.referee.ranks import Ranks, launched_ranks, ranks_of
from rematree.referee.simulate import Referee
from rematree.referee.zero.stage2 import ZeroTwo
from rematree.trace import Segment

FP32 = 4


class Chain(nn.Module):
    """Two blocks of 100 elements and 20 elements outside: 220, so that two ranks have 110 each."""

    def __init__(self, trained: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(2, 10, dtype=trained))
        self.blocks = nn.ModuleList(nn.Linear(10, 10, bias=False, dtype=trained) for _ in range(2))


def segment(label: str, live: int, peak: int) -> Segment:
    return Segment(label, live, peak, 0.0, {"live": live}, {"live": peak})


def timeline(chain: Chain, bucket: int, *, overlaps: bool = False, accumulate: bool = False) -> list[Segment]:
    """A rank's step: each gradient arrives 10 bytes above its segment's beginning, its own bytes included."""
    ranks = Ranks("zero2", 2, bucket_elements=bucket, overlaps=overlaps)
    layout = ZeroTwo(ranks, chain, ["blocks.0", "blocks.1"], accumulate)
    arrivals = [
        Arrival(id(chain.blocks[1].weight), "backward 1", {"live": 10}, 500),
        Arrival(id(chain.blocks[0].weight), "backward 0", {"live": 10}, 20),
        Arrival(id(chain.embedding), "backward 0", {"live": 10}, 20),
    ]
    step = [segment("head", 5000, 9000), segment("backward 1", 4000, 4500), segment("backward 0", 3000, 3020)]
    optimizer = Segment("optimizer", 2000, 2000, 0.0, {"live": 1560, GRADIENTS: 440}, {"live": 1560, GRADIENTS: 440})
    found = layout.on_rank([*step, optimizer], arrivals, [0, 1])
    assert all(sum(each.at_peak.values()) == each.peak_bytes for each in found)
    return found


def test_before_the_first_gradient_nothing_is_held() -> None:
    head, last, *_ = timeline(Chain(), 100)
    assert head.peak_bytes == 9000
    assert last.at_peak["live"] == 4500  # its own peak comes before its gradient
    assert last.at_peak[BUCKETS] == 0


def test_a_full_bucket_of_one_rank_is_reduced_when_the_next_gradient_comes() -> None:
    *_, first, optimizer = timeline(Chain(), 120)
    # blocks.1 is rank 1's alone. It is in the bucket and in the buffer; blocks.0 reaches into that rank: 200 elements.
    assert first.at_peak == {"live": 3010, BUCKETS: 120 * FP32, GRADIENTS: 200 * FP32, REDUCING: 0}
    # What is left, blocks.0 and the embedding, is both ranks'.
    assert optimizer.at_peak == {"live": 1560, BUCKETS: 120 * FP32, GRADIENTS: 200 * FP32, REDUCING: 120 * FP32}


def test_a_bucket_of_several_ranks_is_copied_whole_before_it_is_reduced() -> None:
    *_, first, optimizer = timeline(Chain(), 200)
    # Both blocks fill the bucket, and both ranks have a part of the first; the embedding finds it full.
    assert first.at_peak == {"live": 3010, BUCKETS: 200 * FP32, GRADIENTS: 0, REDUCING: 200 * FP32}
    assert optimizer.at_peak == {"live": 1560, BUCKETS: 200 * FP32, GRADIENTS: 200 * FP32, REDUCING: 0}


def test_a_gradient_larger_than_the_bucket_waits_by_itself() -> None:
    *_, first, _ = timeline(Chain(), 50)
    # The embedding finds that of blocks.0 waiting, which both ranks have a part of; that of blocks.1 is in the buffer.
    assert first.at_peak == {"live": 3010, BUCKETS: 50 * FP32, GRADIENTS: (200 + 100) * FP32, REDUCING: 100 * FP32}


def test_with_overlap_there_are_two_buckets() -> None:
    one, two = (timeline(Chain(), 120, overlaps=overlaps)[2].at_peak for overlaps in (False, True))
    assert two == {**one, BUCKETS: 2 * one[BUCKETS]}


def test_the_buffer_of_earlier_micro_batches_is_there_all_along() -> None:
    for plain, accumulated in zip(timeline(Chain(), 100), timeline(Chain(), 100, accumulate=True), strict=True):
        if plain.label != "optimizer":
            assert accumulated.peak_bytes - plain.peak_bytes == 200 * FP32
            assert accumulated.live_bytes - plain.live_bytes == 200 * FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_step_takes_a_norm_then_a_flat_part_and_then_gathers(dtype: torch.dtype) -> None:
    chain = Chain(dtype)
    optimizer = timeline(chain, 1)[-1]
    size = dtype.itemsize
    buffer, part = 200 * size, 110
    norm = {"live": 1560, GRADIENTS: buffer, STEP: 100 * 8}
    flat = {"live": 1560, GRADIENTS: buffer + part * FP32, STEP: part * size if size < FP32 else 0}
    gather = {"live": 1560, GRADIENTS: 0, GATHERING: 220 * size}
    assert optimizer.peak_bytes >= max(sum(each.values()) for each in (norm, flat, gather))
    assert optimizer.at_peak in (norm, flat, gather)


def test_masters_and_state_are_a_part_in_fp32() -> None:
    model = ranked.tiny(False).bfloat16()
    elements = sum(p.numel() for p in model.parameters())
    plan = ranked.quick_plan(model, ranked.LONG, Ranks("zero2", 4))
    lines = {line.category: line.num_bytes for line in plan.ledger}
    part = -(-elements // 8) * 2
    assert lines[MASTERS] == part * FP32
    assert lines[STATE] == 2 * part * FP32 + 4  # two moments and a counter
    assert plan.notes[0] == "for one of 4 ranks under ZeRO-2; all bytes are those of one rank"


def test_blocks_that_stand_for_others_change_nothing() -> None:
    twin = Twin(ranked.sizeable(False), ranked.LONG)
    blocks = tuple(f"model.layers.{index}" for index in range(8))
    ranks = Ranks("zero2", 2, bucket_elements=100_000)
    folded, unfolded = (
        Referee(twin, blocks, ranked.roofline(), folds=folds, ranks=ranks).run(Levers()).segments
        for folds in (True, False)
    )
    assert folded == unfolded
    assert [each.at_peak.get(GRADIENTS, 0) > 0 for each in unfolded if each.label == "backward 0"] == [True]


# -- what a live model shows -------------------------------------------------------------------------------------------


class DeepSpeedZeroOptimizer:
    """Stands for DeepSpeed's, which is recognised by its name, with what it says of itself."""

    def __init__(self, **changes: Any) -> None:
        defaults = {
            "partition_gradients": True,
            "cpu_offload": False,
            "zenflow": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "has_moe_layers": False,
            "model_parallel_world_size": 1,
            "sequence_parallel_size": 1,
            "low_precision_master_weights_and_grads": False,
            "gradient_accumulation_dtype": torch.float32,
            "communication_data_type": torch.float32,
            "dtype": torch.float32,
            "dp_process_group": None,
            "reduce_bucket_size": 1000,
            "overlap_comm": True,
        }
        vars(self).update({**defaults, **changes})


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's."""

    def __init__(self, module: nn.Module, optimizer: Any = None) -> None:
        super().__init__()
        self.module = module
        self.optimizer = optimizer


class PipelineEngine(DeepSpeedEngine):
    pass


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)


@pytest.mark.usefixtures("three_ranks")
def test_ranks_are_read_off_the_engine_or_off_the_optimizer_beside_the_model() -> None:
    model, optimizer = Chain(), DeepSpeedZeroOptimizer()
    expected = Ranks("zero2", 3, bucket_elements=1000, overlaps=True)
    assert ranks_of(DeepSpeedEngine(model, optimizer)) == expected
    assert launched_ranks(model, SimpleNamespace(optimizer=optimizer)) == expected  # as accelerate wraps it
    assert without_engine(DeepSpeedEngine(model)) is model


@pytest.mark.usefixtures("three_ranks")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"partition_gradients": False}, "ZeRO-1"),
        ({"cpu_offload": True}, "offloaded"),
        ({"zenflow": True}, "ZenFlow"),
        ({"contiguous_gradients": False}, "contiguous_gradients=false"),
        ({"reduce_scatter": False}, "reduce_scatter=false"),
        ({"round_robin_gradients": True}, "round_robin_gradients"),
        ({"model_parallel_world_size": 2}, "tensor parallelism"),
        ({"sequence_parallel_size": 2}, "sequence parallelism"),
        ({"communication_data_type": torch.bfloat16}, "another dtype"),
    ],
    ids=str,
)
def test_what_zero_does_otherwise_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        ranks_of(DeepSpeedEngine(Chain(), DeepSpeedZeroOptimizer(**change)))


@pytest.mark.parametrize(
    ("under", "named"),
    [
        (lambda: DeepSpeedEngine(ranked.tiny(True)), "DeepSpeed without ZeRO-2 or ZeRO-3"),
        (lambda: PipelineEngine(ranked.tiny(True)), "DeepSpeed's PipelineEngine"),
    ],
)
def test_other_engines_of_deepspeed_are_not_planned_for(under: Any, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        rematree.plan(under(), ranked.LONG, None, cost=ranked.roofline())


def test_a_trainer_that_is_to_use_deepspeed_without_zero_is_refused_by_name() -> None:
    arguments = SimpleNamespace(deepspeed={"zero_optimization": {"stage": 0}})
    with pytest.raises(UsageError, match=r"deepspeed=\.\.\."):
        rematree.BudgetCallback("1GiB").on_train_begin(arguments, None, None, model=ranked.tiny(True))


def test_a_bucket_that_holds_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="0 elements"):
        Ranks("zero2", 2, bucket_elements=0)
