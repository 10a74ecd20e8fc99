"""DeepSpeed's ZeRO-3: what a rank holds, to the byte, and what is refused by name.

Real processes under its engine are in `test_zero3_ranks`, which needs DeepSpeed. Here four linear layers of 10,000
elements run under what stands for its engine, on two ranks; each weight takes 40,000 bytes, whole, and the first one's
input requires no grad.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ranked
import rematree
from rematree.errors import UsageError
from rematree.memory.accounts import BUCKETS, GATHERED, GATHERING, GRADIENTS, MASTERS, REDUCING, STATE, TRAINED
from rematree.observation.observe import Twin
from rematree.plans import Action, Decision, Levers, Plan
from rematree.referee.ranks import Ranks, Stage3, launched_ranks, ranks_of
from rematree.referee.simulate import Referee, Simulation

WHOLE, ROWS = 40_000, 3
BLOCKS = tuple(f"blocks.{index}" for index in range(4))
NEVER, ALWAYS = 0, 10**9


class Stack(nn.Module):
    def __init__(self, count: int = 4, width: int = 100, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def settings(prefetch: int = NEVER, persists: int = NEVER, reuse: int = NEVER, live: int = ALWAYS) -> Stage3:
    return Stage3(prefetch, persists, live, reuse)


def step(
    stage3: Stage3, *, count: int = 2, bucket: int = 10_000, recompute: tuple[str, ...] = (), model: Any = None
) -> Simulation:
    chain = Stack() if model is None else model
    weight = chain.blocks[0].weight
    twin = Twin(chain, {"x": torch.zeros(ROWS, weight.shape[1], dtype=weight.dtype)})
    blocks = tuple(f"blocks.{index}" for index in range(len(chain.blocks)))
    ranks = Ranks("zero3", count, bucket_elements=bucket, stage3=stage3)
    levers = Levers(dict.fromkeys(recompute, Decision(Action.RECOMPUTE)))
    found = Referee(twin, blocks, ranked.roofline(), ranks=ranks).run(levers)
    assert all(sum(each.at_peak.values()) == each.peak_bytes for each in found.segments)
    assert not [name for name, p in twin.model.named_parameters() if p.numel() != weight.numel()]  # as it was before
    return found


def whole(bytes_by_category: Mapping[str, int]) -> tuple[int, int]:
    return bytes_by_category.get(GATHERED, 0), bytes_by_category.get(GATHERING, 0)


def test_a_weight_is_whole_while_its_module_runs_and_as_long_as_autograd_keeps_it() -> None:
    found = step(settings())
    kept = [whole(found.forward(k).live)[0] // WHOLE for k in range(4)]
    assert kept == [1, 1, 2, 3]  # its own, and those of the blocks before it but the first
    assert whole(found.head.live) == (3 * WHOLE, 0)
    later = [found.backward(k) for k in (3, 2, 1, 0)]
    assert [whole(each.live)[0] // WHOLE for each in later if each] == [4, 3, 2, 1]  # gathered anew, beside the kept
    assert found.gathers == 8  # for each forward, and for each backward


def test_gloo_gathers_into_a_copy() -> None:
    found = step(settings())
    assert whole(found.forward(0).at_peak) == (WHOLE + 0, WHOLE) or whole(found.forward(0).at_peak)[1] in (0, WHOLE)


def test_what_is_recomputed_keeps_no_weight_and_gathers_none() -> None:
    found = step(settings(), recompute=BLOCKS)
    assert [whole(found.forward(k).live)[0] // WHOLE for k in range(4)] == [1, 1, 1, 1]
    assert whole(found.head.live) == (0, 0)
    assert found.gathers == 8


def test_a_weight_that_is_used_again_soon_stays_whole() -> None:
    found = step(settings(reuse=ALWAYS))
    assert [whole(found.forward(k).live)[0] // WHOLE for k in range(4)] == [1, 2, 3, 4]
    assert found.gathers == 4
    near = step(settings(reuse=30_000), recompute=BLOCKS)  # behind the last but one: 3, 3 again, and then itself
    assert whole(near.head.live)[0] == 2 * WHOLE
    assert near.gathers == 6


def test_small_weights_stay_whole_all_along_and_are_gathered_after_the_step() -> None:
    found = step(settings(persists=10_000))
    assert {whole(found.forward(k).live)[0] for k in range(4)} == {4 * WHOLE}
    assert found.gathers == 4
    optimizer = found.segment("optimizer")
    assert optimizer is not None
    assert whole(optimizer.live) == (0, 0)


def test_several_weights_are_gathered_ahead_into_one_buffer_and_copied_out_of_it() -> None:
    found = step(settings(prefetch=20_000))
    assert whole(found.forward(0).live) == (WHOLE, 2 * WHOLE)
    # The buffer stays until the second of the two is asked for; the next two are on their way.
    assert whole(found.forward(1).live) == (2 * WHOLE, 4 * WHOLE)


def test_nothing_is_gathered_ahead_where_enough_is_whole() -> None:
    assert whole(step(settings(prefetch=10_000)).forward(0).live) == (2 * WHOLE, 0)
    assert whole(step(settings(prefetch=10_000, live=10_000)).forward(0).live) == (WHOLE, 0)


@pytest.mark.parametrize(
    ("bucket", "size"),
    [
        (10_000, 40_000),  # one weight's gradient, of two equal parts: in place, but for gloo's copy
        (20_000, 2 * 80_000),  # two are put in order first
    ],
)
def test_gradients_are_reduced_when_the_next_one_does_not_fit(bucket: int, size: int) -> None:
    found = step(settings(), bucket=bucket, recompute=BLOCKS)
    assert max(each.at_peak.get(REDUCING, 0) for each in found.segments) in (0, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_masters_state_and_a_place_for_gradients_are_held_all_along(dtype: torch.dtype) -> None:
    found = step(settings(), count=3, bucket=500, model=Stack(dtype=dtype))
    part, size = 4 * 3334, dtype.itemsize
    live = found.forward(0).live
    assert live[TRAINED] == part * size
    assert live.get(MASTERS, 0) == (0 if size == 4 else part * 4)  # the part itself, if it is fp32
    assert live[STATE] == 2 * part * 4 + 4
    assert live[GRADIENTS] == part * size
    assert live[BUCKETS] == 500 * size


def test_the_first_step_knows_no_order_and_the_later_ones_need_more() -> None:
    twin = Twin(Stack(), {"x": torch.zeros(ROWS, 100)})
    ranks = Ranks("zero3", 2, bucket_elements=1000, stage3=settings(prefetch=10_000))
    referee = Referee(twin, BLOCKS, ranked.roofline(), ranks=ranks)
    assert referee.run(Levers()) == referee.run(Levers())  # each run begins with a first step


def test_frozen_weights_gathered_for_a_recomputation_serve_the_backward_as_well() -> None:
    model = ranked.tiny(True)
    layers = tuple(path for path, m in model.named_modules() if type(m).__name__ == "LlamaDecoderLayer")
    ranks = Ranks("zero3", 2, bucket_elements=2000, stage3=settings(persists=400))
    referee = Referee(Twin(model, ranked.LONG), layers, ranked.roofline(), ranks=ranks)
    plain, planned = (
        referee.run(Levers(decisions)) for decisions in ({}, dict.fromkeys(layers, Decision(Action.RECOMPUTE)))
    )
    assert planned.gathers <= plain.gathers


# -- what a live model shows -------------------------------------------------------------------------------------------


class DeepSpeedZeroOptimizer_Stage3:  # noqa: N801
    """Stands for DeepSpeed's, which is recognised by its name, with what it says of itself."""

    def __init__(self, model: nn.Module, of_weights: dict[str, Any], **changes: Any) -> None:
        weights = {
            "module": model,
            "zero_quantized_weights": False,
            "model_persistence_threshold": 2**63 - 1,
            "param_numel_persistence_threshold": 3,
            "_prefetch_bucket_sz": 4,
            "_max_available_parameters_in_numel": 5,
            "_max_reuse_distance_in_numel": 6,
        }
        defaults = {
            "parameter_offload": SimpleNamespace(**{**weights, **of_weights}),
            "offload_optimizer": False,
            "offload_param": False,
            "zenflow": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "zero_hpz_partition_size": 1,
            "zero_quantized_nontrainable_weights": False,
            "all2all_process_group": None,
            "use_muon": False,
            "model_parallel_group": None,
            "sequence_parallel_size": 1,
            "master_weights_and_grads_dtype": torch.float32,
            "ipg_buckets": {torch.float32: None},
            "gradient_accumulation_dtype": torch.float32,
            "communication_data_type": torch.float32,
            "dtype": torch.float32,
            "partition_count": 3,
            "reduce_bucket_size": 1000,
        }
        vars(self).update({**defaults, **changes})


