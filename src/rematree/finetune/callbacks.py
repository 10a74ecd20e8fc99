"""What happens around the Trainer's steps: time and peak, whole checkpoints, progress."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from rematree.finetune.run_folder import RunFolder
from rematree.pricing.on_cuda import requested_peak_bytes
from rematree.units import format_seconds


class Meter(Protocol):
    """What a peak meter tells once its block has ended."""

    @property
    def peak_bytes(self) -> int:
        """Peak allocated bytes inside the block, with what was allocated before it."""
        ...


MakeMeter = Callable[[Any, Any], AbstractContextManager[Meter]]


class StepMeter(TrainerCallback):
    """Times every optimizer step and measures the peak of the last one, when the optimizer has its state.

    On a GPU the counters, which cost nothing, tell the peak of the other steps too; the metrics of memory reset them
    when they have read them, so nothing is reset here. On a CPU the last step alone is measured.

    The result is written to `measured.json` before the last checkpoint, so that a run killed after its last step
    still has it. Every step also gets a line in `steps.jsonl`, without a time where the meter slowed it.
    """

    def __init__(self, folder: RunFolder, make_meter: MakeMeter) -> None:
        self._folder = folder
        self._make_meter = make_meter
        self._seconds: list[float] = []
        self._peak_bytes: int | None = None
        self._slowed = False
        self._started = 0.0
        self._stack = ExitStack()
        self._meter: Meter | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 >= state.max_steps:
            self._meter = self._stack.enter_context(self._make_meter(kwargs["model"], kwargs["optimizer"]))
        self._started = clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = clock() - self._started
        if self._meter is None:
            self._seconds.append(seconds)
            here = torch.cuda.is_available()
            self._peak_bytes = requested_peak_bytes(next(kwargs["model"].parameters()).device) if here else None
            return
        self._stack.close()
        self._peak_bytes = int(self._meter.peak_bytes)
        # The meter slows its own step down, and the first step pays for allocations and the optimizer's state.
        counted = self._seconds[1:] or self._seconds or [seconds]
        measured = {"peak_bytes": int(self._meter.peak_bytes), "step_seconds": statistics.median(counted)}
        self._folder.write("measured.json", measured)
        self._meter = None
        self._slowed = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = None if self._slowed else self._seconds[-1]
        if seconds is not None:
            logs["rematree/step(s)"] = seconds
        entry = {"step": state.global_step, "loss": logs["loss"], "seconds": seconds, "peak_bytes": self._peak_bytes}
        self._folder.add_step(entry)

    def close(self) -> None:
        """Take the meter off after an error inside a step."""
        self._stack.close()


class CheckpointMark(TrainerCallback):
    """Marks a checkpoint as whole once the Trainer has written all of it, and only then removes older ones."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._folder.mark_complete(state.global_step)
        self._folder.drop_old_checkpoints()


class ProgressReport(TrainerCallback):
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, every: int) -> None:
        self._console = console
        self._every = every
        self._started = 0.0
        self._task: TaskID | None = None
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._console.is_terminal:
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="")
            self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = clock()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = f"loss {logs['loss']:.4f}"
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step, loss=loss)
        elif state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            took = format_seconds(clock() - self._started)
            self._console.print(f"step {state.global_step}/{state.max_steps}  {loss}  {took}", highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._task is not None:
            self._bar.stop()


def clock() -> float:
    """Seconds now, with everything the device was given done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
