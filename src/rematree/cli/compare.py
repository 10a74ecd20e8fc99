"""`rematree compare`: one run on several devices, beside each other."""

from typing import Annotated

import typer

from rematree.cli import options, rank_options
from rematree.cli.options import DEFAULT
from rematree.cli.output import emit_json, emit_table, hint
from rematree.report.tables import Columns
from rematree.units import format_bytes, format_seconds

Devices = Annotated[
    str,
    typer.Option("--device", help="Names of rematree devices, separated by commas.", show_default=False),
]


def compare(
    ctx: typer.Context,
    device: Devices,
    model: options.Model = None,
    model_option: options.ModelOption = None,
    budget: options.OptionalBudget = None,
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
    """Plan one run for several devices: whether it fits, its step, and what a second gets done.

    Nothing is loaded and none of the devices need be here. Without --budget each device may use all its memory.
    """
    config = options.train_config(ctx)
    from rematree.finetune.target import named_targets

    among = options.ranks_of(ctx, config)
    targets = [target.among(among) for target in named_targets(options.split_list([device]))]
    wanted = None if budget is None else config.budget
    for target in targets:
        target.budget(wanted)
    options.plan_only()
    from rematree.finetune.side_by_side import plan_each

    columns = plan_each(config, targets, wanted, full=full, say=hint)
    if as_json:
        emit_json([column.facts() for column in columns])
        return
    rows = [
        (
            column.device,
            format_bytes(column.budget_bytes),
            format_bytes(column.least_bytes),
            "yes" if column.fits else "no",
            *(
                ("", "", "", "")
                if column.plan is None
                else (
                    format_bytes(column.plan.predicted_peak_bytes),
                    format_seconds(column.plan.predicted_step_seconds),
                    format_seconds(column.plan.extra_seconds),
                    f"{column.tokens_per_second:,.0f}",
                )
            ),
        )
        for column in columns
    ]
    headers = ("device", "may take", "least peak", "fits", "peak", "step", "recomputation", "tokens/s")
    emit_table(Columns(headers, rows, frozenset({1, 2, 4, 5, 6, 7})))
