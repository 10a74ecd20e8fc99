"""Training under a hard limit of the operating system (RLIMIT_DATA): who dies of memory, and what a plan says before.

    python benchmarks/hard_limit.py

Every run is a process of its own. It imports what it needs, then limits its data segment to what it has plus an
allowance, then makes the model and trains.

1. Under an allowance between what the plan and what Hugging Face's flag need, the plain step must die of memory, the
   flag must die of memory, and the plan must complete.
2. Under an allowance below the smallest plan, planning must refuse before a weight is made, and forcing the smallest
   plan to run must die of memory.

Exits with 0 only if all of that happened; the table says what did.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rematree.table import render_table
from rematree.units import KIB, format_bytes

DIED, REFUSED = 17, 3  # exit codes of a child: out of memory, plan infeasible
ROWS, TOKENS, VOCABULARY = 4, 512, 32000
# The budget in smallest peaks. The allowance is larger: Python and libraries need memory of their own.
ROOM = 1.1
# Larger tensors are mapped one by one, in every run alike: a heap would keep what is freed, in pieces that fit nothing.
MAPPED_FROM = 256 * KIB


def data_bytes() -> int:
    """Private writable memory of this process, which is what RLIMIT_DATA limits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData")).split()[1]) * KIB


def limit_data(allowance: int) -> None:
    ctypes.CDLL(None).malloc_trim(0)  # what the imports have freed would be memory beside the limit
    limit = data_bytes() + allowance
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def make_model(weights: Path | None = None) -> Any:
    """A Llama of 46 million weights with LoRA; its weights made, or left in an empty file that nothing reads."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("meta") if weights else nullcontext():
        model: Any = transformers.LlamaForCausalLM(config)
        model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"))
    if weights is not None:
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, tensor in kind.items():
                    if tensor is not None:
                        kind[name] = _on_file(weights, tensor)
    return model.train()


def _on_file(path: Path, tensor: Any) -> Any:
    """A tensor like `tensor` in a sparse file of its own, mapped shared: no data segment, and no disk until written."""
    import torch

    with tempfile.NamedTemporaryFile(dir=path) as file:
        flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    found = flat.view(tensor.shape)
    return torch.nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else found


def make_batch() -> dict[str, Any]:
    import torch

    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def make_planner(folder: Path) -> Any:
    import rematree

    model = make_model(folder)
    # A fixed roofline: nothing is run for its price, and the plans are the same on every machine.
    return rematree.Planner(model, make_batch(), cost=rematree.Roofline(5e10, 1e10))


def import_all() -> None:
    """Everything a run imports, before there is a limit."""
    import peft
    import transformers.models.llama.modeling_llama

    import rematree
    import rematree.finetune.compare

    assert peft
    assert transformers
    assert rematree.Planner
    assert rematree.apply


def predict(folder: Path) -> dict[str, int]:
    """Peaks of the plain step, of the flag and of the smallest plan, which is stored; from a model without weights."""
    planner = make_planner(folder)
    least = planner.min_peak_bytes()
    (folder / "least.json").write_text(planner.plan(least).to_json())
    return {"plain": planner.plain_step()[0], "flag": planner.every_layer_step()[0], "least": least}


def plan(folder: Path, allowance: int, budget: int) -> dict[str, Any]:
    """Plan under the limit, before there is a weight; exits with REFUSED if nothing fits the budget."""
    from rematree.errors import InfeasibleBudgetError

    import_all()
    limit_data(allowance)
    try:
        made = make_planner(folder).plan(budget)
    except InfeasibleBudgetError as error:
        print(json.dumps({"said": error.message}), flush=True)
        sys.exit(REFUSED)
    (folder / "plan.json").write_text(made.to_json())
    return {"said": f"predicted peak {format_bytes(made.predicted_peak_bytes)}"}


def train(way: str, folder: Path, allowance: int) -> dict[str, Any]:
    """Two steps under the limit; exits with DIED if memory runs out."""
    import torch

    import rematree
    from rematree.finetune.compare import hf_checkpointing, train_step
    from rematree.plans import Plan

    import_all()
    batch = make_batch()
    limit_data(allowance)
    try:
        model = make_model()
        ways = {
            "plain": nullcontext,
            "flag": lambda: hf_checkpointing(model),
        }
        stored = folder / f"{way}.json"
        with ways[way]() if way in ways else rematree.apply(Plan.from_json(stored.read_text()), model):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
            losses = [train_step(model, optimizer, batch, 1.0) for _ in range(2)]
    except (MemoryError, RuntimeError) as error:
        text = (str(error).splitlines() or ["MemoryError"])[0]
        if not isinstance(error, MemoryError) and "memory" not in text:
            raise
        print(json.dumps({"said": text[:100]}), flush=True)
        os._exit(DIED)  # without memory an interpreter may not get through its own end
    return {"said": f"losses {losses[0]:.3f}, {losses[1]:.3f}"}


def child(part: str, folder: Path, **numbers: int) -> tuple[int, dict[str, Any]]:
    """Run `part` of this file in a process of its own: its exit code and what it printed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--folder", str(folder)]
    command += ["--numbers", json.dumps(numbers)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MAPPED_FROM)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return done.returncode, {"said": (done.stderr.strip().splitlines() or ["nothing"])[-1][:100]}
    return done.returncode, json.loads(lines[-1])


def run(output: Path) -> bool:
    start = time.perf_counter()
    rows: list[tuple[str, str, str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, peaks = child("predict", folder)
        if code:
            sys.exit(f"prediction failed: {peaks['said']}")
        between = (peaks["least"] + peaks["flag"]) // 2
        below = int(peaks["least"] * 0.7)
        wanted = [
            ("plan, before loading", "plan", between, 0),
            ("plain step", "plain", between, DIED),
            ("HF's flag", "flag", between, DIED),
            ("the plan", "train-plan", between, 0),
            ("plan, before loading", "plan", below, REFUSED),
            ("the smallest plan, forced", "train-least", below, DIED),
        ]
        outcomes = {0: "completes", DIED: "dies of memory", REFUSED: "is refused"}
        held = True
        for what, part, allowance, expected in wanted:
            budget = min(allowance, int(ROOM * peaks["least"]))
            code, told = child(part, folder, allowance=allowance, budget=budget)
            print(f"{time.perf_counter() - start:.0f} s: {what}", file=sys.stderr)
            held &= code == expected
            mark = "" if code == expected else f", but {outcomes[expected]} was expected"
            found = outcomes.get(code, f"exit code {code}") + mark
            rows.append((format_bytes(allowance), what, found, told["said"]))
    predicted = ", ".join(f"{name} {format_bytes(size)}" for name, size in peaks.items())
    print(f"predicted peaks: {predicted}")
    print(render_table(("allowance", "run", "outcome", "it said"), rows, right={0}))
    print(f"{'all as expected' if held else 'NOT as expected'}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"predicted": peaks, "rows": rows, "holds": held}, indent=1))
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/hard_limit.json"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--numbers", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.part:
        case None:
            sys.exit(0 if run(options.output) else 1)
        case "predict":
            said = predict(options.folder)
        case "plan":
            said = plan(options.folder, **options.numbers)
        case way:
            said = train(way.removeprefix("train-"), options.folder, options.numbers["allowance"])
    print(json.dumps(said))


if __name__ == "__main__":
    main()
