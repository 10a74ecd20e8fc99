"""How far plans are from the best there can be: extra time beside its certified bound, for many budgets of a workload.

    python benchmarks/bounds.py                          # the shapes of all workloads, 20 budgets each
    python benchmarks/bounds.py --workload wide --layers 80

Prices are those of two cores in round numbers, or with --device of a device of the table, and not of this machine, so
that the numbers are the same wherever this is run; only the seconds of solving are measured here. Without compiled
blocks: what those take has to be measured, too. On a GPU a plan also has to leave room for what its allocator cannot
use, which the bound does not know of.

A plan's extra time is what its step takes over the fastest step of all. What is printed of it: its distance from that
of the bound, relative to the step, which is what a user waits for, and to the extra time itself where it is more than
1 % of the step.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS, Workload, build

from rematree.planning.planner import Planner
from rematree.planning.search import quantum_of
from rematree.pricing.devices import find_device
from rematree.pricing.roofline import Roofline
from rematree.solve.bound import lower_bound
from rematree.solve.chain import solve_chain
from rematree.solve.nested import quantum_for, solve_groups
from rematree.table import render_table
from rematree.units import MIB

_FLOPS, _BANDWIDTH = 1e12, 4e10  # a second, of two cores with AMX
_LEAST_EXTRA = 0.01  # of the step: a share of less says nothing


def planner_of(workload: Workload, device: str | None, layers: int | None) -> Planner:
    """Of the workload's model in bf16 on this machine, with the prices of `device`, or of two cores."""
    built = build(workload, torch.device("cpu"), torch.bfloat16, layers)
    cost = Roofline(_FLOPS, _BANDWIDTH) if device is None else find_device(device).roofline()
    return Planner(built.model, built.batch, optimizer="none", cost=cost)


def gaps(planner: Planner, count: int) -> Iterator[dict[str, float]]:
    """For `count` budgets from the smallest peak to that of the fastest step: what the plan takes and the bound."""
    fastest = planner.plan(None)
    low, high = planner.min_peak_bytes(), fastest.predicted_peak_bytes
    budgets = [low + (high - low) * index // max(1, count - 1) for index in range(count)]
    for budget, plan in zip(budgets, planner.plans(budgets), strict=True):
        assert plan.bound_seconds is not None
        least, took = plan.bound_seconds, plan.predicted_step_seconds
        extra = took - fastest.predicted_step_seconds
        yield {
            "budget_bytes": budget,
            "step_seconds": took,
            "bound_seconds": least,
            "extra": extra / took,
            "of_step": (took - least) / took,
            "of_extra": (took - least) / extra if extra > _LEAST_EXTRA * took else 0.0,
        }


def solving_seconds(planner: Planner) -> dict[str, float]:
    """Of one budget, half-way between the smallest peak and the fastest step: choosing options, groups, the bound."""
    problem = planner.survey.problem
    middle = (planner.min_peak_bytes() + planner.plan(None).predicted_peak_bytes) // 2
    quantum = quantum_of(planner.survey)
    found: dict[str, float] = {}
    for name, solve in (
        ("options", lambda: solve_chain(problem, middle, quantum)),
        ("groups", lambda: solve_groups(problem, middle, quantum_for(problem, middle))),
        ("bound", lambda: lower_bound(problem, middle, quantum)),
    ):
        started = time.process_time()
        solve()
        found[name] = time.process_time() - started
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--count", type=int, default=20, help="how many budgets")
    parser.add_argument("--layers", type=int, default=None, help="instead of the shape's, with random weights")
    parser.add_argument("--device", default=None, help="of the table: whose prices")
    parser.add_argument("--output", type=Path, default=Path("runs/bounds.json"))
    options = parser.parse_args()
    log: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    rows: list[tuple[str, ...]] = []
    for name in options.workload:
        print(name, file=sys.stderr, flush=True)
        planner = planner_of(WORKLOADS[name], options.device, options.layers)
        found, seconds = [*gaps(planner, options.count)], solving_seconds(planner)
        blocks = len(planner.survey.chain.blocks)
        log[f"{name}, {blocks} blocks"] = {"budgets": found, "solving_seconds": seconds, "device": options.device}
        worst = max(found, key=lambda row: row["of_step"])
        rows.append(
            (
                name,
                str(blocks),
                f"{worst['of_step']:.2%} at {worst['budget_bytes'] / MIB:.0f} MiB",
                f"{sorted(row['of_step'] for row in found)[-2]:.2%}",
                f"{max(row['of_extra'] for row in found):.1%}",
                f"{sum(row['of_step'] <= 0.02 for row in found)} of {len(found)}",
                f"{sum(seconds.values()):.2f} s",
            )
        )
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(log, indent=1))
    heading = ("workload", "blocks", "worst, of the step", "second", "worst, of the extra", "within 2 %", "solving")
    print(render_table(heading, rows))


if __name__ == "__main__":
    main()
