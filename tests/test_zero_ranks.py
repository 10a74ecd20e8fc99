"""DeepSpeed's ZeRO-2 for real: processes over gloo under its engine, with plans on them.

Ranks draw dropout masks of their own: what must be equal, to the bit, is the engine with a plan and without one.
"""

from functools import partial
from typing import Any

import pytest
import torch

import ranked
import ranked_zero
import rematree
import several_ranks
from rematree.plans import Plan
from rematree.referee.ranks import Ranks
from rematree.units import KIB
from rematree.verification import PEAK_SLACK
from test_ranks import STEPS, TALL, check_losses, same
from trainers import QUICK

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow  # DeepSpeed is no dependency, and each of its processes takes long to begin

SMALL_BUCKET = 2000  # elements: some weights of the tiny model do not fit
LORA_ONLY = "lean"
KINDS = ("blocks", "attention saved", "group", LORA_ONLY)
EXACT = [(lora, kind, first) for lora in (True, False) for kind in KINDS for first in (True, False)]
WITHIN = 0.02  # of the largest rank's measured peak
BUCKETS = (20_000, 200_000)


def planned(ranks: Ranks, lora: bool, dtype: torch.dtype, accumulation_steps: int = 1) -> list[Plan]:
    """As `test_ranks.planned`."""
    make = partial(rematree.Planner, ranks=ranks, cost=ranked.roofline(), forbid=QUICK)
    planner = make(ranked.sizeable(lora).to(dtype), TALL, accumulation_steps=accumulation_steps)
    return planner.plans([planner.min_peak_bytes() + 16 * KIB, planner.plain_step()[0] + KIB])


def run(count: int, tasks: list[tuple[Any, ...]]) -> list[list[Any]]:
    """What each rank found, by task."""
    by_rank = several_ranks.run(count, ranked.everything, tasks)
    return [[found[index] for found in by_rank] for index in range(len(tasks))]


def test_steps_with_a_plan_are_those_of_the_engine_without_one() -> None:
    ranks = Ranks("zero2", 2, bucket_elements=SMALL_BUCKET)
    cases = [case for case in EXACT if case[0] or case[1] != LORA_ONLY]
    for case, by_rank in zip(cases, run(2, [(ranked_zero.exactness, ranks, *case) for case in cases]), strict=True):
        for found in by_rank:
            engine, plan = found["engine"], found["planned"]
            assert found["ranks"] == ranks
            assert plan["losses"] == engine["losses"], case
            assert plan["collectives"] == engine["collectives"], case  # a recomputation gathers and reduces nothing
            assert same(plan["weights"], engine["weights"]), case
        assert same(by_rank[0]["planned"]["weights"], by_rank[1]["planned"]["weights"])


@pytest.mark.parametrize("count", [2, 4])
def test_losses_are_those_of_one_process_and_peaks_those_that_were_predicted(count: int) -> None:
    settings = [(Ranks("zero2", count, bucket_elements=size), lora) for size in BUCKETS for lora in (True, False)]
    settings.append((Ranks("zero2", count, bucket_elements=BUCKETS[0], overlaps=True), False))
    check_losses_and_peaks(settings)


@pytest.mark.parametrize(("dtype", "accumulates"), [(torch.bfloat16, False), (torch.float32, True)])
def test_peaks_in_16_bit_and_with_accumulation(dtype: torch.dtype, accumulates: bool) -> None:
    check_peaks_in(Ranks("zero2", 2, bucket_elements=BUCKETS[0]), dtype, accumulates)


def test_a_model_under_the_engine_is_planned_as_before_it_was_and_left_as_it_is() -> None:
    check_planning_under_the_engine(Ranks("zero2", 2, bucket_elements=SMALL_BUCKET))


# -- what is asked of ZeRO-3 as well (test_zero3_ranks.py) ------------------------------------------------------------


def check_losses_and_peaks(settings: list[tuple[Ranks, bool]]) -> None:
    """All of `settings`, of equally many ranks: two plans' peaks for each, and losses with and without LoRA."""
    plans = [(ranks, lora, plan) for ranks, lora in settings for plan in planned(ranks, lora, torch.float32)]
    tasks: list[tuple[Any, ...]] = [(ranked_zero.peak, *setting, TALL) for setting in plans]
    trained = [next(setting for setting in plans if setting[1] == lora) for lora in (True, False)]
    tasks += [(ranked_zero.losses, *setting, STEPS) for setting in trained]
    found = run(settings[0][0].count, tasks)
    for (_, _, plan), measured in zip(plans, found, strict=False):
        check_peaks(measured, plan)
    for (_, lora, _), losses in zip(trained, found[-2:], strict=True):
        check_losses(losses, lora)


def check_peaks_in(ranks: Ranks, dtype: torch.dtype, accumulates: bool) -> None:
    """Peaks of weights in `dtype`, or of the last of two micro-batches."""
    plans = [(lora, plan) for lora in (True, False) for plan in planned(ranks, lora, dtype, 1 + accumulates)]
    found = run(ranks.count, [(ranked_zero.peak, ranks, lora, plan, TALL, accumulates, dtype) for lora, plan in plans])
    for (_, plan), measured in zip(plans, found, strict=True):
        check_peaks(measured, plan)


def check_peaks(measured: list[int], plan: Plan) -> None:
    """Ranks differ: that of the largest is what was predicted, and no rank needs more."""
    assert plan.budget_bytes is not None
    assert max(measured) <= plan.predicted_peak_bytes <= plan.budget_bytes
    assert max(measured) >= (1 - WITHIN) * (plan.predicted_peak_bytes - PEAK_SLACK)


def check_planning_under_the_engine(ranks: Ranks) -> None:
    """A plan made under the engine is that of one process, and measuring leaves the engine's steps as they were."""
    alone = ranked.quick_plan(ranked.tiny(False), ranked.LONG, ranks)
    for found in several_ranks.run(ranks.count, ranked_zero.planned_here, ranks):
        assert found["plan"] == alone
        assert not found["levers"].decisions  # without a budget nothing is recomputed
        assert same(found["measured"], found["left alone"])
