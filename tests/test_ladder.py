"""The lengths to plan for, and plans of other lengths from one survey: as true as those of a survey of their own."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import rematree
from models import build, with_lora
from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.integrations.batches import read_batches
from rematree.measure import PeakMeter
from rematree.planning.ladder import batch_weights, build_ladder, differ, rung_lengths, table
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from trainers import pad, rows_of

COST = Roofline(1e11, 1e10)
SLACK = 256 << 10  # that every prediction holds


# -- the lengths to plan for


def recomputed(weights: dict[int, float], free: float, rungs: tuple[int, ...]) -> float:
    """Tokens recomputed, each batch on the first rung that it fits."""
    total = 0.0
    for length, weight in weights.items():
        rung = min(r for r in rungs if r >= length)
        total += weight * length * max(0.0, 1 - free / rung)
    return total


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(1, 60), st.floats(0.1, 5.0), min_size=1, max_size=9),
    st.floats(0.5, 80.0),
    st.integers(1, 4),
)
def test_no_other_lengths_recompute_less(weights: dict[int, float], free: float, most: int) -> None:
    chosen = rung_lengths(weights, free, most)
    assert chosen[-1] == max(weights)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) <= most
    others = (
        (*some, max(weights))
        for count in range(most)
        for some in itertools.combinations(sorted(set(weights) - {max(weights)}), count)
    )
    least = min(recomputed(weights, free, rungs) for rungs in others)
    computed = sum(length * weight for length, weight in weights.items())
    assert recomputed(weights, free, chosen) <= least + 0.005 * computed + 1e-9


def test_a_rung_is_at_the_longest_batch_that_fits_whole() -> None:
    weights = dict.fromkeys(range(64, 2049), 1.0)
    chosen = rung_lengths(weights, 700.5, 6)
    assert chosen[0] == 700
    assert chosen[-1] == 2048
    assert 3 < len(chosen) <= 6
    assert rung_lengths(weights, 2048, 6) == (2048,)
    assert rung_lengths({}, 10, 6) == (0,)


def test_share_of_batches_by_their_longest_example() -> None:
    lengths = [3, 5, 5, 9]
    counts = dict.fromkeys(lengths, 0)
    for drawn in itertools.product(lengths, repeat=3):
        counts[max(drawn)] += 1
    assert batch_weights(lengths, 3) == pytest.approx({length: n / 4**3 for length, n in counts.items()})


# -- the batches of a data loader


def test_batches_of_a_length_have_its_shape_and_padding() -> None:
    batches = read_batches(DataLoader(rows_of(12, 40, 9, 33, 21, 40), batch_size=2, collate_fn=pad))  # pyright: ignore[reportArgumentType]
    assert batches.note == "the 2 longest of 6 examples"
    assert batches.longest["input_ids"].shape == (2, 40)
    assert batches.longest["attention_mask"].tolist() == [[1] * 40, [1] * 39 + [0]]
    assert batches.of(33)["input_ids"].shape == (2, 33)
    assert batches.of(9)["input_ids"].shape == (2, 9), "there is one example as short"
    assert sorted(batches.weights) == [9, 12, 21, 33, 40]
    even = read_batches(DataLoader(rows_of(7, 7, 7), batch_size=2, collate_fn=pad))  # pyright: ignore[reportArgumentType]
    assert bool((even.longest["attention_mask"] == 1).all())


def test_lengths_of_preferences_are_those_of_the_longer_answer() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt_ids": [1] * 3, "chosen_ids": [1] * 4, "rejected_ids": [1] * 2},
        {"prompt_ids": [1] * 2, "chosen_ids": [1], "rejected_ids": [1] * 9},
    ]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples)
        return {"input_ids": torch.zeros(2 * len(examples), longest, dtype=torch.long)}

    batches = read_batches(DataLoader(rows, batch_size=1, collate_fn=collate))  # pyright: ignore[reportArgumentType]
    assert batches.weights == {7: 0.5, 11: 0.5}
    assert batches.longest["input_ids"].shape == (2, 11)


def test_rows_that_are_cut_have_the_lengths_they_are_cut_to() -> None:
    rows: list[dict[str, Any]] = [{"input_ids": [5] * length} for length in (4, 6, 30, 50)]

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        cut = [example["input_ids"][:8] for example in examples]
        return {"input_ids": torch.tensor([row + [0] * (max(map(len, cut)) - len(row)) for row in cut])}

    batches = read_batches(DataLoader(rows, batch_size=1, collate_fn=collate), most=8)  # pyright: ignore[reportArgumentType]
    assert batches.weights == {4: 0.25, 6: 0.25, 8: 0.5}
    assert [batches.of(length)["input_ids"].shape[1] for length in (4, 6, 8)] == [4, 6, 8]


@pytest.mark.parametrize(("multiple", "holes"), [(1, 0), (8, 1)])
def test_a_row_alone_has_a_hole_only_if_such_rows_are_padded(multiple: int, holes: int) -> None:
    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        (ids,) = (example["input_ids"] for example in examples)
        more = -len(ids) % multiple
        mask = [1] * len(ids) + [0] * more
        return {"input_ids": torch.tensor([ids + [0] * more]), "attention_mask": torch.tensor([mask])}

    rows: list[Any] = [{"input_ids": [5] * length} for length in (16, 11, 16)]
    batches = read_batches(DataLoader(rows, batch_size=1, collate_fn=collate))  # pyright: ignore[reportArgumentType]
    assert batches.longest["input_ids"].shape == (1, 16)
    assert int((batches.longest["attention_mask"] == 0).sum()) == holes


def test_classes_of_pictures_are_no_lengths() -> None:
    for labels in ([0, 1, 2, 0], [torch.tensor(1)] * 4):
        rows: list[Any] = [{"pixel_values": torch.ones(3, 8, 8), "labels": label} for label in labels]
        batches = read_batches(DataLoader(rows, batch_size=2))  # pyright: ignore[reportArgumentType]
        assert batches.note == "the first batch; the lengths of the others cannot be read beforehand"
        assert batches.longest["pixel_values"].shape == (2, 3, 8, 8)


# -- plans of other lengths from one survey


def batch_of(tokens: int) -> dict[str, torch.Tensor]:
    rows: list[Any] = list(rows_of(tokens, tokens))
    batch = pad(rows)
    batch["attention_mask"][-1, -1] = 0
    return batch


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = with_lora(build("llama"), target_modules=["q_proj", "down_proj"])
    model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


@pytest.fixture(scope="module")
def planner(model: nn.Module) -> Planner:
    return Planner(model, batch_of(60), cost=COST, forbid=["chunked_loss"])


def test_peaks_are_those_of_a_planner_of_their_own(model: nn.Module, planner: Planner) -> None:
    other = planner.for_batch(batch_of(24))
    with pytest.raises(UsageError, match="cannot stand for one of"):
        planner.for_batch({"input_ids": batch_of(24)["input_ids"]})
    budget = (planner.min_peak_bytes() + other.plan(None).predicted_peak_bytes) // 2
    plan = other.plan(budget)
    assert plan.predicted_peak_bytes <= budget
    assert {name: shape for name, shape, _ in plan.fingerprint.batch}["input_ids"] == (2, 24)
    own = Planner(model, batch_of(24), cost=COST, forbid=["chunked_loss"])
    alone = own.observed.referee.run(plan.levers)
    assert own._search.peak(alone) == plan.predicted_peak_bytes == sum(line.num_bytes for line in plan.ledger)
    assert alone.seconds == pytest.approx(plan.predicted_step_seconds, rel=1e-9)
    # The scaled survey finds what a survey of this length finds, or next to it.
    assert plan.predicted_step_seconds <= own.plan(budget).predicted_step_seconds * 1.02
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with rematree.apply(planner.plan(budget), model, smaller=[plan]) as handle:
        peaks: list[int] = []
        for _ in range(2):  # the state of the optimizer is there in the second
            with PeakMeter(model, optimizer, batch_of(24)) as meter:
                model(**batch_of(24)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            peaks.append(meter.peak_bytes)
        assert handle.in_force == plan
    assert plan.predicted_peak_bytes - SLACK - 4096 <= peaks[-1] <= plan.predicted_peak_bytes


def test_a_ladder_keeps_its_budget_and_recomputes_less_for_shorter_batches(planner: Planner) -> None:
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    budget = (2 * low + high) // 3
    ladder = build_ladder(planner, budget, dict.fromkeys(range(8, 61), 1.0), batch_of)
    plans = ladder.plans(budget)
    assert 1 < len(plans) <= 6
    assert all(plan.predicted_peak_bytes <= budget for plan in plans)
    shares = [plan.extra_seconds / plan.predicted_step_seconds for plan in plans]
    assert not plans[0].recomputes
    assert shares[-1] == max(shares) > 0
    assert all(differ(plan, longer) for plan, longer in itertools.pairwise(plans))
    assert table(plans).count("\n") == len(plans), "a line each, below the headers"
    # Tighter, for one rung: the others keep the limit too, or are as small as they can be.
    limit = plans[0].predicted_peak_bytes * 9 // 10
    tighter = ladder.plans(limit, ladder.number_for(plans[0].fingerprint))
    assert tighter[0].predicted_peak_bytes <= limit
    assert tighter[-1].predicted_peak_bytes <= max(limit, low)
    with pytest.raises(InfeasibleBudgetError):
        ladder.plans(1000, 0)


def test_data_that_fits_has_one_plan(planner: Planner) -> None:
    ladder = build_ladder(planner, 1 << 40, dict.fromkeys(range(8, 61), 1.0), batch_of)
    (plan,) = ladder.plans(1 << 40)
    assert not plan.recomputes
