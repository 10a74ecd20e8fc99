"""Tables as plain text: equal lines folded into one, names of repeated layers written once.

Knows nothing of plans or torch, so that a plan can print itself.
"""

import itertools
import textwrap
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

_GAP: Final = "  "
_MAX_PIECES: Final = 4


def fold_numbers(numbers: Iterable[int]) -> str:
    """A set of numbers in few words: "3", "0-11", "0,4,8", "5-59 step 6", "0-61 except 5-59 step 6"."""
    found = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in found:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    pieces = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    if len(pieces) <= _MAX_PIECES:
        return ",".join(pieces)
    progression = _progression(found)
    if progression:
        return progression
    exceptions = _progression(sorted(set(range(found[0], found[-1])) - set(found)))
    return f"{found[0]}-{found[-1]} except {exceptions}" if exceptions else ",".join(pieces)


def _progression(numbers: Sequence[int]) -> str:
    """An arithmetic progression of three or more numbers as "a-b step s"; anything else as ""."""
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    if len(numbers) < 3 or len(steps) != 1:
        return ""
    return f"{numbers[0]}-{numbers[-1]} step {steps.pop()}"


def fold_paths(paths: Iterable[str]) -> list[str]:
    """Module paths with those that differ in one number written as one: "model.layers.{0-11}.mlp".

    Paths that differ in several numbers fold as far as they are a full grid. Order is that of first appearance.
    """
    folded = list(dict.fromkeys(paths))
    depth = max((path.count(".") + 1 for path in folded), default=0)
    # From the innermost number outwards: experts fold inside each layer, then layers with equal experts.
    for position in reversed(range(depth)):
        groups: dict[tuple[str, str], list[int]] = {}
        for path in folded:
            parts = path.split(".")
            part = parts[position] if position < len(parts) else ""
            if part.isdecimal():
                key = ("".join(p + "." for p in parts[:position]), "".join("." + p for p in parts[position + 1 :]))
                groups.setdefault(key, []).append(int(part))
            else:
                groups.setdefault((path, ""), [])
        folded = [
            (f"{before}{numbers[0]}{after}" if len(numbers) == 1 else f"{before}{{{fold_numbers(numbers)}}}{after}")
            if numbers
            else before
            for (before, after), numbers in groups.items()
        ]
    return folded


def common_prefix(paths: Sequence[str]) -> str:
    """The enclosing path that all of `paths` share, but for its last name: "base_model.model.model" of its layers.

    Cut off in a table and said once above it. A single name stays, so that "layers.{0-11}" does.
    """
    shared: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1 or parts[0].isdecimal():
            break
        shared.append(parts[0])
    return ".".join(shared[:-1])


class Row(Protocol):
    """One region of a plan's prediction."""

    @property
    def path(self) -> str:
        """Module path."""
        ...

    @property
    def option(self) -> str:
        """What is decided for it."""
        ...

    @property
    def saved_bytes(self) -> int:
        """What it keeps."""
        ...

    @property
    def extra_seconds(self) -> float:
        """What it adds to the step."""
        ...


@dataclass(frozen=True, slots=True)
class FoldedRow:
    """Regions with the same decision that keep the same bytes.

    Attributes:
        regions: Their paths, folded.
        count: How many they are.
        option: What is decided for each.
        saved_bytes: What each keeps.
        extra_seconds: What all of them together add to the step.
    """

    regions: str
    count: int
    option: str
    saved_bytes: int
    extra_seconds: float


def fold_rows(rows: Sequence[Row], prefix: str = "") -> list[FoldedRow]:
    """Fold `rows`, which need not be next to each other: models alternate kinds of layers.

    Args:
        rows: One a region.
        prefix: Enclosing path to leave out.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.option, row.saved_bytes), []).append(row)
    cut = len(prefix) + 1 if prefix else 0
    return [
        FoldedRow(
            ", ".join(fold_paths([row.path[cut:] for row in members])),
            len(members),
            members[0].option,
            members[0].saved_bytes,
            sum(row.extra_seconds for row in members),
        )
        for members in groups.values()
    ]


def render_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = (), wrap: int = 0
) -> str:
    """Columns aligned with spaces.

    Args:
        headers: One a column.
        rows: Cells; as many a row as there are headers.
        right: Columns that are aligned to the right.
        wrap: Cells longer than this continue on the next line, at a space; 0 never.
    """
    lines: list[list[str]] = []
    for row in [headers, *rows]:
        cells = [_wrap(cell, wrap) for cell in row]
        lines += [[cell[i] if i < len(cell) else "" for cell in cells] for i in range(max(map(len, cells)))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        _GAP.join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _wrap(cell: str, width: int) -> list[str]:
    if not width or len(cell) <= width:
        return [cell]
    return textwrap.wrap(
        cell, width, subsequent_indent=_GAP, break_on_hyphens=False, break_long_words=False, drop_whitespace=True
    )
