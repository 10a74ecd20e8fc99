"""Files appear whole or not at all, and every writer's way to say that the disk is full is understood."""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rematree.errors import UsageError
from rematree.finetune.storage import check_place, is_disk_full, read_json, staged_directory, write_json, write_text


def test_json_comes_back(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    assert read_json(tmp_path / "b.json") is None


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"x": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(path.read_text()) == {"x": 1}


def test_what_is_no_number_is_null(tmp_path: Path):
    write_json(tmp_path / "a.json", {"losses": [1.5, math.nan], "rate": (math.inf, {"x": -math.inf})})
    assert read_json(tmp_path / "a.json") == {"losses": [1.5, None], "rate": [None, {"x": None}]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "maximum recursion depth exceeded"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, text: bytes, reason: str):
    path = tmp_path / "run.json"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=rf"run\.json is damaged: {reason}"):
        read_json(path)


def test_directory_takes_its_name_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "adapter"
    for text in ("old", "new"):
        with staged_directory(target) as staging:
            (staging / "weights").write_text(text)
    with pytest.raises(FileNotFoundError), staged_directory(target) as staging:
        (staging / "no folder" / "weights").write_text("half")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert (target / "weights").read_text() == "new"


@pytest.fixture
def for_the_group() -> Iterator[None]:
    """The umask of an account whose group may read."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("for_the_group")
def test_new_files_and_directories_follow_the_umask(tmp_path: Path):
    write_text(tmp_path / "plan.json", "{}")
    with staged_directory(tmp_path / "adapter") as staging:
        save_file({"weight": torch.zeros(1)}, staging / "weights")  # gives its file the mode 0600
        (staging / "below").mkdir()
        (staging / "below" / "config.json").touch()
    assert {str(path.relative_to(tmp_path)): oct(mode(path)) for path in tmp_path.rglob("*")} == {
        "plan.json": "0o640",
        "adapter": "0o750",
        "adapter/weights": "0o640",
        "adapter/below": "0o750",
        "adapter/below/config.json": "0o640",
    }


@pytest.mark.usefixtures("for_the_group")
@pytest.mark.parametrize("given", [0o600, 0o664, 0o444])
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, given: int):
    path = tmp_path / "plan.json"
    path.touch()
    path.chmod(given)
    write_text(path, "new")
    assert (path.read_text(), oct(mode(path))) == ("new", oct(given))


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, there: bool):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "plan.json", tmp_path / "plan.json"
    link.symlink_to(Path("far") / "plan.json")
    if there:
        target.write_text("old")
    write_text(link, "new")
    assert link.readlink() == Path("far") / "plan.json"
    assert (target.read_text(), target.is_symlink()) == ("new", False)
    assert [path.name for path in target.parent.iterdir()] == ["plan.json"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_place(pipe)
        write_text(pipe, "a plan\n")
        assert os.read(reader, 100) == b"a plan\n"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path):
    path = tmp_path / "plan.json"
    check_place(path)
    assert not list(tmp_path.iterdir())
    path.write_text("old")
    check_place(path)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    with pytest.raises(FileNotFoundError):
        check_place(tmp_path / "no folder" / "plan.json")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), False),
        (ValueError("x"), False),
    ],
)
def test_full_disk_is_recognised(error: Exception, full: bool):
    assert is_disk_full(error) is full
    wrapped = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    wrapped.__context__ = error
    assert is_disk_full(wrapped) is full
