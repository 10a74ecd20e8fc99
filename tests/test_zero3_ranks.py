"""DeepSpeed's ZeRO-3 for real: processes over gloo under its engine, with plans on them.

Ranks draw dropout masks of their own: what must be equal, to the bit, is the engine with a plan and without one.
"""

import pytest
import torch

import ranked_zero
from rematree.referee.ranks import Ranks, Stage3
from test_ranks import TALL, same
from test_zero_ranks import (
    EXACT,
    LORA_ONLY,
    SMALL_BUCKET,
    check_losses_and_peaks,
    check_peaks_in,
    check_planning_under_the_engine,
    planned,
    run,
)

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow  # DeepSpeed is no dependency, and each of its processes takes long to begin

ALWAYS = 10**9
# Nothing stays and nothing comes ahead; little of both; all that fits, which with the defaults is all of a small model.
NOTHING, SOME, ALL = Stage3(0, 0, ALWAYS, 0), Stage3(60_000, 10_000, 150_000, 100_000), Stage3()
TINY = Stage3(2000, 100, ALWAYS, 4000)


def test_steps_with_a_plan_are_those_of_the_engine_without_one() -> None:
    ranks = Ranks("zero3", 2, bucket_elements=SMALL_BUCKET, stage3=TINY)
    cases = [case for case in EXACT if case[0] or case[1] != LORA_ONLY]
    for case, by_rank in zip(cases, run(2, [(ranked_zero.exactness, ranks, *case) for case in cases]), strict=True):
        for found in by_rank:
            engine, plan = found["engine"], found["planned"]
            assert found["ranks"] == ranks
            assert plan["losses"] == engine["losses"], case
            assert plan["collectives"]["reduce_scatter_base"] == engine["collectives"]["reduce_scatter_base"], case
            assert same(plan["weights"], engine["weights"]), case
        assert same(by_rank[0]["planned"]["weights"], by_rank[1]["planned"]["weights"])


@pytest.mark.parametrize("count", [2, 4])
def test_losses_are_those_of_one_process_and_peaks_those_that_were_predicted(count: int) -> None:
    stages = (NOTHING, SOME, ALL)
    each = [Ranks("zero3", count, bucket_elements=20_000, stage3=stage3) for stage3 in stages]
    check_losses_and_peaks([(ranks, lora) for ranks in each for lora in (True, False)])


@pytest.mark.parametrize(("dtype", "accumulates"), [(torch.bfloat16, False), (torch.float32, True)])
def test_peaks_in_16_bit_and_with_accumulation(dtype: torch.dtype, accumulates: bool) -> None:
    check_peaks_in(Ranks("zero3", 2, bucket_elements=20_000, stage3=SOME), dtype, accumulates)


def test_a_model_under_the_engine_is_planned_as_before_it_was_and_left_as_it_is() -> None:
    check_planning_under_the_engine(Ranks("zero3", 2, bucket_elements=SMALL_BUCKET, stage3=TINY))


def test_gathers_of_a_plan_are_as_many_as_it_says() -> None:
    ranks = Ranks("zero3", 2, bucket_elements=20_000, stage3=SOME)
    plans = [(lora, plan) for lora in (True, False) for plan in planned(ranks, lora, torch.float32)]
    for (lora, plan), found in zip(
        plans, run(2, [(ranked_zero.gathers, ranks, lora, plan, TALL) for lora, plan in plans]), strict=True
    ):
        assert any(note.startswith(f"{found[0]} all-gathers a step;") for note in plan.notes), (lora, found)
