"""DeepSpeed's ZeRO-3 for real: processes over gloo under its engine, with plans on them.

Ranks draw dropout masks of their own: what must be equal, to the bit, is the engine with a plan and without one.
"""

from typing import Any

import pytest
import torch

import ranked
import ranked_zero
import several_ranks
from rematree.plans import Plan
from rematree.referee.ranks import Ranks, Stage3
from rematree.verification import PEAK_SLACK
from test_ranks import STEPS, TALL, check_losses, same
from test_zero_ranks import KINDS, LORA_ONLY, planned, run

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow  # DeepSpeed is no dependency, and each of its processes takes long to begin

WITHIN = 0.02  # of the largest rank's measured peak
SMALL_BUCKET = 2000  # elements: some weights of the tiny model do not fit
ALWAYS = 10**9
# Nothing stays and nothing comes ahead; little of both; all that fits, which with the defaults is all of a small model.
NOTHING, SOME, ALL = Stage3(0, 0, ALWAYS, 0), Stage3(60_000, 10_000, 150_000, 100_000), Stage3()
EXACT = [(lora, kind, first) for lora in (True, False) for kind in KINDS for first in (True, False)]
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
    settings = [
        (Ranks("zero3", count, bucket_elements=20_000, stage3=stage3), lora)
        for stage3 in (NOTHING, SOME, ALL)
        for lora in (True, False)
    ]
    plans = [(ranks, lora, plan) for ranks, lora in settings for plan in planned(ranks, lora, torch.float32)]
    tasks: list[tuple[Any, ...]] = [(ranked_zero.peak, *setting, TALL) for setting in plans]
    trained = [next(setting for setting in plans if setting[1] == lora) for lora in (True, False)]
    tasks += [(ranked_zero.losses, *setting, STEPS) for setting in trained]
    found = run(count, tasks)
    for (_, _, plan), measured in zip(plans, found, strict=False):
        check_peaks(measured, plan)
    for (_, lora, _), losses in zip(trained, found[-2:], strict=True):
        check_losses(losses, lora)


@pytest.mark.parametrize(("dtype", "accumulates"), [(torch.bfloat16, False), (torch.float32, True)])
def test_peaks_in_16_bit_and_with_accumulation(dtype: torch.dtype, accumulates: bool) -> None:
    ranks = Ranks("zero3", 2, bucket_elements=20_000, stage3=SOME)
    plans = [(lora, plan) for lora in (True, False) for plan in planned(ranks, lora, dtype, 1 + accumulates)]
    found = run(2, [(ranked_zero.peak, ranks, lora, plan, TALL, accumulates, dtype) for lora, plan in plans])
    for (_, plan), measured in zip(plans, found, strict=True):
        check_peaks(measured, plan)


def test_gathers_of_a_plan_are_as_many_as_it_says() -> None:
    ranks = Ranks("zero3", 2, bucket_elements=20_000, stage3=SOME)
    plans = [(lora, plan) for lora in (True, False) for plan in planned(ranks, lora, torch.float32)]
    for (lora, plan), found in zip(
        plans, run(2, [(ranked_zero.gathers, ranks, lora, plan, TALL) for lora, plan in plans]), strict=True
    ):
        assert any(note.startswith(f"{found[0]} all-gathers a step;") for note in plan.notes), (lora, found)


def check_peaks(measured: list[int], plan: Plan) -> None:
    """Every rank needs what was predicted."""
    assert plan.budget_bytes is not None
    assert max(measured) <= plan.predicted_peak_bytes <= plan.budget_bytes
    assert max(measured) >= (1 - WITHIN) * (plan.predicted_peak_bytes - PEAK_SLACK)


def test_a_model_under_the_engine_is_planned_as_before_it_was_and_left_as_it_is() -> None:
    ranks = Ranks("zero3", 2, bucket_elements=SMALL_BUCKET, stage3=TINY)
    alone = ranked.quick_plan(ranked.tiny(False), ranked.LONG, ranks)
    for found in several_ranks.run(2, ranked_zero.planned_here, ranks):
        assert found["plan"] == alone
        assert not found["levers"].decisions  # without a budget nothing is recomputed
        assert same(found["measured"], found["left alone"])
