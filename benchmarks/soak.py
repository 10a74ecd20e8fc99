"""Hundreds of training steps on batches of many lengths under a budget: does anything grow?

    OMP_NUM_THREADS=2 python benchmarks/soak.py                       # 500 steps of a tiny model, a minute
    OMP_NUM_THREADS=2 python benchmarks/soak.py --shape smollm2       # of SmolLM2, 16 to 128 tokens, some 10 minutes
    OMP_NUM_THREADS=2 python benchmarks/soak.py --plain               # the same without a plan, to compare with

transformers' Trainer with `BudgetCallback`, AdamW. Behind every step: the resident size of the process; every tenth
step also how many hooks, overrides, tensors and plans there are. Behind step --settled nothing may grow: the slope of
the resident size, fitted by least squares, is reported and must stay below 0.2 % of it per 100 steps, and the counts
must be those of then. Writes --output (JSON). Exits with 1 if something grew.

torch itself grows by megabytes for each new shape of a 16-bit product on a CPU (oneDNN's primitives), a plain model as
well. So that this is over by step 50, rows are padded to multiples of 8, and oneDNN's cache is made small.
"""

import argparse
import gc
import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import conditions
from datasets import Dataset
from frontier import quieten, say, write
from lengths import lengths_between
from transformers import Trainer, TrainerCallback, TrainingArguments
from workloads import Workload, build, default_dtype

import rematree
from rematree.execute.override import ForwardOverride
from rematree.planning.planner import Planner

MIB = 2**20
SIZES = {"tiny": (8, 128), "smollm2": (16, 128)}
MULTIPLE = 8  # of which rows are padded to
SLOPE = 0.002  # of the resident size, in 100 steps


def resident_bytes() -> int:
    """Resident size of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def counts(model: Any, callback: rematree.BudgetCallback) -> dict[str, int]:
    """How many there are of what might pile up."""
    gc.collect()
    modules = list(model.modules())
    overrides = 0
    for module in modules:
        forward = module.__dict__.get("forward")
        while isinstance(forward, ForwardOverride):
            overrides += 1
            forward = forward.inner
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
        "overrides": overrides,
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        "plans": len(callback.plans),
    }


class Watch(TrainerCallback):
    """Looks behind every step."""

    def __init__(self, callback: rematree.BudgetCallback, every: int) -> None:
        self._callback = callback
        self._every = every
        self.resident: list[int] = []
        self.seen: dict[int, dict[str, int]] = {}
        self.in_force: dict[str, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        plan = self._callback.in_force
        tokens = "none" if plan is None else str(max(shape[-1] for _, shape, _ in plan.fingerprint.batch))
        self.in_force[tokens] = self.in_force.get(tokens, 0) + 1
        if state.global_step % self._every == 0:
            self.seen[state.global_step] = counts(kwargs["model"], self._callback)
        self.resident.append(resident_bytes())


def slope(values: Sequence[int]) -> float:
    """Of the line of least squares, per step."""
    return statistics.linear_regression(range(len(values)), values).slope


def data_of(lengths: Sequence[int], vocabulary: int) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = -(-max(len(example["input_ids"]) for example in examples) // MULTIPLE) * MULTIPLE
    filled = {
        name: torch.tensor([[*example[name], *[value] * (longest - len(example[name]))] for example in examples])
        for name, value in (("input_ids", 0), ("labels", -100))
    }
    return {**filled, "attention_mask": (filled["labels"] != -100).long()}


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Train and watch."""
    low, high = SIZES[options.shape]
    workload = Workload(f"{options.shape}-soak", options.shape, "lora", 2, high, dropout=0.05)
    built = build(workload, torch.device("cpu"), default_dtype())
    built.batch["attention_mask"] = torch.ones_like(built.batch["input_ids"])
    built.batch["attention_mask"][-1, -1] = 0
    planner = Planner(built.model, built.batch)
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    del planner
    # Half-way: long batches must recompute, short ones need not.
    callback = rematree.BudgetCallback((least + most) // 2, say=say)
    watch = Watch(callback, options.every)
    trainer = Trainer(
        model=built.model,
        args=TrainingArguments(
            output_dir=str(options.output.parent / "soak"),
            per_device_train_batch_size=2,
            max_steps=options.steps,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=options.steps,
            seed=5,
        ),
        train_dataset=data_of(lengths_between(low, high, 400), built.model.config.vocab_size),
        data_collator=collate,
        callbacks=[watch] if options.plain else [callback, watch],
    )
    trainer.train()
    return {
        "conditions": conditions(torch.device("cpu")),
        "title": workload.title,
        "steps_by_plan": watch.in_force,
        "resident_bytes": watch.resident,
        "counts": watch.seen,
        "hooks_after": counts(built.model, callback),
    }


def verdicts(log: dict[str, Any], settled: int) -> list[tuple[bool, str]]:
    """What holds behind step `settled`."""
    later = log["resident_bytes"][settled:]
    rising, mean = slope(later), statistics.fmean(later)
    lines = [
        (
            rising * 100 <= SLOPE * mean,
            f"resident size behind step {settled}: {rising / 1024:+.2f} KiB a step over {len(later)} steps, "
            f"{100 * rising / mean:+.3%} of {mean / MIB:.0f} MiB in 100 steps, at most {SLOPE:.1%}",
        )
    ]
    seen = {step: found for step, found in log["counts"].items() if step >= settled}
    first, last = seen[min(seen)], seen[max(seen)]
    lines += [
        (last[name] <= count, f"{name}: {count} at step {min(seen)}, {last[name]} at step {max(seen)}")
        for name, count in first.items()
    ]
    lines.append((len(log["steps_by_plan"]) == last["plans"] or not last["plans"], f"steps: {log['steps_by_plan']}"))
    lines.append((log["hooks_after"]["overrides"] == 0, "nothing is left on the model after training"))
    return lines


def main() -> None:
    # 1024 by default, which a run of many shapes takes thousands of steps to fill. Read when the first one is made.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/soak.json"))
    parser.add_argument("--shape", choices=list(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--settled", type=int, default=50, help="step behind which nothing may grow")
    parser.add_argument("--every", type=int, default=10, help="steps between two counts")
    parser.add_argument("--plain", action="store_true", help="no plan")
    options = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = soak(options)
    found = verdicts(log, options.settled)
    write(options.output, {**log, "verdicts": found})
    for holds, text in found:
        print(f"{'PASS' if holds else 'MISS'}  {text}")
    sys.exit(not all(holds for holds, _ in found))


if __name__ == "__main__":
    quieten()
    main()
