"""Several ranks on this machine: losses beside one process, peaks beside the budget and the prediction.

    python benchmarks/ranks.py                   # two and four processes over gloo, writes docs/ranks.md
    python benchmarks/ranks.py --quick           # two processes, a smaller model, prints the page
    python benchmarks/ranks.py --engine zero3    # that engine alone, prints the page; zero2 and zero3 need DeepSpeed,
                                                 # and are left out of the others where that is not installed

Every rank takes its rows of a batch of eight; one process takes all of them. Dropout is off, or the ranks would draw
other masks than the one process. A rank's peak is summed from the profiler's allocation events, over a gloo group that
holds nothing of a collective that has returned (`rematree.gloo`).
"""

import argparse
import gc
import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import rematree
from rematree.finetune.result import library_versions
from rematree.gloo import Settling, start_settled_gloo
from rematree.referee.ranks import ENGINES, Engine, Stage3, base_optimizer
from rematree.units import format_bytes
from rematree.verification import PEAK_SLACK

PAGE = Path(__file__).parent.parent / "docs" / "ranks.md"
ROWS, STEPS = 8, 4
DEEPSPEED = frozenset({"zero2", "zero3"})
LOSS_TOLERANCE, PEAK_TOLERANCE = 1e-4, 0.05


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    tokens: int
    vocabulary: int


BUCKET = 1 << 20  # elements, of ZeRO-2 and -3
# Elements; a block has 0.7 million of them. The defaults would keep all weights of so small a model whole.
STAGE_3 = Stage3(prefetch=1 << 18, persistence_threshold=1000, max_live=1 << 22, max_reuse=1 << 19)
FULL, QUICK = Size(256, 16, 128, 2000), Size(64, 4, 32, 300)


@dataclass(frozen=True)
class Case:
    ranks: rematree.Ranks
    lora: bool
    size: Size
    plan: rematree.Plan


def build(size: Size, lora: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=size.vocabulary,
        pad_token_id=0,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return model.train()


def batch_of(size: Size, number: int, rows: slice) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, size.vocabulary, (ROWS, size.tokens), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids[rows], "labels": ids[rows]}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def train(under: nn.Module, optimizer: torch.optim.Optimizer | None, size: Size, rows: slice) -> list[float]:
    return [step(under, optimizer, batch_of(size, number, rows)) for number in range(STEPS)]


def step(under: Any, optimizer: torch.optim.Optimizer | None, batch: dict[str, torch.Tensor]) -> float:
    """One step; without an optimizer `under` is DeepSpeed's engine, which has its own."""
    loss = under(**batch).loss
    if optimizer is None:
        under.backward(loss)
        under.step()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def engine_of(model: nn.Module, ranks: rematree.Ranks) -> nn.Module:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    import deepspeed  # pyright: ignore[reportMissingImports]

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    told, stage3 = ranks.stage3, dict[str, int]()
    if ranks.engine == "zero3":
        stage3["stage3_prefetch_bucket_size"] = told.prefetch
        stage3["stage3_param_persistence_threshold"] = told.persistence_threshold
        stage3["stage3_max_live_parameters"] = told.max_live
        stage3["stage3_max_reuse_distance"] = told.max_reuse
    config = {
        "train_micro_batch_size_per_gpu": ROWS // ranks.count,
        "zero_optimization": {"stage": int(ranks.engine[-1]), "reduce_bucket_size": ranks.bucket_elements, **stage3},
        "gradient_clipping": 0.0,  # 1.0 where nothing is said; the other engines do not clip
        "zero_allow_untested_optimizer": True,  # torch's AdamW, and on a CPU without DeepSpeed's own in its place
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=adamw(model), config=config)[0]


def wrapped(model: nn.Module, ranks: rematree.Ranks) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """What runs, and the optimizer that must be stepped beside it."""
    if ranks.engine in DEEPSPEED:
        return engine_of(model, ranks), None
    if ranks.engine == "ddp":
        # All ranks have the same weights; sent around in a flat copy, they would at times be counted as buckets.
        return nn.parallel.DistributedDataParallel(model, init_sync=False), adamw(model)
    for module in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(module)
    fully_shard(model)
    return model, adamw(model)


def peak(case: Case, rows: slice) -> int:
    """Of the second step, of ZeRO-3 of the third; DDP's buckets, which no tensor shows, as what wrapping leaves."""
    model, settling = build(case.size, case.lora), Settling()
    batch = batch_of(case.size, 0, rows)
    with rematree.PeakMeter(model, None, batch) as wrapping:
        under, optimizer = wrapped(model, case.ranks)
    if optimizer is None:
        settling.every_collective_of_deepspeed()
    else:
        settling.every_collective_of(model)
    buckets = wrapping.end_bytes - wrapping.start_bytes if case.ranks.engine == "ddp" else 0
    zero3 = case.ranks.engine == "zero3"
    stepped = under.optimizer if zero3 else base_optimizer(optimizer or under.optimizer)
    with rematree.apply(case.plan, under):
        for _ in range(3 if zero3 else 2):  # it knows the order of modules from the second on
            gc.collect()
            settling.now()
            with rematree.PeakMeter(model, stepped, batch, hidden=True) as meter:
                step(under, optimizer, batch)
    return meter.peak_bytes + buckets


