"""Options that several commands share, named as in PEFT, TRL and transformers' Trainer.

A parameter has the name of the field of `TrainConfig` that it sets, and the default of that field.
"""

import atexit
import contextlib
import dataclasses
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from rematree.cli.output import hint
from rematree.errors import UsageError
from rematree.finetune.config import TrainConfig
from rematree.finetune.target import Target, named_ranks
from rematree.units import parse_bytes

if TYPE_CHECKING:
    from rematree.planning.planner import Planner
    from rematree.referee.ranks import Ranks

DEFAULT: Final[dict[str, Any]] = {
    item.name: item.default for item in dataclasses.fields(TrainConfig) if item.default is not dataclasses.MISSING
}
_LISTS: Final = ("forbid", "lora_target_modules")
_NO_COMPILER: Final = "TORCHDYNAMO_DISABLE"
_OBJECTS_BEFORE_A_LOOK: Final = 2_000_000  # for the garbage collector; some 500 MiB at most
_MODEL, _SHAPE, _LORA = "Model", "Batch", "Adapters"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, folder, .gguf file, or builtin:smollm2-135m. To plan, a config is enough: a built-in shape such "
        "as llama-3-70b, or a config.json.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="MODEL, as an option.", show_default=False, rich_help_panel=_MODEL)
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Plan for this device, here or not, from the model's config alone: rematree devices lists them.",
        show_default=False,
    ),
]
OptionalBudget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Peak memory the step may reach, with a unit: 14GiB, 900MiB, 24GB. Counts weights, adapters, gradients, "
        "optimizer state, saved tensors and workspaces. By default all that --device has.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=_MODEL)]
