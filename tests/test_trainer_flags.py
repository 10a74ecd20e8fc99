"""The Trainer's flags and this library: what is in effect at each point of a real run, and what it leaves.

`At` notes `checkpointing_in_effect` at each event of the Trainer. A control run without checkpointing gives the losses.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

import rematree
from checkpointed_models import Batch, step
from models import assert_same, batch_for, build, with_lora
from rematree import BudgetCallback, checkpointing_in_effect, prepare_model_for_kbit_training
from rematree.errors import InfeasibleBudgetError, UsageError
from rematree.execute.handle import applied_handle
from rematree.pricing.cost import Roofline
from trainers import quiet_arguments

COST = Roofline(1e11, 1e10)
AMPLE = "64MiB"


def make() -> Any:
    return with_lora(build("llama", layers=2), target_modules=["q_proj"], layers_to_transform=[1])


def quiet(budget: int | str | None = None) -> BudgetCallback:
    return BudgetCallback(budget, cost=COST, forbid=["chunked_loss"], say=lambda text: None)


class At(TrainerCallback):
    """What is in effect when training begins (before other callbacks), in the first step, and when it has ended."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.setdefault("step", checkpointing_in_effect(kwargs["model"]).set_by)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen["hooks"] = str(len(kwargs["model"].get_input_embeddings()._forward_hooks))


def trainer_for(folder: Path, model: Any, *callbacks: TrainerCallback, steps: int = 2, **settings: Any) -> Trainer:
    rows = Dataset.from_list([{name: t[0].tolist() for name, t in batch_for(model, tokens=12).items()}] * 8)
    arguments = quiet_arguments(folder, per_device_eval_batch_size=2, max_steps=steps, **settings)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))  # pyright: ignore[reportArgumentType]


def weights(model: Any) -> Batch:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(folder: Path, model: Any, *callbacks: TrainerCallback, **settings: Any) -> Batch:
    trainer_for(folder, model, *callbacks, **settings).train()
    return weights(model)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return train(tmp_path_factory.mktemp("control"), make())


@pytest.fixture(scope="module")
def least() -> int:
    """A budget at which something has to be recomputed."""
    model = make()
    batch = {**batch_for(model, tokens=12)}
    return rematree.Planner(model, batch, cost=COST, forbid=["chunked_loss"]).min_peak_bytes() + 4096


@pytest.fixture
def budget_set_by_theirs() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
        yield


def test_what_the_trainer_enables_over_our_switch_stays_ours(tmp_path: Path, control: Batch) -> None:
    """A script that changes one import and keeps its flags keeps our guarantees, and each of its plain arguments."""
    model = with_lora(
        prepare_model_for_kbit_training(build("llama", layers=2)), target_modules=["q_proj"], layers_to_transform=[1]
    )
    at = At()
    found = train(
        tmp_path,
        model,
        at,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True, "every_n_layers": 2},
    )
    assert_same(control, found)
    assert at.seen == {"step": "rematree", "hooks": "1"}
    effect = checkpointing_in_effect(model)
    assert (effect.set_by, effect.kwargs, len(effect.layers)) == ("rematree", {"use_reentrant": True}, 1)
    for _ in range(2):
        train(tmp_path, model, at, activation_checkpointing=True)
    assert at.seen["hooks"] == "0"
    assert checkpointing_in_effect(model).kwargs == {"use_reentrant": False}
    rematree.activation_checkpointing_disable(model)
    assert not checkpointing_in_effect(model)
    assert not model.get_input_embeddings()._forward_hooks  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def test_a_flag_that_is_off_is_off(tmp_path: Path, least: int, control: Batch) -> None:
    """A budget among arguments that switch checkpointing off: no plan. Our switch stays as it was asked for."""
    said: list[str] = []
    callback = BudgetCallback(cost=COST, say=said.append)
    at, model = At(), make()
    settings: dict[str, Any] = {"activation_checkpointing_kwargs": {"budget": least}}
    assert_same(control, train(tmp_path, model, callback, at, activation_checkpointing=False, **settings))
    assert at.seen["step"] == "nobody"
    assert callback.plan is None
    assert said == ["no plan: the training arguments name a budget, and switch checkpointing off"]
    prepared = with_lora(prepare_model_for_kbit_training(build("llama", layers=2)), target_modules=["q_proj"])
    train(tmp_path, prepared, at := At(), activation_checkpointing=False)
    assert at.seen["step"] == "rematree"
    rematree.gradient_checkpointing_disable(prepared)
    train(tmp_path, prepared, at := At(), activation_checkpointing=False)
    assert at.seen["step"] == "nobody"


