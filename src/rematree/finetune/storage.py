"""Write so that a reader sees all of it or none, and say so when the disk is full."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rematree.errors import UsageError

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Writers below Python report a full disk in their own words: safetensors (Rust), torch.save (C++).
_NO_ROOM_TEXTS: Final = (
    "No space left on device",
    "File too large",
    "os error 28",
    "PytorchStreamWriter failed",
    "iostream error",
)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step; a killed process leaves the old one or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that `write_json` wrote, or None when there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged: {error.msg} at line {error.lineno}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is damaged: not a JSON object")
    return data  # pyright: ignore[reportUnknownVariableType]


@contextmanager
def staged_directory(target: Path) -> Generator[Path]:
    """A new directory that takes the name `target` when the block ends well, and is removed when it does not."""
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_disk_full(error: BaseException | None) -> bool:
    """True when `error`, or what it was raised from, means that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(text in str(error) for text in _NO_ROOM_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
