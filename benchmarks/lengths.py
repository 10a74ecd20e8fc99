"""Batches of 64 to 2048 tokens: a plan for each of a few lengths, beside what one setting for all of them costs.

    OMP_NUM_THREADS=2 python benchmarks/lengths.py                    # SmolLM2, some 9 minutes on two quiet cores
    OMP_NUM_THREADS=2 python benchmarks/lengths.py --page docs/lengths.md
    python benchmarks/lengths.py --quick                              # a tiny model, for the tests

The budget is what Hugging Face's flag needs for the longest batch. Four ways of stepping: the flag; our plan for the
longest batch, for all of them; our plans by length; and no recomputation, for the batches where that fits the budget.
Each batch is stepped by every way in turn, the order turned round from batch to batch; a turn begins with a step on a
few tokens that is thrown away. Seconds of a batch are medians over rounds. Lengths are spread evenly on a logarithmic
scale, the longest always among them, one row a batch. At least one round is made, none begins that would end after
--minutes.

Writes --output (JSON) and beside it, or to --page, a table; prints what holds.
"""

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import conditions
from frontier import quieten, say, write
from lengths_page import page, verdicts
from peers import hf_flag, plain
from workloads import Built, Workload, build, default_dtype, plain_loss, step

import rematree
from rematree.measure import PeakMeter, storage_bytes
from rematree.planning.ladder import build_ladder, table
from rematree.planning.planner import Planner
from rematree.quantised import hidden_tensors
from rematree.units import format_bytes

FEW_TOKENS = 16
FLAG, FIXED, BY_LENGTH, NOTHING = "HF flag", "one plan", "plans by length", "no recomputation"
SIZES = {"smollm2": (64, 2048), "tiny": (16, 256)}
Batch = dict[str, torch.Tensor]


@dataclass
class Way:
    """One way of stepping batches of any length.

    Attributes:
        name: Of the way.
        around: A context in which the model steps this way.
        peak_bytes: Largest measured peak, weights included: of the longest batch, and of others where that may be more.
        seconds: Of each batch, by length; medians of `rounds`.
        rounds: All that was measured, by length.
        losses: Of the first round, by length.
    """

    name: str
    around: Callable[[], AbstractContextManager[Any]]
    peak_bytes: int = 0
    seconds: dict[int, float] = field(default_factory=dict[int, float])
    rounds: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    losses: dict[int, float] = field(default_factory=dict[int, float])


def lengths_between(low: int, high: int, count: int) -> list[int]:
    """`count` lengths, evenly spread on a logarithmic scale, in an order that is always the same."""
    spread = [round(low * (high / low) ** (i / (count - 1))) for i in range(count)]
    random.Random(5).shuffle(spread)
    return spread


def batch_of(built: Built, length: int) -> Batch:
    """The workload's batch, cut to `length` tokens."""
    return {name: value[:, :length].contiguous() for name, value in built.batch.items()}


def peak_of(built: Built, way: Way, length: int) -> int:
    """Allocated bytes at the peak of one step, weights included."""
    batch = batch_of(built, length)
    model = built.model
    held = storage_bytes([*model.parameters(), *model.buffers(), *hidden_tensors(model), *batch.values()])
    with way.around(), PeakMeter(model, None, batch) as meter:
        step(model, batch, plain_loss)
    forget_gradients(model)
    return meter.peak_bytes - meter.start_bytes + held


def forget_gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def time_step(built: Built, way: Way, length: int) -> tuple[float, float]:
    """Seconds and loss of one step, behind one on a few tokens."""
    batch = batch_of(built, length)
    with way.around():
        step(built.model, batch_of(built, FEW_TOKENS), plain_loss)
        forget_gradients(built.model)
        torch.manual_seed(length)
        started = time.perf_counter()
        loss = step(built.model, batch, plain_loss)
        seconds = time.perf_counter() - started
    forget_gradients(built.model)
    return seconds, loss.item()


def plans_of(built: Built, lengths: Sequence[int], budget: int) -> tuple[list[rematree.Plan], float]:
    """Our plans for these lengths within `budget`, and the seconds it took to make them."""
    started = time.perf_counter()
    planner = Planner(built.model, built.batch, optimizer="none")
    ladder = build_ladder(planner, budget, dict.fromkeys(lengths, 1.0), partial(batch_of, built))
    plans = list(ladder.plans(budget))
    return plans, time.perf_counter() - started


