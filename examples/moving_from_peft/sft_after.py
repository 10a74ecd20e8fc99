"""LoRA with TRL's SFTTrainer inside a budget.

python sft_after.py MODEL DATA.jsonl OUTPUT BUDGET
"""

import json
import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import rematree

path, data, output, budget = sys.argv[1:5]
trainer = SFTTrainer(
    model=path,
    args=SFTConfig(
        output_dir=output,
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[rematree.BudgetCallback(budget)],
)
trainer.train()
print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
