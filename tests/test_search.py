"""The search for a plan that the referee confirms, with a referee whose errors are known."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from chain_problems import layers
from rematree.planning.search import Search
from rematree.solve.chain import ChainChoice, ChainProblem
from rematree.solve.groups import choice_peak
from rematree.units import GIB, MIB

PROBLEM = layers(20, kept=30 * MIB, boundary=MIB)
ALL_SAVED = ChainChoice((2,) * 20, 0, 0.0)


def search(slack: Any, problem: ChainProblem = PROBLEM) -> Search:
    """Over a step of 20 blocks that takes what the solver adds up and `slack` of it."""
    plain = choice_peak(problem, ALL_SAVED)

    def run(choice: ChainChoice) -> Any:
        taken = choice_peak(problem, choice)
        return SimpleNamespace(misread=(), peak_bytes=taken, slack_bytes=slack(plain - taken))

    survey: Any = SimpleNamespace(
        problem=problem, plain=SimpleNamespace(peak_bytes=plain, seconds=100.0), levers=lambda choice: choice
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
