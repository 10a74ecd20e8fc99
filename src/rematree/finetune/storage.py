"""Write so that a reader sees all of it or none, and say so when the disk is full."""

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rematree.errors import UsageError
from rematree.typed_json import without_nan

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
    """Replace the file at `path` in one step; a killed process leaves the old one or the new one.

    The file keeps its mode; a new one has that of a plain open(). A link stays, and what it leads to is replaced. What
    is no file, a device or a pipe, is written to.

    Raises:
        OSError: it cannot be written; a file is as it was.
    """
    mode = _mode(path)
    if not _is_replaced(mode):
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()
    staging = beside(target)
    try:
        with staging.open("x", encoding="utf-8") as file:
            if mode is not None:
                staging.chmod(stat.S_IMODE(mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def check_place(path: Path) -> None:
    """Find out whether `write_text` can write to `path`, as far as that shows before; nothing is left there.

    Raises:
        OSError: it cannot.
    """
    if _is_replaced(_mode(path)):
        # Tried, not asked: root may do anything, but not on a read-only file system.
        staging = beside(path.resolve())
        staging.touch(exist_ok=False)
        staging.unlink()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def write_json(path: Path, data: Any) -> None:
    """`write_text` of indented JSON, null for what is no number."""
    write_text(path, json.dumps(without_nan(data), indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that `write_json` wrote, or None when there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged: {error.msg} at line {error.lineno}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is damaged: not a JSON object")
    return data  # pyright: ignore[reportUnknownVariableType]


@contextmanager
def staged_directory(target: Path) -> Generator[Path]:
    """A new directory that takes the name `target` when the block ends well, and is removed when it does not.

    Directory and files have the modes of a plain mkdir() and open().
    """
    staging = beside(target)
    staging.mkdir()
    try:
        yield staging
        apply_umask(staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def beside(target: Path) -> Path:
    """A new name in the directory of `target`, for what is to take its place; `target`'s own is part of it."""
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}")


def apply_umask(folder: Path) -> None:
    """Give the files in `folder` the mode of a plain open(): safetensors leaves its own to their owner alone."""
    plain = beside(folder / "mode")
    plain.touch()
    mode = stat.S_IMODE(plain.stat().st_mode)
    plain.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def is_disk_full(error: BaseException | None) -> bool:
    """True when `error`, or what it was raised from, means that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(text in str(error) for text in _NO_ROOM_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _mode(path: Path) -> int | None:
    """Kind and permissions of what is at `path`, links followed; None: nothing is there."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _is_replaced(mode: int | None) -> bool:
    return mode is None or stat.S_ISREG(mode)
