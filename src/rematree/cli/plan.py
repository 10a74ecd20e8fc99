"""`rematree plan`: a plan for a model and a batch shape."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rematree.cli import options
from rematree.cli.options import DEFAULT
from rematree.cli.output import check_writable, command_with, emit_table, hint, write_plan
from rematree.report.tables import plan_columns

Output = Annotated[Path | None, typer.Option(help="File for the plan, as JSON.", show_default=False)]


def plan(
    ctx: typer.Context,
    model: options.Model,
    budget: options.Budget,
    output: Output = None,
    per_device_train_batch_size: options.BatchSize = DEFAULT["per_device_train_batch_size"],
    max_length: options.MaxLength = DEFAULT["max_length"],
    packing: options.Packing = DEFAULT["packing"],
    gradient_accumulation_steps: options.Accumulation = DEFAULT["gradient_accumulation_steps"],
    lora_r: options.LoraR = DEFAULT["lora_r"],
    lora_alpha: options.LoraAlpha = DEFAULT["lora_alpha"],
    lora_dropout: options.LoraDropout = DEFAULT["lora_dropout"],
    lora_target_modules: options.LoraTargets = options.TARGETS,
    full: options.Full = False,
    revision: options.Revision = DEFAULT["revision"],
    dtype: options.Dtype = DEFAULT["dtype"],
    load_in_4bit: options.LoadIn4bit = DEFAULT["load_in_4bit"],
    load_in_8bit: options.LoadIn8bit = DEFAULT["load_in_8bit"],
    bnb_4bit_quant_type: options.QuantType = DEFAULT["bnb_4bit_quant_type"],
    bnb_4bit_use_double_quant: options.DoubleQuant = DEFAULT["bnb_4bit_use_double_quant"],
    forbid: options.Forbid = [],  # noqa: B006
    as_json: options.Json = False,
) -> None:
    """Make a plan for a model and a batch shape.

    The model is loaded, not run: its step is observed on fake tensors. Prints the folded table; with --output the plan
    is stored for `rematree show`, `explain` and `verify`.
    """
    config = options.train_config(ctx)
    if output is not None:
        check_writable(output)
    from rematree.errors import InfeasibleBudgetError
    from rematree.finetune.remedies import working_changes
    from rematree.finetune.synthetic import prepare_shape
    from rematree.planning import plan as make_plan

    hint(f"loading {model}")
    shape = prepare_shape(config, full=full)
    hint("planning")
    try:
        made = make_plan(
            shape.model,
            shape.batch,
            config.budget,
            accumulation_steps=config.gradient_accumulation_steps,
            forbid=config.forbid,
        )
    except InfeasibleBudgetError as error:
        changes: list[dict[str, Any]] = working_changes(error, config, hint, full=full, shape=shape)
        raise error.with_remedies(command_with(ctx, **change) for change in changes) from None
    if output is not None:
        write_plan(output, made)
        hint(f"stored in {output}")
    if as_json:
        typer.echo(made.to_json())
    else:
        emit_table(plan_columns(made))
