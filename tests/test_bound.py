"""The lower bound: below everything there is, close to what the solver finds, and certified whatever the LP returns."""

import dataclasses
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain_problems import alike, layers, one_long_row, problems
from rematree.solve import bound, labels
from rematree.solve.bound import certify, tightened
from rematree.solve.chain import ChainProblem, least_peak, solve_chain
from rematree.solve.exhaustive import solve_exhaustively
from rematree.solve.groups import choice_peak
from rematree.solve.nested import least_grouped_peak, quantum_for, solve_groups
from rematree.solve.relaxation import Prices
from rematree.units import KIB


@settings(max_examples=80, deadline=None)
@given(st.one_of(problems(), alike()), st.integers(0, 90), st.integers(1, 5))
def test_no_choice_is_below_it(problem: ChainProblem, limit: int, quantum: int) -> None:
    best = solve_exhaustively(problem, limit)
    found = certify(problem, limit, quantum).seconds
    if best is not None:
        assert found <= best.seconds
        assert tightened(problem, limit, found, best.seconds) <= best.seconds


@settings(max_examples=40, deadline=None)
@given(alike(), st.integers(0, 90), st.lists(st.floats(0, 3), min_size=13, max_size=13))
def test_any_multipliers_give_a_bound(problem: ChainProblem, limit: int, prices: list[float]) -> None:
    """HiGHS may be as wrong as it likes: the certificate does not trust it."""
    best = solve_exhaustively(problem, limit)
    count = len(problem.stages)
    wrong = Prices(np.array(prices[:count]), np.array(prices[6 : 6 + count]), prices[12])
    with mock.patch.object(bound, "relaxation", return_value=(0.0, wrong, np.zeros(count + 1))):
        found = certify(problem, limit, 1).seconds
    if best is not None:
        assert found <= best.seconds


def test_plenty_of_memory_costs_nothing() -> None:
    problem = layers(12)
    assert certify(problem, 10**6, 1).seconds == pytest.approx(5.0, abs=1e-9)
    assert certify(problem, 10**6, 1).seconds <= 5.0


@pytest.mark.parametrize("grouped", [False, True])
def test_the_plan_is_within_two_percent_of_the_step(grouped: bool) -> None:
    """D5 on a model-like chain: 24 blocks, 20 limits from the least to plenty."""
    problem = layers(24)
    if not grouped:
        problem = dataclasses.replace(problem, advances=())
    step = 24 * 3.0 + 5.0  # a forward of one second and a backward of two
    least = least_peak(dataclasses.replace(problem, advances=()), 1)
    for limit in np.linspace(least, 100 + 24 * 31 + 70, 20).astype(int):
        choice = solve_groups(problem, int(limit), 1)
        assert choice is not None
        gap = choice.seconds - certify(problem, int(limit), 1).seconds
        assert 0 <= gap <= 0.02 * step, (limit, gap / step)


def test_eighty_layers_take_less_than_two_seconds() -> None:
    """Of processor time, dynamic program and bound together, for a limit in the middle and one near the least."""
    problem = layers(80)
    options = problem.stages[0]
    more = tuple(dataclasses.replace(options[1], kept=2 + 2 * i, seconds=0.8 * 0.9**i) for i in range(13))
    problem = dataclasses.replace(problem, stages=((options[0], *more, options[2]),) * 80)
    for limit in (210, 1200):
        begin = time.process_time()
        choice = solve_groups(problem, limit, quantum_for(problem, limit))
        assert choice is not None
        assert choice_peak(problem, choice) <= limit
        assert certify(problem, limit, 1).seconds <= choice.seconds
        assert time.process_time() - begin < 2.0


