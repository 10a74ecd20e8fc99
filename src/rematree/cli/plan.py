"""`rematree plan`: a plan for a model and a batch shape."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from rematree.cli import options, rank_options
from rematree.cli.options import DEFAULT
from rematree.cli.output import check_writable, command_with, emit_table, hint, write_output
from rematree.report.tables import plan_columns

Output = Annotated[Path | None, typer.Option(help="File for the plan, as JSON.", show_default=False)]


def plan(
    ctx: typer.Context,
    model: options.Model = None,
    model_option: options.ModelOption = None,
    device: options.DeviceName = None,
    budget: options.OptionalBudget = None,
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
    ranks: rank_options.RankCount = None,
    engine: rank_options.Engine = None,
    reshard: rank_options.Reshard = True,
    gradient_as_bucket_view: rank_options.BucketView = False,
    reduce_bucket_size: rank_options.BucketSize = None,
    overlap_comm: rank_options.OverlapComm = False,
    stage3_prefetch_bucket_size: rank_options.Prefetch = None,
    stage3_param_persistence_threshold: rank_options.Persistence = None,
    stage3_max_live_parameters: rank_options.MaxLive = None,
    stage3_max_reuse_distance: rank_options.MaxReuse = None,
    forbid: options.Forbid = [],  # noqa: B006
    compile: options.Compile = DEFAULT["compile"],
    as_json: options.Json = False,
) -> None:
    """Make a plan for a model and a batch shape.

    With --device nothing is loaded and no weights are needed: the model is made of its config alone, for a device that
    need not be here. Without, the model is loaded, not run. Its step is observed on fake tensors. With --ranks and
    --engine the step is one of several ranks, and the budget that of each. Prints the folded table; with --output the
    plan is stored for `rematree show`, `explain`, `export` and `verify`.
    """
    config = options.train_config(ctx)
    if output is not None:
        check_writable(output)
    target = options.target_of(ctx, config)
    budget_bytes = target.budget(None if budget is None else config.budget)
    config = replace(config, budget=budget_bytes)
    from rematree.errors import InfeasibleBudgetError
    from rematree.finetune.planned import described
    from rematree.finetune.remedies import working_changes

    hint(f"loading {config.model}" if target.loads(config) else f"making {config.model} of its config alone")
    shape = target.shape(config, full=full)
    hint(f"planning for {target.place}")
    try:
        made = target.planner(shape, config).plan(budget_bytes)
    except InfeasibleBudgetError as error:
        for note in shape.notes:
            hint(f"note: {note}")
        changes = working_changes(error, config, hint, target=target, shape=shape, full=full)
        raise error.with_remedies(command_with(ctx, **change) for change in changes) from None
    made = described(made, config, target, shape, full=full)
    if output is not None:
        write_output(output, made.to_json() + "\n")
        hint(f"stored in {output}")
    if as_json:
        typer.echo(made.to_json())
    else:
        emit_table(plan_columns(made))