def run(built: Built, lengths: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured of one workload."""
    until = time.perf_counter() + 60 * options.minutes
    longest = max(lengths)
    flag = Way(FLAG, lambda: hf_flag(built))
    flag.peak_bytes = budget = peak_of(built, flag, longest)
    say(f"{built.workload.title}: the flag needs {format_bytes(budget)} for the longest batch")
    plans, planning = plans_of(built, lengths, budget)
    *smaller, plan = plans
    say(f"planned in {planning:.1f} s:\n{table(plans)}")
    ways = [
        flag,
        Way(FIXED, lambda: rematree.apply(plan, built.model)),
        Way(BY_LENGTH, lambda: rematree.apply(plan, built.model, smaller=smaller)),
        Way(NOTHING, plain),
    ]
    for way in ways[1:3]:
        tried = {longest} if way.name == FIXED else {longest, *(covered(lengths, each) for each in plans)}
        way.peak_bytes = max(peak_of(built, way, length) for length in tried)
    # Where no recomputation fits the budget; the bytes rise with the length.
    fits, ordered = 0, sorted(lengths)
    while fits < len(ordered) and (peak := peak_of(built, ways[3], ordered[fits])) <= budget:
        ways[3].peak_bytes = peak
        fits += 1
    least = ordered[fits] if fits < len(ordered) else longest + 1
    made = 0
    took = 0.0
    while made < options.rounds and (made == 0 or time.perf_counter() + took < until):
        took = one_round(built, ways, lengths, least, made)
        made += 1
        say(f"round {made}: {took:.0f} s")
    return {
        "title": built.workload.title,
        "weights": built.weights,
        "dtype": str(next(built.model.parameters()).dtype).removeprefix("torch."),
        "lengths": list(lengths),
        "budget_bytes": budget,
        "planning_seconds": planning,
        "rounds": made,
        "plans": [as_row(each) for each in plans],
        "ways": [asdict_way(way) for way in ways],
    }


def covered(lengths: Sequence[int], plan: rematree.Plan) -> int:
    """The longest of `lengths` that `plan` is for."""
    most = max(shape[1] for _, shape, _ in plan.fingerprint.batch)
    return max(length for length in lengths if length <= most)


def one_round(built: Built, ways: Sequence[Way], lengths: Sequence[int], least: int, number: int) -> float:
    """Every batch by every way; seconds of the round. Batches of `least` tokens or more do not fit whole."""
    started = time.perf_counter()
    for place, length in enumerate(lengths):
        turn = [way for way in ways if way.name != NOTHING or length < least]
        for way in turn if (place + number) % 2 == 0 else reversed(turn):
            seconds, loss = time_step(built, way, length)
            way.rounds.setdefault(length, []).append(seconds)
            way.seconds[length] = statistics.median(way.rounds[length])
            way.losses.setdefault(length, loss)
    return time.perf_counter() - started


def as_row(plan: rematree.Plan) -> Mapping[str, Any]:
    return {
        "tokens": max(shape[1] for _, shape, _ in plan.fingerprint.batch),
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "predicted_seconds": plan.predicted_step_seconds,
        "recomputation_seconds": plan.extra_seconds,
        "loss_chunk_rows": plan.loss_chunk_rows,
        "exact": plan.exact,
    }


def asdict_way(way: Way) -> dict[str, Any]:
    around, way.around = way.around, lambda: plain()
    row = asdict(way)
    way.around = around
    del row["around"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lengths.json"))
    parser.add_argument("--page", type=Path, default=None, help="where the table goes; default: beside the output")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="at most")
    parser.add_argument("--minutes", type=float, default=9.0, help="all included")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    options = parser.parse_args()
    shape = "tiny" if options.quick else "smollm2"
    low, high = SIZES[shape]
    workload = Workload(f"{shape}-lengths", shape, "lora", 1, high, dropout=options.dropout)
    device = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = build(workload, device, default_dtype())
        found = run(built, lengths_between(low, high, options.batches), options)
    log = {"conditions": conditions(device), **found}
    write(options.output, log)
    lines = verdicts(log)
    (options.page or options.output.with_suffix(".md")).write_text(page(log, lines))
    for line in lines:
        print(line)


if __name__ == "__main__":
    quieten()
    main()
