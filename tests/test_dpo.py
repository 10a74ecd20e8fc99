"""DPO with a reference that is the same model: its adapter switched off, or another one switched on, in mid-step.

In TRL's trainer, planned as it calls the model: two rows an example, the reference without a graph. And in a plain
loop, where backward may come while the reference is still switched on: what is run again must be the policy.
"""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import CheckpointError

import rematree
from both_paths import EVERY_WAY, Ours, differ
from checkpointed_models import by_transformers, upstream_is_wrong
from models import assert_same, batch_for, build, with_lora
from rematree import BudgetCallback
from rematree.pricing.cost import Roofline
from test_budget_callback import LastStepPeak, adapters
from test_finetune_tiny import save_tiny_model
from test_plans_by_length import plans_for
from trainers import QUICK

SLACK = 320 << 10  # what every prediction holds, and what the meter does not see: the batch, the reference's numbers
COST = Roofline(1e11, 1e10)
LENGTHS = (1, 2, 8, 3, 8, 2, 5)  # words of the chosen answers

Found = dict[str, torch.Tensor]
Run = tuple[list[float], Found]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def run(folder: Path, model_folder: Path, *callbacks: Any, reference: str = "disabled", accumulate: int = 1) -> Run:
    """Losses of the steps, and the weights after them."""
    trl: Any = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    adapter: Any = LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    if reference == "adapter":  # trained further: TRL puts a copy beside it, named "ref"
        model, adapter = with_lora(model, target_modules=["q_proj", "down_proj"]), None
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [
        {"prompt": " ".join(words[: 1 + i % 3]), "chosen": " ".join(words[:count]), "rejected": words[i % 8]}
        for i, count in enumerate(LENGTHS)
    ]
    arguments = trl.DPOConfig(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
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
        precompute_ref_log_probs=reference == "precomputed",
    )
    trainer = trl.DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=adapter,
        callbacks=list(callbacks),
    )
    trainer.train()
    policy = trainer.model
    assert policy.active_adapter == "default"
    assert ("ref" in policy.peft_config) == (reference == "adapter")
    assert trainer.ref_model is None
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], adapters(policy)


def same(expected: Run, found: Run) -> None:
    assert expected[0] == found[0]
    assert_same(expected[1], found[1])


