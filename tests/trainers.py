"""What tests of transformers' Trainer share: quiet arguments, rows of many lengths, and what was trained."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

QUICK = ("chunked_loss", "lean_adapters", "groups")  # levers not to use, so that planning takes seconds


def quiet_arguments(folder: Path | str, **settings: Any) -> TrainingArguments:
    """On the CPU, every loss logged, nothing reported, nothing saved; `settings` come before these."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **settings})


def rows_of(*lengths: int) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 151, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def pad(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(e["input_ids"]) for e in examples)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([list(e[name]) + [value] * (longest - len(e[name])) for e in examples])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids != 0).long()}


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
