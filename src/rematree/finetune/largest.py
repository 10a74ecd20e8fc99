"""The largest value that fits, or the first thing, found with few probes.

The smallest peak grows nearly in proportion to what is looked for, so the next value to try is read off the nearest
two; the answer is not believed until it was tried itself and the next value was refused.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final

_FARTHEST: Final = 4  # times the greatest value that fits


@dataclass(frozen=True, slots=True)
class Probe:
    """One value that was planned.

    Attributes:
        value: Of the setting, or the name of the device.
        least_bytes: Smallest peak that any plan reaches.
        budget_bytes: It must not be above this.
    """

    value: int | str
    least_bytes: int
    budget_bytes: int

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.least_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class Grid:
    """Values that are tried: the least one and the multiples of a step above it, up to the greatest one.

    Attributes:
        least: First value.
        most: Last value, whether a multiple or not.
        step: Between the others.
    """

    least: int
    most: int
    step: int = 1

    def __len__(self) -> int:
        return 1 if self.most <= self.least else 1 + -(-(self.most - self._base) // self.step)

    @property
    def _base(self) -> int:
        return self.least // self.step * self.step

    def __getitem__(self, index: int) -> int:
        return self.least if index == 0 else min(self.most, self._base + index * self.step)

    def index_of(self, value: float) -> int:
        """Index of the last value that is not above `value`, kept within the grid."""
        return min(len(self) - 1, max(0, int((value - self._base) // self.step)))


def find_largest(
    try_value: Callable[[int], Probe], grid: Grid, first: int, about: Callable[[int], Probe] | None = None
) -> tuple[Probe | None, Probe | None]:
    """The largest value of `grid` that fits, and the next one, which does not.

    Args:
        try_value: Plans a value.
        grid: Values to choose from; what fits is taken to be below what does not.
        first: Where to begin.
        about: Says nearly the same in far less time, once `first` was planned; None: nothing does. Only asked where to
            look.
    Returns:
        The probe that fits and the one of the next value. None for the one where not even the first value fits, for
        the other where the last value does.
    Cost:
        Mostly four to six probes, three where `about` is right; at worst some more than twice those of a bisection.
    """
    known: dict[int, Probe] = {}
    fits, refused = -1, len(grid)
    index, halve = grid.index_of(first), False
    likely: list[int] | None = None if about is not None else []
    while refused - fits > 1:
        before = refused - fits
        known[index] = try_value(grid[index])
        if known[index].fits:
            fits = index
        else:
            refused = index
        if likely is None:
            assert about is not None
            found, _ = find_largest(about, grid, first)
            at = -1 if found is None else grid.index_of(int(found.value))
            likely = [at, at + 1, at - 1]
        bounded = refused in known
        halve = bounded and not halve and refused - fits > before // 2
        guessed = grid.index_of(_crossing(known, grid, index))
        if halve:
            guessed = (fits + refused) // 2
        elif not bounded:  # what is far above what fits is slow to plan, and says little
            guessed = min(guessed, grid.index_of(_FARTHEST * grid[fits]))
        unknown = [each for each in likely if fits < each < refused]
        index = unknown[0] if unknown else min(refused - 1, max(fits + 1, guessed))
    return known.get(fits), known.get(refused)


def _crossing(known: dict[int, Probe], grid: Grid, last: int) -> float:
    """The value at which the smallest peak would meet the budget, on the line through the two nearest values."""
    nearest = sorted(known, key=lambda index: abs(known[index].least_bytes - known[index].budget_bytes))[:2]
    value = float(grid[last])
    if len(nearest) > 1:
        one, other = (known[index] for index in nearest)
        rise = (other.least_bytes - one.least_bytes) / (grid[nearest[1]] - grid[nearest[0]])
        if rise > 0:
            return grid[nearest[0]] + (one.budget_bytes - one.least_bytes) / rise
    return value * 2 if known[last].fits else value / 2


def find_first(kinds: Sequence[Hashable], fits: Callable[[int], bool]) -> int | None:
    """Index of the first thing that fits; None if none does.

    Args:
        kinds: Of each thing; of one kind, what fits comes after what does not, while another kind may need more.
        fits: Tries the thing at an index; asked once of each.
    Cost:
        A bisection of the commonest kind, then of what comes before in each of the others.
    """
    best: int | None = None
    for kind in sorted(dict.fromkeys(kinds), key=kinds.count, reverse=True):
        indices = [index for index, other in enumerate(kinds[:best]) if other == kind]
        low, high = -1, len(indices)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(indices[middle]) else (middle, high)
        if high < len(indices):
            best = indices[high]
    return best
