"""Budgets across the frontier of a model: predicted and measured peak, predicted and measured step time.

    python benchmarks/ten_budgets.py --output runs/ten_budgets.json             # the demo's model, ten budgets
    python benchmarks/ten_budgets.py --model llama --count 20                   # a model of the accuracy grid

For each budget a step that makes the optimizer's state, one that is timed, and one that is measured under the profiler.
Exits with 1 if a peak is above its budget, a prediction is off by more than 3 %, a predicted time falls as the budget
shrinks, or a measured peak rises as the budget shrinks.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from grid import FAMILIES, Cell, build_batch, build_model

from rematree.execute.handle import apply
from rematree.finetune.compare import train_step, weights_kept
from rematree.finetune.config import TrainConfig
from rematree.finetune.demo import demo_settings
from rematree.finetune.setup import prepare
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.units import MIB, format_bytes, format_seconds

Row = dict[str, float | int | None]
_PEAKS = ("budget_bytes", "predicted_peak_bytes", "measured_peak_bytes")
_LEARNING_RATE, _MAX_GRAD_NORM = 1e-4, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/ten_budgets.json"))
    parser.add_argument("--count", type=int, default=10, help="how many budgets")
    parser.add_argument("--model", choices=["demo", *FAMILIES], default="demo")
    options = parser.parse_args()
    if options.model == "demo":
        config = TrainConfig(output_dir=options.output.parent / "unused", budget=1, **demo_settings())
        setup = prepare(config, lambda line: print(line, file=sys.stderr))
        model, batch, described = setup.model.train(), setup.batch, dataclasses.asdict(config)
    else:
        cell = Cell(options.model, "lora", 2, 512, "float32")
        model = build_model(cell, torch.device("cpu"))
        batch, described = build_batch(cell, model, torch.device("cpu")), dataclasses.asdict(cell)
    rows: list[Row] = []
    for row in sweep(model, batch, Planner(model, batch), options.count):
        rows.append(row)
        budget, predicted, measured = (int(row[name] or 0) for name in _PEAKS)
        print(
            f"budget {format_bytes(budget)}  predicted {predicted / MIB:.1f} MiB "
            f"{format_seconds(row['predicted_step_seconds'] or 0)}  measured {measured / MIB:.1f} MiB "
            f"{format_seconds(row['measured_step_seconds'] or 0)}  loss rows {row['loss_chunk_rows']}",
            flush=True,
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"config": described, "rows": rows}, indent=1, default=str))
    broken = broken_promises(rows)
    for line in broken:
        print(line, file=sys.stderr)
    sys.exit(1 if broken else 0)


def sweep(model: Any, batch: Mapping[str, Any], planner: Planner, count: int) -> Iterator[Row]:
    """One row for each of `count` budgets, evenly from the smallest peak to that of the fastest plan."""
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    budgets = [low + (high - low) * i // (count - 1) for i in range(count)]
    for budget, plan in zip(budgets, planner.plans(budgets), strict=True):
        with weights_kept(model, _LEARNING_RATE) as optimizer, apply(plan, model):
            train_step(model, optimizer, batch, _MAX_GRAD_NORM)
            start = time.perf_counter()
            train_step(model, optimizer, batch, _MAX_GRAD_NORM)
            seconds = time.perf_counter() - start
            with PeakMeter(model, optimizer, batch) as meter:
                train_step(model, optimizer, batch, _MAX_GRAD_NORM)
        yield {
            "budget_bytes": budget,
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "measured_peak_bytes": meter.peak_bytes,
            "predicted_step_seconds": plan.predicted_step_seconds,
            "measured_step_seconds": seconds,
            "loss_chunk_rows": plan.loss_chunk_rows,
        }


def broken_promises(rows: Sequence[Row], slack: int = 0) -> list[str]:
    """What a row does not keep of what a plan promises; rows from the smallest budget to the largest.

    `slack` bytes of a prediction are no error: every one counts 256 KiB more than the step, which matters for toys.
    """
    broken: list[str] = []
    fastest, lowest = float("inf"), 0
    for row in rows:
        budget, predicted, measured = (int(row[name] or 0) for name in _PEAKS)
        seconds = float(row["predicted_step_seconds"] or 0)
        reasons = {
            "the measured peak is above the budget": measured > budget,
            "the predicted peak is off by more than 3 %": abs(predicted - measured) > 0.03 * measured + slack,
            "a smaller budget is predicted to be faster": seconds > fastest,
            "a smaller budget has a larger measured peak": measured < lowest,
        }
        broken += [f"budget {format_bytes(budget)}: {reason}" for reason, holds in reasons.items() if holds]
        fastest, lowest = min(fastest, seconds), max(lowest, measured)
    return broken


if __name__ == "__main__":
    main()
