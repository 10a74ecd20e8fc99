"""What a run folder tells a page: the frontier that was stored with it, and what its steps measured.

Nothing of the model is read. A run from before frontiers were stored gets one made of its config alone; its times are
then priced op by op, without the block that a run measures.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from rematree.errors import UsageError
from rematree.finetune.config import TrainConfig
from rematree.finetune.run_folder import RunFolder
from rematree.finetune.target import Target
from rematree.plans import Plan
from rematree.report.page import MeasuredStep, Page
from rematree.report.stored_frontier import StoredFrontier, stored_frontier
from rematree.units import format_bytes, format_seconds

_SHOWN: Final = ("model", "data", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "dtype")


def run_page(path: Path, say: Callable[[str], None]) -> Page:
    """The page about the run in `path`.

    Args:
        path: Output directory of `rematree train`; the run may still be going on.
        say: Told what takes time.
    Raises:
        UsageError: there is no run, or a file of it is damaged; or it has no frontier and none can be made.
    """
    folder = RunFolder(path)
    run = folder.about()
    if run is None:
        raise UsageError(
            f"{path} holds no run: there is no run.json in it",
            remedies=["the --output-dir of a rematree train"],
        )
    config, plan = run["config"], folder.plan()
    stored = folder.read("frontier.json")
    notes = [
        "Peaks and times of plans are predicted before the first step: memory by running the step on fake tensors, "
        "time by the price of each operation."
    ]
    if stored is None:
        frontier = _made_anew(config, plan, say)
        notes.append(
            "This run stored no frontier: it was made for this page of the model's config alone, on the device that is "
            "here, so its times may differ from those the plan was chosen by."
        )
    else:
        frontier = StoredFrontier.from_json(stored)
    measured, result = folder.read("measured.json") or {}, folder.read("result.json") or {}
    if not measured:
        notes.append("The run has not ended: its peak is measured at its last step.")
    steps = [
        MeasuredStep(step["step"], _number(step.get("seconds")), step.get("peak_bytes")) for step in folder.steps()
    ]
    if not any(step.peak_bytes for step in steps[:-1]):
        notes.append(
            "On a CPU the peak is what torch allocates, measured in the last step, which that slows: it is not timed."
        )
    versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    facts = [(name.replace("_", " "), str(config[name])) for name in _SHOWN if name in config]
    facts = [("run", str(folder.path)), *facts, ("budget", format_bytes(config["budget"]))]
    facts += [(name, text) for name, text in (("device", result.get("device", "")), ("versions", versions)) if text]
    passes = int(config["gradient_accumulation_steps"])
    return Page(
        title=f"{Path(config['model']).name} in {format_bytes(config['budget'])}",
        facts=facts,
        budget_bytes=config["budget"],
        frontier=frontier,
        passes=passes,
        predicted_allocated_bytes=plan.predicted_allocated_bytes,
        steps=steps,
        compared=_compared(plan, passes, measured, result),
        notes=notes,
    )


def _compared(plan: Plan, passes: int, measured: Mapping[str, Any], result: Mapping[str, Any]) -> list[list[str]]:
    """Peak and step as predicted and measured; then what else the run timed, which nothing predicts."""
    rows: list[list[str]] = []
    if measured:
        peak, seconds = measured["peak_bytes"], measured["step_seconds"]
        predicted = plan.predicted_step_seconds * passes
        allocated = plan.predicted_allocated_bytes
        rows = [
            ["peak", format_bytes(allocated), format_bytes(peak), _off(allocated, peak)],
            ["step, median", format_seconds(predicted), format_seconds(seconds), _off(predicted, seconds)],
        ]
    named = {
        "hf_checkpointing_peak_bytes": ("peak, every layer checkpointed", format_bytes),
        "budgeted_step_seconds": ("step, timed in turns", format_seconds),
        "hf_checkpointing_step_seconds": ("step, every layer checkpointed, in turns", format_seconds),
        "plain_step_seconds": ("plain step, in turns", format_seconds),
    }
    for name, (words, form) in named.items():
        if result.get(name) is not None:
            rows.append([words, "", form(result[name]), ""])
    return rows


def _off(predicted: float, measured: float) -> str:
    return f"{predicted / measured - 1:+.1%}" if measured else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _made_anew(described: Mapping[str, Any], plan: Plan, say: Callable[[str], None]) -> StoredFrontier:
    """The frontier of a run that stored none, with the plan it trained under among its points."""
    from rematree.finetune.synthetic import config_shape

    names = {item.name for item in dataclasses.fields(TrainConfig)}
    taken: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in described.items() if name in names
    }
    taken["model"] = described["model"].removeprefix("builtin:")  # its config is in the catalogue by the same name
    config = TrainConfig(**taken, output_dir=Path())
    say(f"the run stored no frontier; making {config.model} of its config alone")
    target = Target()
    planner = target.planner(config_shape(config, full=False), config)
    return stored_frontier(planner, plan)
