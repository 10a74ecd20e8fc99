"""DPO in TRL's trainer: planned as it calls the model, two rows an example, its reference without a graph."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from models import with_lora
from rematree import BudgetCallback
from rematree.cost import Roofline
from test_budget_callback import LastStepPeak
from test_finetune_tiny import save_tiny_model

SLACK = 320 << 10  # what every prediction holds, and what the meter does not see: the batch, the reference's numbers


def run(folder: Path, model_folder: Path, *callbacks: Any) -> list[float]:
    trl: Any = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = with_lora(AutoModelForCausalLM.from_pretrained(model_folder), target_modules=["q_proj", "down_proj"])
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [
        {"prompt": " ".join(words[: 1 + i % 3]), "chosen": " ".join(words[: 2 + i]), "rejected": words[i % 8]}
        for i in range(7)
    ]
    arguments = trl.DPOConfig(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-2,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        activation_checkpointing=False,
    )
    trainer = trl.DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        callbacks=list(callbacks),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_dpo_trains_the_same_inside_its_budget(tmp_path: Path) -> None:
    model_folder = save_tiny_model(tmp_path / "model")
    expected = run(tmp_path / "plain", model_folder)
    ample = BudgetCallback("1GiB", cost=Roofline(1e11, 1e10), say=lambda text: None)
    assert run(tmp_path / "ample", model_folder, ample) == expected
    assert ample.plan is not None
    shapes = {name: shape for name, shape, _ in ample.plan.fingerprint.batch}
    assert shapes["input_ids"][0] == 4, "chosen and rejected"
    assert shapes["labels"] == shapes["input_ids"]
    tight = BudgetCallback(
        ample.plan.predicted_peak_bytes * 98 // 100, cost=Roofline(1e11, 1e10), say=lambda text: None
    )
    peak = LastStepPeak()
    assert run(tmp_path / "tight", model_folder, tight, peak) == expected
    assert tight.plan is not None
    assert tight.plan.recomputes
    assert peak.peak_bytes <= max(plan.predicted_peak_bytes for plan in tight.plans) + SLACK
