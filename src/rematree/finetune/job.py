"""The fine-tuning job: load, plan, print the plan, measure, train inside the budget, measure again, save.

The loop is Hugging Face's Trainer. TRL's SFTTrainer would bring packing and completion-only loss, but it puts its own
chunked loss or fused head into the model it trains; the plan would then hold for a model that no longer exists, and
the largest tensors of the step, the logits, would be out of its reach. What is needed of it is in `data.py`.

A run may be killed at any moment. Started again with the same settings it goes on from its last whole checkpoint,
with the plan and the measurements of its first start, and ends with the same losses.
"""

from pathlib import Path
from typing import Any, Final

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from rematree.errors import RematreeError
from rematree.finetune.callbacks import CheckpointMark, ProgressReport, StepMeter
from rematree.finetune.compare import hf_checkpointing_peak, time_side_by_side
from rematree.finetune.config import TrainConfig
from rematree.finetune.data import collate
from rematree.finetune.evaluate import generate_answer, heldout_loss
from rematree.finetune.result import TrainResult, device_name, library_versions
from rematree.finetune.run_folder import RunFolder, RunState, disk_full_is_said
from rematree.finetune.setup import Engine, Setup, prepare
from rematree.finetune.storage import read_json, staged_directory
from rematree.integrations.metrics import MemoryMetrics
from rematree.plans import Plan
from rematree.units import MIB, format_bytes, format_seconds

_COMPARE_ROUNDS: Final = 3
_BYTES_BESIDE_WEIGHTS: Final = 8 * MIB


def run(
    config: TrainConfig,
    console: Console | None = None,
    *,
    engine: Engine | None = None,
    setup: Setup | None = None,
    hf_peak_bytes: int | None = None,
) -> TrainResult:
    """Run the job, go on with it, or tell its result when it is already done.

    Args:
        config: What to run.
        console: Where plan, progress and report are printed; standard error by default.
        engine: Planner, executor and meter; the library's own by default.
        setup: Model and data, when they are already loaded.
        hf_peak_bytes: Peak under Hugging Face's checkpointing, when it is already measured.
    Raises:
        UsageError: something asked for is not there or does not fit; the output directory holds another run; the disk
            is full.
        InfeasibleBudgetError: no plan reaches the budget. Nothing has been written.
    """
    out = console or Console(stderr=True)
    folder = RunFolder(config.output_dir)
    asked = config.describe()
    state = folder.inspect(asked)
    if state is RunState.FINISHED:
        result = TrainResult.from_dict(folder.read("result.json") or {})
        _say(out, f"{folder.path} holds this run, finished; its result:", *result.lines())
        return result
    engine = engine or Engine.default()
    setup = setup or prepare(config, lambda line: _say(out, line))
    frontier: dict[str, Any] | None = None
    if state is RunState.STARTED:
        plan = folder.plan()
        hf_peak_bytes = (folder.read("run.json") or {})["notes"]["hf_checkpointing_peak_bytes"]
    else:
        plan = engine.plan(setup.model, setup.batch, config)
        frontier = _frontier(engine, plan, out)
    _say_plan(out, plan, config)
    with disk_full_is_said(folder, _save_bytes(setup.model)):
        if state is RunState.NEW:
            folder.start(asked, plan, {"hf_checkpointing_peak_bytes": hf_peak_bytes}, frontier)
        before = folder.read("before.json")
        if before is None:
            before = _evaluate(setup, config)
            folder.write("before.json", before)
    if before["heldout_loss"] is not None:
        _say(out, f"held-out loss before: {before['heldout_loss']:.4f}")
    losses = _train(config, setup, plan, engine, folder, out)
    adapter = folder.path / "adapter"
    with disk_full_is_said(folder, _save_bytes(setup.model)):
        with staged_directory(adapter) as staging:
            setup.model.save_pretrained(staging)
            setup.tokenizer.save_pretrained(staging)
        after = _evaluate(setup, config)
        compared = _compare(config, setup, plan, engine, hf_peak_bytes, out) if config.compare_hf else {}
        measured = folder.read("measured.json") or {}
        result = TrainResult(
            budget_bytes=config.budget,
            predicted_peak_bytes=plan.predicted_allocated_bytes,
            measured_peak_bytes=measured["peak_bytes"],
            predicted_step_seconds=plan.predicted_step_seconds * config.gradient_accumulation_steps,
            measured_step_seconds=measured["step_seconds"],
            heldout_loss_before=before["heldout_loss"],
            heldout_loss_after=after["heldout_loss"],
            question=setup.data.question.text if setup.data.question else "",
            generated_before=before["generated"],
            generated_after=after["generated"],
            losses=losses,
            output_dir=str(folder.path),
            adapter=str(adapter),
            device=device_name(next(setup.model.parameters()).device),
            versions=library_versions(),
            **compared,
        )
        folder.write("result.json", result.to_dict())
    _say(out, *result.lines())
    return result