def rank_main(rank: int, count: int, port: int, cases: list[Case], folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    patience = timedelta(minutes=10)
    store = distributed.TCPStore("127.0.0.1", port, count, rank == 0, timeout=patience)
    start_settled_gloo(rank, count, store, patience)
    rows = slice(rank, None, count)
    found: list[tuple[list[float], int]] = []
    for case in cases:
        model = build(case.size, case.lora)
        under, optimizer = wrapped(model, case.ranks)
        with rematree.apply(case.plan, under):
            losses = train(under, optimizer, case.size, rows)
        del model, under, optimizer
        found.append((losses, peak(case, rows)))
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def run(count: int, cases: list[Case], folder: Path) -> list[list[tuple[list[float], int]]]:
    """What every rank found, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_main, (count, port, cases, str(folder)), nprocs=count)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def cases_of(count: int, size: Size, engines: Sequence[Engine]) -> list[Case]:
    """A budget a quarter of the way from the smallest peak of any plan to that of the plain step."""
    found: list[Case] = []
    for ranks in (rematree.Ranks(engine, count, bucket_elements=BUCKET, stage3=STAGE_3) for engine in engines):
        for lora in (True, False):
            rows = slice(0, None, count)
            planner = rematree.Planner(build(size, lora), batch_of(size, 0, rows), ranks=ranks)
            low, high = planner.min_peak_bytes(), planner.plain_step()[0]
            found.append(Case(ranks, lora, size, planner.plan(low + (high - low) // 4)))
    return found


def lines_of(count: int, size: Size, engines: Sequence[Engine], folder: Path) -> tuple[list[str], bool]:
    cases = cases_of(count, size, engines)
    by_rank = run(count, cases, folder)
    lines, good = list[str](), True
    for index, case in enumerate(cases):
        model = build(size, case.lora)
        alone = torch.tensor(train(model, adamw(model), size, slice(None)))
        losses = torch.tensor([found[index][0] for found in by_rank]).mean(0)
        off = float((losses - alone).abs().max())
        measured = [found[index][1] for found in by_rank]
        highest, plan = max(measured), case.plan
        predicted = plan.predicted_peak_bytes - PEAK_SLACK
        budget = plan.budget_bytes or 0
        error = predicted / highest - 1
        holds = off <= LOSS_TOLERANCE and highest <= budget and abs(error) <= PEAK_TOLERANCE
        good = good and holds
        lines.append(
            f"| {case.ranks.title} | {count} | {'LoRA' if case.lora else 'all'} | {format_bytes(budget)} "
            f"| {format_bytes(predicted)} | {format_bytes(min(measured))} to {format_bytes(highest)} | {error:+.2%} "
            f"| {float(alone[0]):.4f} to {float(alone[-1]):.4f} | {off:.1e} | {'yes' if holds else 'NO'} |"
        )
        sys.stderr.write(lines[-1] + "\n")
    return lines, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    told = parser.parse_args()
    engines = told.engine or [name for name in ENGINES if name not in DEEPSPEED or find_spec("deepspeed")]
    quick, needs_deepspeed = told.quick, DEEPSPEED & set(engines)
    if told.engine is None and not needs_deepspeed:
        print("DeepSpeed is not installed: no lines for ZeRO-2 and ZeRO-3", file=sys.stderr)
    size = QUICK if quick else FULL
    warnings.simplefilter("ignore")
    lines, good = list[str](), True
    with tempfile.TemporaryDirectory() as folder:
        for count in (2,) if quick else (2, 4):
            more, holds = lines_of(count, size, engines, Path(folder))
            lines, good = lines + more, good and holds
    named = library_versions()
    if needs_deepspeed:
        named["deepspeed"] = version("deepspeed")
    versions = ", ".join(f"{name} {number}" for name, number in named.items())
    text = "\n".join(
        [
            "# Several ranks",
            "",
            "Written by `python benchmarks/ranks.py`. Real processes over gloo, one thread each, fp32, AdamW; a Llama "
            f"of {size.layers} layers, width {size.width}, vocabulary {size.vocabulary}; {ROWS} rows of {size.tokens} "
            f"tokens in all, {STEPS} steps.",
            "",
            f"A line holds if losses equal those of one process that takes all rows within {LOSS_TOLERANCE} (the order "
            f"of sums differs), every rank stays within the budget, and the peak of the rank that needs most was "
            f"predicted within {PEAK_TOLERANCE:.0%}. Under ZeRO-2 (buckets of {BUCKET} elements) ranks differ: the "
            "last one's part of the gradients comes first. ZeRO-3 has such buckets too; its stage3_ settings are "
            f"prefetch_bucket_size {STAGE_3.prefetch}, param_persistence_threshold {STAGE_3.persistence_threshold}, "
            f"max_live_parameters {STAGE_3.max_live}, max_reuse_distance {STAGE_3.max_reuse}. "
            "Predictions are made in one process, without the engine; "
            f"the {format_bytes(PEAK_SLACK)} that every plan counts for host tensors are left out of them here. "
            "gloo's copies of what it gathers and sums are counted while a collective runs.",
            "",
            "gloo's threads drop a collective's tensors a moment after its caller goes on, and torch's profiler does "
            "not see a free in those threads. Both are left out of the measurement: its group has one worker thread, "
            "and a tiny second collective after each waits until that thread has dropped the first (`rematree.gloo`). "
            "In a step without this, a rank may hold a gathered block, or a copy of its gradients, a little longer; "
            "that is gloo on a CPU, NCCL makes no such copies.",
            "",
            "| engine | ranks | trained | budget of a rank | predicted | measured | error | one process' loss "
            "| largest difference | holds |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            versions,
            "",
        ]
    )
    if quick or told.engine:
        sys.stdout.write(text)
    else:
        PAGE.write_text(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
