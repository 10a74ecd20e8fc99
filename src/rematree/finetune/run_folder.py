"""The output directory: whose run it holds, how far that run got, and which checkpoints are whole.

run.json        what was asked for; written when the first step is about to start
plan.json       the plan in force; a resumed run uses it again, so that its steps round the same way
frontier.json   what else could be had, for `rematree report`; made with the plan
before.json     held-out loss and answer before training
steps.jsonl     a line for every step: loss, seconds, peak where the device counts it; a resumed run adds to it
measured.json   peak of the last step, seconds of the steps
checkpoint-N/   written by the Trainer file by file; `complete.json` in it is written last
adapter/        the result, for PEFT
logs/           TensorBoard
result.json     written last: a directory with it holds a finished run
"""

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final, cast

from rematree.errors import UsageError
from rematree.finetune.config import differences
from rematree.finetune.storage import apply_umask, is_disk_full, read_json, write_json, write_text
from rematree.plans import Plan
from rematree.typed_json import without_nan
from rematree.units import format_bytes

_MARK: Final = "complete.json"
_STEPS: Final = "steps.jsonl"
_CHECKPOINTS_KEPT: Final = 2
# What is written under another name first, see `storage.py`.
_PIECES: Final = ("adapter", "run.json", "plan.json", "frontier.json", "before.json", "measured.json", "result.json")


class RunState(Enum):
    """How far the run in a directory got."""

    NEW = "new"
    STARTED = "started"
    FINISHED = "finished"


class RunFolder:
    """One output directory.

    Attributes:
        path: The directory; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser()

    def inspect(self, asked: dict[str, Any]) -> RunState:
        """How far the run described by `asked` has got here. Writes nothing.

        Raises:
            UsageError: the directory holds another run, or files that are no run at all.
        """
        remedies = ["another --output-dir", f"rm -r {self.path}   (to start afresh)"]
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a directory", remedies=remedies[:1])
        nearest = self.nearest()
        if not os.access(nearest, os.W_OK) or not nearest.is_dir():
            raise UsageError(f"{self.path} cannot be written: {nearest} does not allow it", remedies=remedies[:1])
        if nearest != self.path.absolute():
            return RunState.NEW
        there = self.about()
        if there is None:
            # Files that start with a dot are what a killed start leaves behind, or a file browser.
            own = {"plan.json", "frontier.json"}
            foreign = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(".") and p.name not in own)
            if foreign:
                raise UsageError(
                    f"{self.path} is not empty and holds no run",
                    details=[f"in it: {', '.join(foreign[:8])}"],
                    remedies=remedies,
                )
            return RunState.NEW
        lines = differences(there["config"], asked)
        if lines:
            raise UsageError(
                f"{self.path} holds another run",
                details=lines,
                remedies=[*remedies, "the settings of that run, to resume it"],
            )
        return RunState.FINISHED if (self.path / "result.json").exists() else RunState.STARTED

    def about(self) -> dict[str, Any] | None:
        """What `run.json` holds, or None without one.

        Raises:
            UsageError: it is damaged.
        """
        there = read_json(self.path / "run.json")
        if there is not None and not isinstance(there.get("config"), dict):
            raise UsageError(f"{self.path / 'run.json'} is damaged: there is no config in it")
        return there

    def nearest(self) -> Path:
        """The directory itself, or while it is not there the closest one above it."""
        path = self.path.absolute()
        return next(p for p in (path, *path.parents) if p.exists())

    def start(
        self, asked: dict[str, Any], plan: Plan, notes: dict[str, Any], frontier: dict[str, Any] | None = None
    ) -> None:
        """Claim the directory. `run.json` comes last: with it, everything a resumed run needs is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "plan.json", plan.to_json())
        if frontier is not None:
            write_text(self.path / "frontier.json", json.dumps(frontier) + "\n")
        write_json(self.path / "run.json", {"config": asked, "notes": notes})

    def plan(self) -> Plan:
        """The plan the run was started with."""
        return Plan.from_json((self.path / "plan.json").read_text(encoding="utf-8"))

    def read(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file of the run, or None."""
        return read_json(self.path / name)

    def write(self, name: str, data: dict[str, Any]) -> None:
        """Replace a file of the run in one step."""
        write_json(self.path / name, data)

    def add_step(self, entry: Mapping[str, Any]) -> None:
        """Add a line about a step that was made; one that a kill has cut is ended first."""
        with (self.path / _STEPS).open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(without_nan(entry)).encode() + b"\n")

    def steps(self) -> list[dict[str, Any]]:
        """What is known of every step, in order; of one that was made again after a kill, the last time counts."""
        try:
            lines = (self.path / _STEPS).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        found: dict[int, dict[str, Any]] = {}
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # a kill cuts the line that is being written
                entry: Any = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                    found[entry["step"]] = entry
        return [found[step] for step in sorted(found)]

    def mark_complete(self, step: int) -> None:
        """Note the files of a checkpoint and their sizes; a checkpoint without this note is torn."""
        folder = self.path / f"checkpoint-{step}"
        apply_umask(folder)
        write_json(folder / _MARK, {"files": _sizes(folder)})

    def drop_old_checkpoints(self) -> None:
        """Keep the newest two; the older of them is for a crash of the machine that loses the newer one's bytes."""
        for folder in sorted(self.path.glob("checkpoint-*"), key=_step)[:-_CHECKPOINTS_KEPT]:
            shutil.rmtree(folder)

    def recover(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and the names of the torn ones; these and other torn pieces are removed."""
        for piece in (p for name in _PIECES for p in self.path.glob(f".{name}-*")):
            if piece.is_dir():
                shutil.rmtree(piece)
            else:
                piece.unlink()
        removed: list[str] = []
        whole: Path | None = None
        for folder in sorted(self.path.glob("checkpoint-*"), key=_step, reverse=True):
            if not _is_whole(folder):
                shutil.rmtree(folder)
                removed.append(folder.name)
            elif whole is None:
                whole = folder
        return whole, removed


@contextlib.contextmanager
def disk_full_is_said(folder: RunFolder, needed_bytes: int) -> Generator[None]:
    """Turn whatever a writer raises on a full disk into one clear error, and remove what it left half-written.

    Args:
        folder: What is written to.
        needed_bytes: About how much one save takes.
    Raises:
        UsageError: names the directory, the bytes needed, the bytes free and what is still there.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        nearest = folder.nearest()
        free = shutil.disk_usage(nearest).free
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        whole, _ = folder.recover()
        raise UsageError(
            f"saving to {folder.path} failed: it takes about {format_bytes(needed_bytes)}, "
            f"{format_bytes(free)} are free",
            details=[reason, f"{whole.name} is whole" if whole is not None else "no checkpoint was saved before"],
            remedies=["make room and start the same command again", "another --output-dir"],
        ) from error


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _MARK
    }


def _is_whole(folder: Path) -> bool:
    try:
        mark = read_json(folder / _MARK)
    except UsageError:
        return False
    files = None if mark is None else mark.get("files")
    if not isinstance(files, dict) or not files:
        return False
    there = _sizes(folder)  # a file browser's or a user's own may be among them
    return all(there.get(name) == size for name, size in cast("dict[str, Any]", files).items())
