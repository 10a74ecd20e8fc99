"""How far plans are from the best there can be: extra time beside its certified bound, for many budgets of a workload.

    python benchmarks/bounds.py                          # all workloads, 20 budgets each; adds to docs/bounds.md
    python benchmarks/bounds.py --device h100-sxm --workload wide
    python benchmarks/bounds.py --solving 80             # seconds of solving for so many layers, nothing else

Prices are those of two cores in round numbers, or with --device of a device of the table, and not of this machine, so
that the numbers are the same wherever this is run; only the seconds of solving are measured here. Without compiled
blocks: what those take has to be measured, too. On a GPU a plan also has to leave room for what its allocator cannot
use, which the bound does not know of.

A plan's extra time is what its step takes over the fastest step of all. Its distance from that of the bound is given in
two readings: relative to the step, which is what a user waits for, and to the extra time itself.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS, Workload, build

from rematree.finetune.result import library_versions
from rematree.planning.planner import Planner
from rematree.planning.search import quantum_of
from rematree.pricing.devices import find_device
from rematree.pricing.roofline import Roofline
from rematree.solve.bound import certify
from rematree.solve.chain import solve_chain
from rematree.solve.nested import quantum_for, solve_groups
from rematree.units import MIB

_FLOPS, _BANDWIDTH = 1e12, 4e10  # a second, of two cores with AMX
_CLOSE = 0.02
_NOTHING = 1e-6  # of the step: extra time that is only rounding
_SOLVED = "smollm2"  # whose shape the chain of --solving has
_PAGE = Path(__file__).resolve().parents[1] / "docs" / "bounds.md"


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
            "of_extra": (took - least) / extra if extra > _NOTHING * took else 0.0,
        }


def solving_seconds(planner: Planner) -> dict[str, float]:
    """Of one budget, half-way between the smallest peak and the fastest step: choosing options, groups, the bound.

    The bound's part also finds the fastest choice of options to the byte.
    """
    problem = planner.survey.problem
    middle = (planner.min_peak_bytes() + planner.plan(None).predicted_peak_bytes) // 2
    quantum = quantum_of(planner.survey)
    found: dict[str, float] = {}
    for name, solve in (
        ("options", lambda: solve_chain(problem, middle, quantum)),
        ("groups", lambda: solve_groups(problem, middle, quantum_for(problem, middle))),
        ("bound", lambda: certify(problem, middle, quantum)),
    ):
        started = time.process_time()
        solve()
        found[name] = time.process_time() - started
    return found


def page(log: dict[str, Any]) -> str:
    """docs/bounds.md."""
    rows = [f"| {' | '.join(_summary(entry))} |" for entry in log["workloads"].values()]
    misses = [
        f"| {entry['title']} | {entry['prices']} | {' | '.join(_miss(row))} |"
        for entry in log["workloads"].values()
        for row in entry["budgets"]
        if max(row["of_step"], row["of_extra"]) > _CLOSE
    ]
    missing = [workload for name, workload in WORKLOADS.items() if f"two cores, {name}" not in log["workloads"]]
    solving = [
        f"| {layers} | {' | '.join(f'{seconds:.2f} s' for seconds in (*took.values(), sum(took.values())))} |"
        for layers, took in log["solving"].items()
    ]
    return "\n".join(
        [
            "# Plans beside the certified bound",
            "",
            "Written by `python benchmarks/bounds.py`, `--device h100-sxm` and `--solving 80`. For each workload, "
            "budgets in equal steps from the smallest peak of any plan to that of the fastest step; bf16, no "
            "optimizer, no compiled blocks. Prices are fixed (two cores in round numbers, or the table's H100), so the "
            "numbers are the same on every machine.",
            "",
            "A plan's extra time is what its step takes over the fastest step. Its distance from the bound is given "
            f"relative to the step, and to the extra time itself; the promise is {_CLOSE:.0%}. The bound holds for "
            "every choice of the options that were measured, groups included, as the planner adds up their bytes; on a "
            "GPU it does not know what the allocator cannot use, and a plan has to leave room for that.",
            "",
            "| workload | blocks | prices | within 2 % of the step | worst | within 2 % of the extra time | worst |",
            "|---|---|---|---|---|---|---|",
            *rows,
            *(f"| {workload.title} | | two cores | not run | | not run | |" for workload in missing),
            "",
            "## Misses",
            "",
            "Budgets at which one of the readings is above 2 %." if misses else "None.",
            *(
                [
                    "",
                    "| workload | prices | budget | extra time | distance, of the step | of the extra time |",
                    "|---|---|---|---|---|---|",
                    *misses,
                ]
                if misses
                else []
            ),
            "",
            "## Seconds of solving",
            "",
            f"Processor seconds of one thread for one budget in the middle, chains of {_SOLVED}'s shape with LoRA: "
            "options, groups, and the bound with the fastest options to the byte.",
            "",
            "| layers | options | groups | bound | together |",
            "|---|---|---|---|---|",
            *solving,
            "",
            ", ".join(f"{name} {version}" for name, version in library_versions().items()),
            "",
        ]
    )


def _summary(entry: dict[str, Any]) -> tuple[str, ...]:
    found = entry["budgets"]
    cells = [entry["title"], str(entry["blocks"]), entry["prices"]]
    for reading in ("of_step", "of_extra"):
        worst = max(found, key=lambda row: row[reading])
        cells.append(f"{sum(row[reading] <= _CLOSE for row in found)} of {len(found)}")
        cells.append(f"{worst[reading]:.2%} at {worst['budget_bytes'] / MIB:.0f} MiB")
    return tuple(cells)


def _miss(row: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{row['budget_bytes'] / MIB:.0f} MiB",
        *(f"{row[name]:.2%}" for name in ("extra", "of_step", "of_extra")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=[*WORKLOADS], default=[*WORKLOADS])
    parser.add_argument("--count", type=int, default=20, help="how many budgets")
    parser.add_argument("--solving", type=int, default=None, help="layers of a chain whose solving is timed instead")
    parser.add_argument("--device", default=None, help="of the table: whose prices")
    parser.add_argument("--output", type=Path, default=Path("runs/bounds.json"))
    parser.add_argument("--page", type=Path, default=_PAGE, help="what is made of everything in the output")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    log: dict[str, Any] = {"workloads": {}, "solving": {}}
    if options.output.is_file():
        log = json.loads(options.output.read_text())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if options.solving is not None:
        planner = planner_of(WORKLOADS[_SOLVED], options.device, options.solving)
        log["solving"][str(options.solving)] = solving_seconds(planner)
        options.output.write_text(json.dumps(log, indent=1))
    for name in options.workload if options.solving is None else ():
        print(name, file=sys.stderr, flush=True)
        planner = planner_of(WORKLOADS[name], options.device, None)
        found = [*gaps(planner, options.count)]
        prices = "two cores" if options.device is None else find_device(options.device).title
        log["workloads"][f"{prices}, {name}"] = {
            "title": WORKLOADS[name].title,
            "blocks": len(planner.survey.chain.blocks),
            "prices": prices,
            "budgets": found,
        }
        options.output.write_text(json.dumps(log, indent=1))
    options.page.write_text(page(log))


if __name__ == "__main__":
    main()