def _train(
    config: TrainConfig, setup: Setup, plan: Plan, engine: Engine, folder: RunFolder, out: Console
) -> list[float | None]:
    """Train under the plan from the last whole checkpoint. Returns the loss of every step of the run."""
    checkpoint, torn = folder.recover()
    for name in torn:
        _say(out, f"{name} is not whole, as a kill in the middle of saving leaves it; removed")
    if checkpoint is not None:
        _say(out, f"resuming from {checkpoint.name}")
        state = read_json(checkpoint / "trainer_state.json") or {}
        if state["global_step"] >= state["max_steps"]:
            # Killed between the last step and the report. The Trainer would make one step more.
            setup.model.load_adapter(str(checkpoint), setup.model.active_adapter, is_trainable=True)
            return _losses(state["log_history"])
    meter = StepMeter(folder, engine.meter)
    progress = ProgressReport(out, config.logging_steps)
    with disk_full_is_said(folder, _save_bytes(setup.model)), engine.apply(plan, setup.model):
        writer = SummaryWriter(str(folder.path / "logs"))
        try:
            trainer: Any = Trainer(
                model=setup.model,
                args=_arguments(config, folder.path, setup),
                train_dataset=setup.data.train,
                data_collator=collate,
                callbacks=[
                    CheckpointMark(folder),
                    MemoryMetrics(),
                    meter,
                    progress,
                    TensorBoardCallback(writer),
                ],
            )
            trainer.remove_callback(PrinterCallback)
            # Whatever was drawn while measuring and planning, the first step starts from the seed.
            set_seed(config.seed)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            meter.close()
            progress.close()
            writer.close()
    return _losses(trainer.state.log_history)


def _frontier(engine: Engine, plan: Plan, out: Console) -> dict[str, Any] | None:
    """What else could be had, for the page about the run; no run fails for want of it."""
    if engine.frontier is None:
        return None
    try:
        return engine.frontier(plan).to_json()
    except RematreeError as error:
        _say(out, f"no frontier is stored for rematree report: {error.message}")
        return None


def _losses(log: list[dict[str, Any]]) -> list[float | None]:
    return [float(entry["loss"]) for entry in log if "loss" in entry]


def _arguments(config: TrainConfig, folder: Path, setup: Setup) -> Any:
    device = next(setup.model.parameters()).device
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_steps=config.max_steps,
        num_train_epochs=config.num_train_epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        optim="adamw_torch_fused",
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_strategy="steps",
        logging_steps=1,  # The losses of all steps are kept in the checkpoints; a resumed run has them too.
        logging_nan_inf_filter=False,
        dataloader_drop_last=True,  # The plan is for one batch shape.
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )


def _evaluate(setup: Setup, config: TrainConfig) -> dict[str, Any]:
    question = setup.data.question
    return {
        "heldout_loss": heldout_loss(setup.model, setup.data.heldout, config.max_eval_examples),
        "generated": generate_answer(setup.model, setup.tokenizer, question.text, config.max_new_tokens)
        if question is not None
        else "",
    }


def _compare(
    config: TrainConfig, setup: Setup, plan: Plan, engine: Engine, hf_peak_bytes: int | None, out: Console
) -> dict[str, Any]:
    _say(out, "timing steps: budgeted, every layer checkpointed, plain")
    options = {"learning_rate": config.learning_rate, "max_grad_norm": config.max_grad_norm}
    seconds = time_side_by_side(
        setup.model, setup.batch, lambda: engine.apply(plan, setup.model), rounds=_COMPARE_ROUNDS, **options
    )
    if hf_peak_bytes is None and seconds["hf_checkpointing"] is not None:
        hf_peak_bytes = hf_checkpointing_peak(setup.model, setup.batch, engine.meter, **options)
    return {f"{name}_step_seconds": value for name, value in seconds.items()} | {
        "hf_checkpointing_peak_bytes": hf_peak_bytes
    }


def _save_bytes(model: Any) -> int:
    """About what one checkpoint takes: the adapters, two moments of each of their weights, and small files."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 3 * weights + _BYTES_BESIDE_WEIGHTS


def _say_plan(out: Console, plan: Plan, config: TrainConfig) -> None:
    seconds = plan.predicted_step_seconds * config.gradient_accumulation_steps
    _say(
        out,
        str(plan),
        f"predicted: peak {format_bytes(plan.predicted_peak_bytes)} of {format_bytes(config.budget)}, "
        f"step {format_seconds(seconds)}",
    )


def _say(out: Console, *lines: str) -> None:
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
