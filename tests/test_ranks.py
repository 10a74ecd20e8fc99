"""Several ranks for real: processes over gloo, under DDP and FSDP2, with plans on them.

Ranks that see equal data must have the gradients of one process to the bit: the mean of two equal numbers is that
number. With data of their own they must have, to the bit, what the engine has without a plan; against one process that
sees all the data only the order of sums differs, which is what the tolerance is for.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import ranked
import rematree
import several_ranks
from models import batch_for
from rematree.errors import PlanMismatchError, UsageError
from rematree.planning.agreement import chosen_plan
from rematree.plans import Fingerprint, Levers, Plan
from rematree.referee.ranks import Ranks
from rematree.units import KIB
from rematree.verification import PEAK_SLACK
from trainers import QUICK

TOLERANCE = 1e-5  # of a loss of about 6, in fp32: the order of sums over four rows
BELOW = 0.02  # of the prediction: blocks that stay whole are counted whole until all of their backward is over
STEPS = 4
KINDS = ("blocks", "attention saved", "group")
# engine, LoRA, what is recomputed, whether the plan is applied before the model is wrapped, whether ranks see the same
EXACT = [
    ("ddp", True, "blocks", True, False),
    ("ddp", True, "attention saved", False, True),
    ("ddp", False, "group", True, True),
    ("fsdp2", False, "blocks", False, True),
    ("fsdp2", True, "attention saved", True, False),
    ("fsdp2", True, "group", False, False),
]
ENGINES = {"ddp": Ranks("ddp", 2), "fsdp2": Ranks("fsdp2", 2)}
CHUNKED = [("ddp", "root"), ("fsdp2", "root"), ("fsdp2", "head")]  # engine, and the unit that the head is in
SETTINGS = [(Ranks("ddp", 2, bucket_view=True), True), (Ranks("fsdp2", 2), False)]
MORE = [
    (ranks, lora)
    for ranks in (Ranks("ddp", 2), Ranks("ddp", 4), Ranks("fsdp2", 2, reshard=False), Ranks("fsdp2", 4))
    for lora in (True, False)
]
TALL = {name: tensor.repeat(2, 1) for name, tensor in batch_for(torch.nn.Module(), tokens=32).items()}


def planned(ranks: Ranks, lora: bool, accumulation_steps: int = 1) -> list[Plan]:
    """Plans near the smallest peak and without a budget to speak of, made in one process."""
    make = partial(rematree.Planner, ranks=ranks, cost=ranked.roofline(), forbid=QUICK)
    planner = make(ranked.sizeable(lora), TALL, accumulation_steps=accumulation_steps)
    return planner.plans([planner.min_peak_bytes() + 16 * KIB, planner.plain_step()[0] + KIB])


class Results:
    """Of all tasks of one group of processes, by task."""

    def __init__(self, count: int, tasks: dict[Any, tuple[Any, ...]]) -> None:
        by_rank = several_ranks.run(count, ranked.everything, list(tasks.values()))
        self._found = {name: [each[i] for each in by_rank] for i, name in enumerate(tasks)}

    def __getitem__(self, name: Any) -> list[Any]:
        return self._found[name]


@pytest.fixture(scope="module")
def plans() -> dict[Any, list[Plan]]:
    return {setting: planned(*setting) for setting in SETTINGS}


@pytest.fixture(scope="module")
def two(plans: dict[Any, list[Plan]]) -> Results:
    tasks: dict[Any, tuple[Any, ...]] = {case: (ranked.exactness, ENGINES[case[0]], *case[1:]) for case in EXACT}
    for (ranks, lora), made in plans.items():
        tasks["losses", ranks, lora] = (ranked.losses, ranks, lora, made[0], STEPS)
        for index, plan in enumerate(made):
            tasks["peak", ranks, lora, index] = (ranked.peak, ranks, lora, plan, TALL)
    for engine, unit in CHUNKED:
        tasks["chunked", engine, unit] = (ranked.chunked, ENGINES[engine], unit)
    tasks["planned"] = (ranked.planned_here, ENGINES["fsdp2"])
    return Results(2, tasks)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_gradients_are_those_of_the_engine_and_of_one_process(two: Results, case: tuple[Any, ...]) -> None:
    for found in two[case]:
        assert same(found["planned"], found["engine"])
        assert found["repeated"]  # the second step finds hooks and weights as the first did
        if case[-1]:
            assert same(found["planned"], found["alone"])


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_recomputation_gathers_nothing_and_reduces_nothing_unless_blocks_are_grouped(
    two: Results, case: tuple[Any, ...]
) -> None:
    engine, _, kind, _, _ = case
    for found in two[case]:
        assert found["more reduces"] == 0
        # A group is rerun in the backward of its last block: the other two are gathered once more.
        assert found["more gathers"] == (2 if (engine, kind) == ("fsdp2", "group") else 0)


@pytest.mark.parametrize(("engine", "unit"), CHUNKED)
def test_a_loss_in_chunks_makes_no_logits_under_an_engine(two: Results, engine: str, unit: str) -> None:
    """DDP clones what a model returns and FSDP2 hooks it; the head of a unit of its own is not left for later."""
    for found in two["chunked", engine, unit]:
        assert found["void"] == (unit == "head")
        assert not found["made"]
        assert found["offered"] == ((None,) if unit == "head" else (None, 32))
        torch.testing.assert_close(found["chunked extra"], found["engine extra"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found["chunked"], found["engine"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_losses_are_those_of_one_process_that_sees_all_rows(two: Results, setting: tuple[Ranks, bool]) -> None:
    check_losses(two["losses", *setting], setting[1])


def check_losses(found: list[list[float]], lora: bool) -> None:
    model = ranked.sizeable(lora)
    expected = ranked.train(model, model, STEPS, slice(None))
    mean = torch.tensor(found).mean(0)
    assert mean[-1] < mean[0] - 0.1  # it trains
    torch.testing.assert_close(mean, torch.tensor(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_rank_stays_within_the_budget_and_what_was_predicted(
    two: Results, plans: dict[Any, list[Plan]], setting: tuple[Ranks, bool], index: int
) -> None:
    check_peaks(two["peak", *setting, index], plans[setting][index])


def check_peaks(measured: list[int], plan: Plan, below: float = BELOW) -> None:
    assert plan.budget_bytes is not None
    assert sum(line.num_bytes for line in plan.ledger) == plan.predicted_peak_bytes <= plan.budget_bytes
    assert max(measured) - min(measured) < KIB  # no race with anything that is large
    for each in measured:
        assert each <= plan.predicted_peak_bytes
        assert each >= (1 - below) * (plan.predicted_peak_bytes - PEAK_SLACK)


def test_a_sharded_model_is_planned_as_before_it_was(two: Results) -> None:
    alone = ranked.quick_plan(ranked.smallest(), ranked.LONG, ENGINES["fsdp2"])
    for found in two["planned"]:
        assert found["plan"] == alone


def test_all_ranks_take_the_plan_for_the_largest_batch(two: Results) -> None:
    for found in two["planned"]:
        assert found["agreed"].fingerprint.batch == (("input_ids", (2, 32), "int64"),)


def test_an_error_on_one_rank_is_raised_on_all(two: Results) -> None:
    for found in two["planned"]:
        assert found["error"] == ("InfeasibleBudgetError", "too small", ["on rank 1 of 2"])
        assert found["mismatch"] == "the ranks hold different models: one plan cannot hold for all"


@pytest.mark.slow
def test_a_model_under_ddp_is_planned_as_before_it_was() -> None:
    alone = ranked.quick_plan(ranked.smallest(), ranked.LONG, ENGINES["ddp"])
    for found in several_ranks.run(2, ranked.planned_here, ENGINES["ddp"]):
        assert found["plan"] == alone


@pytest.mark.slow
@pytest.mark.parametrize("setting", MORE, ids=str)
def test_more_ranks_and_settings(setting: tuple[Ranks, bool]) -> None:
    made = planned(*setting)
    tasks: dict[Any, tuple[Any, ...]] = {i: (ranked.peak, *setting, plan, TALL) for i, plan in enumerate(made)}
    tasks["losses"] = (ranked.losses, *setting, made[0], STEPS)
    for kind in KINDS:
        tasks[kind] = (ranked.exactness, *setting, kind, False, False)
    found = Results(setting[0].count, tasks)
    check_losses(found["losses"], setting[1])
    for index, plan in enumerate(made):
        check_peaks(found[index], plan, below=0.05)  # 3.0 % with four ranks of FSDP2 that train all weights
    for kind in KINDS:
        assert all(same(each["planned"], each["engine"]) for each in found[kind])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_gradients_of_earlier_micro_batches_are_shards_under_fsdp2(lora: bool) -> None:
    ranks = ENGINES["fsdp2"]
    made = planned(ranks, lora, 2)
    found = Results(2, {i: (ranked.peak, ranks, lora, plan, TALL, True) for i, plan in enumerate(made)})
    for index, plan in enumerate(made):
        check_peaks(found[index], plan, below=0.05)  # a block's gradients count as whole all through its backward


# -- without processes ------------------------------------------------------------------------------------------------


def plan_for(rows: int, tokens: int, dtype: str = "int64", model: str = "Llama") -> Plan:
    return Plan.of(Levers(), Fingerprint(model, "", "", "", (("input_ids", (rows, tokens), dtype),), "cpu", ""))


def test_the_plan_of_the_lowest_rank_that_holds_all_batches_is_taken() -> None:
    made = [plan_for(2, 8), plan_for(2, 16), plan_for(1, 16), plan_for(2, 16)]
    assert chosen_plan(made) is made[1]


def test_where_a_rank_has_padding_its_mask_counts() -> None:
    plans = [plan_for(2, 16), plan_for(2, 8)]
    ones, padded = replace(plans[0].fingerprint, left_out=("attention_mask",)), plans[1].fingerprint
    with pytest.raises(PlanMismatchError, match="no rank's longest batch"):
        chosen_plan([Plan.of(Levers(), ones), Plan.of(Levers(), padded)])
    both = [Plan.of(Levers(), replace(ones, left_out=())), Plan.of(Levers(), ones)]
    assert chosen_plan(both) is both[0]
    assert chosen_plan(both[::-1]) is both[0]


def test_an_error_that_is_none_of_the_librarys_leaves_no_rank_waiting(two: Results) -> None:
    for rank, found in enumerate(two["planned"]):
        assert found["broken"] == ("ZeroDivisionError" if rank == 1 else "RematreeError: ZeroDivisionError")


def test_ranks_none_of_which_holds_all_batches_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match="no rank's longest batch") as error:
        chosen_plan([plan_for(2, 8), plan_for(1, 16)])
    assert error.value.details == ("rank 0: input_ids 2x8", "rank 1: input_ids 1x16")


def test_ranks_with_different_models_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match="different models") as error:
        chosen_plan([plan_for(2, 8), plan_for(2, 8, model="Qwen")])
    assert error.value.details == ("model_class: rank 0 has Llama, rank 1 Qwen",)


def test_without_a_group_of_processes_the_plan_is_taken_as_it_is() -> None:
    made = plan_for(2, 8)
    assert rematree.agreed_plan(lambda: made) is made


@pytest.mark.parametrize(("engine", "count", "said"), [("zero", 2, "no engine 'zero'"), ("ddp", 0, "0 ranks")])
def test_ranks_that_cannot_be_are_refused(engine: Any, count: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Ranks(engine, count)


@pytest.mark.slow
def test_more_ranks_hold_less_under_fsdp2_and_as_much_under_ddp() -> None:
    model = ranked.tiny(True)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    plain, two, eight, sharded = (
        ranked.quick_plan(model, ranked.LONG, ranks).predicted_peak_bytes
        for ranks in (None, Ranks("ddp", 2), Ranks("ddp", 8), Ranks("fsdp2", 8))
    )
    assert two == eight == plain + trained  # a bucket beside the gradients
    fewer = ranked.quick_plan(model, ranked.LONG, Ranks("fsdp2", 2)).predicted_peak_bytes
    assert sharded < fewer


def test_a_shorter_batch_is_planned_for_the_same_ranks() -> None:
    model = ranked.smallest()
    long, short = (batch_for(model, tokens=tokens) for tokens in (32, 16))
    make = partial(rematree.Planner, model, ranks=ENGINES["fsdp2"], cost=ranked.roofline(), forbid=QUICK)
    fresh, shorter = make(short).plan(None), make(long).for_batch(short).plan(None)
    assert shorter.levers == fresh.levers
    assert shorter.predicted_peak_bytes == fresh.predicted_peak_bytes
