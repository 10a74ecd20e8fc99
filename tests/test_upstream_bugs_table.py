"""The table of upstream's bugs names tests that exist, and leaves no item out."""

import ast
import re
from pathlib import Path

import pytest

NUMBERED = [*(f"B{n}" for n in range(1, 8)), *(f"2.5{letter}" for letter in "abcd"), *(f"4.{n}" for n in range(1, 14))]
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
Row = tuple[str, str, str, str]


@pytest.fixture(scope="module")
def rows(repository: Path) -> list[Row]:
    lines = (repository / "tests" / "upstream_bugs.md").read_text(encoding="ascii").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [(row[0], row[1], row[2], row[3]) for row in cells if row[0] != "item"]


def test_every_item_is_in_the_table_once(rows: list[Row]) -> None:
    items = [row[0] for row in rows]
    assert [item for item in items if item in NUMBERED] == NUMBERED
    assert len(items) == len(set(items))


def test_every_item_has_a_test_or_a_reason(rows: list[Row]) -> None:
    assert [item for item, _, shown, _ in rows if not NAMED.search(shown) and "cannot be shown: " not in shown] == []
    assert [item for item, _, _, ours in rows if not NAMED.search(ours)] == []


def test_every_test_of_the_table_exists(rows: list[Row], repository: Path) -> None:
    named = {match for row in rows for match in NAMED.findall(" ".join(row))}
    assert len(named) > 40
    missing: list[str] = []
    for file, names in {file: {name for f, name in named if f == file} for file, _ in named}.items():
        path = repository / "tests" / file
        tree = ast.parse(path.read_text(encoding="ascii")) if path.exists() else ast.parse("")
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing += [f"{file}::{name}" for name in sorted(names - there)]
    assert missing == []


def test_every_numbered_test_is_in_the_table(rows: list[Row], repository: Path) -> None:
    """A test named after an item belongs to the item's row."""
    text = {item: f"{shown} {ours}" for item, _, shown, ours in rows}
    left: list[str] = []
    for path in sorted((repository / "tests").glob("test_*.py")):
        for name in re.findall(r"^def (test_(?:b\d|2_5|4_\d+)_\w+)", path.read_text(encoding="ascii"), re.MULTILINE):
            number = re.match(r"test_(b\d|2_5|4_\d+)", name)
            assert number is not None
            item = number[1].replace("_", ".").upper()
            listed = " ".join(cell for key, cell in text.items() if key.rstrip("abcd") == item)
            if f"`{path.name}::{name}`" not in listed:
                left.append(f"{path.name}::{name}")
    assert left == []
