"""The search for a plan that the referee confirms, with a referee whose errors are known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from chain_problems import layers, one_long_row
from rematree.planning.search import Search
from rematree.solve.chain import ChainChoice, ChainProblem
from rematree.solve.groups import choice_peak
from rematree.solve.nested import quantum_for, solve_groups
from rematree.units import GIB, MIB

PROBLEM = layers(20, kept=30 * MIB, boundary=MIB)
ALL_SAVED = ChainChoice((2,) * 20, 0, 0.0)


def search(slack: Any, problem: ChainProblem = PROBLEM, seconds: float = 100.0) -> Search:
    """Over a step that takes what the solver adds up and `slack` of it, and `seconds` with nothing recomputed."""
    plain = choice_peak(problem, ChainChoice(tuple(len(stage) - 1 for stage in problem.stages), 0, 0.0))

    def run(choice: ChainChoice) -> Any:
        taken = choice_peak(problem, choice)
        return SimpleNamespace(misread=(), peak_bytes=taken, slack_bytes=slack(plain - taken))

    survey: Any = SimpleNamespace(
        problem=problem, plain=SimpleNamespace(peak_bytes=plain, seconds=seconds), levers=lambda choice: choice
    )
    referee: Any = SimpleNamespace(run=run)
    return Search(survey, referee, 0)


@pytest.mark.parametrize("growing", [50, 200, 400])
def test_slack_that_grows_as_memory_is_saved_does_not_end_in_the_smallest_plan(growing: int) -> None:
    """The first `growing` MiB that a plan saves are lost to the allocator, and the budget is missed by one more."""
    within = search(lambda saved: MIB + min(saved, growing * MIB))
    budget = choice_peak(PROBLEM, ALL_SAVED)
    within.around(budget)
    found = within.best_within(budget)
    assert found is not None
    assert found.simulation.peak_bytes >= budget - 2 * (growing + 1) * MIB  # not at 22 MiB, where everything is rerun


@pytest.mark.parametrize("points", [1, 2, 5])
def test_a_frontier_has_at_most_the_points_asked_for(points: int) -> None:
    within = search(lambda saved: MIB)
    within.around(choice_peak(PROBLEM, ALL_SAVED) // 2)  # confirmed for another question, and on the frontier too
    found = within.frontier(points)
    assert len(found) <= points
    assert found[0].peak_bytes == within.least().peak_bytes


def test_every_point_of_a_frontier_is_a_plan_where_weights_are_most_of_the_peak() -> None:
    """What a plan can save is 0.6 of 10.6 GiB, and only limits there differ in what the solver chooses."""
    found = search(lambda saved: MIB, dataclasses.replace(PROBLEM, base=10 * GIB)).frontier(12)
    assert len({entry.choice for entry in found}) == 12
    assert found[-1].choice.blocks == ALL_SAVED.blocks


def test_a_frontier_where_slack_grows_as_memory_is_saved() -> None:
    """Then the smallest peak is not at the smallest limit; the least of all that were confirmed comes first."""
    within = search(lambda saved: max(0, saved - 400 * MIB) * 2)
    found = within.frontier(5)
    assert found[0].peak_bytes == min(entry.peak_bytes for entry in within._confirmed.values())
    assert found[0].choice != within._at(within._least_limit).choice  # pyright: ignore[reportOptionalMemberAccess]


def test_near_the_smallest_peak_quanta_are_finer() -> None:
    """Of some budgets there a coarse quantum would lose a forward or five, and no bound would show it."""
    problem, lost = one_long_row(), 0
    for limit in range(418_611_188, 420_500_000, 150_000):
        best, coarse = (solve_groups(problem, limit, quantum_for(problem, limit) // parts) for parts in (48, 1))
        within = search(lambda saved: 0, problem)
        within.around(limit)
        found = within.best_within(limit)
        assert found is not None
        assert best is not None
        assert found.choice.seconds <= best.seconds * 1.04
        assert within.bound(found, limit) == pytest.approx(best.seconds, rel=1e-6)
        lost += coarse is None or coarse.seconds > found.choice.seconds
    assert lost > 2


def test_the_smallest_peak_is_that_of_a_step_somebody_would_wait_for() -> None:
    """The last 2.5 of 134 MiB would make the step half as long again, and its simulation as well."""
    problem, plain = one_long_row(), 5.0
    within = search(lambda saved: 0, problem, plain)
    least = within.least()
    patient = search(lambda saved: 0, problem).least()
    assert patient.choice.seconds > 3 * plain
    assert plain < least.choice.seconds <= 3 * plain
    assert patient.peak_bytes < least.peak_bytes < 1.02 * patient.peak_bytes
    within.around(patient.peak_bytes)
    assert all(entry.choice.seconds <= 3 * plain for entry in within._confirmed.values())
    assert within.best_within(patient.peak_bytes) is None
