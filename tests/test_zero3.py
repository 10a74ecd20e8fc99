"""DeepSpeed's ZeRO-3: what a rank holds, to the byte, and what is refused by name.

Real processes under its engine are in `test_zero3_ranks`, which needs DeepSpeed. Here four linear layers of 10,000
elements run under what stands for its engine, on two ranks; each weight takes 40,000 bytes, whole.
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
from rematree.referee.simulate import Referee
from rematree.referee.simulation import Simulation
from rematree.trace import Segment

WHOLE, ELEMENTS, ROWS = 40_000, 10_000, 3
BLOCKS = tuple(f"blocks.{index}" for index in range(4))
NEVER, ALWAYS = 0, 10**9


class Stack(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(100, 100, bias=False, dtype=dtype) for _ in BLOCKS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def settings(prefetch: int = NEVER, persists: int = NEVER, reuse: int = NEVER, live: int = ALWAYS) -> Stage3:
    return Stage3(prefetch, persists, live, reuse)


def step(
    stage3: Stage3,
    *,
    count: int = 2,
    bucket: int = ELEMENTS,
    recompute: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Simulation:
    twin = Twin(Stack(dtype), {"x": torch.zeros(ROWS, 100, dtype=dtype)})
    ranks = Ranks("zero3", count, bucket_elements=bucket, stage3=stage3)
    levers = Levers(dict.fromkeys(recompute, Decision(Action.RECOMPUTE)))
    found = Referee(twin, BLOCKS, ranked.roofline(), ranks=ranks).run(levers)
    assert all(sum(each.at_peak.values()) == each.peak_bytes for each in found.segments)
    assert {p.numel() for p in twin.model.parameters()} == {ELEMENTS}  # the model is as it was before
    return found


def whole(bytes_by_category: Mapping[str, int]) -> tuple[int, int]:
    return bytes_by_category.get(GATHERED, 0), bytes_by_category.get(GATHERING, 0)


def forwards(found: Simulation) -> list[tuple[int, int]]:
    return [whole(found.forward(k).live) for k in range(len(BLOCKS))]


def segment(found: Simulation, label: str) -> Segment:
    here = found.segment(label)
    assert here is not None
    return here


def test_a_weight_is_whole_while_its_module_runs() -> None:
    found = step(settings())
    assert forwards(found) == [(WHOLE, 0)] * 4
    assert [whole(segment(found, f"backward {k}").live) for k in range(4)] == [(WHOLE, 0)] * 4
    assert found.gathers == 8  # for each forward, and for each backward


def test_gloo_gathers_into_a_copy() -> None:
    embedding = segment(step(settings()), "embedding")  # the first weight is gathered before its block begins
    assert whole(embedding.at_peak) == (WHOLE, WHOLE)
    assert embedding.peak_bytes - embedding.live_bytes == 2 * WHOLE


def test_what_is_recomputed_in_the_backward_of_its_module_gathers_nothing() -> None:
    found = step(settings(), recompute=BLOCKS)
    assert forwards(found) == [(WHOLE, 0)] * 4
    assert found.gathers == 8


def test_a_weight_that_is_used_again_soon_stays_whole() -> None:
    found = step(settings(reuse=ALWAYS))
    assert forwards(found) == [(count * WHOLE, 0) for count in (1, 2, 3, 4)]
    assert found.gathers == 4
    # Behind the third forward 20,000 elements are used before that weight again; behind the second, 40,000.
    near = step(settings(reuse=30_000))
    assert whole(near.head.live) == (2 * WHOLE, 0)
    assert near.gathers == 6


def test_small_weights_stay_whole_all_along_and_are_gathered_after_the_step() -> None:
    found = step(settings(persists=ELEMENTS))
    assert forwards(found) == [(4 * WHOLE, 0)] * 4
    assert found.gathers == 4
    optimizer = segment(found, "optimizer")
    assert whole(optimizer.live) == (0, 0)
    assert whole(optimizer.at_peak) == (4 * WHOLE, WHOLE)  # the last of them, with gloo's copy
    assert forwards(step(settings(persists=ELEMENTS - 1))) == [(WHOLE, 0)] * 4


def test_several_weights_are_gathered_ahead_into_one_buffer_and_copied_out_of_it() -> None:
    found = step(settings(prefetch=2 * ELEMENTS))
    # The model's own forward gathers the first two. As the first begins, they are copied, and the next two ordered.
    assert whole(found.forward(0).live) == (2 * WHOLE, (2 + 2) * WHOLE)
    # The first buffer goes as the second weight is asked for; the first weight, let go of, is ordered for its backward.
    assert whole(found.forward(1).live) == (2 * WHOLE, 2 * WHOLE)
    assert whole(found.forward(3).live) == (4 * WHOLE, 0)
    assert found.gathers == 3


def test_nothing_is_gathered_ahead_where_enough_is_whole() -> None:
    assert whole(step(settings(prefetch=ELEMENTS)).forward(0).live) == (2 * WHOLE, 0)
    assert whole(step(settings(prefetch=ELEMENTS, live=ELEMENTS)).forward(0).live) == (WHOLE, 0)


@pytest.mark.parametrize(
    ("count", "bucket", "size"),
    [
        (2, ELEMENTS, WHOLE),  # one gradient, of two equal parts: in place, but for gloo's copy
        (3, ELEMENTS, 2 * 3 * 3334 * 4),  # three parts with padding are put in order first
        (2, 2 * ELEMENTS, 2 * 2 * WHOLE),  # so are the parts of two gradients
        (2, 1, WHOLE),  # it does not fit, and waits by itself
    ],
)
def test_gradients_are_reduced_when_the_next_one_does_not_fit(count: int, bucket: int, size: int) -> None:
    found = step(settings(), count=count, bucket=bucket)
    assert max(each.at_peak.get(REDUCING, 0) for each in found.segments) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_masters_state_and_room_for_gradients_are_held_all_along(dtype: torch.dtype) -> None:
    live = step(settings(), count=3, bucket=500, dtype=dtype).forward(0).live
    part, size = 4 * 3334, dtype.itemsize
    assert live[TRAINED] == part * size
    assert live[MASTERS] == part * 4
    assert live[STATE] == 2 * part * 4 + 4  # two moments and a counter
    assert live[GRADIENTS] == part * size
    assert live[BUCKETS] == 500 * size


def test_each_run_begins_with_a_first_step_which_knows_no_order() -> None:
    twin = Twin(Stack(), {"x": torch.zeros(ROWS, 100)})
    ranks = Ranks("zero3", 2, bucket_elements=1000, stage3=settings(prefetch=ELEMENTS))
    referee = Referee(twin, BLOCKS, ranked.roofline(), ranks=ranks)
    assert referee.run(Levers()) == referee.run(Levers())


def test_a_recomputation_gathers_frozen_weights_once_more() -> None:
    model = ranked.tiny(True)
    layers = tuple(path for path, m in model.named_modules() if type(m).__name__ == "LlamaDecoderLayer")
    twin, everything = Twin(model, ranked.LONG), dict.fromkeys(layers, Decision(Action.RECOMPUTE))
    larger = [name for name, p in model.named_parameters() if p.numel() > 400 and ".layers." in name]
    assert len(larger) == 28  # the frozen weights of linear layers; all adapters stay whole
    # Where all stays whole, what the rerun has gathered goes nevertheless, and is gathered anew for its own backward,
    # which three weights of the first layer have not: nothing is trained before them.
    for reuse, more in ((NEVER, 28), (ALWAYS, 28 - 3)):
        ranks = Ranks("zero3", 2, bucket_elements=2000, stage3=settings(persists=400, reuse=reuse))
        referee = Referee(twin, layers, ranked.roofline(), ranks=ranks)
        plain, planned = referee.run(Levers()), referee.run(Levers(everything))
        assert planned.gathers == plain.gathers + more


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
