"""Ten budgets across the frontier of the demo model: predicted and measured peak, predicted and measured step time.

    python benchmarks/ten_budgets.py --output runs/ten_budgets.json

Two steps for each budget: the first makes the optimizer's state and is timed, the second is measured under the
profiler. Exits with 1 if a peak is above its budget, a prediction is off by more than 3 %, or a predicted time falls as
the budget shrinks.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from rematree.execute.handle import apply
from rematree.finetune.compare import train_step, weights_kept
from rematree.finetune.config import TrainConfig
from rematree.finetune.demo import demo_settings
from rematree.finetune.setup import prepare
from rematree.measure import PeakMeter
from rematree.planning import Planner
from rematree.units import MIB, format_bytes, format_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/ten_budgets.json"))
    parser.add_argument("--budgets", type=int, default=10)
    options = parser.parse_args()
    config = TrainConfig(output_dir=options.output.parent / "unused", budget=1, **demo_settings())
    setup = prepare(config, lambda line: print(line, file=sys.stderr))
    setup.model.train()
    planner = Planner(setup.model, setup.batch)
    low, high = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    budgets = [low + (high - low) * i // (options.budgets - 1) for i in range(options.budgets)]
    rows: list[dict[str, float | int | None]] = []
    for budget, plan in zip(budgets, planner.plans(budgets), strict=True):
        with weights_kept(setup.model, config.learning_rate) as optimizer, apply(plan, setup.model):
            train_step(setup.model, optimizer, setup.batch, config.max_grad_norm)
            start = time.perf_counter()
            train_step(setup.model, optimizer, setup.batch, config.max_grad_norm)
            seconds = time.perf_counter() - start
            with PeakMeter(setup.model, optimizer, setup.batch) as meter:
                train_step(setup.model, optimizer, setup.batch, config.max_grad_norm)
        rows.append(
            {
                "budget_bytes": budget,
                "predicted_peak_bytes": plan.predicted_peak_bytes,
                "measured_peak_bytes": meter.peak_bytes,
                "predicted_step_seconds": plan.predicted_step_seconds,
                "measured_step_seconds": seconds,
                "loss_chunk_rows": plan.loss_chunk_rows,
            }
        )
        print(
            f"budget {format_bytes(budget)}  predicted {plan.predicted_peak_bytes / MIB:.1f} MiB "
            f"{format_seconds(plan.predicted_step_seconds)}  measured {meter.peak_bytes / MIB:.1f} MiB "
            f"{format_seconds(seconds)}  loss rows {plan.loss_chunk_rows}",
            flush=True,
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"config": dataclasses.asdict(config), "rows": rows}, indent=1, default=str))
    sys.exit(0 if holds(rows) else 1)


def holds(rows: list[dict[str, float | int | None]]) -> bool:
    """Whether every row keeps what a plan promises."""
    ok = True
    fastest = float("inf")
    for row in rows:
        budget, predicted, measured = (int(row[k] or 0) for k in _PEAKS)
        ok &= measured <= budget and abs(predicted - measured) <= 0.03 * measured
        seconds = float(row["predicted_step_seconds"] or 0)
        ok &= seconds <= fastest
        fastest = seconds
    return ok


_PEAKS = ("budget_bytes", "predicted_peak_bytes", "measured_peak_bytes")

if __name__ == "__main__":
    main()
