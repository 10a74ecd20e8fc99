"""QLoRA on the demo's model and data: peaks predicted and measured, training at half of HF's flag, cost of upcasting.

    python benchmarks/qlora.py peaks --bits 4   # smallest budget, half of gradient_checkpointing=True, plain
    python benchmarks/qlora.py train --bits 4   # a short run at that half; the adapter is loaded with plain PEFT
    python benchmarks/qlora.py upcast           # dtype of the residual stream, bytes between layers, peak

Each part adds its section to --output and prints it as a table. Peaks are allocated bytes of one step, optimizer state
included; a profiled step is not timed. For a comparison of times see `rematree train --compare-hf`, which takes turns.
Exits with 1 if a prediction is off by more than 3 %, the held-out loss does not fall, or the adapter does not load to
the same loss.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import rematree
from rematree.finetune.compare import hf_checkpointing, train_step, weights_kept
from rematree.finetune.config import TrainConfig
from rematree.finetune.demo import demo_settings
from rematree.finetune.evaluate import heldout_loss
from rematree.finetune.job import run
from rematree.finetune.result import device_name, library_versions
from rematree.finetune.setup import Setup, add_adapters, load_base, prepare
from rematree.fingerprint import describe_model
from rematree.measure import PeakMeter, storage_bytes
from rematree.observation.observe import Twin
from rematree.planning.planner import Planner
from rematree.plans import Action, Decision, Levers, Plan
from rematree.quantised import hidden_tensors
from rematree.referee.simulate import Referee
from rematree.regions import find_chain
from rematree.table import render_table
from rematree.units import MIB, format_bytes, format_seconds

TOLERANCE = 0.03
# Plain bitsandbytes evaluates 4-bit weights with scales rounded to bfloat16 where the CPU has such instructions.
RELOAD_TOLERANCE = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["peaks", "train", "upcast"])
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4)
    parser.add_argument("--dtype", default=None, help="of the base model; float32, for upcast bfloat16")
    parser.add_argument("--output", type=Path, default=Path("runs/qlora.json"))
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if options.part == "upcast" else "float32")
    changes: dict[str, Any] = {"dtype": dtype, f"load_in_{options.bits}bit": True, "compare_hf": False}
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    folder = options.output.parent / f"qlora-{options.bits}bit"
    config = TrainConfig(output_dir=folder, budget=1, **{**demo_settings(), **changes})
    section = f"{options.part}-{options.bits}bit-{dtype}"
    match options.part:
        case "peaks":
            result = peaks(config)
        case "train":
            known = found.get(f"peaks-{options.bits}bit-{dtype}")
            if known is None:
                sys.exit("run the part peaks first: it finds the budget")
            result = train(config, known["hf_checkpointing_peak_bytes"] // 2)
        case _:
            result = upcasts(config)
    where = {"device": device_name(torch.device("cpu")), "versions": library_versions()}
    found[section] = {**result, **where, "config": dataclasses.asdict(config)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1, default=str))
    sys.exit(0 if result["holds"] else 1)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(setup: Setup, config: TrainConfig, around: Callable[[], AbstractContextManager[Any]]) -> tuple[int, float]:
    """Peak bytes of a step and seconds of the one before it."""
    with weights_kept(setup.model, config.learning_rate) as optimizer, around():
        train_step(setup.model, optimizer, setup.batch, config.max_grad_norm)
        start = time.perf_counter()
        train_step(setup.model, optimizer, setup.batch, config.max_grad_norm)
        seconds = time.perf_counter() - start
        with PeakMeter(setup.model, optimizer, setup.batch) as meter:
            train_step(setup.model, optimizer, setup.batch, config.max_grad_norm)
    return meter.peak_bytes, seconds


def peaks(config: TrainConfig) -> dict[str, Any]:
    setup = prepare(config, say)
    setup.model.train()
    hf_peak, _ = measure(setup, config, lambda: hf_checkpointing(setup.model))
    planner = Planner(setup.model, setup.batch)
    least = planner.plan(planner.min_peak_bytes())
    half = planner.plan(hf_peak // 2)
    plain = planner.survey.plain
    # No decision: nothing is recomputed and the loss is the model's own; int8 layers still keep no input.
    nothing = dataclasses.replace(half, decisions={}, loss_chunk_rows=None)
    wanted = [
        ("smallest budget", least, least.predicted_allocated_bytes, least.predicted_step_seconds),
        ("half of HF's flag", half, half.predicted_allocated_bytes, half.predicted_step_seconds),
        ("no recomputation", nothing, plain.peak_bytes, plain.seconds),
    ]
    rows: list[dict[str, Any]] = []
    for name, plan, predicted, predicted_seconds in wanted:
        measured, seconds = measure(setup, config, lambda plan=plan: rematree.apply(plan, setup.model))
        rows.append(
            {
                "what": name,
                "predicted_peak_bytes": predicted,
                "measured_peak_bytes": measured,
                "predicted_step_seconds": predicted_seconds,
                "measured_step_seconds": seconds,
                "loss_chunk_rows": plan.loss_chunk_rows,
            }
        )
    library, _ = measure(setup, config, nullcontext)
    cells = [
        (
            row["what"],
            format_bytes(row["predicted_peak_bytes"]),
            format_bytes(row["measured_peak_bytes"]),
            f"{row['predicted_peak_bytes'] / row['measured_peak_bytes'] - 1:+.2%}",
            format_seconds(row["predicted_step_seconds"]),
            format_seconds(row["measured_step_seconds"]),
        )
        for row in rows
    ]
    cells.append(("HF's flag", "", format_bytes(hf_peak), "", "", ""))
    cells.append(("plain library", "", format_bytes(library), "", "", ""))
    headers = ("step", "predicted peak", "measured", "off by", "predicted time", "measured")
    print(render_table(headers, cells, right={1, 2, 3, 4, 5}))
    return {
        "rows": rows,
        "hf_checkpointing_peak_bytes": hf_peak,
        "plain_library_peak_bytes": library,
        "holds": all(
            abs(row["predicted_peak_bytes"] / row["measured_peak_bytes"] - 1) <= TOLERANCE
            and row["measured_peak_bytes"] <= row["predicted_peak_bytes"] * (1 + 1e-3)
            for row in rows
        ),
    }


def train(config: TrainConfig, budget: int) -> dict[str, Any]:
    result = run(dataclasses.replace(config, budget=budget), Console(stderr=True))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    packed = BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit:
        packed = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    source = json.loads((Path(result.adapter) / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(source, quantization_config=packed, dtype=dtype)
    data = prepare(config, say).data
    reloaded = heldout_loss(PeftModel.from_pretrained(base, result.adapter), data.heldout, config.max_eval_examples)
    before, after = result.heldout_loss_before, result.heldout_loss_after
    assert before is not None
    assert after is not None
    assert reloaded is not None
    rows = [
        ("budget, half of HF's flag", format_bytes(result.budget_bytes)),
        (
            "peak predicted, measured",
            f"{format_bytes(result.predicted_peak_bytes)}, {format_bytes(result.measured_peak_bytes)}",
        ),
        ("held-out loss before, after", f"{before:.4f}, {after:.4f}"),
        ("adapter in plain PEFT", f"{reloaded:.4f}"),
    ]
    print(render_table(("training", f"{len(result.losses)} steps"), rows, right={1}))
    return {
        **result.to_dict(),
        "heldout_loss_plain_peft": reloaded,
        "holds": after < before
        and abs(reloaded / after - 1) <= RELOAD_TOLERANCE
        and result.measured_peak_bytes <= result.budget_bytes
        and abs(result.predicted_peak_bytes / result.measured_peak_bytes - 1) <= TOLERANCE,
    }


def upcasts(config: TrainConfig) -> dict[str, Any]:
    """Every layer recomputed, so that what is kept is the piece of the residual stream between two layers."""
    rows: list[dict[str, Any]] = []
    batch = prepare(config, say).batch
    for upcast in ("all", "norms", "none"):
        base = load_base(config).model
        prepared = rematree.prepare_model_for_kbit_training(base, False, upcast=upcast)
        model = add_adapters(prepared, config)
        weights = [p for p in model.parameters() if not p.requires_grad]
        blocks = find_chain(model).blocks
        inputs = block_inputs(model, blocks, batch)
        twin = Twin(model, batch)
        referee = Referee(twin, blocks, rematree.Measured(torch.device("cpu")))
        decisions = {path: Decision(Action.RECOMPUTE) for path in blocks}
        predicted = referee.run(Levers(decisions)).peak_bytes
        plan = Plan(decisions, None, None, 0, 0.0, (), (), describe_model(model))
        with weights_kept(model, config.learning_rate) as optimizer, rematree.apply(plan, model):
            train_step(model, optimizer, batch, config.max_grad_norm)
            with PeakMeter(model, optimizer, batch) as meter:
                train_step(model, optimizer, batch, config.max_grad_norm)
        rows.append(
            {
                "upcast": upcast,
                "residual_dtype": sorted({str(dtype).removeprefix("torch.") for dtype, _ in inputs}),
                "boundary_bytes": sorted({size for _, size in inputs}),
                "frozen_weight_bytes": storage_bytes([*weights, *hidden_tensors(model)]),
                "predicted_peak_bytes": predicted,
                "measured_peak_bytes": meter.peak_bytes,
            }
        )
    cells = [
        (
            row["upcast"],
            ", ".join(row["residual_dtype"]),
            ", ".join(f"{size / MIB:.2f} MiB" for size in row["boundary_bytes"]),
            format_bytes(row["frozen_weight_bytes"]),
            format_bytes(row["predicted_peak_bytes"]),
            format_bytes(row["measured_peak_bytes"]),
            f"{row['predicted_peak_bytes'] / row['measured_peak_bytes'] - 1:+.2%}",
        )
        for row in rows
    ]
    headers = ("upcast", "residual stream", "between layers", "frozen weights", "predicted peak", "measured", "off by")
    print(render_table(headers, cells, right={2, 3, 4, 5, 6}))
    return {
        "rows": rows,
        "holds": all(abs(row["predicted_peak_bytes"] / row["measured_peak_bytes"] - 1) <= TOLERANCE for row in rows),
    }


def block_inputs(
    model: nn.Module, blocks: tuple[str, ...], batch: dict[str, torch.Tensor]
) -> list[tuple[torch.dtype, int]]:
    """Dtype and bytes of what each block is given."""
    seen: list[tuple[torch.dtype, int]] = []
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs: seen.append((inputs[0].dtype, inputs[0].numel() * inputs[0].element_size()))
        )
        for path in blocks
    ]
    with torch.no_grad():
        model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return seen


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    main()
