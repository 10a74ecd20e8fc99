"""What a command prints: data on standard output, progress and hints on standard error."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from rematree.errors import UsageError
from rematree.plans import Plan
from rematree.report.tables import Columns
from rematree.typed_json import without_nan


def hint(line: str) -> None:
    """A line of progress."""
    typer.echo(line, err=True)


def emit_json(data: Any) -> None:
    """`data` as indented JSON, null for what is no number."""
    typer.echo(json.dumps(without_nan(data), indent=1, allow_nan=False))


def emit_table(columns: Columns) -> None:
    """A table: coloured and wrapped on a terminal, plain and whole in a pipe."""
    if not sys.stdout.isatty():
        typer.echo(columns.plain())
        return
    console = Console()
    for line in columns.above:
        console.print(line, markup=False, highlight=False)
    console.print(columns.rich())
    for line in columns.below:
        console.print(line, markup=False, highlight=False)


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        UsageError: there is no such file, or it is no plan; names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}",
            remedies=["rematree plan --model ... --budget ... --output plan.json"],
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a plan: not UTF-8 at byte {error.start}") from error
    try:
        return Plan.from_json(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}") from error


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written before any work is done for it.

    Raises:
        UsageError: it is a directory, or the place allows no writing.
    """
    from rematree.finetune.storage import check_place

    try:
        if path.is_dir():
            raise UsageError(f"{path} is a directory, not a file to write")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no directory {path.parent}")
        check_place(path)
    except OSError as error:
        raise _not_writable(path, error) from error


def write_output(path: Path, text: str) -> None:
    """Store what was asked for by --output, whole or not at all.

    Raises:
        UsageError: it cannot be written; what was there is as it was.
    """
    from rematree.finetune.storage import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise _not_writable(path, error) from error


def command_with(ctx: typer.Context, **changes: Any) -> str:
    """The command as it was given, with other values for some of its parameters, None to leave one out, for a shell."""
    words = ["rematree", ctx.info_name or ""]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source = ctx.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if not given and name not in changes:
            continue
        value = changes.get(name, ctx.params[name])
        if value is None:
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        elif isinstance(value, (list, tuple)):
            words += [parameter.opts[0], ",".join(map(str, value))] if value else []  # pyright: ignore[reportUnknownArgumentType]
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join(words)


def _not_writable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path} cannot be written: {error.strerror}", remedies=["another --output"])
