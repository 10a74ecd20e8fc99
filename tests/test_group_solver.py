"""The solver of groups: published operation counts as exact integers, and every choice there is as the oracle."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain_problems import alike, layers, problems
from rematree.solve.chain import Advance, ChainProblem, HeadOption, StageOption, solve_chain
from rematree.solve.exhaustive import nested_groups, solve_exhaustively
from rematree.solve.groups import choice_peak, grouped_step, square_root_groups, treeverse_advances
from rematree.solve.nested import least_grouped_peak, quantum_for, solve_groups
from rematree.solve.tables import Tables


@settings(max_examples=200, deadline=None)
@given(st.one_of(problems(), alike()), st.integers(0, 90))
def test_groups_are_optimal(problem: ChainProblem, limit: int) -> None:
    """With a quantum of one byte nothing is rounded, so it must find what trying everything finds."""
    found, best = solve_groups(problem, limit, 1), solve_exhaustively(problem, limit)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.seconds == best.seconds
        peak, seconds = grouped_step(problem, found.blocks, found.head, found.groups)
        assert peak <= limit
        assert seconds == found.seconds


@settings(max_examples=200, deadline=None)
@given(st.one_of(problems(), alike()), st.integers(0, 90), st.integers(2, 7))
def test_a_coarse_quantum_is_safe_and_never_better(problem: ChainProblem, limit: int, quantum: int) -> None:
    found, best = solve_groups(problem, limit, quantum), solve_exhaustively(problem, limit)
    if found is None:
        return
    assert best is not None
    assert found.seconds >= best.seconds
    assert choice_peak(problem, found) <= limit
    generous = solve_groups(problem, limit + 2 * quantum * len(problem.stages), quantum)
    assert generous is not None
    assert generous.seconds <= best.seconds  # no more is lost than one quantum for each thing that is rounded


@settings(max_examples=100, deadline=None)
@given(alike(), st.integers(1, 5))
def test_optimistic_tables_are_never_above(problem: ChainProblem, quantum: int) -> None:
    count = len(problem.stages)
    exact = Tables(problem, 1, 100).group(0, count).seconds
    loose = Tables(problem, quantum, 100 // quantum + 2, optimistic=True).group(0, count).seconds
    for available, seconds in enumerate(exact[:-1]):
        assert loose[-(-available // quantum)] <= seconds


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 90))
def test_without_advances_it_is_the_chain_solver(problem: ChainProblem, limit: int) -> None:
    bare = ChainProblem(problem.base, problem.stages, problem.gradients, problem.heads)
    assert solve_groups(bare, limit, 1) == solve_chain(bare, limit, 1) or (
        solve_groups(bare, limit, 1).seconds == solve_chain(bare, limit, 1).seconds  # pyright: ignore[reportOptionalMemberAccess]
    )


def test_the_least_peak_is_the_smallest_feasible_limit() -> None:
    problem = revolve_problem(20)
    least = least_grouped_peak(problem, 1, 100)
    assert solve_groups(problem, least, 1) is not None
    assert solve_groups(problem, least - 1, 1) is None


# -- published counts -------------------------------------------------------------------------------------------------


def revolve_problem(steps: int) -> ChainProblem:
    """A chain as Revolve has it: a state takes one byte, everything else takes nothing.

    Revolve counts the states it has put aside, the first one included, and not the one it computes on. Here the first
    one is `base`, and the input of the block whose backward runs counts: so `slots` of Revolve are a limit of `slots`.
    The state at the end of the chain counts for neither.
    """
    kept = [1] * (steps - 1) + [0]
    stages = tuple((StageOption(kept=slots, forward=0, backward=0, seconds=1.0),) for slots in kept)
    advances = tuple(Advance(output=slots, forward=-1, gradient=0, seconds=1.0) for slots in kept)
    return ChainProblem(0, stages, (0,) * steps, (HeadOption(0, 0.0),), advances)


# Griewank and Walther 2000: t(l, s) for s slots. Spot values from r * l - C(s + r, s + 1), worked out by hand:
# 10 steps with 3 slots: r = 2 (C(5, 3) = 10), 20 - C(5, 4) = 15.
@pytest.mark.parametrize(
    ("steps", "slots", "advances"),
    [(1, 1, 0), (2, 1, 1), (5, 1, 10), (10, 1, 45), (3, 2, 2), (6, 2, 8), (10, 2, 20), (10, 3, 15), (20, 3, 45),
     (56, 3, 210), (10, 9, 9), (84, 6, 216), (100, 5, 316), (100, 10, 222)],
)  # fmt: skip
def test_published_operation_counts(steps: int, slots: int, advances: int) -> None:
    assert treeverse_advances(steps, slots) == advances


@pytest.mark.parametrize("slots", range(1, 8))
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 21, 35])
def test_the_program_reproduces_treeverse(steps: int, slots: int) -> None:
    """Seconds are forward steps beyond the first pass, the one before each backward included.

    Revolve's count has the first pass, but for its last step, and not the steps before a backward: between forward and
    backward of our last block there is a head. So seconds = advances - (steps - 1) + steps.
    """
    found = solve_groups(revolve_problem(steps), slots, 1)
    assert found is not None
    assert found.seconds == treeverse_advances(steps, slots) + 1


def test_one_slot_for_every_step_recomputes_each_step_once() -> None:
    found = solve_groups(revolve_problem(12), 11, 1)
    assert found is not None
    assert (found.seconds, found.groups) == (12.0, ())


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_treeverse_is_what_trying_everything_finds(steps: int, slots: int) -> None:
    best = solve_exhaustively(revolve_problem(steps), slots)
    assert best is not None
    assert best.seconds == treeverse_advances(steps, slots) + 1


def test_little_schroeder_numbers() -> None:
    """Nestings of runs of n blocks, the whole allowed: twice the little Schroeder numbers 1, 3, 11, 45, 197."""
    assert [sum(1 for _ in nested_groups(0, count)) for count in (2, 3, 4, 5, 6)] == [2, 6, 22, 90, 394]


# -- square root ------------------------------------------------------------------------------------------------------


def test_square_root_segments() -> None:
    assert square_root_groups(9) == ((0, 3), (3, 6), (6, 9))
    assert square_root_groups(2) == ((0, 2),)
    ends = square_root_groups(80)
    assert len(ends) == 8
    assert (ends[0][0], ends[-1][1]) == (0, 80)


@pytest.mark.parametrize("count", [9, 16, 30])
def test_the_program_is_not_behind_square_root_segments(count: int) -> None:
    problem = layers(count)
    groups = square_root_groups(count)
    for option in (0, 2):
        peak, seconds = grouped_step(problem, [option] * count, 0, groups)
        found = solve_groups(problem, peak, 1)
        assert found is not None
        assert found.seconds <= seconds


def test_square_root_segments_need_less_than_one_input_a_block() -> None:
    problem = layers(64)
    per_block, _ = grouped_step(problem, [0] * 64, 1, ())
    segments, _ = grouped_step(problem, [0] * 64, 1, square_root_groups(64))
    least = least_grouped_peak(problem, 1, per_block)
    assert least < segments < per_block
    assert solve_chain(problem, segments, 1) is None


def test_groups_are_no_slower_where_both_reach() -> None:
    problem = layers(24)
    for limit in range(160, 600, 40):
        with_groups, without = solve_groups(problem, limit, 1), solve_chain(problem, limit, 1)
        assert with_groups is not None
        if without is not None:
            assert with_groups.seconds <= without.seconds + 1e-9


def test_eighty_layers_of_sixteen_options_take_less_than_two_seconds() -> None:
    mib = 2**20
    options = tuple(
        StageOption((16 + 20 * i) * mib, (90 + 20 * i) * mib, 400 * mib, 0.05 * (1 - math.sqrt(i / 15)), 0.05 * (i > 0))
        for i in range(16)
    )
    advance = Advance(16 * mib, 90 * mib, 16 * mib, 0.06)
    heads = tuple(HeadOption(size * mib, 0.2 + 1 / size) for size in (4000, 2000, 1000, 500))
    problem = ChainProblem(20000 * mib, (options,) * 80, (mib,) * 80, heads, (advance,) * 80)
    begin = time.process_time()
    for limit in (20900 * mib, 22500 * mib):
        choice = solve_groups(problem, limit, quantum_for(problem, limit))
        assert choice is not None
        assert choice_peak(problem, choice) <= limit
    assert time.process_time() - begin < 4.0