def tight(ample: BudgetCallback, forbid: tuple[str, ...] = ()) -> BudgetCallback:
    assert ample.plan is not None
    return BudgetCallback(ample.plan.predicted_peak_bytes * 98 // 100, cost=COST, forbid=forbid, say=lambda text: None)


def test_dpo_trains_the_same_inside_its_budget(tmp_path: Path, model_folder: Path) -> None:
    expected = run(tmp_path / "plain", model_folder)
    ample = BudgetCallback("1GiB", cost=COST, say=lambda text: None)
    same(expected, run(tmp_path / "ample", model_folder, ample))
    assert ample.plan is not None
    shapes = {name: shape for name, shape, _ in ample.plan.fingerprint.batch}
    assert shapes["input_ids"][0] == 4, "chosen and rejected"
    assert shapes["labels"] == shapes["input_ids"]
    callback, peak = tight(ample), LastStepPeak()
    same(expected, run(tmp_path / "tight", model_folder, callback, peak))
    assert callback.plan is not None
    assert callback.plan.recomputes
    assert len(callback.plans) > 1, "short batches have plans of their own"
    assert peak.peak_bytes <= max(plan.predicted_peak_bytes for plan in callback.plans) + SLACK


@pytest.mark.parametrize("reference", ["adapter", "precomputed"])
def test_other_references_of_the_trainer(reference: str, tmp_path: Path, model_folder: Path) -> None:
    how: dict[str, Any] = {"reference": reference, "accumulate": 2}
    expected = run(tmp_path / "plain", model_folder, **how)
    ample = BudgetCallback("1GiB", cost=COST, forbid=QUICK, say=lambda text: None)
    same(expected, run(tmp_path / "ample", model_folder, ample, **how))
    callback = tight(ample, QUICK)
    same(expected, run(tmp_path / "tight", model_folder, callback, **how))
    assert callback.plan is not None
    assert callback.plan.recomputes
    assert len(callback.plans) > 1


# -- in a loop of one's own -------------------------------------------------------------------------------------------

Reference = Callable[[Any], contextlib.AbstractContextManager[None]]


def train_policy(model: Any) -> None:
    """PEFT freezes an adapter that it switches off; whoever calls backward then has it trained again first."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)


@contextlib.contextmanager
def disabled(model: Any) -> Generator[None]:
    with model.disable_adapter():
        train_policy(model)
        yield


@contextlib.contextmanager
def switched(model: Any) -> Generator[None]:
    model.set_adapter("reference")
    train_policy(model)
    try:
        yield
    finally:
        model.set_adapter("default")


REFERENCES = pytest.mark.parametrize("reference", [disabled, switched])
CHOSEN, REJECTED = 40, 20  # tokens: under the largest plan of the ladder, and under the second


def with_reference(model: Any, name: str) -> None:
    """Another adapter `name` with weights of its own, not trained; the first one stays active."""
    model.add_adapter(name, model.peft_config["default"])
    generator = torch.Generator().manual_seed(5)
    for path, parameter in model.named_parameters():
        if f".{name}." in path:
            parameter.data.normal_(std=0.05, generator=generator)


def policy() -> Any:
    model = with_lora(build("llama"))
    with_reference(model, "reference")
    model.config.use_cache = False  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def answers(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    return [batch_for(model, tokens=tokens) for tokens in (CHOSEN, REJECTED)]


def step(model: Any, reference: Reference, *, inside: bool) -> Found:
    """Loss and gradients of one step of DPO; `inside`: backward while the reference is switched on."""
    torch.manual_seed(7)
    model.zero_grad(set_to_none=True)
    chosen, rejected = (-model(**batch).loss for batch in answers(model))
    with reference(model):
        with torch.no_grad():
            ref_chosen, ref_rejected = (-model(**batch).loss for batch in answers(model))
        loss = -logsigmoid(chosen - rejected - (ref_chosen - ref_rejected))
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), "random state": torch.get_rng_state(), **found}


def right_step(model: Any, reference: Reference, *, inside: bool) -> Found:
    """`step` of a model that recomputes nothing."""
    found = step(model, reference, inside=inside)
    trained = found.keys() - {"loss", "random state"}
    assert trained
    assert all(".default." in name for name in trained), "the reference is not trained"
    return found


@REFERENCES
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the reference's forward
def test_plain_checkpointing_reruns_the_reference(reference: Reference, use_reentrant: bool) -> None:
    """The blocks are run again with the adapters of backward time: gradients of another model, or an error."""
    model = policy()
    expected = right_step(model, reference, inside=True)
    with by_transformers(model, {"use_reentrant": use_reentrant}):
        try:
            wrong = differ(expected, step(model, reference, inside=True))
        except (CheckpointError, RuntimeError):
            wrong = True
    upstream_is_wrong(wrong, "backward while the reference is switched on changes the rerun")


@REFERENCES
@pytest.mark.parametrize("inside", [False, True])
@EVERY_WAY
def test_the_policy_is_what_is_run_again(ours: Ours, inside: bool, reference: Reference) -> None:
    model = policy()
    expected = right_step(model, reference, inside=inside)
    with ours(model, answers(model)[0]):
        assert_same(expected, step(model, reference, inside=inside))


@REFERENCES
@pytest.mark.parametrize("inside", [False, True])
def test_under_a_ladder_of_plans(inside: bool, reference: Reference) -> None:
    """Chosen and rejected answers of other lengths: two plans in one step, lean layers and groups among them."""
    model = policy()
    expected = right_step(model, reference, inside=inside)
    *smaller, largest = plans_for(model)
    with rematree.apply(largest, model, smaller=smaller) as handle:
        assert_same(expected, step(model, reference, inside=inside))
        assert handle.in_force is handle.plans[1]
