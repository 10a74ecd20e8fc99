"""The largest value of one setting of a run that still fits, or the smallest device: found with real plans.

Every probe is a whole observation with its smallest confirmed peak. Where to look for the longest rows and the most of
them the first observation says, scaled. Where nothing fits, what else could be changed is planned too.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.finetune.config import TrainConfig, flag
from rematree.finetune.largest import Grid, Probe, find_first, find_largest
from rematree.finetune.remedies import working_changes
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
# Rows are asked for in multiples that kernels like, the rest one by one.
_STEP: Final = {"max-length": 64, "batch-size": 1, "lora-r": 1}
_LEAST: Final = {"max-length": 8, "batch-size": 1, "lora-r": 1}
_MOST_ROWS: Final = 16384
_UNBOUNDED_LENGTH: Final = 1 << 20


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


def find_setting(
    quantity: str,
    config: TrainConfig,
    target: Target,
    budget: int | None,
    *,
    full: bool = False,
    say: Callable[[str], None],
    command: Callable[..., str],
) -> Fit:
    """The largest value of a setting of `config` that fits.

    Args:
        quantity: "max-length", "batch-size" or "lora-r"; what `config` says of it is where the search begins.
        config: The run.
        target: Where it is to fit.
        budget: Into how many bytes; None takes all that the device has.
        full: All parameters are trained.
        say: Takes a line of progress.
        command: Writes the command that asks this, with new values for some of its parameters, None to leave one out.
    Raises:
        InfeasibleBudgetError: not even the smallest value fits; says by which commands something would.
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
    planners: dict[bool, Planner] = {}  # the last that fits, which is the answer's, and the last that does not
    beside: list[Planner] = []  # made for an estimate
    probes: list[Probe] = []

    def run_with(value: int) -> tuple[TrainConfig, Shape]:
        changed = replace(config, **{field: value})
        if quantity == "lora-r":
            return changed, target.shape(changed, full=full)
        return changed, synthetic_batch_like(shape, changed)

    def try_value(value: int) -> Probe:
        changed, tried = run_with(value)
        planner = target.planner(tried, changed)
        probe = Probe(value, planner.min_peak_bytes(), limit_bytes)
        probes.append(probe)
        planners[probe.fits] = planner
        say(f"{flag(field)} {value}: {format_bytes(probe.least_bytes)}, {'fits' if probe.fits else 'does not fit'}")
        return probe

    def estimate(value: int) -> Probe:
        """By the planner of the first value, scaled, or by a new one where that has not the same levers."""
        (first,), (known,) = probes, planners.values()
        if value == first.value:
            return first
        changed, tried = run_with(value)
        same = next((planner for planner in (known, *beside) if planner.scales_to(tried.batch)), None)
        if same is None:
            beside.append(target.planner(tried, changed))
        scaled = beside[-1] if same is None else same.for_batch(tried.batch)
        probe = Probe(value, scaled.min_peak_bytes(), limit_bytes)
        say(f"{flag(field)} {value}: about {format_bytes(probe.least_bytes)}")
        return probe

    grid = Grid(min(_LEAST[quantity], most), most, _STEP[quantity])
    answer, refused = find_largest(
        try_value, grid, min(most, getattr(config, field)), None if quantity == "lora-r" else estimate
    )
    if answer is None:
        for note in shape.notes:
            say(f"note: {note}")
        assert refused is not None  # the first value of the grid, and the last that was tried
        least = int(refused.value)
        error = _nothing_fits(f"nothing fits: even with {flag(field)} {least}", refused, planners[False])
        changed, tried = run_with(least)
        changes = working_changes(error, changed, say, target=target, shape=tried, full=full)
        raise error.with_remedies(command(**change) for change in changes)
    plan = planners[True].plan(limit_bytes)
    return Fit(quantity, answer, refused, tuple(probes), plan, target.name, "" if refused else limit, target.ranks)


def _nothing_fits(said: str, probe: Probe, planner: Planner) -> InfeasibleBudgetError:
    return planner.infeasible(
        probe.budget_bytes,
        f"{said} the smallest reachable peak is {format_bytes(probe.least_bytes)}, and "
        f"{format_bytes(probe.budget_bytes)} may be taken",
    )


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
    command: Callable[..., str],
) -> Fit:
    """The device with the least memory that `config` fits.

    Args:
        config: The run.
        targets: Devices to choose from.
        full: All parameters are trained.
        say: Takes a line of progress.
        command: Writes the command that asks this, with new values for some of its parameters, None to leave one out.
    Raises:
        InfeasibleBudgetError: it fits none of them; says by which commands something would.
    """
    ordered = sorted(targets, key=lambda target: target.budget(None))
    shapes: dict[Any, Shape] = {}  # by what weights are kept in, which depends on the device
    fitting: list[Planner] = []  # of the last that fits, which is the answer's

    def planner_for(target: Target) -> Planner:
        if target.dtype not in shapes:
            shapes[target.dtype] = target.shape(config, full=full)
        return target.planner(shapes[target.dtype], config)

    tried: dict[int, Probe] = {}

    def fits(index: int) -> bool:
        target = ordered[index]
        planner = planner_for(target)
        probe = tried[index] = Probe(target.name, planner.min_peak_bytes(), target.budget(None))
        if probe.fits:
            fitting[:] = [planner]
        say(
            f"{target.name}, {format_bytes(probe.budget_bytes)}: {format_bytes(probe.least_bytes)}, "
            f"{'fits' if probe.fits else 'does not fit'}"
        )
        return probe.fits

    # What has more memory comes later; but where weights are kept in fp32, for want of bf16, that may not be enough.
    found = find_first([target.dtype for target in ordered], fits)
    if found is None:
        last = ordered[-1]
        error = _nothing_fits(f"no device fits: even on {last.name}", tried[len(ordered) - 1], planner_for(last))
        changes = working_changes(error, config, say, target=last, shape=shapes[last.dtype], full=full)
        raise error.with_remedies(command(**change) for change in changes)
    plan = fitting[0].plan(tried[found].budget_bytes)
    refused = max((index for index in tried if index < found), default=None)
    limit = "" if refused is not None else "no smaller device was asked about"
    return Fit(
        DEVICE,
        tried[found],
        None if refused is None else tried[refused],
        tuple(tried.values()),
        plan,
        ordered[found].name,
        limit,
        ordered[found].ranks,
    )
