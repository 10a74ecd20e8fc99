"""TRL's other trainers, planned as they call the model.

In GRPO and RLOO the model writes the completions it is trained on: there is a plan for the longest batch that can come.
KTO runs references and other completions without a graph; rewards have a loss of the trainer's own. DPO: test_dpo.py.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

import rematree
from rematree import BudgetCallback
from rematree.errors import UsageError
from rematree.integrations.trl import generated_batches
from rematree.pricing.cost import Roofline
from test_budget_callback import LastStepPeak, adapters
from test_dpo import Run, same, tight
from test_finetune_tiny import save_tiny_model

COST = Roofline(1e11, 1e10)
SLACK = 320 << 10  # what every prediction holds, and what the meter does not see: the batch, its numbers for each token
COMPLETION = 24
PROMPTS = ["one", "one two three four", "two three", "three four five six seven eight", "five", "six seven"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def arguments(kind: str, folder: Path, **options: Any) -> Any:
    trl: Any = pytest.importorskip("trl")
    known: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
    }
    if kind in ("GRPO", "RLOO"):
        known |= {"num_generations": 2, "max_completion_length": COMPLETION}
    return getattr(trl, f"{kind}Config")(str(folder), **{**known, **options})


def distinct(completions: list[str], **_: Any) -> list[float]:
    """A reward that tells completions apart."""
    return [float(len(set(text))) for text in completions]


def examples(kind: str) -> Dataset:
    if kind in ("GRPO", "RLOO"):
        return Dataset.from_dict({"prompt": PROMPTS})
    other = [f" {text} one" for text in reversed(PROMPTS)]
    if kind == "KTO":
        labels = [index % 2 == 0 for index in range(len(PROMPTS))]
        return Dataset.from_dict({"prompt": PROMPTS, "completion": other, "label": labels})
    return Dataset.from_dict({"chosen": [f"{text} two" for text in PROMPTS], "rejected": other})


def run(kind: str, folder: Path, model_folder: Path, *callbacks: Any, guard: bool = False, **options: Any) -> Run:
    trl: Any = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if kind == "Reward":
        config = AutoModelForCausalLM.from_pretrained(model_folder).config
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(model_folder)
    task = "SEQ_CLS" if kind == "Reward" else "CAUSAL_LM"
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments(kind, folder, **options),
        train_dataset=examples(kind),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type=task),
        callbacks=list(callbacks),
        **({"reward_funcs": distinct} if kind in ("GRPO", "RLOO") else {}),
    )
    if guard:
        rematree.survive_out_of_memory(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], adapters(trainer.model)


@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [
        ("GRPO", {}, COMPLETION + 6),
        ("GRPO", {"beta": 0.1}, COMPLETION + 6),
        ("RLOO", {}, COMPLETION + 6),
        ("KTO", {}, 8),
        ("Reward", {}, 8),
    ],
)
def test_they_train_the_same_inside_their_budget(
    kind: str, options: dict[str, Any], least: int, tmp_path: Path, model_folder: Path
) -> None:
    expected = run(kind, tmp_path / "plain", model_folder, **options)
    assert len(expected[0]) == 3
    assert any(tensor.any() for name, tensor in expected[1].items() if "lora_B" in name), "nothing was trained"
    ample = BudgetCallback("1GiB", cost=COST, say=lambda text: None)
    # Where the model writes its batches the trainer is given prompts, which a guard hands on as they are.
    same(expected, run(kind, tmp_path / "ample", model_folder, ample, guard=True, **options))
    assert ample.plan is not None
    shapes = {name: shape for name, shape, _ in ample.plan.fingerprint.batch}
    rows, tokens = shapes["input_ids"]
    assert rows == (8 if kind == "Reward" else 4)
    assert tokens >= least
    assert not any(name.startswith("KL_") or name in ("label", "completion_mask") for name in shapes)
    if kind == "Reward":  # no logits: next to nothing is at the peak but the blocks, and half of them are lean
        ample.plan = replace(ample.plan, predicted_peak_bytes=ample.plan.predicted_peak_bytes * 8 // 10)
    callback, peak = tight(ample), LastStepPeak()
    same(expected, run(kind, tmp_path / "tight", model_folder, callback, peak, **options))
    assert callback.plan is not None
    assert callback.plan.recomputes
    assert peak.peak_bytes <= max(plan.predicted_peak_bytes for plan in callback.plans) + SLACK


# -- the longest batch ------------------------------------------------------------------------------------------------


def words(text: list[str]) -> dict[str, list[list[int]]]:
    """A tokenizer of plain prompts."""
    return {"input_ids": [[1] * len(line.split()) for line in text]}


def loader(data: Any) -> Any:
    return SimpleNamespace(dataset=data)


def test_the_longest_batch_and_shorter_ones(tmp_path: Path) -> None:
    given = arguments("GRPO", tmp_path, pad_to_multiple_of=4)
    batches = generated_batches(given, loader(Dataset.from_dict({"prompt": PROMPTS})), words)
    assert batches is not None
    assert batches.note == "4 rows of the longest prompt, 8 tokens, and 24 tokens of completion"
    assert [*batches.weights] == [11, 14, 17, 20, 23, 26, 29, 32]
    assert sum(batches.weights.values()) == pytest.approx(1.0)
    assert {name: tuple(t.shape) for name, t in batches.longest.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (4, 32)
    )
    for length in batches.weights:
        batch = batches.of(length)
        assert batch["input_ids"].shape == (4, length)
        assert not batch["attention_mask"].all(), "a mask that is all ones is left out, and takes no memory"
        scored = (batch["labels"] != -100).sum(1)
        assert (scored == min(COMPLETION, length - 1)).all(), "prompts may be short: all but one token is scored"


def test_a_conversation_goes_through_the_template(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def template(conversation: list[Any], **options: Any) -> dict[str, list[list[int]]]:
        asked.update(options)
        return {"input_ids": [[1] * sum(len(turn["content"]) for turn in turns) for turns in conversation]}

    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]})
    given = arguments("RLOO", tmp_path, chat_template_kwargs={"enable_thinking": False})
    batches = generated_batches(given, loader(data), SimpleNamespace(apply_chat_template=template))
    assert batches is not None
    assert batches.longest["input_ids"].shape == (4, max(map(len, PROMPTS)) + COMPLETION)
    assert asked == {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "enable_thinking": False}


def test_what_cannot_be_known_is_named(tmp_path: Path) -> None:
    plain = Dataset.from_dict({"prompt": PROMPTS})
    endless = arguments("GRPO", tmp_path)
    endless.max_completion_length = None
    with pytest.raises(
        UsageError, match="GRPOConfig: the longest batch cannot be known: max_completion_length is None"
    ):
        generated_batches(endless, loader(plain), words)
    streamed: Any = IterableDataset.from_generator(lambda: iter([{"prompt": "one"}]))
    with pytest.raises(UsageError, match="no column of prompts that can be read beforehand"):
        generated_batches(arguments("GRPO", tmp_path), loader(streamed), words)
    pictures = plain.add_column("image", PROMPTS)
    with pytest.raises(UsageError, match="images among the prompts"):
        generated_batches(arguments("GRPO", tmp_path), loader(pictures), words)


def test_other_trainers_have_their_batches_in_the_data(tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    for kind in ("SFT", "DPO"):
        given = getattr(trl, f"{kind}Config")(str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
        assert generated_batches(given, loader(Dataset.from_dict({"prompt": PROMPTS})), words) is None
