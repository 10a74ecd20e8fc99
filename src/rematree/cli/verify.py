"""`rematree verify`: a plan's promises against the live model."""

from dataclasses import asdict
from typing import Annotated

import typer

from rematree.cli import options
from rematree.cli.options import DEFAULT
from rematree.cli.output import emit_json, emit_table, hint, read_plan
from rematree.errors import UsageError
from rematree.report.tables import verification_columns

Rounds = Annotated[int, typer.Option(min=1, help="Timed steps of each kind; the median counts.")]


def verify(
    ctx: typer.Context,
    plan: options.PlanFile,
    model: options.Model = None,
    model_option: options.ModelOption = None,
    rounds: Rounds = 3,
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
    as_json: options.Json = False,
) -> None:
    """Run the model with and without a stored plan, and compare.

    Gradients must be equal (up to rounding where the loss is chunked) and the peak must be as predicted; exit code 4 if
    not. Give the options of the model and its adapters that the plan was made with. The batch is made up in the shape
    that is in the plan. The plain step must fit, as it is the reference.
    """
    stored = read_plan(plan)
    if "ranks" in stored.run:
        raise UsageError(
            f"{plan} is for one of {stored.run['ranks']} ranks, and this command runs one process: its peak is another",
            remedies=["rematree plan ... without --ranks, and verify that"],
        )
    passes = stored.run.get("gradient_accumulation_steps", "1")
    if not passes.isdecimal() or int(passes) < 1:
        raise UsageError(f"{plan}: not a plan: its run has gradient_accumulation_steps {passes!r}")
    config = options.train_config(ctx)
    from rematree.finetune.synthetic import shape_of_plan
    from rematree.verification import verify as run_both

    hint(f"loading {config.model}")
    shape = shape_of_plan(config, stored.fingerprint.batch, full=full)
    hint("running steps with and without the plan")
    result = run_both(stored, shape.model, shape.batch, accumulation_steps=int(passes), rounds=rounds)
    if as_json:
        emit_json(asdict(result))
    else:
        emit_table(verification_columns(result))
