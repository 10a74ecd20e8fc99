"""Every architecture of transformers once: a plan for its smallest peak and one half-way, and a step under each.

    python benchmarks/architectures.py                          # causal language models, some 20 minutes on two cores
    python benchmarks/architectures.py --task SEQ_TO_SEQ_CAUSAL_LM SEQUENCE_CLASSIFICATION IMAGE_TEXT_TO_TEXT
    python benchmarks/architectures.py --only llama falcon      # these, printed only

Each model is built from its own config, shrunk by one rule for all; what cannot be built so, or does not train by
itself, is listed as that. LoRA is on all linear layers with dropout; where PEFT does not take the model so, all of it
is trained. Gradients are compared with the plain step's by `torch.equal`; where a plan computes the loss in chunks, the
same again with that forbidden. Peaks are allocated bytes, summed from the profiler's allocation events.

Writes --output (one JSON a line) and --page. A killed run goes on where it was.
"""

import argparse
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures_page import page
from peft import LoraConfig, get_peft_model
from transformers.models.auto import modeling_auto

import rematree
from rematree.errors import RematreeError
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.pricing.cost import Roofline

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT")
ROWS, TOKENS = 2, 48
SECONDS = 200  # for one architecture
COST = Roofline(5e10, 1e10)
# What configs call their sizes. A value is taken wherever a config has a field of that name.
SMALL: Mapping[str, int] = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "lru_width"), 32)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size", "d_inner"), 48)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 2000)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24)
    | dict.fromkeys(("head_dim", "rotary_dim", "d_kv", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8)
    | dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "block_size", "mamba_chunk_size"), 16)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "state_size"), 8)
    | dict.fromkeys(("hidden_size_per_layer_input", "sliding_window", "attention_window_size"), 8)
    | dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1)
    | {"num_key_value_heads": 2, "encoder_layers": 2, "num_experts_per_tok": 2, "linear_num_key_heads": 2}
    | {"linear_num_value_heads": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}
    | {"num_kv_shared_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_logits_to_keep": 0}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_size": 28, "patch_size": 14}
)
# What the rule above does not say of one type.
OWN: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [6, 8]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
PLACEHOLDERS = ("image_token_id", "video_token_id", "image_token_index", "audio_token_id")


class TimeUpError(BaseException):
    """An architecture took too long. No `Exception`: nobody may take it for what a model cannot do."""


