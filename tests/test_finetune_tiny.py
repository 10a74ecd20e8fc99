"""A model, a tokenizer, data and an engine small enough to train in a test; and that they are what they stand for."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rematree.finetune.config import TrainConfig
from rematree.finetune.setup import Engine
from rematree.fingerprint import describe_model
from rematree.plans import Plan
from rematree.units import MIB

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def save_tiny_model(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i}+{i}?", "completion": f"it is {i + i}."} for i in range(count)]


def tiny_config(folder: Path, **changes: Any) -> TrainConfig:
    """Nine steps of two rows of 64 tokens, with dropout, over a little more than two epochs, on `folder`'s model."""
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": str(folder / "sums.jsonl"),
        "budget": 100 * MIB,
        "output_dir": folder / "out",
        "dtype": "float32",
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 9,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "max_new_tokens": 4,
    }
    return TrainConfig(**settings | changes)


class FixedMeter:
    """Stands for a peak meter; says 7."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.peak_bytes = 7


def plain_plan(model: Any, batch: Mapping[str, torch.Tensor], config: TrainConfig) -> Plan:
    return Plan(
        decisions={},
        loss_chunk_rows=None,
        budget_bytes=config.budget,
        predicted_peak_bytes=5,
        predicted_step_seconds=0.25,
        ledger=(),
        rows=(),
        fingerprint=describe_model(model),
    )


def plain_engine() -> Engine:
    """Saves everything, measures nothing: for tests of the job around the plan."""
    return Engine(plain_plan, lambda plan, model: nullcontext(), FixedMeter)


@pytest.mark.parametrize("text", ["what is 1+1?", "n\u00e4\u00efve \u2603", "a\nb\tc"])
def test_tokenizer_gives_every_text_back(text: str):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_model_has_a_row_for_every_token():
    assert tiny_model().config.vocab_size == len(tiny_tokenizer())
