"""A plan as the nearest settings of another trainer, and what cannot be said there.

For `trl sft --config file.yaml`, with transformers' Trainer below it, and for `axolotl train file.yaml`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rematree.errors import UsageError
from rematree.plans import Action, Plan
from rematree.table import fold_paths
from rematree.units import format_bytes

TRL: Final = "trl"
AXOLOTL: Final = "axolotl"
TRAINERS: Final = (TRL, AXOLOTL)
_CUT_PLUGIN: Final = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
_ALL_LINEAR: Final = "all-linear"
_BUNDLED: Final = "builtin:"


@dataclass(frozen=True)
class Export:
    """A plan in the words of another trainer.

    Attributes:
        trainer: "trl" or "axolotl".
        settings: Its keys and values, in order.
        lost: What of the plan they do not express, a line each.
    """

    trainer: str
    settings: Mapping[str, Any]
    lost: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """JSON values."""
        return {"to": self.trainer, "settings": dict(self.settings), "not_expressed": list(self.lost)}

    def yaml(self) -> str:
        """The settings as YAML, with what they do not express as comments in front."""
        lines = [f"# not expressed: {line}" for line in self.lost]
        for key, value in self.settings.items():
            if isinstance(value, Mapping):
                lines.append(f"{key}:")
                lines += [f"  {name}: {_scalar(item)}" for name, item in value.items()]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            elif isinstance(value, list):
                lines.append(f"{key}:")
                lines += [f"  - {_scalar(item)}" for item in value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            else:
                lines.append(f"{key}: {_scalar(value)}")
        return "\n".join(lines)


def _scalar(value: object) -> str:
    """JSON's scalars are YAML's; a plain word needs no quotes."""
    if isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum() and not value[0].isdigit():
        words = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
        return value if value.lower() not in words else json.dumps(value)
    return json.dumps(value)


def export_plan(plan: Plan, trainer: str, weights: str | None = None, note: str = "") -> Export:
    """The settings of `trainer` that come nearest to `plan`.

    Args:
        plan: A stored plan.
        trainer: "trl" or "axolotl".
        weights: Where the weights are, if not where the plan says: a name of the catalogue is none of the Hub.
        note: In what the model that was planned is not the one whose weights they are.
    Raises:
        UsageError: another trainer, or a plan that does not say what it was made for.
    """
    if trainer not in TRAINERS:
        raise UsageError(f"--to is {trainer!r}; it can be {' or '.join(TRAINERS)}")
    if "model" not in plan.run:
        raise UsageError(
            "the plan does not say what run it was made for; one that `rematree plan` stores does",
            remedies=["rematree plan MODEL --budget ... --output plan.json"],
        )
    every, lost = _layers(plan)
    model = weights or plan.run["model"]
    try:
        settings = _trl(plan, model, every) if trainer == TRL else _axolotl(plan, model, every)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"the plan does not say what run it was made for: {type(error).__name__} in its run, {error}"
        ) from error
    if model.startswith(_BUNDLED) or model.endswith((".json", ".gguf")):
        lost.insert(0, f"the weights: {trainer} loads a folder or an id on the Hub, and {model} is none")
    if note:
        lost.insert(0, f"what was planned: {note}")
    lost += [*_rows(plan, trainer), *_adapters(plan, trainer), *_loss(plan, trainer), *_levers(plan)]
    budget = plan.budget_bytes if plan.budget_bytes is not None else plan.predicted_peak_bytes
    lost.append(f"the budget of {format_bytes(budget)}: {trainer} does not look at the peak before it trains")
    return Export(trainer, settings, tuple(lost))


def _layers(plan: Plan) -> tuple[int, list[str]]:
    """Checkpoint every so many layers (0: none), and what of the decisions that is not.

    At least as many layers are recomputed as in the plan.
    """
    blocks = [row.path for row in plan.rows]
    whole = [path for path in blocks if _recomputed(plan, path)]
    if not whole:
        return 0, []
    every = max(1, len(blocks) // len(whole))
    lost: list[str] = []
    checkpointed = blocks[::every]
    if checkpointed != whole:
        lost.append(
            f"which layers: the plan recomputes {len(whole)} of {len(blocks)} "
            f"({', '.join(fold_paths([_short(plan, path) for path in whole]))}); every {_nth(every)} is checkpointed"
        )
    inside = sorted(
        {
            path.removeprefix(f"{block}.")
            for block in whole
            for path, decision in plan.decisions.items()
            if path.startswith(f"{block}.") and decision.action is Action.SAVE
        }
    )
    if inside:
        lost.append(f"what recomputed layers save: {', '.join(inside)}; whole layers are run again instead")
    return every, lost


def _recomputed(plan: Plan, path: str) -> bool:
    own = plan.decisions.get(path)
    inner = any(
        decision.action is Action.RECOMPUTE for name, decision in plan.decisions.items() if name.startswith(f"{path}.")
    )
    return inner or (own is not None and own.action is Action.RECOMPUTE)


def _short(plan: Plan, path: str) -> str:
    return path.removeprefix(f"{plan.region_prefix}.") if plan.region_prefix else path


def _nth(every: int) -> str:
    return "layer" if every == 1 else f"{every}th layer"


def _rows(plan: Plan, trainer: str) -> list[str]:
    """What becomes of packed rows. Source: `DataCollatorForLanguageModeling` of TRL's `sft_trainer.py`."""
    rows = _number(plan.run["per_device_train_batch_size"])
    if trainer != TRL or rows == 1 or not _number(plan.run["packing"]):
        return []
    return [
        f"{rows} packed rows beside each other: TRL lays them end to end, and its default attention (sdpa) masks one "
        f'row as long as all of them; attn_implementation "flash_attention_2" needs no mask'
    ]


