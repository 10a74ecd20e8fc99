"""Runs that a test kills: `rematree train`, and a Trainer with a budget, each in a process of its own."""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

import forked
from models import build, with_lora
from rematree import BudgetCallback
from rematree.cli.main import main
from rematree.finetune.callbacks import CheckpointMark, StepMeter
from rematree.finetune.run_folder import RunFolder
from rematree.pricing.cost import Roofline
from test_finetune_tiny import FixedMeter
from trainers import QUICK, pad, quiet_arguments, rows_of

LENGTHS = (12, 40, 9, 33, 21, 40, 17, 8, 30, 25, 11, 38, 16, 24, 32, 40)
_PATIENCE = 600.0


def train_command(inputs: Path, folder: Path, steps: int) -> None:
    """`rematree train` as a shell would start it."""
    words = ["train", "--model", inputs / "model", "--data", inputs / "sums.jsonl", "--budget", "1300KiB"]
    words += ["--output-dir", folder, "--max-steps", steps, "--save-steps", 2, "--max-length", 64, "--dtype", "float32"]
    words += ["--per-device-train-batch-size", 2, "--learning-rate", 1e-2, "--lora-r", 4, "--lora-dropout", 0.1]
    words += ["--lora-target-modules", "q_proj,down_proj"]  # less to plan at every start
    words += ["--max-new-tokens", 4, "--logging-steps", 1]
    for lever in QUICK:
        words += ["--forbid", lever]
    main([str(word) for word in words])


def trainer(inputs: Path, folder: Path, steps: int) -> None:
    """A Trainer with a budget and batches of several lengths, resumed from its newest whole checkpoint."""
    run_folder = RunFolder(folder)
    checkpoint, _ = run_folder.recover()
    folder.mkdir(exist_ok=True)
    arguments = quiet_arguments(folder, max_steps=steps, save_steps=2, save_strategy="steps")
    meter = StepMeter(run_folder, FixedMeter)
    budget = BudgetCallback("1300KiB", cost=Roofline(1e11, 1e10), forbid=QUICK, say=lambda text: None)
    made = Trainer(
        model=with_lora(build("llama", layers=2)),
        args=arguments,
        train_dataset=rows_of(*LENGTHS),
        data_collator=pad,
        callbacks=[CheckpointMark(run_folder), meter, budget],
    )
    made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert len(budget.plans) > 1
    assert not budget.plans[0].recomputes
    assert budget.plans[-1].recomputes
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    made.save_model(str(folder / "adapter"))
    run_folder.write("result.json", {"losses": losses})


def start(job: Callable[..., None], log: Path, *args: Any) -> Any:
    """`job(*args)` in a process of its own, what it prints added to `log`."""
    process = forked.process(_quietly, log, job, args)
    process.start()
    return process


def _quietly(log: Path, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    job(*args)


def kill_at_random(process: Any, folder: Path, draw: random.Random) -> str:
    """Kill `process` a moment after one of its next three steps, or before the first of them; says when it was.

    However fast the machine: never later than two steps after that, so that a run of eight does not end before.
    """
    made, further, moment = _steps(folder), draw.randint(0, 3), draw.uniform(0, 0.3)
    _until(lambda: not process.is_alive() or _steps(folder) >= made + further, _PATIENCE, "no step")
    longest = moment if further else 10 * moment  # planning and resuming take longer than a step and a save
    _until(lambda: not process.is_alive() or _steps(folder) >= made + further + 2, longest)
    process.kill()
    process.join()
    return f"step {made + further} and {moment:.3f} s"


def _steps(folder: Path) -> int:
    return len(RunFolder(folder).steps())


def _until(come: Callable[[], bool], seconds: float, missing: str = "") -> None:
    """Wait until something has come, at most so long; if it must come, `missing` says what did not."""
    end = time.monotonic() + seconds
    while not come():
        if time.monotonic() >= end:
            assert not missing, missing
            return
        time.sleep(0.002)