class MiCS_Optimizer(DeepSpeedZeroOptimizer_Stage3):  # noqa: N801
    pass


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's."""

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.module = module
        self.optimizer = optimizer


def test_ranks_are_read_off_the_engine_or_off_the_optimizer_beside_the_model() -> None:
    model = Stack()
    optimizer = DeepSpeedZeroOptimizer_Stage3(model, {})
    expected = Ranks("zero3", 3, bucket_elements=1000, stage3=Stage3(4, 3, 5, 6))
    assert ranks_of(DeepSpeedEngine(model, optimizer)) == expected
    assert launched_ranks(model, SimpleNamespace(optimizer=optimizer)) == expected  # as accelerate wraps it


LEAF = Stack()
LEAF._z3_leaf = True  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "of_weights", "named"),
    [
        ({"offload_optimizer": True}, {}, "an optimizer offloaded"),
        ({"offload_param": True}, {}, "parameters offloaded"),
        ({"zenflow": True}, {}, "ZenFlow"),
        ({"contiguous_gradients": False}, {}, "contiguous_gradients=false"),
        ({"reduce_scatter": False}, {}, "reduce_scatter=false"),
        ({"zero_hpz_partition_size": 2}, {}, "hpZ"),
        ({"zero_quantized_nontrainable_weights": True}, {}, "quantised weights"),
        ({}, {"zero_quantized_weights": True}, "quantised weights"),
        ({"all2all_process_group": 1}, {}, "quantised gradients"),
        ({}, {"module": LEAF}, "leaf modules"),
        ({}, {"model_persistence_threshold": 9}, "stage3_model_persistence_threshold"),
        ({"use_muon": True}, {}, "Muon"),
        ({"model_parallel_group": 1}, {}, "tensor parallelism"),
        ({"sequence_parallel_size": 2}, {}, "sequence parallelism"),
        ({"communication_data_type": torch.bfloat16}, {}, "another dtype"),
    ],
    ids=str,
)
def test_what_zero_3_does_otherwise_is_refused_by_name(
    change: dict[str, Any], of_weights: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        ranks_of(DeepSpeedEngine(Stack(), DeepSpeedZeroOptimizer_Stage3(Stack(), of_weights, **change)))


def test_other_ways_of_sharding_weights_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="DeepSpeed with MiCS"):
        ranks_of(DeepSpeedEngine(Stack(), MiCS_Optimizer(Stack(), {})))


def test_weights_that_are_parts_without_an_engine_are_not_planned_for() -> None:
    model = ranked.tiny(True)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UsageError, match="its engine is not there"):
        rematree.plan(model, ranked.LONG, None, cost=ranked.roofline())
    rematree.apply(Plan.of(Levers(), ranked.describe_model(ranked.tiny(True))), model).remove()


def test_settings_count_elements() -> None:
    with pytest.raises(UsageError, match="none is negative"):
        Stage3(prefetch=-1)