def test_a_plan_takes_the_place_of_what_the_flags_enable(tmp_path: Path, least: int, control: Batch) -> None:
    """Budget and other keys: the ones without effect are named; torch never gets to hear of a budget."""
    model, at, callback = make(), At(), quiet()
    kwargs = {"budget": least, "use_reentrant": True, "every_n_layers": 2}
    trainer = trainer_for(
        tmp_path, model, callback, at, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs
    )
    with pytest.warns(UserWarning, match="use_reentrant=True, every_n_layers=2 among the arguments of checkpointing"):
        trainer.train()
    assert_same(control, weights(model))
    assert at.seen == {"step": "plan", "hooks": "0"}  # transformers' hook on the embedding is off meanwhile
    assert callback.plan is not None
    assert callback.plan.recomputes
    effect = checkpointing_in_effect(model)
    assert (effect.set_by, effect.kwargs, len(effect.layers)) == ("transformers", {"use_reentrant": True}, 1)
    assert effect.budget is None
    assert kwargs["budget"] == least  # the user's own dictionary
    for state in (effect.layers, ()):
        assert checkpointing_in_effect(model).layers == state
        step(model, batch_for(model, tokens=12))  # no unknown word reaches torch
        rematree.activation_checkpointing_disable(model)
    assert not model.get_input_embeddings()._forward_hooks


def test_two_runs_of_one_trainer(tmp_path: Path, least: int) -> None:
    """The second is as the first: same plan, same state before and after; upstream's hooks are its own."""
    model, callback = make(), quiet()
    trainer = trainer_for(
        tmp_path,
        model,
        callback,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"budget": least, "use_reentrant": False},
    )
    trainer.train()
    first, effect = callback.plan, checkpointing_in_effect(model)
    trainer.train()
    assert callback.plan == first
    assert checkpointing_in_effect(model) == effect
    assert applied_handle(model) is None
    rematree.activation_checkpointing_disable(model)
    assert not model.get_input_embeddings()._forward_hooks


