"""QLoRA in a plain loop, inside a budget.

python plain_loop_after.py MODEL DATA.jsonl BUDGET
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import rematree

path, data, budget = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(path)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=nf4)
model = rematree.prepare_model_for_kbit_training(model)
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()

batches = []
for start in range(0, len(texts) - 1, 2):
    batch = tokenizer(texts[start : start + 2], return_tensors="pt", padding=True)
    batches.append({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
losses = []
longest = max(batches, key=lambda batch: batch["input_ids"].numel())
rematree.apply(rematree.plan(model, longest, budget=budget), model)
for batch in batches:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps(losses))
