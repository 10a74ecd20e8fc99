"""`rematree train`: the fine-tuning job."""

import gc
import traceback
from pathlib import Path
from typing import Annotated

import typer

from rematree.cli import options
from rematree.cli.options import DEFAULT
from rematree.cli.output import command_with, emit_json, hint
from rematree.finetune.config import SCHEDULES

_TRAINING, _RUN = "Training", "Run"

Data = Annotated[
    str,
    typer.Option(
        help="JSONL file with prompt/completion or chat messages, Hub data set id, or builtin:stdlib-docstrings.",
        show_default=False,
    ),
]
OutputDir = Annotated[
    Path, typer.Option(help="For checkpoints, logs, the adapter and result.json; one run each.", show_default=False)
]
Heldout = Annotated[
    float, typer.Option(help="Share (below 1) or number of examples not trained on.", rich_help_panel=_RUN)
]
MaxEval = Annotated[int, typer.Option(help="Held-out examples measured before and after.", rich_help_panel=_RUN)]
MaxNew = Annotated[int, typer.Option(help="Tokens of the answers generated before and after.", rich_help_panel=_RUN)]
MaxSteps = Annotated[int, typer.Option(help="Optimizer steps; -1 goes by epochs.", rich_help_panel=_TRAINING)]
Epochs = Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=_TRAINING)]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.", rich_help_panel=_TRAINING)]
Scheduler = Annotated[
    str,
    typer.Option(help="Of the learning rate: " + ", ".join(SCHEDULES) + ".", rich_help_panel=_TRAINING),
]
Warmup = Annotated[float, typer.Option(help="Steps, or share of all steps, of rising rate.", rich_help_panel=_TRAINING)]
WeightDecay = Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=_TRAINING)]
MaxGradNorm = Annotated[
    float, typer.Option(help="Gradients are clipped to this norm; 0 leaves them.", rich_help_panel=_TRAINING)
]
SaveSteps = Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)]
LoggingSteps = Annotated[int, typer.Option(help="Steps between lines of log.", rich_help_panel=_RUN)]
CompareHf = Annotated[
    bool, typer.Option("--compare-hf", help="Afterwards time gradient_checkpointing=True too.", rich_help_panel=_RUN)
]


def train(
    ctx: typer.Context,
    data: Data,
    budget: options.Budget,
    output_dir: OutputDir,
    model: options.Model = None,
    model_option: options.ModelOption = None,
    per_device_train_batch_size: options.BatchSize = DEFAULT["per_device_train_batch_size"],
    max_length: options.MaxLength = DEFAULT["max_length"],
    packing: options.Packing = DEFAULT["packing"],
    gradient_accumulation_steps: options.Accumulation = DEFAULT["gradient_accumulation_steps"],
    max_steps: MaxSteps = DEFAULT["max_steps"],
    num_train_epochs: Epochs = DEFAULT["num_train_epochs"],
    learning_rate: LearningRate = DEFAULT["learning_rate"],
    lr_scheduler_type: Scheduler = DEFAULT["lr_scheduler_type"],
    warmup_steps: Warmup = DEFAULT["warmup_steps"],
    weight_decay: WeightDecay = DEFAULT["weight_decay"],
    max_grad_norm: MaxGradNorm = DEFAULT["max_grad_norm"],
    lora_r: options.LoraR = DEFAULT["lora_r"],
    lora_alpha: options.LoraAlpha = DEFAULT["lora_alpha"],
    lora_dropout: options.LoraDropout = DEFAULT["lora_dropout"],
    lora_target_modules: options.LoraTargets = options.TARGETS,
    heldout: Heldout = DEFAULT["heldout"],
    max_eval_examples: MaxEval = DEFAULT["max_eval_examples"],
    max_new_tokens: MaxNew = DEFAULT["max_new_tokens"],
    save_steps: SaveSteps = DEFAULT["save_steps"],
    logging_steps: LoggingSteps = DEFAULT["logging_steps"],
    compare_hf: CompareHf = DEFAULT["compare_hf"],
    revision: options.Revision = DEFAULT["revision"],
    dtype: options.Dtype = DEFAULT["dtype"],
    load_in_4bit: options.LoadIn4bit = DEFAULT["load_in_4bit"],
    load_in_8bit: options.LoadIn8bit = DEFAULT["load_in_8bit"],
    bnb_4bit_quant_type: options.QuantType = DEFAULT["bnb_4bit_quant_type"],
    bnb_4bit_use_double_quant: options.DoubleQuant = DEFAULT["bnb_4bit_use_double_quant"],
    forbid: options.Forbid = [],  # noqa: B006
    compile: options.Compile = DEFAULT["compile"],
    seed: options.Seed = DEFAULT["seed"],
    as_json: options.Json = False,
) -> None:
    """Fine-tune a model inside a budget; killed and started again, it resumes.

    Before the first step it prints the plan with predicted peak and time. Standard output is the directory of the
    trained adapter, or with --json all of result.json.
    """
    config = options.train_config(ctx)
    from rematree.errors import InfeasibleBudgetError
    from rematree.finetune.job import run
    from rematree.finetune.remedies import working_changes

    try:
        result = run(config)
    except InfeasibleBudgetError as error:
        # Frames that are left hold the model, and the one that what would work is tried on is loaded anew.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        changes = working_changes(error, config, hint)
        raise error.with_remedies(command_with(ctx, **change) for change in changes) from None
    if as_json:
        emit_json(result.to_dict())
    else:
        typer.echo(result.adapter)
