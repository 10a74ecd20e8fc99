"""Files appear whole or not at all, and every writer's way to say that the disk is full is understood."""

import errno
import json
from pathlib import Path

import pytest

from rematree.errors import UsageError
from rematree.finetune.storage import is_disk_full, read_json, staged_directory, write_json


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


@pytest.mark.parametrize(("text", "reason"), [("{", "Expecting property name"), ("[1]", "not a JSON object")])
def test_damaged_file_is_named(tmp_path: Path, text: str, reason: str):
    path = tmp_path / "run.json"
    path.write_text(text)
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