Dtype = Annotated[str, typer.Option(help="Of the base model: auto, float32 or bfloat16.", rich_help_panel=_MODEL)]
LoadIn4bit = Annotated[
    bool,
    typer.Option(
        "--load-in-4bit", help="Pack the base model into 4 bits a weight with bitsandbytes.", rich_help_panel=_MODEL
    ),
]
LoadIn8bit = Annotated[
    bool,
    typer.Option(
        "--load-in-8bit", help="Pack the base model into 8 bits a weight with bitsandbytes.", rich_help_panel=_MODEL
    ),
]
QuantType = Annotated[
    str, typer.Option("--bnb-4bit-quant-type", help="Of 4-bit weights: nf4 or fp4.", rich_help_panel=_MODEL)
]
DoubleQuant = Annotated[
    bool,
    typer.Option(
        "--bnb-4bit-use-double-quant/--no-bnb-4bit-use-double-quant",
        help="Pack the scales of 4-bit weights too.",
        rich_help_panel=_MODEL,
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        help="Peak memory the step may reach, with a unit: 14GiB, 900MiB, 24GB. Counts weights, adapters, gradients, "
        "optimizer state, saved tensors and workspaces.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option("--per-device-train-batch-size", "--batch-size", help="Rows in a step.", rich_help_panel=_SHAPE),
]
MaxLength = Annotated[int, typer.Option(help="Tokens in a row.", rich_help_panel=_SHAPE)]
Packing = Annotated[bool, typer.Option(help="Put several short examples into one row.", rich_help_panel=_SHAPE)]
Accumulation = Annotated[
    int,
    typer.Option(
        "--gradient-accumulation-steps",
        help="Forward and backward passes in one optimizer step.",
        rich_help_panel=_SHAPE,
    ),
]
LoraR = Annotated[int, typer.Option("--lora-r", help="Rank of the adapters.", rich_help_panel=_LORA)]
LoraAlpha = Annotated[int, typer.Option("--lora-alpha", help="Scale of the adapters.", rich_help_panel=_LORA)]
LoraDropout = Annotated[
    float, typer.Option("--lora-dropout", help="Dropout in front of the adapters.", rich_help_panel=_LORA)
]
LoraTargets = Annotated[
    list[str],
    typer.Option(
        "--lora-target-modules",
        help='"all-linear", or names of modules, separated by commas or each with the option before it.',
        rich_help_panel=_LORA,
    ),
]
Full = Annotated[bool, typer.Option("--full", help="Train all parameters, without adapters.", rich_help_panel=_LORA)]
Forbid = Annotated[
    list[str],
    typer.Option(
        help="Lever the plan may not use; chunked_loss, sliced_attention and compile change rounding.",
        show_default=False,
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile blocks if that pays, also when it is not known how many steps will run."),
]
Seed = Annotated[int, typer.Option(help="Of adapter initialisation, data order and dropout.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.JSON", help="A stored plan.", show_default=False)]
TARGETS: Final = [str(DEFAULT["lora_target_modules"])]


def train_config(ctx: typer.Context, **values: Any) -> TrainConfig:
    """The run that the options of a command describe.

    Args:
        ctx: Of the command; its parameters that are fields of `TrainConfig` are taken.
        values: Fields that the command has no option for.
    Raises:
        UsageError: a size without a unit, or a value that no run can have.
    """
    fields = {item.name for item in dataclasses.fields(TrainConfig)}
    taken: dict[str, Any] = {name: value for name, value in ctx.params.items() if name in fields}
    for name in _LISTS:
        if name in taken:
            taken[name] = split_list(taken[name])
    if taken.get("lora_target_modules") == ("all-linear",):
        taken["lora_target_modules"] = "all-linear"
    if "output_dir" in taken:
        taken["output_dir"] = Path(taken["output_dir"])
    if isinstance(taken.get("budget"), str):
        taken["budget"] = parse_budget(taken["budget"])
    taken = {name: value for name, value in taken.items() if name != "budget" or value is not None}
    taken["model"] = chosen_model(ctx)
    # A shape without a run: nothing is read and nothing written.
    absent: dict[str, Any] = {"data": "", "budget": 1, "output_dir": Path()}
    return TrainConfig(**{**absent, **taken, **values})


def chosen_model(ctx: typer.Context) -> str:
    """The model that a command was given, as its argument or as an option.

    Raises:
        UsageError: none was given, or two.
    """
    argument, option = ctx.params.get("model"), ctx.params.get("model_option")
    if argument is not None and option is not None and argument != option:
        raise UsageError(f"MODEL is {argument!r} and --model is {option!r}; they contradict each other")
    chosen = argument if argument is not None else option
    if chosen is None:
        raise UsageError(
            "Missing argument 'MODEL'",
            remedies=[f"rematree {ctx.info_name} {name}" for name in ("llama-3-8b", "Qwen/Qwen3-8B", "./config.json")],
        )
    return chosen


def target_of(ctx: typer.Context, config: TrainConfig) -> Target:
    """What the command plans for: the device of `--device`, or the one that is here.

    Raises:
        UsageError: there is no such device, or several are named.
    """
    name = ctx.params.get("device")
    if name is not None and "," in name:
        raise UsageError(
            f"--device {name} names several devices, and a plan is for one",
            remedies=[f"rematree compare {config.model} --device {name}"],
        )
    target = Target.named(name).among(ranks_of(ctx, config))
    if not target.loads(config):
        plan_only()
    return target


def ranks_of(ctx: typer.Context, config: TrainConfig) -> "Ranks | None":
    """The ranks that the options of a command name; None if they name none.

    Raises:
        UsageError: there can be no such ranks.
    """
    given = ctx.params
    return named_ranks(
        given["ranks"],
        given["engine"],
        config,
        reshard=given["reshard"],
        bucket_view=given["gradient_as_bucket_view"],
        bucket_elements=given["reduce_bucket_size"],
        overlaps=given["overlap_comm"],
        stage3={
            "prefetch": given["stage3_prefetch_bucket_size"],
            "persistence_threshold": given["stage3_param_persistence_threshold"],
            "max_live": given["stage3_max_live_parameters"],
            "max_reuse": given["stage3_max_reuse_distance"],
        },
    )


def planner_of(target: Target, config: TrainConfig, *, full: bool) -> "Planner":
    """Load or make the model of `config` and observe its step, saying so."""
    hint(f"loading {config.model}" if target.loads(config) else f"making {config.model} of its config alone")
    shape = target.shape(config, full=full)
    hint(f"planning for {target.place}")
    return target.planner(shape, config)


def plan_only() -> None:
    """Import what planning needs, knowing that nothing will be computed in this process.

    bitsandbytes compiles two functions when it is imported, which takes a second and a half of nothing else. The
    variable that stops it is as it was afterwards: who calls a command from a process that trains wants to compile.
    What is imported stays: the garbage collector, which would go through all of it a dozen times, need not look. Nor
    need it look often at the model of its config, which stays too: that was a tenth of a plan for 80 layers, whose
    garbage is 20 MiB. Nor at all of it once more when the process ends, which took a quarter of a second.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    collects, cold = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        # Missing, or there and broken: `--load-in-4bit` says so, and nothing else needs it.
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            import bitsandbytes as bitsandbytes
        import peft as peft

        from rematree.planning import planner as planner
    finally:
        if cold:  # else there may be garbage of others among it, and the process is not a command's
            gc.freeze()
            atexit.register(gc.freeze)
            gc.set_threshold(_OBJECTS_BEFORE_A_LOOK, *gc.get_threshold()[1:])
        if collects:
            gc.enable()
        if before is None:
            del os.environ[_NO_COMPILER]
        else:
            os.environ[_NO_COMPILER] = before


def parse_budget(text: str, option: str = "--budget") -> int:
    """`parse_bytes` that names the option."""
    try:
        return parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error.message}") from error


def split_list(values: Any) -> tuple[str, ...]:
    """Values of an option that is given several times, or once with commas."""
    return tuple(part.strip() for value in values or () for part in value.split(",") if part.strip())
