"""`rematree`: the commands, and how their errors leave the process."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from rematree.cli.advise import advise
from rematree.cli.calibrate import calibrate
from rematree.cli.compare import compare
from rematree.cli.devices import devices
from rematree.cli.env import env
from rematree.cli.explain import explain
from rematree.cli.export import export
from rematree.cli.fit import fit
from rematree.cli.frontier import frontier
from rematree.cli.plan import plan
from rematree.cli.report import report
from rematree.cli.show import show
from rematree.cli.train import train
from rematree.cli.verify import verify
from rematree.errors import RematreeError


def _dashes(option: str) -> str:
    return option.replace("_", "-")


# Tracebacks stay Python's own: a report of a bug is read elsewhere.
app = typer.Typer(
    name="rematree",
    help="Say how many bytes you have; get the fastest training step that fits, with exactly the same gradients.",
    epilog="Exit codes: 0 done, 2 wrong usage, 3 infeasible budget, 4 verification failed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    # PEFT, TRL and Trainer spell their settings with underscores: both spellings are taken.
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": _dashes},
)
for command in (
    train,
    report,
    advise,
    plan,
    fit,
    compare,
    show,
    explain,
    export,
    frontier,
    verify,
    devices,
    calibrate,
    env,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit.

    Args:
        arguments: Of the command line; those of the process by default.
    """
    # Read when torch and tokenizers are imported: profiler notices, and a warning about forks, are no help here.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It warns of a missing kernel whenever PEFT imports it, and for every int8 layer and token of an evaluation.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(args=None if arguments is None else list(arguments), prog_name="rematree")
    except RematreeError as error:
        typer.echo(f"error: {error.render()}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
