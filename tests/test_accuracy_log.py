"""The benchmarks' shared code, on a model small enough for every run of the tests."""

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from models import batch_for, build, with_lora
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline
from rematree.units import KIB, MIB

SLACK = 256 * KIB + 64  # in every prediction; much of a toy's peak. And scalars that come and go at it


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _benchmarks_importable(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


def test_every_pair_of_a_way_to_train_and_a_shape_or_dtype_is_met() -> None:
    grid = load("grid")
    found = [cell for family in grid.FAMILIES for cell in grid.cells(family)]
    assert len(found) == len(grid.FAMILIES) * len(grid.MODES) == len({cell.name for cell in found}) == 18
    assert {(c.mode, (c.rows, c.tokens)) for c in found} == {(m, s) for m in grid.MODES for s in grid.SHAPES}
    assert {(c.mode, c.dtype) for c in found} == {(m, d) for m in grid.MODES for d in grid.DTYPES}
    assert len([c for f in grid.FAMILIES for c in grid.cells(f, every_shape=True)]) == 54


@pytest.mark.usefixtures("stated_prices")
def test_a_cell_is_predicted_measured_and_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = load("grid")
    monkeypatch.setitem(grid.FAMILIES, "tiny", lambda: build("llama", layers=2))
    # Levers that are none of the grid's business, and take most of the planning.
    monkeypatch.setattr(grid, "Planner", functools.partial(Planner, forbid=["groups", "lean_adapters"]))
    # How fast the machine is takes a second to find out, ten times, and nothing here depends on it.
    monkeypatch.setattr(load("speed"), "_WARM_RUNS", 0)
    monkeypatch.setattr(load("speed"), "_RUNS", 1)
    cell = grid.Cell("tiny", "lora", 2, 32, "float32")
    device = torch.device("cpu")
    rows = list(grid.measure(cell, device, timed_steps=1, done=frozenset({"plain"})))
    assert [row.way for row in rows] == ["hf flag", "plan 0%", "plan 33%", "plan 67%"]
    for row in rows:
        assert 0 <= row.predicted_peak_bytes - row.measured_peak_bytes <= SLACK
        assert 0 < row.first_step_peak_bytes <= row.measured_peak_bytes
        assert row.reserved_bytes is None
        assert row.measured_seconds > 0 < row.predicted_seconds
    assert rows[1].measured_peak_bytes < rows[0].measured_peak_bytes
    text = json.dumps([grid.as_json(row) for row in rows])
    page = load("accuracy_page").page("Title", "Intro.", {"device": "none"}, json.loads(text))
    assert page.count("\n| tiny lora float32 2x32 |") == 4


def row(peak: int, predicted: int, seconds: float = 1.0) -> dict[str, Any]:
    return {
        "cell": "tiny lora float32 1x1",
        "way": "plain",
        "measured_peak_bytes": peak,
        "predicted_peak_bytes": predicted,
        "predicted_allocated_bytes": predicted,
        "first_step_peak_bytes": peak,
        "reserved_bytes": None,
        "peak_error": predicted / peak - 1,
        "predicted_seconds": seconds,
        "measured_seconds": 1.0,
        "all_seconds": [0.9, 1.0, 1.08],
        "time_error": seconds - 1.0,
        "machine": 1.02,
    }


@pytest.mark.parametrize(("predicted", "holds"), [(991, True), (989, False), (1009, True), (1011, False)])
def test_what_is_promised_about_peaks(predicted: int, holds: bool) -> None:
    accuracy = load("accuracy_page")
    assert accuracy.peaks_hold([row(1000, predicted)]) is holds
    assert accuracy.peaks_hold([row(1000, 1000), row(1000, 1000), row(1000, 1029)])
    assert not accuracy.peaks_hold([row(1000, 1000), row(1000, 1000), row(1000, 1031)])


def test_misses_stay_in_the_table() -> None:
    page = load("accuracy_page").page("T", "I", {}, [row(MIB, 2 * MIB), row(MIB, MIB, 1.3), row(MIB, MIB)])
    lines = [line for line in page.splitlines() if line.startswith("| tiny lora float32 1x1 |")]
    assert [line.rsplit("|", 2)[1].strip() for line in lines] == ["missed: peak", "missed: time", ""]
    assert "| peak, worst absolute error | 100.00% | 3% | missed |" in page
    assert "| step time, worst absolute error | 30.00% | 20% | missed |" in page
    assert "takes 20.0% longer than the fastest in the median over the runs, 20.0% at worst." in page


def test_times_against_the_fastest_step_and_against_the_plain_one() -> None:
    plan = {**row(MIB, MIB, 1.32), "way": "plan 0%"}
    page = load("accuracy_page").page("T", "I", {}, [row(MIB, MIB, 1.1), plan])
    assert "| against the fastest of the timed steps, not their median | 2 | 34.44% | 46.67% |" in page
    assert "| divided by the plain step's, predicted against measured | 1 | 20.00% | 20.00% |" in page


def test_peaks_never_rise_when_the_budget_falls() -> None:
    budgets = load("ten_budgets")
    model = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    batch = batch_for(model, rows=8, tokens=64)
    planner = Planner(model, batch, cost=Roofline(1e11, 1e10))
    rows = list(budgets.sweep(model, batch, planner, 12))
    assert len({row["measured_peak_bytes"] for row in rows}) > 4, "hardly any budget made a difference"
    assert budgets.broken_promises(rows, slack=SLACK) == []


def test_a_sweep_says_which_promise_is_broken() -> None:
    budgets = load("ten_budgets")

    def at(budget: int, predicted: int, measured: int, seconds: float) -> dict[str, Any]:
        names = ("budget_bytes", "predicted_peak_bytes", "measured_peak_bytes", "predicted_step_seconds")
        return dict(zip(names, (budget, predicted, measured, seconds), strict=True))

    good = [at(100 * MIB, 100 * MIB, 99 * MIB, 2.0), at(200 * MIB, 150 * MIB, 150 * MIB, 1.0)]
    assert budgets.broken_promises(good) == []
    bad = [at(100 * MIB, 100 * MIB, 101 * MIB, 1.0), at(200 * MIB, 90 * MIB, 100 * MIB, 1.5)]
    assert budgets.broken_promises(bad) == [
        "budget 100.0 MiB: the measured peak is above the budget",
        "budget 200.0 MiB: the predicted peak is off by more than 3 %",
        "budget 200.0 MiB: a smaller budget is predicted to be faster",
        "budget 200.0 MiB: a smaller budget has a larger measured peak",
    ]