def test_without_groups_it_bounds_the_chain_only() -> None:
    problem = layers(16)
    bare = dataclasses.replace(problem, advances=())
    limit = 190
    chain = solve_chain(bare, limit, 1)
    assert chain is not None
    assert certify(problem, limit, 1).seconds <= certify(bare, limit, 1).seconds <= chain.seconds


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 90), st.integers(1, 9))
def test_it_finds_the_fastest_choice_to_the_byte(problem: ChainProblem, limit: int, quantum: int) -> None:
    """However coarse the dynamic program is that it begins with; without groups there is nothing left between."""
    bare = dataclasses.replace(problem, advances=())
    begun = solve_chain(bare, limit, quantum)
    best = solve_exhaustively(bare, limit)
    found = certify(bare, limit, quantum)
    if begun is None or best is None:
        return
    assert found.seconds == pytest.approx(best.seconds, rel=1e-4, abs=1e-9)
    assert found.seconds <= best.seconds
    if found.choice is None:
        assert begun.seconds <= best.seconds + 1e-4 * abs(best.seconds)
    else:
        assert found.choice.seconds == best.seconds < begun.seconds
        assert choice_peak(bare, found.choice) <= limit


@settings(max_examples=30, deadline=None)
@given(problems(), st.integers(0, 90), st.lists(st.floats(0, 3), min_size=13, max_size=13))
def test_wrong_prices_lose_no_label(problem: ChainProblem, limit: int, prices: list[float]) -> None:
    """Prices say which labels are left; the fastest choice is among them whatever the prices are."""
    bare = dataclasses.replace(problem, advances=())
    best, begun = solve_exhaustively(bare, limit), solve_chain(bare, limit, 9)
    count = len(bare.stages)
    wrong = Prices(np.array(prices[:count]), np.array(prices[6 : 6 + count]), prices[12])
    with mock.patch.object(bound, "relaxation", return_value=(0.0, wrong, np.zeros(count + 1))):
        found = certify(bare, limit, 9)
    if best is not None and begun is not None and best.seconds < begun.seconds * (1 - 1e-4):
        assert found.choice is not None
        assert found.choice.seconds == best.seconds


def test_at_the_smallest_peak_it_is_what_the_solver_finds() -> None:
    """Where all depends on groups: there is no room that no limit applies to, not even in the tables' last state."""
    for count in (12, 24):
        problem = layers(count, kept=60, boundary=4)
        least = least_grouped_peak(problem, 1, least_peak(problem, 1))
        for limit in (least, least + 5):
            choice = solve_groups(problem, limit, 1)
            assert choice is not None
            assert choice.groups
            thousandfold = _times(problem, 1000)  # not a whole number of quanta above the base
            assert certify(thousandfold, 1000 * limit + 7, 1).seconds == pytest.approx(choice.seconds, rel=1e-9)


def test_at_the_smallest_peak_finer_quanta_close_the_bound() -> None:
    problem = one_long_row()
    least = least_grouped_peak(problem, KIB, least_peak(problem, KIB))
    for limit in (least, least + 60_000):
        choice = solve_groups(problem, limit, quantum_for(problem, limit) // 4)
        assert choice is not None
        assert choice.groups
        found = certify(problem, limit, KIB, choice.seconds).seconds
        assert found < choice.seconds * 0.97
        assert tightened(problem, limit, found, choice.seconds) == pytest.approx(choice.seconds, rel=1e-9)


def _times(problem: ChainProblem, factor: int) -> ChainProblem:
    """`problem` with all bytes multiplied."""

    def each(what: Any) -> Any:
        sizes = {f.name: getattr(what, f.name) for f in dataclasses.fields(what)}
        changed = {name: factor * size for name, size in sizes.items() if type(size) is int}
        return dataclasses.replace(what, **changed)

    return ChainProblem(
        factor * problem.base,
        tuple(tuple(map(each, stage)) for stage in problem.stages),
        tuple(factor * gradient for gradient in problem.gradients),
        tuple(map(each, problem.heads)),
        tuple(map(each, problem.advances)),
    )


@settings(max_examples=20, deadline=None)
@given(alike(), st.integers(0, 90))
def test_too_many_labels_leave_the_bound(problem: ChainProblem, limit: int) -> None:
    best = solve_exhaustively(problem, limit)
    with mock.patch.object(labels, "_MOST", 0):
        found = certify(problem, limit, 9)
    if best is not None:
        assert found.choice is None
        assert found.seconds <= best.seconds
