"""`rematree advise`: whether recomputation is needed at all."""

from typing import Annotated

import typer

from rematree.cli import options, rank_options
from rematree.cli.options import DEFAULT
from rematree.cli.output import emit_json, emit_table, hint
from rematree.report.tables import Columns
from rematree.units import format_bytes, format_seconds

Budget = Annotated[
    str | None,
    typer.Option(
        help="Peak memory the step may reach, with a unit; by default what is free here now, or all of --device."
    ),
]


def advise(
    ctx: typer.Context,
    model: options.Model = None,
    model_option: options.ModelOption = None,
    device: options.DeviceName = None,
    budget: Budget = None,
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
    as_json: options.Json = False,
) -> None:
    """Say whether recomputation is needed at all for a model and a batch, and what it would cost.

    Compares the plain step, the loss in chunks, every layer checkpointed, and the plan for the budget.
    """
    wanted = None if budget is None else options.parse_budget(budget)
    config = options.train_config(ctx, budget=wanted or 1)
    target = options.target_of(ctx, config)
    if wanted is not None or device is not None:
        wanted = target.budget(wanted)
    from rematree.advice import advise as make_advice
    from rematree.report.machine import describe_machine

    if wanted is None:
        wanted = describe_machine(bfloat16=False).largest_budget_bytes
        hint(f"budget: {format_bytes(wanted)}, what is free here now")
    planner = options.planner_of(target, config, full=full)
    advice = make_advice(planner, wanted)
    if as_json:
        emit_json(advice.facts())
        return
    rows = [
        (way.name, format_bytes(way.peak_bytes), "yes" if way.fits else "no", format_seconds(way.seconds))
        for way in advice.ways
    ]
    emit_table(Columns(("way", "peak", "fits", "step"), rows, frozenset({1, 3}), above=advice.lines()))
