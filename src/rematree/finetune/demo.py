"""The main job on real input: the built-in model and data in half the memory of checkpointing every layer."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from rematree.errors import RematreeError
from rematree.finetune.compare import hf_checkpointing_peak
from rematree.finetune.config import TrainConfig
from rematree.finetune.job import run
from rematree.finetune.result import TrainResult
from rematree.finetune.run_folder import RunFolder
from rematree.finetune.setup import Engine, prepare
from rematree.pricing.devices import overhead_of
from rematree.units import format_bytes

# Sized for two CPU cores and ten minutes in all. float32, because a CPU may have no bfloat16 instructions.
_SETTINGS: Final[dict[str, Any]] = {
    "model": "builtin:smollm2-135m",
    "data": "builtin:stdlib-docstrings",
    "dtype": "float32",
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "max_steps": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "max_eval_examples": 16,
    "max_new_tokens": 48,
    "save_steps": 4,
    "compare_hf": True,
}


def demo_settings() -> dict[str, Any]:
    """The fields of `TrainConfig` that make the demo's job, but for directory and budget."""
    return dict(_SETTINGS)


def run_demo(
    output_dir: Path, console: Console | None = None, *, engine: Engine | None = None, **changes: Any
) -> TrainResult:
    """Measure the job with every layer checkpointed, then run it in half of that.

    Args:
        output_dir: Where the run is kept; a killed demo goes on from there.
        console: Where everything is printed; standard error by default.
        engine: Planner, executor and meter; the library's own by default.
        changes: Fields of `TrainConfig` that differ from the demo's.
    Raises:
        UsageError, InfeasibleBudgetError: as `run`.
    """
    out = console or Console(stderr=True)
    engine = engine or Engine.default()
    # The budget is not known before the measurement; no part of the set-up reads it.
    config = TrainConfig(output_dir=output_dir, budget=1, **{**_SETTINGS, **changes})
    started = RunFolder(output_dir).read("run.json")
    if started is not None:
        # A budget measured anew could differ by a few bytes, and would make this another run.
        return run(dataclasses.replace(config, budget=started["config"]["budget"]), out, engine=engine)
    RunFolder(output_dir).inspect(config.describe())
    setup = prepare(config, lambda line: out.print(line, markup=False, highlight=False))
    out.print("measuring the peak with every layer checkpointed (gradient_checkpointing=True)", highlight=False)
    peak = hf_checkpointing_peak(
        setup.model,
        setup.batch,
        engine.meter,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
    )
    beside = overhead_of(None, next(setup.model.parameters()).device.type)  # a budget is also for a GPU's context
    budget = (peak - beside.library_bytes) // 2 + beside.library_bytes + beside.context_bytes
    more = ", and what the device takes beside it" if beside.context_bytes else ""
    out.print(f"{format_bytes(peak)}; the budget is half of it{more}, {format_bytes(budget)}", highlight=False)
    return run(dataclasses.replace(config, budget=budget), out, engine=engine, setup=setup, hf_peak_bytes=peak)


def main() -> None:
    """`python -m rematree.finetune.demo --output DIR`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="directory of the run")
    try:
        run_demo(parser.parse_args().output)
    except RematreeError as error:
        Console(stderr=True).print(error.render(), markup=False, highlight=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and stop on stderr
    main()
