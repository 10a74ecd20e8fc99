"""The chain solver against every choice there is, and the block frontier against its own definition."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematree.solve import block as block_module
from rematree.solve.block import BlockOption, enumerate_options, evaluate
from rematree.solve.chain import (
    ChainChoice,
    ChainProblem,
    HeadOption,
    StageOption,
    in_runs,
    least_peak,
    position_peak,
    solve_chain,
)
from rematree.solve.exhaustive import solve_exhaustively
from rematree.trace import BlockTrace, TraceOp, TraceSave

_small = st.integers(0, 20)
_option = st.builds(
    lambda kept, forward, backward, seconds: StageOption(kept, kept + forward, backward, float(seconds)),
    _small,
    _small,
    st.integers(0, 40),
    _small,
)
_head = st.builds(lambda peak, seconds: HeadOption(peak, float(seconds)), st.integers(0, 40), _small)


@st.composite
def problems(draw: st.DrawFn) -> ChainProblem:
    stages = draw(st.lists(st.lists(_option, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4))
    gradients = draw(st.lists(st.integers(0, 5), min_size=len(stages), max_size=len(stages)))
    heads = draw(st.lists(_head, min_size=1, max_size=3))
    return ChainProblem(draw(st.integers(0, 10)), tuple(stages), tuple(gradients), tuple(heads))


@given(problems(), st.integers(0, 160))
def test_dynamic_program_is_optimal(problem: ChainProblem, limit: int) -> None:
    """With a quantum of one byte nothing is rounded, so it must find what trying everything finds."""
    found, best = solve_chain(problem, limit, 1), solve_exhaustively(problem, limit)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert found.seconds == best.seconds
        assert position_peak(problem, found.blocks, found.head) <= limit


@given(problems(), st.integers(1, 4), st.integers(0, 400))
def test_blocks_that_are_alike_trade_options_within_the_limit(problem: ChainProblem, times: int, limit: int) -> None:
    chain = replace(problem, stages=problem.stages * times, gradients=problem.gradients * times)
    found = solve_chain(chain, limit, 1)
    if found is None:
        return
    ordered = in_runs(chain, found, limit)
    assert ordered.seconds == found.seconds
    assert ordered.head == found.head
    assert position_peak(chain, ordered.blocks, ordered.head) <= limit
    for kind in set(zip(chain.stages, chain.gradients, strict=True)):
        places = [i for i, of in enumerate(zip(chain.stages, chain.gradients, strict=True)) if of == kind]
        assert sorted(ordered.blocks[i] for i in places) == sorted(found.blocks[i] for i in places)
        if ordered != found:
            kept = [kind[0][ordered.blocks[i]].kept for i in places]
            assert kept == sorted(kept)


def test_options_stand_in_runs_where_that_fits() -> None:
    small, large = StageOption(1, 1, 1, 2.0), StageOption(3, 3, 3, 0.0)
    chain = ChainProblem(0, ((small, large),) * 4, (0,) * 4, (HeadOption(0, 0.0),))
    mixed = ChainChoice((1, 0, 1, 0), 0, 4.0)
    assert in_runs(chain, mixed, 8) == replace(mixed, blocks=(0, 0, 1, 1))
    # What keeps more also needs more while it runs: at the end of the chain that is one byte too many.
    greedy = replace(chain, stages=((small, StageOption(3, 6, 6, 0.0)),) * 4)
    assert in_runs(greedy, mixed, 10) == mixed
    assert in_runs(greedy, mixed, 11) == replace(mixed, blocks=(0, 0, 1, 1))
    grouped = replace(mixed, groups=((1, 3),))
    assert in_runs(chain, grouped, 8) == grouped


@given(problems(), st.integers(0, 160), st.integers(1, 7))
def test_rounding_never_breaks_the_limit(problem: ChainProblem, limit: int, quantum: int) -> None:
    found = solve_chain(problem, limit, quantum)
    if found is not None:
        assert position_peak(problem, found.blocks, found.head) <= limit


@given(problems(), st.integers(1, 7))
def test_seconds_never_fall_when_the_limit_shrinks(problem: ChainProblem, quantum: int) -> None:
    seconds = [c.seconds if (c := solve_chain(problem, limit, quantum)) else float("inf") for limit in range(0, 160, 3)]
    assert seconds == sorted(seconds, reverse=True)


@given(problems())
def test_least_peak_is_the_smallest_feasible_limit(problem: ChainProblem) -> None:
    least = least_peak(problem, 1)
    assert solve_chain(problem, least, 1) is not None
    assert solve_exhaustively(problem, least - 1) is None


def block() -> BlockTrace:
    """x -> norm -> a (keeps norm's output) -> act (keeps a's output) -> b (keeps act's output) -> out."""
    ops = (
        TraceOp("norm", frozenset({1}), frozenset({2}), 1.0),
        TraceOp("a", frozenset({2}), frozenset({3}), 10.0),
        TraceOp("act", frozenset({3}), frozenset({4}), 2.0),
        TraceOp("b", frozenset({4}), frozenset({5}), 10.0),
    )
    saves = (TraceSave(1, "a", 2), TraceSave(2, "act", 3), TraceSave(3, "b", 4))
    return BlockTrace(ops, saves, {2: 100, 3: 100, 4: 100, 5: 100}, ("norm", "a", "act", "b"), {})


def test_nothing_saved_reruns_up_to_the_last_saved_tensor() -> None:
    option = evaluate(block(), ())
    assert (option.kept_bytes, option.rerun_seconds) == (0, 13.0)


def test_a_saved_region_keeps_its_tensors_and_the_output_the_rerun_reads() -> None:
    option = evaluate(block(), ("a",))
    assert option.stashed == {"a"}
    assert (option.kept_bytes, option.rerun_seconds) == (200, 3.0)


def test_an_output_nobody_reads_costs_nothing() -> None:
    assert evaluate(block(), ("b",)) == evaluate(block(), ("b",))
    assert evaluate(block(), ("b",)).stashed == frozenset()


def test_a_packed_output_counts_packed() -> None:
    trace = block()
    packed = BlockTrace(trace.ops, trace.saves, trace.sizes, trace.regions, {"a": 4})
    assert evaluate(packed, ("a",)).kept_bytes == 104


def test_frontier_is_sorted_and_ends_with_saving_everything() -> None:
    options = enumerate_options(block(), 12)
    assert options[0].kept_bytes == 0
    assert options[-1].saves_all
    pairs = [(o.kept_bytes, o.rerun_seconds) for o in options]
    assert pairs == sorted(pairs, key=lambda p: (p[0], -p[1]))


def layers_in_a_block(count: int, inside: int) -> BlockTrace:
    """`count` layers one after the other, each of `inside` linear layers, each of which keeps its input."""
    ops: list[TraceOp] = []
    saves: list[TraceSave] = []
    regions: list[str] = []
    for number in range(count * inside):
        layer = f"layers.{number // inside}"
        path = f"{layer}.linear{number % inside}"
        regions += [layer, path] if number % inside == 0 else [path]
        saves.append(TraceSave(len(ops), path, number + 1))
        ops.append(TraceOp(path, frozenset({number + 1}), frozenset({number + 2}), 1.0 + number % 3))
    sizes = dict.fromkeys(range(2, count * inside + 2), 100)
    return BlockTrace(tuple(ops), tuple(saves), sizes, tuple(regions), {})


def test_of_a_block_with_many_layers_the_outermost_regions_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of Funnel, a level of HRM: 400 regions would take minutes, squared and times 1,300 ops."""
    small, large = layers_in_a_block(3, 4), layers_in_a_block(24, 40)
    saved = {region for option in enumerate_options(small, 12) for region in option.saved}
    assert any(region.count(".") == 2 for region in saved), "or all of them are outermost"
    evaluated: list[BlockOption] = []
    own = block_module.evaluate

    def spy(*args: Any) -> BlockOption:
        evaluated.append(own(*args))
        return evaluated[-1]

    monkeypatch.setattr(block_module, "evaluate", spy)
    options = enumerate_options(large, 12)
    assert len(evaluated) * len(large.ops) < 48 * block_module._MOST_WORK
    assert {f"layers.{number}" for number in range(24)} <= {r for option in evaluated for r in option.saved}
    assert options[0].kept_bytes == 0
    assert options[-1].saves_all
    assert len(options) == 12
