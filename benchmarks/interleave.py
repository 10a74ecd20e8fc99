"""Run ways of stepping in turns: each one's peak, loss and gradients first, then times, round-robin.

The first step of a way is the one whose allocations are counted and whose gradients are compared with the plain step's;
it is not timed. Then the ways take turns, every other round in the opposite order, so that a machine that slows down
does so for all. A turn begins with a step that is thrown away: on a few tokens, because it only has to do what is done
once, or on the whole batch where code is compiled for its shape.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peers import Way
from workloads import Built, Loss, step

from rematree.measure import PeakMeter, storage_bytes
from rematree.quantised import hidden_tensors

FEW_TOKENS = 32
Say = Callable[[str], None]


@dataclass
class Point:
    """One way of stepping one workload, measured. Bytes are allocated bytes of one forward and backward.

    Attributes:
        name: Of the way.
        series: "plain", "peer", "ours" or "ours compiled".
        settings: In words.
        peak_bytes: Weights and batch included.
        above_bytes: The same without them: activations, gradients, workspaces.
        seconds: Median of `all_seconds`.
        first_seconds: Of the first step, compilation included, without the profiler; None if it was profiled.
        predicted_peak_bytes: By rematree's planner, where it can tell.
        predicted_seconds: Likewise.
        loss: Of the first step.
        loss_equal: To the plain step's.
        exact: All gradients are `torch.equal` to the plain step's.
        difference: Largest norm of a gradient's difference, relative to the norm of the gradient; None if exact, or if
            the way draws other dropout masks.
        error: Why there are no numbers.
    """

    name: str
    series: str
    settings: str
    peak_bytes: int | None = None
    above_bytes: int | None = None
    seconds: float | None = None
    all_seconds: list[float] = field(default_factory=list[float])
    first_seconds: float | None = None
    predicted_peak_bytes: int | None = None
    predicted_seconds: float | None = None
    loss: float | None = None
    loss_equal: bool | None = None
    exact: bool | None = None
    difference: float | None = None
    error: str | None = None

    @property
    def peak_error(self) -> float | None:
        """Of the prediction, relative to what was measured."""
        if self.predicted_peak_bytes is None or not self.peak_bytes:
            return None
        return self.predicted_peak_bytes / self.peak_bytes - 1

    @property
    def time_error(self) -> float | None:
        """Likewise."""
        if self.predicted_seconds is None or not self.seconds:
            return None
        return self.predicted_seconds / self.seconds - 1


class Interleaved:
    """The ways of one workload and what is known of them so far.

    Args:
        built: Model and batch.
        say: Told about progress.
        whole_warm_up: Every turn begins with a step on the whole batch.
    Attributes:
        points: One for each way that was added, in that order.
    """

    def __init__(self, built: Built, say: Say, *, whole_warm_up: bool = False) -> None:
        self._built = built
        self._say = say
        self._whole = whole_warm_up
        self._device = next(built.model.parameters()).device
        self._ways: list[Way] = []
        self._reference: list[torch.Tensor] | None = None
        self._few = {name: value[:1, :FEW_TOKENS] for name, value in built.batch.items()}
        self.points: list[Point] = []

    # -- the first step of a way --------------------------------------------------------------------------------------

    def add(self, way: Way) -> Point:
        """Take `way` in: its peak, loss and gradients. What goes wrong is noted in the point."""
        predicted_peak, predicted_seconds = way.predicted or (None, None)
        point = Point(
            way.name,
            way.series,
            way.settings,
            predicted_peak_bytes=predicted_peak,
            predicted_seconds=predicted_seconds,
        )
        self._ways.append(way)
        self.points.append(point)
        try:
            with self._entered(way) as loss:
                self._first(way, point, loss)
        except Exception as error:  # noqa: BLE001  what a peer cannot do here is its row
            point.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._say(f"{way.name}: {point.error}")
        else:
            assert point.above_bytes is not None
            self._say(f"{way.name}: {point.above_bytes / 2**20:.1f} MiB above the weights")
        self._clear()
        return point

    def _first(self, way: Way, point: Point, loss: Loss) -> None:
        if self._device.type == "cuda" and self._reference is None:
            self._step(loss, self._few)  # cuBLAS allocates what it keeps, in both threads
            self._clear()
        if way.compiles:
            started = time.perf_counter()
            self._step(loss)
            self._wait()
            point.first_seconds = time.perf_counter() - started
            self._clear()
        torch.manual_seed(0)
        with PeakMeter(self._built.model, None, self._built.batch) as meter:
            value = self._step(loss)
        point.above_bytes = meter.peak_bytes - meter.start_bytes
        point.peak_bytes = point.above_bytes + self.static_bytes
        point.loss = value.item()
        self._compare(way, point)

    @property
    def static_bytes(self) -> int:
        """Of weights and batch."""
        model = self._built.model
        held = (*model.parameters(), *model.buffers(), *hidden_tensors(model), *self._built.batch.values())
        return storage_bytes(held)

    def _compare(self, way: Way, point: Point) -> None:
        trained = [parameter for parameter in self._built.model.parameters() if parameter.requires_grad]
        found = [None if p.grad is None else p.grad.detach() for p in trained]
        if self._reference is None:
            assert way.series == "plain"
            assert all(gradient is not None for gradient in found)
            self._reference = [gradient.to("cpu", copy=True) for gradient in found if gradient is not None]
        plain = self.points[0]
        point.loss_equal = point.loss == plain.loss
        if any(gradient is None for gradient in found):
            missing = sum(gradient is None for gradient in found)
            raise RuntimeError(f"{missing} of {len(found)} trained parameters got no gradient")
        pairs = [(g.cpu(), r) for g, r in zip(found, self._reference, strict=True) if g is not None]
        point.exact = all(torch.equal(here, there) for here, there in pairs)
        other_masks = way.compiles and self._built.workload.dropout > 0
        if not point.exact and not other_masks:
            point.difference = max(_relative(here, there) for here, there in pairs)

    # -- turns --------------------------------------------------------------------------------------------------------

    def rounds(self, most: int, deadline: float, chosen: Callable[[Way], bool] = lambda _: True) -> int:
        """Time every way that works, up to `most` rounds; at least one, and none that would end after `deadline`.

        Args:
            most: Rounds.
            deadline: On the clock of `time.perf_counter`.
            chosen: The ways to time.
        Returns:
            How many rounds were made.
        """
        longest = 0.0
        pairs = [(way, point) for way, point in zip(self._ways, self.points, strict=True) if chosen(way)]
        for number in range(most):
            started = time.perf_counter()
            if number > 0 and started + longest > deadline:
                return number
            working = [(way, point) for way, point in pairs if point.error is None]
            for way, point in working if number % 2 == 0 else reversed(working):
                self._turn(way, point)
            longest = max(longest, time.perf_counter() - started)
            self._say(f"round {number + 1}: {longest:.0f} s")
        return most

    def _turn(self, way: Way, point: Point) -> None:
        try:
            with self._entered(way) as loss:
                few = None if self._whole or way.compiles else self._few
                self._step(loss, few)
                self._forget_gradients()
                self._wait()
                started = time.perf_counter()
                self._step(loss)
                self._wait()
                point.all_seconds.append(time.perf_counter() - started)
            point.seconds = statistics.median(point.all_seconds)
        except Exception as error:  # noqa: BLE001  as above
            point.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._say(f"{way.name}: {point.error}")
        self._clear()

    # -- one step -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _entered(self, way: Way) -> Any:
        # A peer that prints must not print into our output.
        with contextlib.redirect_stdout(sys.stderr), way.around() as loss:
            yield loss

    def _step(self, loss: Loss, batch: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        return step(self._built.model, self._built.batch if batch is None else batch, loss)

    def _forget_gradients(self) -> None:
        for parameter in self._built.model.parameters():
            parameter.grad = None

    def _clear(self) -> None:
        self._forget_gradients()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _relative(here: torch.Tensor, there: torch.Tensor) -> float:
    here, there = here.float(), there.float()
    scale = there.norm().item()
    return (here - there).norm().item() / scale if scale else float(here.norm().item() > 0)


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Plain values, with the ratios to the plain step and to HF's flag, and the errors of the predictions."""
    known = {point.name: point for point in points}
    plain, flag = known.get("plain"), known.get("HF flag")
    rows: list[dict[str, Any]] = []
    for point in points:
        row = asdict(point)
        for name, other in (("plain", plain), ("hf_flag", flag)):
            row[f"peak_to_{name}"] = _ratio(point.above_bytes, other and other.above_bytes)
            row[f"time_to_{name}"] = _ratio(point.seconds, other and other.seconds)
        rows.append({**row, "peak_error": point.peak_error, "time_error": point.time_error})
    return rows


def _ratio(here: float | None, there: float | None) -> float | None:
    return None if here is None or not there else here / there