def test_preparation_budget_and_flags_together(tmp_path: Path, least: int) -> None:
    """The same budget twice is one; our switch comes back after the plan, with the Trainer's options."""
    base = prepare_model_for_kbit_training(build("llama", layers=2), budget=least)
    model = with_lora(base, target_modules=["q_proj"], layers_to_transform=[1])
    at = At()
    settings: dict[str, Any] = {"budget": least, "use_reentrant": False}
    train(tmp_path, model, quiet(), at, activation_checkpointing=True, activation_checkpointing_kwargs=settings)
    assert at.seen == {"step": "plan", "hooks": "0"}
    assert checkpointing_in_effect(model).set_by == "rematree"
    with pytest.raises(UsageError, match="two budgets"):
        train(
            tmp_path,
            model,
            quiet(),
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"budget": "2GiB"},
        )
    with pytest.raises(UsageError, match="two budgets"):
        prepare_model_for_kbit_training(build("llama"), True, {"budget": "1GiB"}, budget="2GiB")
    prepared = prepare_model_for_kbit_training(build("llama"), True, {"budget": "1GiB"})
    assert rematree.requested_budget(prepared) == 1 << 30


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter:UserWarning")
def test_a_budget_without_the_callback(tmp_path: Path) -> None:
    """Nothing of this library runs then. torch refuses the word, unless transformers' layers swallow it with others.

    With our switch on, the word is understood and waits.
    """
    kwargs: dict[str, Any] = {"budget": AMPLE}
    with pytest.raises(ValueError, match="Unexpected keyword arguments: budget"):
        train(tmp_path, make(), activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    model = make()
    kwargs = {"budget": AMPLE, "use_reentrant": False}
    trainer_for(tmp_path, model, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs).train()
    text = str(checkpointing_in_effect(model))
    assert text.endswith("use_reentrant=False; set by transformers; budget 64.0 MiB, no plan applied yet")
    model = make()
    rematree.activation_checkpointing_enable(model)
    train(tmp_path, model, activation_checkpointing=True, activation_checkpointing_kwargs={"budget": AMPLE})
    text = str(checkpointing_in_effect(model))
    assert text.endswith("use_reentrant=False; set by rematree; budget 64.0 MiB, no plan applied yet")


class Fails(TrainerCallback):
    """An error in the first step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")


def test_a_run_that_fails_leaves_the_next_one_whole(tmp_path: Path, least: int) -> None:
    """An error in training skips the Trainer's end; the next run takes the plan off before it makes its own."""

    def fail_and_train(model: Any, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
        fails = Fails()
        trainer = trainer_for(tmp_path, model, *callbacks, fails, **settings)
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.train()
        trainer.remove_callback(fails)
        return trainer

    plain, model = make(), make()
    fail_and_train(plain).train()
    rematree.activation_checkpointing_enable(model)
    trainer = fail_and_train(model, quiet(least), activation_checkpointing=True)
    assert checkpointing_in_effect(model).set_by == "plan"
    with pytest.warns(UserWarning, match="a plan is in force on this model"):
        trainer.train()
    assert_same(weights(plain), weights(model))
    assert checkpointing_in_effect(model).set_by == "rematree"
    rematree.activation_checkpointing_disable(model)
    assert not checkpointing_in_effect(model)


def test_another_callback_takes_over_from_one_that_was_interrupted(tmp_path: Path, least: int) -> None:
    """A notebook: a run is stopped, and the cell that makes the Trainer is run again with another budget."""
    plain, model, first = make(), make(), quiet(least)
    train(tmp_path, plain)
    model.enable_input_require_grads()
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path, model, first, Fails())
    assert applied_handle(model) is not None
    callback = quiet(AMPLE)
    train(tmp_path, model, callback)
    assert applied_handle(model) is None
    assert callback.plan is not None
    assert callback.plan.budget_bytes == 64 << 20
    assert_same(weights(plain), weights(model))
    assert hooks
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks


def test_a_plan_that_the_user_applied_is_not_taken_off(tmp_path: Path) -> None:
    model = make()
    batch = batch_for(model, tokens=12)
    with rematree.apply(rematree.Planner(model, batch, cost=COST, forbid=["chunked_loss"]).plan(None), model):
        with pytest.raises(UsageError, match="another plan is in force"):
            train(tmp_path, model, quiet(AMPLE))
        assert applied_handle(model) is not None


def test_a_budget_given_to_the_switch_is_there_when_the_trainer_has_enabled_checkpointing(tmp_path: Path) -> None:
    model, callback = make(), quiet()
    rematree.activation_checkpointing_enable(model, {"budget": AMPLE})
    train(tmp_path, model, callback, activation_checkpointing=True)
    assert callback.plan is not None
    assert callback.plan.budget_bytes == 64 << 20


def test_a_loss_that_the_trainer_computes_itself_is_said_not_to_be_counted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"label_smoothing_factor=0.1: the Trainer computes that loss from all logits"):
        train(tmp_path, make(), quiet(AMPLE), label_smoothing_factor=0.1)


