"""QLoRA in a plain loop, with PEFT alone.

python plain_loop_before.py MODEL DATA.jsonl
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

path, data = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(path)
texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=nf4)
model = prepare_model_for_kbit_training(model)
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"))
model.train()

batches = []
for start in range(0, len(texts) - 1, 2):
    batch = tokenizer(texts[start : start + 2], return_tensors="pt", padding=True)
    batches.append({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
losses = []
for batch in batches:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps(losses))
