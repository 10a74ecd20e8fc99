"""Tables: equal lines become one, and nothing is lost in it."""

import itertools
import re
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematree.table import common_prefix, fold_numbers, fold_paths, fold_rows, render_table


@dataclass(frozen=True)
class Row:
    path: str
    option: str
    saved_bytes: int = 0
    extra_seconds: float = 0.0


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        (range(12), "0-11"),
        ([0, 4, 8], "0,4,8"),
        ([0, 1, 2, 3, 5], "0-3,5"),
        (range(5, 60, 6), "5-59 step 6"),
        (sorted(set(range(62)) - set(range(5, 62, 6))), "0-61 except 5-59 step 6"),
        ([1, 3, 6, 10, 15], "1,3,6,10,15"),
    ],
)
def test_numbers_fold(numbers: list[int], text: str) -> None:
    assert fold_numbers(numbers) == text


def unfold_numbers(text: str) -> set[int]:
    whole, _, exceptions = text.partition(" except ")
    if exceptions:
        return unfold_numbers(whole) - unfold_numbers(exceptions)
    found: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?: step (\d+))?", piece)
        assert match is not None, piece
        first, last, step = match.groups()
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


@given(st.sets(st.integers(0, 40), min_size=1))
def test_no_number_is_lost_or_added(numbers: set[int]) -> None:
    assert unfold_numbers(fold_numbers(numbers)) == numbers


@given(st.integers(0, 5), st.integers(1, 9), st.integers(3, 30))
def test_no_number_of_a_regular_pattern_is_lost_or_added(start: int, step: int, count: int) -> None:
    some = set(range(start, start + step * count, step))
    assert unfold_numbers(fold_numbers(some)) == some
    rest = set(range(start + step * count)) - some
    if rest:
        assert unfold_numbers(fold_numbers(rest)) == rest


@pytest.mark.parametrize(
    ("paths", "folded"),
    [
        ([f"model.layers.{i}.mlp" for i in range(12)], ["model.layers.{0-11}.mlp"]),
        (["embed", "layers.0", "layers.1", "norm"], ["embed", "layers.{0-1}", "norm"]),
        ([f"layers.{i}.experts.{j}.up" for i in range(3) for j in range(4)], ["layers.{0-2}.experts.{0-3}.up"]),
        (["layers.0.experts.1", "layers.1.experts.0"], ["layers.0.experts.1", "layers.1.experts.0"]),
        (["0", "1", "2"], ["{0-2}"]),
        (["a.0", "a.0"], ["a.0"]),
        ([""], [""]),
        ([], []),
    ],
)
def test_paths_fold(paths: list[str], folded: list[str]) -> None:
    assert fold_paths(paths) == folded


def unfold_path(path: str) -> set[str]:
    parts = [
        sorted(map(str, unfold_numbers(part[1:-1]))) if part.startswith("{") else [part] for part in path.split(".")
    ]
    return {".".join(choice) for choice in itertools.product(*parts)}


PATHS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.sampled_from("xy"), st.integers(0, 3)).map(
        lambda parts: ".".join(map(str, parts))
    ),
    max_size=30,
)


@given(PATHS)
def test_no_path_is_lost_or_added(paths: list[str]) -> None:
    folded = fold_paths(paths)
    assert set().union(*map(unfold_path, folded)) == set(paths)
    assert sum(len(unfold_path(path)) for path in folded) == len(set(paths))


@pytest.mark.parametrize(
    ("paths", "prefix"),
    [
        (["base_model.model.model.layers.0", "base_model.model.model.layers.1"], "base_model.model.model"),
        (["layers.0", "layers.1"], ""),
        (["model.embed", "model.norm"], ""),
        (["model.body.embed", "model.body.norm"], "model"),
        (["0", "1"], ""),
        (["model.layers.0"], "model"),
        ([], ""),
    ],
)
def test_common_prefix_leaves_a_name(paths: list[str], prefix: str) -> None:
    assert common_prefix(paths) == prefix


def test_alternating_kinds_fold_into_one_line_each() -> None:
    rows = [Row(f"m.layers.{i}", "save all" if i % 6 == 5 else "recompute all", 10, 0.5) for i in range(26)]
    sliding, full = fold_rows(rows, "m")
    assert (sliding.regions, sliding.count) == ("layers.{0-25 except 5-23 step 6}", 22)
    assert (full.regions, full.count) == ("layers.{5,11,17,23}", 4)
    assert (sliding.option, sliding.saved_bytes, sliding.extra_seconds) == ("recompute all", 10, 11.0)


def test_same_decision_with_other_bytes_is_another_line() -> None:
    rows = [Row("layers.0", "save all", 10), Row("layers.1", "save all", 11), Row("layers.2", "save all", 10)]
    assert [row.regions for row in fold_rows(rows)] == ["layers.{0,2}", "layers.1"]


def test_columns_are_aligned_and_long_cells_go_on_below() -> None:
    rows = [["a", "one two three four", "7"], ["bb", "x", "12"]]
    assert render_table(["name", "what", "size"], rows, right=[2], wrap=9).split("\n") == [
        "name  what     size",
        "a     one two     7",
        "        three",
        "        four",
        "bb    x          12",
    ]
