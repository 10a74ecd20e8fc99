"""`rematree fit`: the longest rows, the most rows, the highest rank, or the smallest device that fits."""

import functools
from enum import StrEnum
from typing import Annotated

import typer

from rematree.cli import options, rank_options
from rematree.cli.options import DEFAULT
from rematree.cli.output import command_with, emit_json, emit_table, hint
from rematree.errors import UsageError
from rematree.report.tables import Columns
from rematree.units import format_bytes


class Quantity(StrEnum):
    """What can be looked for; named as the option whose value is found."""

    MAX_LENGTH = "max-length"
    BATCH_SIZE = "batch-size"
    LORA_R = "lora-r"
    DEVICE = "device"


_OPTION = {
    Quantity.MAX_LENGTH: "max_length",
    Quantity.BATCH_SIZE: "per_device_train_batch_size",
    Quantity.LORA_R: "lora_r",
}
Find = Annotated[Quantity, typer.Option("--find", help="What to look for.", show_default=False)]
Devices = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where it is to fit, here or not; with --find device those to choose from, separated by commas, by "
        "default all of rematree devices.",
        show_default=False,
    ),
]


def fit(
    ctx: typer.Context,
    find: Find,
    model: options.Model = None,
    model_option: options.ModelOption = None,
    device: Devices = None,
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
    """Find the longest rows, the most rows or the highest rank that fits a budget, or the smallest device.

    Each value that is tried is planned; the answer fits and the next value does not. Lengths are multiples of 64.
    """
    config = options.train_config(ctx)
    _refuse_contradictions(ctx, find, device, budget)
    among = options.ranks_of(ctx, config)
    options.plan_only()
    from rematree.finetune.fit import find_device, find_setting
    from rematree.finetune.target import all_targets, named_targets

    command = functools.partial(command_with, ctx)
    if find is Quantity.DEVICE:
        targets = named_targets(options.split_list([device])) if device else all_targets()
        found = find_device(config, [target.among(among) for target in targets], full=full, say=hint, command=command)
    else:
        target = options.target_of(ctx, config)
        wanted = None if budget is None else config.budget
        found = find_setting(find.value, config, target, wanted, full=full, say=hint, command=command)
    if as_json:
        emit_json(found.facts())
        return
    rows = [
        (str(probe.value), format_bytes(probe.least_bytes), format_bytes(probe.budget_bytes), _yes(probe.fits))
        for probe in found.probes
    ]
    emit_table(Columns((find.value, "least peak", "may take", "fits"), rows, frozenset({0, 1, 2}), found.lines()))


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


def _refuse_contradictions(ctx: typer.Context, find: Quantity, device: str | None, budget: str | None) -> None:
    """Refuse a value for what is looked for, and a budget where devices differ in theirs."""
    option = _OPTION.get(find)
    source = ctx.get_parameter_source(option) if option else None
    if source is not None and source.name == "COMMANDLINE":
        raise UsageError(
            f"--find {find.value} looks for the largest --{find.value}; a value for it contradicts that",
            remedies=[f"leave out --{find.value}", f"rematree plan ... --{find.value} ...   (whether one value fits)"],
        )
    if find is Quantity.DEVICE and budget is not None:
        raise UsageError(
            "--find device looks for a device by its memory; --budget contradicts that",
            remedies=["leave out --budget", "rematree plan ... --budget ...   (whether it fits)"],
        )
