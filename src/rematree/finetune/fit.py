"""The largest value of one setting of a run that still fits, or the smallest device: found with real plans.

Every probe is a whole observation with its smallest confirmed peak. That peak grows nearly in proportion to what is
looked for, so the next value to try is read off the nearest two; the answer is not believed until it was planned itself
and the next value was refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.finetune.config import TrainConfig, flag
from rematree.finetune.synthetic import Shape, synthetic_batch_like
from rematree.finetune.target import Target
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.referee.ranks import Ranks
from rematree.units import format_bytes

FIELDS: Final[dict[str, str]] = {
    "max-length": "max_length",
    "batch-size": "per_device_train_batch_size",
    "lora-r": "lora_r",
}
DEVICE: Final = "device"
QUANTITIES: Final = (*FIELDS, DEVICE)
# Rows are asked for in multiples that kernels like, the rest one by one.
_STEP: Final = {"max-length": 64, "batch-size": 1, "lora-r": 1}
_LEAST: Final = {"max-length": 8, "batch-size": 1, "lora-r": 1}
_MOST_ROWS: Final = 16384
_FARTHEST: Final = 4  # times the greatest value that fits
_UNBOUNDED_LENGTH: Final = 1 << 20


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


@dataclass(frozen=True)
class Fit:
    """The answer.

    Attributes:
        quantity: What was looked for.
        answer: The value that fits.
        refused: The next one, which does not; None where there is none to ask for.
        probes: Everything that was planned, in the order it was.
        plan: For the answer.
        device: It was planned for.
        limit: Why there is no next value; empty if there is one.
        ranks: Over which ranks the step is distributed; all bytes are those of one of them.
    """

    quantity: str
    answer: Probe
    refused: Probe | None
    probes: tuple[Probe, ...]
    plan: Plan
    device: str
    limit: str = ""
    ranks: Ranks | None = None

    def lines(self) -> tuple[str, ...]:
        """The answer in sentences."""
        took = f"{format_bytes(self.answer.least_bytes)} of {format_bytes(self.answer.budget_bytes)}"
        if self.quantity == DEVICE:
            first = f"The smallest device that fits is {self.answer.value}: it takes at least {took}."
        else:
            first = f"The largest --{self.quantity} that fits is {self.answer.value}: it takes at least {took}."
        if self.refused is None:
            second = f"There is no next value: {self.limit}."
        else:
            second = (
                f"{self.refused.value} does not fit: it takes at least {format_bytes(self.refused.least_bytes)} of "
                f"{format_bytes(self.refused.budget_bytes)}."
            )
        third = f"For {self.answer.value}: {self.plan.summary()}."
        return (first, second, third) if self.ranks is None else (first, second, third, f"All of it for {self.ranks}.")

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "find": self.quantity,
            "answer": self.answer.value,
            "refused": None if self.refused is None else self.refused.value,
            "limit": self.limit,
            "device": self.device,
            "ranks": None if self.ranks is None else asdict(self.ranks),
            "budget_bytes": self.answer.budget_bytes,
            "predicted_peak_bytes": self.plan.predicted_peak_bytes,
            "predicted_step_seconds": self.plan.predicted_step_seconds,
            "probes": [{**asdict(probe), "fits": probe.fits} for probe in self.probes],
        }


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


def find_largest(try_value: Callable[[int], Probe], grid: Grid, first: int) -> tuple[Probe, Probe | None]:
    """The largest value of `grid` that fits, and the next one, which does not.

    Args:
        try_value: Plans a value.
        grid: Values to choose from; what fits is taken to be below what does not.
        first: Where to begin.
    Returns:
        The probe that fits and the one of the next value; None for that where the last value fits.
    Raises:
        InfeasibleBudgetError: not even the first value of the grid fits.
    Cost:
        Mostly four to six probes; at worst twice those of a bisection.
    """
    known: dict[int, Probe] = {}
    fits, refused = -1, len(grid)
    index, halve = grid.index_of(first), False
    while refused - fits > 1:
        before = refused - fits
        known[index] = try_value(grid[index])
        if known[index].fits:
            fits = index
        else:
            refused = index
        bounded = refused in known
        halve = bounded and not halve and refused - fits > before // 2
        guessed = grid.index_of(_crossing(known, grid, index))
        if halve:
            guessed = (fits + refused) // 2
        elif not bounded:  # what is far above what fits is slow to plan, and says little
            guessed = min(guessed, grid.index_of(_FARTHEST * grid[fits]))
        index = min(refused - 1, max(fits + 1, guessed))
    if fits < 0:
        raise _nothing_fits(known[0])
    return known[fits], known.get(refused)


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


def _nothing_fits(probe: Probe) -> InfeasibleBudgetError:
    return InfeasibleBudgetError(
        f"nothing fits: at {probe.value} the smallest reachable peak is {format_bytes(probe.least_bytes)}, "
        f"and {format_bytes(probe.budget_bytes)} may be taken",
        budget=probe.budget_bytes,
        min_peak=probe.least_bytes,
    )


def find_setting(
    quantity: str,
    config: TrainConfig,
    target: Target,
    budget: int | None,
    *,
    full: bool = False,
    say: Callable[[str], None],
) -> Fit:
    """The largest value of a setting of `config` that fits.

    Args:
        quantity: "max-length", "batch-size" or "lora-r"; what `config` says of it is where the search begins.
        config: The run.
        target: Where it is to fit.
        budget: Into how many bytes; None takes all that the device has.
        full: All parameters are trained.
        say: Takes a line of progress.
    Raises:
        InfeasibleBudgetError: not even the smallest value fits.
        UsageError: there is no such model or device, or `full` leaves no adapter to have a rank.
    """
    if quantity == "lora-r" and full:
        raise UsageError("--full trains all parameters: there is no adapter whose rank --find lora-r could look for")
    limit_bytes = target.budget(budget)
    field = FIELDS[quantity]
    # The length looked for may be any that the model has positions for; the one in `config` need not be one of them.
    shortest = _LEAST["max-length"] if quantity == "max-length" else config.max_length
    shape = target.shape(replace(config, max_length=shortest), full=full)
    most, limit = _limit(quantity, shape)
    planners: dict[int, Planner] = {}
    probes: list[Probe] = []

    def try_value(value: int) -> Probe:
        changed = replace(config, **{field: value})
        tried = target.shape(changed, full=full) if quantity == "lora-r" else synthetic_batch_like(shape, changed)
        planners.clear()  # only the last is asked for its plan again; each holds a whole model of fake tensors
        planners[value] = target.planner(tried, changed)
        probe = Probe(value, planners[value].min_peak_bytes(), limit_bytes)
        probes.append(probe)
        say(f"{flag(field)} {value}: {format_bytes(probe.least_bytes)}, {'fits' if probe.fits else 'does not fit'}")
        return probe

    grid = Grid(min(_LEAST[quantity], most), most, _STEP[quantity])
    answer, refused = find_largest(try_value, grid, min(most, getattr(config, field)))
    value = int(answer.value)
    if value not in planners:
        changed = replace(config, **{field: value})
        tried = target.shape(changed, full=full) if quantity == "lora-r" else synthetic_batch_like(shape, changed)
        planners[value] = target.planner(tried, changed)
    plan = planners[value].plan(limit_bytes)
    return Fit(quantity, answer, refused, tuple(probes), plan, target.name, "" if refused else limit, target.ranks)


def _limit(quantity: str, shape: Shape) -> tuple[int, str]:
    """The largest value there is, and why."""
    text = shape.model.config.get_text_config()
    if quantity == "max-length":
        positions = getattr(text, "max_position_embeddings", None)
        return (positions, f"the model has {positions} positions") if positions else (_UNBOUNDED_LENGTH, "none tried")
    if quantity == "batch-size":
        return _MOST_ROWS, f"more than {_MOST_ROWS} rows are not tried"
    return text.hidden_size, f"a rank above the hidden size, {text.hidden_size}, is no adapter"


def find_device(
    config: TrainConfig,
    targets: Sequence[Target],
    *,
    full: bool = False,
    say: Callable[[str], None],
) -> Fit:
    """The device with the least memory that `config` fits.

    Args:
        config: The run.
        targets: Devices to choose from.
        full: All parameters are trained.
        say: Takes a line of progress.
    Raises:
        InfeasibleBudgetError: it fits none of them.
    """
    ordered = sorted(targets, key=lambda target: target.budget(None))
    shapes: dict[Any, Shape] = {}  # by what weights are kept in, which depends on the device
    planners: dict[int, Planner] = {}
    probes: list[Probe] = []

    def planner_for(target: Target) -> Planner:
        if target.dtype not in shapes:
            shapes[target.dtype] = target.shape(config, full=full)
        return target.planner(shapes[target.dtype], config)

    def try_value(index: int) -> Probe:
        target = ordered[index]
        planners.clear()
        planners[index] = planner_for(target)
        probe = Probe(target.name, planners[index].min_peak_bytes(), target.budget(None))
        probes.append(probe)
        say(
            f"{target.name}, {format_bytes(probe.budget_bytes)}: {format_bytes(probe.least_bytes)}, "
            f"{'fits' if probe.fits else 'does not fit'}"
        )
        return probe

    low, high = -1, len(ordered)
    tried: dict[int, Probe] = {}
    while high - low > 1:  # here more memory comes later, so what fits is above what does not
        middle = (low + high) // 2
        tried[middle] = try_value(middle)
        low, high = (low, middle) if tried[middle].fits else (middle, high)
    if high == len(ordered):
        raise _nothing_fits(tried[high - 1])
    planner = planners.get(high) or planner_for(ordered[high])
    plan = planner.plan(tried[high].budget_bytes)
    limit = "" if low >= 0 else "no smaller device was asked about"
    return Fit(DEVICE, tried[high], tried.get(low), tuple(probes), plan, ordered[high].name, limit, ordered[high].ranks)