def shrunk(config: Any, own: Mapping[str, Any] | None = None) -> Any:
    """A small config of the same class, and of the same kinds of layers; configs inside it are shrunk as well."""
    known = {name for name in (*config.to_dict(), *getattr(config, "attribute_map", {})) if takes(config, name)}
    given: dict[str, Any] = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in known:  # keys and values are made for every head
        given["num_key_value_heads"] = SMALL["num_attention_heads"]
    kinds = getattr(config, "layer_types", None)
    if kinds and "layer_types" in known:
        different = list(dict.fromkeys(kinds))
        given["layer_types"] = [different[place % len(different)] for place in range(SMALL["num_hidden_layers"])]
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping) and "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        half = int(SMALL["head_dim"] * rope.get("partial_rotary_factor", 1.0)) // 2
        # Of time, height and width.
        given["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 4), half // 4, half // 4]}
    for name, value in vars(config).items():
        if type(value).__name__.endswith("Config"):
            given[name] = shrunk(value)
        elif name in PLACEHOLDERS:
            given[name] = SMALL["vocab_size"] - 1
    return type(config)(**{**given, **(own or {})})


def takes(config: Any, name: str) -> bool:
    """Whether `name` can be given to a config of this class, and is not made of what else is given."""
    made = inspect.getattr_static(type(config), getattr(config, "attribute_map", {}).get(name, name), None)
    return not isinstance(made, property) or made.fset is not None


def own_config(kind: str, model_class: Any) -> Any:
    """The default config of `kind` that `model_class` takes: the one for its words, where it has several."""
    config = transformers.AutoConfig.for_model(kind)
    inside = [value for value in vars(config).values() if isinstance(value, model_class.config_class)]
    return config if isinstance(config, model_class.config_class) or not inside else inside[0]


def batch_for(task: str) -> dict[str, torch.Tensor]:
    """Text alone, whatever the task."""
    ids = torch.randint(3, 99, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(TOKENS) < TOKENS // 4, -100)
    return {"input_ids": ids, "labels": torch.arange(ROWS) if task == "SEQUENCE_CLASSIFICATION" else labels}


def build(task: str, kind: str) -> Any:
    """The model that `kind` names for `task`, trained as a whole, without a key-value cache in training."""
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")[kind]
    torch.manual_seed(0)
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config = shrunk(own_config(kind, model_class), OWN.get(kind))
    if task == "SEQ_TO_SEQ_CAUSAL_LM":
        config.decoder_start_token_id = 1
    model = model_class(config).train()
    for module in model.modules():
        inner = getattr(module, "config", None)
        if hasattr(inner, "use_cache"):
            inner.use_cache = False
    return model


def adapted(model: Any) -> Any:
    """Under LoRA, with B away from zero so that A is trained, too."""
    columns = type(model).__name__.startswith("GPT2")
    wrapped = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", fan_in_fan_out=columns),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return wrapped.train()


def step(model: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and gradients of one step, always with the same random numbers."""
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **found}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextlib.contextmanager
def at_most(seconds: int) -> Generator[None]:
    """Raise `TimeUpError` inside after so many seconds."""

    def ring(*_: Any) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def trained_model(task: str, kind: str, batch: Mapping[str, torch.Tensor]) -> tuple[Any, str, dict[str, torch.Tensor]]:
    """(model, what of it is trained, its plain step): under LoRA, or as a whole if that does not train."""
    with contextlib.suppress(Exception):
        model = adapted(build(task, kind))
        return model, "LoRA", step(model, batch)
    model = build(task, kind)
    return model, "all", step(model, batch)


def measure(task: str, kind: str) -> dict[str, Any]:
    """One row of the page."""
    row: dict[str, Any] = {"task": task, "kind": kind, "outcome": "not built"}
    batch = batch_for(task)
    try:
        with at_most(SECONDS):
            model, row["trained"], expected = trained_model(task, kind, batch)
            row["outcome"] = "failed"
            if not same(expected, step(model, batch)):
                return {**row, "outcome": "not repeatable", "detail": "the plain step gives other gradients each time"}
            row |= compared(model, batch, expected)
    except TimeUpError:
        row["detail"] = f"more than {SECONDS} s"
    except RematreeError as error:
        row |= {"outcome": "refused", "detail": error.message.splitlines()[0]}
    except Exception as error:  # noqa: BLE001  whatever goes wrong with one model is its row
        row["detail"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return row


def compared(model: Any, batch: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What plans for the smallest peak and half-way are like, and whether their steps are the plain one."""
    planner = Planner(model, batch, optimizer="none", cost=COST)
    low, plain = planner.min_peak_bytes(), planner.plain_step()[0]
    plans = planner.plans([low, (low + plain) // 2])
    below: list[int] = []
    exact = True
    for plan in plans:
        with rematree.apply(plan, model):
            exact &= plan.loss_chunk_rows is not None or same(expected, step(model, batch))
            with PeakMeter(model, None, batch) as meter:
                step(model, batch)
        below.append(plan.predicted_peak_bytes - meter.peak_bytes)
    if any(plan.loss_chunk_rows is not None for plan in plans):
        whole = Planner(model, batch, optimizer="none", cost=COST, forbid=["chunked_loss"])
        least = whole.min_peak_bytes()
        for plan in whole.plans([least, (least + plain) // 2]):
            with rematree.apply(plan, model):
                exact &= same(expected, step(model, batch))
    return {"outcome": "exact" if exact else "WRONG", "share": low / plain, "below_bytes": min(below)}


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []


def work(wanted: Sequence[tuple[str, str]], output: Path | None) -> None:
    """Measure what is wanted, in this process; every row is stored as soon as it is there."""
    for task, kind in wanted:
        row = measure(task, kind)
        print(f"{task:24} {kind:28} {row['outcome']:14} {row.get('detail', '')[:80]}", file=sys.stderr, flush=True)
        if output is not None:
            with output.open("a") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS[:1])
    parser.add_argument("--only", nargs="+", help="these model types, printed only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)  # of the workers, the one that this process is
    parser.add_argument("--output", type=Path, default=Path("runs/architectures.jsonl"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    names = {task: list(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")) for task in options.task}
    wanted = [(task, kind) for task in options.task for kind in names[task]]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if options.only:
        work([(task, kind) for task, kind in wanted if kind in options.only], None)
        return
    if options.part is not None:
        done = {(row["task"], row["kind"]) for row in read(options.output)}
        work([each for each in wanted[options.part :: options.workers] if each not in done], options.output)
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    parts = [[sys.executable, *sys.argv, "--part", str(part)] for part in range(options.workers)]
    running = [subprocess.Popen(command) for command in parts]
    ends = [worker.wait() for worker in running]
    if any(ends):
        print("a worker ended early; what it has done is kept, run this again", file=sys.stderr)
    options.page.write_text(page(read(options.output)))


if __name__ == "__main__":
    main()
