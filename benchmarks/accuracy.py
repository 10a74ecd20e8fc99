"""Predicted against measured peak and step time, over architectures, ways to train, shapes and ways to step.

    python benchmarks/accuracy.py              # 90 runs, into runs/accuracy.json and docs/accuracy.md
    python benchmarks/accuracy.py --quick      # 15 of them, printed only
    python benchmarks/accuracy.py --every-shape  # 270 runs

One process for each family of models, so that no memory is left from one to the next. A killed run goes on where it
was; delete the output to begin anew. Needs a quiet machine for the times; peaks do not depend on it. Exits with 1 if a
promise about peaks is broken.
"""

import argparse
import datetime
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accuracy_page import format_time, page, peaks_hold, verdicts
from grid import FAMILIES, as_json, cells, measure

from rematree.finetune.result import device_name, library_versions
from rematree.units import format_bytes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
QUICK = ("llama", "mixtral")
# glibc gives back what is freed, in large pieces or at the end of its heap, and every page of it costs a fault when it
# is asked for again: up to a third of a step, in some ways of stepping and not in others. A GPU's allocator keeps it.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
INTRO = """Every row is one way of stepping one model, predicted before anything ran and then run: the plain step,
Hugging Face's flag, and plans at three budgets (the smallest, a third and two thirds of the way to the largest useful).
Measured peaks are allocated bytes of a whole training step, {counted}: the larger of the first step's, in which the
optimizer's state is born, and the second one's. Times are medians of later steps, {timed}. A fixed piece of work,
which no plan has a part in, is timed before and after ops are priced and before and after a way is timed: the column
"machine" is what it took then over what it took when ops were priced. With `--attempts` above 1, ways timed while the
machine was more than 10 % faster or slower are timed again, then priced again. Models are small ones of the
architectures named, with random weights; the batch is rows x tokens. LoRA is on all linear layers, with dropout 0.05;
QLoRA is NF4 with double quantisation."""
COUNTED = {
    "cpu": ("summed from the profiler's allocation events", "without the profiler"),
    "cuda": ("counted by torch's allocator, cuBLAS's workspaces included", "with their optimizer's step"),
}
WHOLE = """

"Budget's peak" is what a budget is compared with: the same with the rest of the allocator's segments in use, and with
the CUDA context. "Reserved" are the segments that the allocator held at most, in use or not, without the context."""


def parse(description: str | None, output: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--page", type=Path, default=None, help="where the page goes")
    parser.add_argument("--quick", action="store_true", help="two families, LoRA alone of the second")
    parser.add_argument("--every-shape", action="store_true", help="all three shapes for every model")
    parser.add_argument("--timed-steps", type=int, default=5, help="of every way of stepping; the median counts")
    parser.add_argument("--attempts", type=int, default=1, help="at most, while the machine is at another speed")
    parser.add_argument("--device", default=None, help="cpu or cuda")
    parser.add_argument(
        "--malloc", choices=("keep", "default"), default="default", help="what glibc does with freed memory"
    )
    parser.add_argument("--family", choices=list(FAMILIES), help="only this one, in this process")
    return parser.parse_args()


def read(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text()) if output.is_file() else {"rows": []}


def wanted_cells(family: str, options: argparse.Namespace) -> list[Any]:
    found = cells(family, every_shape=options.every_shape)
    return found[:1] if options.quick and family != QUICK[0] else found[:2] if options.quick else found


def run_family(family: str, options: argparse.Namespace, device: torch.device) -> None:
    """Measure what is missing of one family; every row is stored as soon as it is there."""
    for cell in wanted_cells(family, options):
        log = read(options.output)
        done = frozenset(row["way"] for row in log["rows"] if row["cell"] == cell.name)
        if len(done) == 5:
            continue
        for row in measure(cell, device, timed_steps=options.timed_steps, attempts=options.attempts, done=done):
            log["rows"].append(as_json(row))
            fresh = options.output.with_suffix(".part")
            fresh.write_text(json.dumps(log, indent=1))
            fresh.replace(options.output)
            print(
                f"{row.cell:36} {row.way:8}  peak {format_bytes(row.predicted_allocated_bytes)} predicted, "
                f"{format_bytes(row.measured_peak_bytes)} measured ({row.peak_error:+.2%})  time "
                f"{format_time(row.predicted_seconds)}, {format_time(row.measured_seconds)} ({row.time_error:+.1%})",
                file=sys.stderr,
                flush=True,
            )


def conditions(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    return {
        "device": device_name(device) + (f" ({names[0]})" if names and device.type == "cpu" else ""),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/{Path(sys.argv[0]).name} "
        + shlex.join(sys.argv[1:]),
    }


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def main(description: str | None, output: str, device: torch.device, where: Path, title: str) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options = parse(description, output)
    if options.quick and options.output == Path(output):
        options.output = Path(output).with_stem(Path(output).stem + "_quick")
    device = torch.device(options.device) if options.device else device
    if options.family:
        run_family(options.family, options, device)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for family in QUICK if options.quick else FAMILIES:
        # Options of argparse win over earlier ones: the last --output is the one that counts.
        command = [sys.executable, *sys.argv, "--family", family, "--output", str(options.output)]
        subprocess.run(command, check=True, env={**os.environ, **(KEPT if options.malloc == "keep" else {})})
    log = read(options.output)
    log["conditions"] = conditions(device)
    if device.type == "cpu":
        kept = " ".join(f"{name}={value}" for name, value in KEPT.items())
        log["conditions"]["memory"] = {
            "keep": f"glibc keeps what is freed, as a GPU's allocator does ({kept})",
            "default": "glibc gives back what is freed as it does by default",
        }[options.malloc]
    log["seconds"] = log.get("seconds", 0.0) + time.perf_counter() - start
    options.output.write_text(json.dumps(log, indent=1))
    for what, found, limit, holds in verdicts(log["rows"]):
        print(f"{what:42} {found:8.2%}  of {limit:.0%}  {'holds' if holds else 'MISSED'}")
    if options.page or not options.quick:
        target = options.page or where
        target.parent.mkdir(parents=True, exist_ok=True)
        took = {**log["conditions"], "took": f"{log['seconds'] / 60:.0f} minutes"}
        counted, timed = COUNTED[device.type]
        intro = INTRO.format(counted=counted, timed=timed) + (WHOLE if device.type == "cuda" else "")
        target.write_text(page(title, intro, took, log["rows"]))
    sys.exit(0 if peaks_hold(log["rows"]) else 1)


if __name__ == "__main__":
    main(__doc__, "runs/accuracy.json", torch.device("cpu"), PAGE, "Accuracy on a CPU")
