"""Our frontier beside everything a user could pick by hand, in one run: peaks, times, gradients, predictions.

    python benchmarks/frontier.py                       # all workloads, some 25 minutes on two quiet cores
    python benchmarks/frontier.py --workload wide       # one of them
    python benchmarks/frontier.py --quick               # a tiny model, for the tests

Writes --output (JSON), and beside it a table (.md) and one picture for each workload (.svg); prints what holds. One
process for each workload. A workload that is in the output is not run again; --again does. Times need a quiet machine,
peaks do not. The step is forward and backward. Peers with packages of their own: `requirements-peers.txt`.

A workload takes its ways once for peaks and gradients, compilation included, then in rounds for times. At least one
round is made, and none begins that would end after --minutes; at the defaults 8 minutes for smollm2, which meets every
peer, 4.5 for wide, 3 for each other one. --peers, --points and --no-compile make it shorter or longer.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accuracy import conditions
from dominance import SMALLEST, verdicts
from frontier_page import page
from interleave import Interleaved, as_json
from ours import make_planner, our_ways, peer_budgets, predictions
from peers import Way, own_peers
from peers_lean import lean_peers
from peers_libraries import library_peers
from picture import picture
from workloads import QUICK, WORKLOADS, Built, Workload, build, default_dtype

PEERS = ("none", "few", "main", "all")
MINUTES = {"few": 3.0, "main": 4.5, "all": 8.0}


def make_parser(description: str | None, output: str, names: Iterable[str]) -> argparse.ArgumentParser:
    """The options of this benchmark and of the one for a GPU."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=[*names], help="only these")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of every way, at most")
    parser.add_argument(
        "--more-rounds",
        type=int,
        default=0,
        help="then of the plain step, HF's flag and our plans at its peak and at the share of it that is to be reached",
    )
    parser.add_argument("--minutes", type=float, default=None, help="for one workload, all included")
    parser.add_argument(
        "--points", type=int, default=None, help="budgets of each of our series, beside the peers' peaks"
    )
    parser.add_argument(
        "--peers", choices=["all", "main", "none"], default=None, help="which; default: as the workload"
    )
    parser.add_argument("--only", default=None, help="ways whose name holds this text, plain step and HF flag besides")
    parser.add_argument("--no-compile", action="store_true", help="leave out every way that compiles")
    parser.add_argument("--whole-warm-up", action="store_true", help="every turn begins with a whole step")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default=None, help="default: what the device is for"
    )
    parser.add_argument("--again", action="store_true", help="also what is in the output already")
    return parser


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def read(output: Path) -> dict[str, Any]:
    return json.loads(output.read_text()) if output.is_file() else {"workloads": {}}


def write(output: Path, log: Mapping[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_suffix(".part")
    fresh.write_text(json.dumps(log, indent=1))
    fresh.replace(output)


def wanted_peers(built: Built, options: argparse.Namespace) -> list[Way]:
    """Plain step and HF's flag first, then the peers this run is about."""
    which = PEERS.index(options.peers or built.workload.peers)
    first, flag, *rest = own_peers(built)
    return [
        first,
        flag,
        *(
            way
            for way in [*rest, *lean_peers(built), *library_peers(built)]
            if PEERS.index(way.among) <= which
            and not (way.compiles and options.no_compile)
            and (options.only is None or options.only in way.name)
        ),
    ]


def run_workload(
    workload: Workload, options: argparse.Namespace, device: torch.device, layers: int | None = None
) -> dict[str, Any]:
    """Every point of one workload, measured in this process; of a model with that many `layers`, or its own number."""
    started = time.perf_counter()
    dtype = getattr(torch, options.dtype) if options.dtype else default_dtype()
    built = build(workload, device, dtype, layers)
    say(f"{workload.title}; {dtype}, weights: {built.weights}")
    run = Interleaved(built, say, whole_warm_up=options.whole_warm_up)
    plain, flag, *rest = wanted_peers(built, options)
    planner = make_planner(built, ["compile"])
    predicted = predictions(planner)
    for way in (plain, flag, *rest):
        way.predicted = predicted.get(way.name)
        run.add(way)
    points = min(workload.points, options.points or workload.points)
    share = SMALLEST.get(workload.name, SMALLEST["smollm2"])[0]
    for compiled in (False,) if options.no_compile else (False, True):
        ours = make_planner(built, []) if compiled else planner
        beside = peer_budgets(run.points, run.static_bytes, share, compiled=compiled)
        for way in our_ways(built, ours, points, beside, compiled=compiled):
            if options.only is None or options.only in way.name:
                run.add(way)
    prepared = time.perf_counter() - started
    minutes = options.minutes or MINUTES[workload.peers]
    rounds = run.rounds(options.rounds, started + 60 * minutes)
    if options.more_rounds:
        run.rounds(options.more_rounds, float("inf"), lambda way: way.series == "plain" or "flag" in way.name)
    return {
        "title": workload.title,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": built.weights,
        "rounds": rounds,
        "prepare_seconds": prepared,
        "seconds": time.perf_counter() - started,
        "points": as_json(run.points),
    }


def report(log: Mapping[str, Any], output: Path) -> list[str]:
    """Write table and pictures; the lines that say what holds."""
    lines: list[str] = []
    for name, found in log["workloads"].items():
        said = verdicts(name, found["points"])
        lines += [f"{name}: {verdict}" for verdict in said]
        if any(point["seconds"] for point in found["points"]):
            title = f"{found['title']}, {found['dtype']}"
            output.with_name(f"{output.stem}-{name}.svg").write_text(picture(title, found["points"]))
    output.with_suffix(".md").write_text(page(log, lines, output.stem))
    return lines


def drive(
    known: Mapping[str, Workload], options: argparse.Namespace, device: torch.device, layers: int | None = None
) -> None:
    """Run what is missing of the workloads asked for, report all of them, print what holds."""
    names: list[str] = options.workload or list(known)
    if len(names) == 1:
        (name,) = names
        if name not in read(options.output)["workloads"] or options.again:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peers warn of much that is not the matter here
                found = run_workload(known[name], options, device, layers)
            log = read(options.output)
            log["workloads"][name] = found
            log["conditions"] = conditions(device)
            write(options.output, log)
    else:
        for name in names:  # a process each, so that no memory is left from one to the next
            done = subprocess.run([sys.executable, *sys.argv, "--workload", name], check=False, stdout=sys.stderr)
            if done.returncode:
                say(f"{name}: ended with {done.returncode}")
    for line in report(read(options.output), options.output):
        print(line)


def quieten() -> None:
    """Have profiler and bitsandbytes not say at every start what they are doing."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    parser = make_parser(__doc__, "runs/frontier.json", [*WORKLOADS, *QUICK])
    parser.add_argument("--quick", action="store_true", help="a tiny model, and no compilation")
    options = parser.parse_args()
    if options.quick:
        options.workload, options.no_compile = list(QUICK), True
        options.minutes = options.minutes or 1.0
    chosen = {name: {**WORKLOADS, **QUICK}[name] for name in options.workload or WORKLOADS}
    drive(chosen, options, torch.device("cpu"))


if __name__ == "__main__":
    quieten()
    main()
