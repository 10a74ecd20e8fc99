"""Masks of ones and positions of one sequence, which need no memory until a batch comes in which they count."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import Trainer

import rematree
from models import assert_same
from rematree import BudgetCallback
from rematree.errors import PlanMismatchError
from rematree.execute.selection import covers
from rematree.fingerprint import describe_batch, left_out
from rematree.measure import PeakMeter
from rematree.planning.heads import tokens_of
from rematree.planning.planner import Planner
from test_budget_callback import COST, LastStepPeak, adapted
from test_finetune_tiny import save_tiny_model
from trainers import QUICK, adapters, pad, quiet_arguments, rows_of

TOKENS = 128
Batch = dict[str, torch.Tensor]


def grouped() -> nn.Module:
    """Keys for two heads each: with a mask of its own, transformers repeats them, and they are kept."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 200}
    config = transformers.LlamaConfig(num_attention_heads=8, num_key_value_heads=2, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config).train()


def batch(*, hole: bool = False, rows: int = 1, tokens: int = TOKENS) -> Batch:
    ids = torch.randint(3, 200, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if hole:
        mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def planner(model: nn.Module, planned: Batch) -> Planner:
    return Planner(model, planned, optimizer="none", cost=COST, forbid=QUICK)


def peak(model: nn.Module, stepped: Batch) -> int:
    model.zero_grad(set_to_none=True)
    with PeakMeter(model, None, stepped) as meter:
        model(**stepped).loss.backward()
    return meter.peak_bytes


# -- what is left out ------------------------------------------------------------


def test_what_changes_nothing() -> None:
    rows = torch.arange(8).expand(2, 8)
    ones, hole = torch.ones(2, 8, dtype=torch.long), torch.tensor([[1] * 8, [1] * 7 + [0]])
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    assert left_out({"attention_mask": ones}) == ("attention_mask",)
    assert left_out({"attention_mask": hole}) == ()
    assert left_out({"position_ids": rows}) == ("position_ids",)
    assert left_out({"position_ids": packed}) == ()
    assert left_out({"position_ids": rows, "attention_mask": ones}) == ()  # transformers looks at neither then
    assert left_out({"attention_mask": ones.to("meta")}) == ()


def test_offsets_of_packed_sequences_are_no_shape() -> None:
    ids = torch.zeros(1, 8, dtype=torch.long)
    few = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 8]), "cu_seq_lens_k": torch.tensor([0, 8])}
    many = {"input_ids": ids, "cu_seq_lens_q": torch.arange(9), "cu_seq_lens_k": torch.arange(9)}
    assert describe_batch(few) == describe_batch(many) == (("input_ids", (1, 8), "int64"),)


def test_patches_are_no_tokens() -> None:
    ids = torch.zeros(2, 40, dtype=torch.long)
    assert tokens_of({"input_ids": ids, "labels": ids, "pixel_values": torch.zeros(256, 1176)}) == 80
    assert tokens_of({"input_ids": ids, "labels": torch.zeros(2, dtype=torch.long)}) == 80
    assert tokens_of({"input_values": torch.zeros(2, 300)}) == 600
    assert tokens_of({"labels": torch.zeros(2, dtype=torch.long)}) == 1


# -- a plan ------------------------------------------------------------


def test_a_plan_for_a_mask_of_ones_covers_no_other() -> None:
    model = grouped()
    ones, holed = planner(model, batch()).plan(None), planner(model, batch(hole=True)).plan(None)
    assert ones.fingerprint.left_out == ("attention_mask",)
    assert holed.fingerprint.left_out == ()
    assert ones.predicted_peak_bytes < holed.predicted_peak_bytes
    assert covers(holed.fingerprint, ones.fingerprint)
    assert not covers(ones.fingerprint, holed.fingerprint)
    with pytest.raises(PlanMismatchError, match="another model, batch shape") as caught:
        rematree.apply(ones, model, batch(hole=True))
    assert "left_out: planned for ('attention_mask',), here ()" in str(caught.value)
    with rematree.apply(holed, model, batch()):
        assert peak(model, batch()) <= holed.predicted_peak_bytes


def test_a_padded_batch_under_a_plan_for_none_is_said_once() -> None:
    model = grouped()
    plan = planner(model, batch()).plan(None)
    with rematree.apply(plan, model):
        assert peak(model, batch()) <= plan.predicted_peak_bytes
        with pytest.warns(UserWarning, match="attention_mask changed nothing"):
            assert peak(model, batch(hole=True)) > plan.predicted_peak_bytes
        peak(model, batch(hole=True))


@pytest.mark.parametrize("first", [False, True])
def test_another_length_is_planned_for_with_the_mask_it_has(first: bool) -> None:
    model = grouped()
    base = planner(model, batch(hole=first))
    for hole in (False, True):
        other = batch(hole=hole, tokens=96)
        scaled = base.for_batch(other).plan(None)
        assert scaled.fingerprint.left_out == (() if first or hole else ("attention_mask",))
        own = planner(model, batch(hole=first or hole, tokens=96)).plan(None)
        assert scaled.predicted_peak_bytes == own.predicted_peak_bytes


# -- in a trainer ------------------------------------------------------------


def test_rows_padded_beforehand_are_planned_for_when_they_come(tmp_path: Path) -> None:
    """Rows of one length, of which some end in padding: the longest batch of the data is all words."""

    def rows() -> Dataset:
        found = rows_of(*([40] * 6))
        ids: list[list[int]] = [list(row) for row in found["input_ids"]]
        ids[3:] = [row[:30] + [0] * 10 for row in ids[3:]]
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    def trained(*callbacks: Any) -> dict[str, torch.Tensor]:
        model = adapted()
        settings: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 1}
        args = quiet_arguments(tmp_path, **settings)
        Trainer(model=model, args=args, train_dataset=rows(), data_collator=pad, callbacks=list(callbacks)).train()
        return adapters(model)

    said: list[str] = []
    callback, meter = BudgetCallback("1GiB", cost=COST, forbid=QUICK, say=said.append), LastStepPeak()
    assert_same(trained(), trained(callback, meter))
    again = [line for line in said if "planned again" in line]
    assert len(again) == 1
    assert again[0].startswith("a more padded or packed batch (attention_mask 1x40, input_ids 1x40")
    assert callback.plan is not None
    assert callback.plan.fingerprint.left_out == ()


def test_packed_rows_are_planned_for_once(tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = save_tiny_model(tmp_path / "model")
    words = random.Random(0)
    counts = (1, 2, 3, 5, 9, 14)
    rows = [{"text": " ".join(["one"] * words.choice(counts))} for _ in range(200)]
    args = trl.SFTConfig(
        str(tmp_path / "out"),
        packing=True,
        max_length=48,
        per_device_train_batch_size=2,
        max_steps=8,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    said: list[str] = []
    trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(source),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        callbacks=[BudgetCallback("1GiB", cost=COST, forbid=QUICK, say=said.append)],
    ).train()
    assert any("predicted: peak" in line for line in said)
    assert not [line for line in said if "planned again" in line]