def _adapters(plan: Plan, trainer: str) -> list[str]:
    """In what adapters of packed weights are trained. Source: `SFTTrainer.__init__`, which casts them to bfloat16."""
    packed = any(f"load_in_{bits}bit" in plan.run for bits in (4, 8))
    if trainer != TRL or not packed or "lora_r" not in plan.run:
        return []
    return ["adapters in fp32, with their gradients and moments: TRL trains those of packed weights in bfloat16"]


def _loss(plan: Plan, trainer: str) -> list[str]:
    if plan.loss_chunk_rows is None:
        return []
    how = "TRL's own fused loss" if trainer == TRL else "Cut Cross Entropy"
    return [f"{plan.loss_chunk_rows} rows of logits at a time: {how} chooses its own tiles"]


def _levers(plan: Plan) -> list[str]:
    """What else the plan does to the step."""
    lost: list[str] = []
    if plan.groups:
        lost.append("layers that are recomputed together: each keeps its own input instead, which takes more memory")
    if plan.sliced:
        lost.append("attention in slices of queries: all scores of a layer are there at once instead")
    if len(plan.lean) > len(plan.sliced):
        lost.append("lean layers, which share one input in its own dtype: each keeps its own instead, in fp32")
    if plan.compiled:
        lost.append(f"blocks that are compiled: {len(plan.compiled)}")
    if "ranks" in plan.run:
        lost.append(f"{plan.run['ranks']} ranks under {plan.run['engine']}: how they are launched decides that")
    return lost


def _number(text: str) -> Any:
    return json.loads(text)


def _trl(plan: Plan, model: str, every: int) -> dict[str, Any]:
    run = plan.run
    out: dict[str, Any] = {"model_name_or_path": model}
    if "revision" in run:
        out["model_revision"] = run["revision"]
    out["dtype"] = run.get("dtype", "auto")  # without it, TRL loads and computes in float32
    out["bf16"] = False  # without it, TRL computes under autocast to bf16, and the plan is for a step without
    for bits in (4, 8):
        if f"load_in_{bits}bit" in run:
            out[f"load_in_{bits}bit"] = True
    if "load_in_4bit" in run:
        out["bnb_4bit_quant_type"] = run["bnb_4bit_quant_type"]
        out["use_bnb_nested_quant"] = _number(run["bnb_4bit_use_double_quant"])
    if "lora_r" in run:
        out["use_peft"] = True
        out |= {name: _number(run[name]) for name in ("lora_r", "lora_alpha", "lora_dropout")}
        out["lora_target_modules"] = run["lora_target_modules"].split(",")
    out |= {
        "max_length": _number(run["max_length"]),
        "packing": _number(run["packing"]),
        "per_device_train_batch_size": _number(run["per_device_train_batch_size"]),
        "gradient_accumulation_steps": _number(run["gradient_accumulation_steps"]),
        "activation_checkpointing": every > 0,
    }
    if every > 0:
        out["activation_checkpointing_kwargs"] = {
            "use_reentrant": False,
            **({"every_n_layers": every} if every > 1 else {}),
        }
    return out


def _axolotl(plan: Plan, model: str, every: int) -> dict[str, Any]:
    run = plan.run
    out: dict[str, Any] = {"base_model": model}
    if "revision" in run:
        out["revision_of_model"] = run["revision"]
    if run.get("dtype", "auto") != "auto":
        out["bf16"] = False  # axolotl's bf16 is autocast; the plan is for a step without
        out["bfloat16"] = run["dtype"] == "bfloat16"
    for bits in (4, 8):
        out[f"load_in_{bits}bit"] = f"load_in_{bits}bit" in run
    if "load_in_4bit" in run:
        out["bnb_config_kwargs"] = {
            "bnb_4bit_quant_type": run["bnb_4bit_quant_type"],
            "bnb_4bit_use_double_quant": _number(run["bnb_4bit_use_double_quant"]),
        }
    if "lora_r" in run:
        out["adapter"] = "qlora" if "load_in_4bit" in run else "lora"
        out |= {name: _number(run[name]) for name in ("lora_r", "lora_alpha", "lora_dropout")}
        if run["lora_target_modules"] == _ALL_LINEAR:
            out["lora_target_linear"] = True
        else:
            out["lora_target_modules"] = run["lora_target_modules"].split(",")
    packing = _number(run["packing"])
    out |= {
        "sequence_len": _number(run["max_length"]),
        "sample_packing": packing,
        # Without one of its attentions axolotl packs and lets examples read each other. This is the plan's.
        **({"sdp_attention": True} if packing else {}),
        "pad_to_sequence_len": packing,
        "micro_batch_size": _number(run["per_device_train_batch_size"]),
        "gradient_accumulation_steps": _number(run["gradient_accumulation_steps"]),
        "gradient_checkpointing": every > 0,
    }
    if every > 0:
        out["gradient_checkpointing_kwargs"] = {
            "use_reentrant": False,
            **({"every_n_layers": every} if every > 1 else {}),
        }
    if plan.loss_chunk_rows is not None:
        out["plugins"] = [_CUT_PLUGIN]
        out["cut_cross_entropy"] = True
    return out