class Generates(TrainerCallback):
    """Generates after every step as it comes, in training mode, and in every evaluation."""

    def __init__(self) -> None:
        self.fed: list[list[int]] = []
        self.modes: list[bool] = []

    def _generate(self, model: Any) -> None:
        fed: list[int] = []
        layer = model.get_submodule("base_model.model.model.layers.0")
        hook = layer.register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
        settings = {**vars(model.config), **vars(model.generation_config)}
        with torch.no_grad():
            model.generate(
                input_ids=torch.tensor([[3, 4, 5]]),
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        hook.remove()
        assert {**vars(model.config), **vars(model.generation_config)} == settings
        self.fed.append(fed)
        self.modes.append(model.training)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._generate(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._generate(kwargs["model"])


@pytest.mark.parametrize("how", ["plan", "switch"])
def test_generation_between_steps_keeps_its_cache(how: str, tmp_path: Path, least: int) -> None:
    """One token is fed for each new one; and training goes on as in the same run without checkpointing."""
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
    expected = train(tmp_path, make(), Generates(), **settings)
    model, generates, at = make(), Generates(), At()
    callbacks: list[TrainerCallback] = [generates, at]
    if how == "plan":
        callbacks.append(quiet(least))
    else:
        rematree.activation_checkpointing_enable(model)
        settings["activation_checkpointing"] = True
    found = train(tmp_path, model, *callbacks, **settings)
    assert_same(expected, found)
    assert at.seen["step"] == {"plan": "plan", "switch": "rematree"}[how]
    assert generates.fed == [[3, 1, 1, 1]] * 4
    assert set(generates.modes) == {True, False}


def test_prefix_tuning_under_a_plan(tmp_path: Path) -> None:
    """The prefix is a cache, and a rerun finds it as the forward did."""

    def prefixed() -> Any:
        config: Any = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        torch.manual_seed(1)
        return get_peft_model(build("llama", layers=3), config)  # pyright: ignore[reportArgumentType]

    expected = train(tmp_path, prefixed())
    callback = quiet(AMPLE)
    train(tmp_path, prefixed(), callback)
    assert callback.plan is not None
    with pytest.raises(InfeasibleBudgetError) as refused:
        train(tmp_path, prefixed(), quiet("1KiB"))
    callback = quiet(refused.value.min_peak)
    assert_same(expected, train(tmp_path, prefixed(), callback))
    assert callback.plan is not None
    assert callback.plan.recomputes


@pytest.mark.usefixtures("budget_set_by_theirs")
@pytest.mark.parametrize("prepared", [False, True])
def test_trl(prepared: bool, tmp_path: Path) -> None:
    """TRL asks for checkpointing by default and hooks the embedding when it is made; both are back after the plan."""
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from test_finetune_tiny import save_tiny_model

    folder = save_tiny_model(tmp_path / "model")

    def run(budget: str | None) -> tuple[Any, list[float], At]:
        base: Any = AutoModelForCausalLM.from_pretrained(folder)
        if prepared:
            base = prepare_model_for_kbit_training(base)
        torch.manual_seed(0)
        model = with_lora(base, target_modules=["q_proj"], lora_dropout=0.0)
        at = At()
        arguments = trl.SFTConfig(
            str(tmp_path / "out"),
            max_length=16,
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            gradient_checkpointing=budget is not None,
            gradient_checkpointing_kwargs=None if budget is None else {"budget": budget},
        )
        trainer = trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"text": "one two three four five six"}] * 4),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[at] if budget is None else [quiet(), at],
        )
        trainer.train()
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], at

    _, expected, _ = run(None)
    model, losses, at = run(AMPLE)
    assert losses == expected
    assert at.seen == {"step": "plan", "hooks": "0"}
    effect = checkpointing_in_effect(model)
    assert effect.set_by == ("rematree" if prepared else "transformers")
    assert effect.kwargs == {"use_reentrant": False}
    rematree.activation_checkpointing_disable(model)
    assert not checkpointing_in_effect(model)
