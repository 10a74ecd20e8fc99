"""`rematree frontier`: the fastest step for every amount of memory."""

from typing import Annotated

import typer

from rematree.cli import options, rank_options
from rematree.cli.options import DEFAULT
from rematree.cli.output import command_with, emit_json, emit_table
from rematree.errors import InfeasibleBudgetError
from rematree.report.tables import frontier_columns, frontier_facts
from rematree.units import MIB

Points = Annotated[int, typer.Option(min=1, help="At most so many points, if no budgets are given.")]
Budgets = Annotated[
    list[str],
    typer.Option(help="Sizes with units, separated by commas: plan these instead.", show_default=False),
]


def frontier(
    ctx: typer.Context,
    model: options.Model = None,
    model_option: options.ModelOption = None,
    device: options.DeviceName = None,
    points: Points = 12,
    budgets: Budgets = [],  # noqa: B006
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
    """List peak and step time, from the smallest to the largest useful budget.

    Every point is a confirmed plan; times are also given as a multiple of the plain step, which recomputes nothing.
    """
    config = options.train_config(ctx)
    wanted = [options.parse_budget(text, "--budgets") for text in options.split_list(budgets)]
    target = options.target_of(ctx, config)
    if target.device is not None:
        wanted = [target.budget(budget) for budget in wanted]
    from rematree.report.sweep import plain_step, sweep

    planner = options.planner_of(target, config, full=full)
    try:
        found = sweep(planner, wanted, points)
    except InfeasibleBudgetError as error:
        least = f"{-(-error.min_peak // MIB)}MiB"
        raise error.with_remedies([command_with(ctx, budgets=[least]), command_with(ctx, budgets=[])]) from None
    room = None if target.device is None else (target.name, target.budget(None))
    if as_json:
        emit_json(frontier_facts(found, plain_step(planner), room))
    else:
        emit_table(frontier_columns(found, plain_step(planner), room))
