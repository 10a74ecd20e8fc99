"""`kill -9` at random moments, again and again: the run that is started anew each time ends with the same numbers."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import killed
from rematree.finetune.run_folder import RunFolder
from rematree.plans import Plan
from test_finetune_tiny import save_tiny_model, sums, write_jsonl

JOBS = {"command": killed.train_command, "trainer": killed.trainer}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs")
    save_tiny_model(path / "model")
    write_jsonl(path / "sums.jsonl", sums(24))
    return path


def test_two_kills(inputs: Path, tmp_path: Path) -> None:
    check(JOBS["command"], inputs, tmp_path, kills=2, steps=8, seed=0)  # the moments still differ with the machine


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_ten_kills(name: str, inputs: Path, tmp_path: Path) -> None:
    check(JOBS[name], inputs, tmp_path, kills=10, steps=24, seed=random.SystemRandom().randrange(10**6))


def check(job: Callable[..., None], inputs: Path, tmp_path: Path, *, kills: int, steps: int, seed: int) -> None:
    say(f"random.Random({seed})")
    draw = random.Random(seed)
    undisturbed, folder, log = tmp_path / "undisturbed", tmp_path / "killed", tmp_path / "log"
    beside = killed.start(job, tmp_path / "undisturbed log", inputs, undisturbed, steps)
    count = 0
    while not (folder / "result.json").exists():
        process = killed.start(job, log, inputs, folder, steps)
        if count < kills:
            say("killed at " + killed.kill_at_random(process, folder, draw))
            count += process.exitcode == -9
        process.join()
        assert process.exitcode in (-9, 0), log.read_text()
        everything_is_whole(folder)
    beside.join()
    assert beside.exitcode == 0, (tmp_path / "undisturbed log").read_text()
    assert count > 0
    expected, found = (json.loads((path / "result.json").read_text()) for path in (undisturbed, folder))
    assert len(expected["losses"]) == steps
    assert found["losses"] == expected["losses"]
    for name in ("heldout_loss_before", "heldout_loss_after", "generated_after"):
        assert found.get(name) == expected.get(name)
    made = RunFolder(folder).steps()
    assert [entry["step"] for entry in made] == list(range(1, steps + 1))
    assert [entry["loss"] for entry in made] == expected["losses"]
    theirs, ours = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (undisturbed, folder))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


def everything_is_whole(folder: Path) -> None:
    """Every file that has its name is complete; what is being written has another name, or no mark of completeness."""
    for path in folder.glob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict), path
    if (folder / "plan.json").exists():
        Plan.from_json((folder / "plan.json").read_text())
    if (folder / "steps.jsonl").exists():
        *_, last = lines = (folder / "steps.jsonl").read_text().split("\n")
        cut = [line for line in lines[:-1] if not _is_json(line)]
        assert not cut, "a line is written whole"
        assert last == ""
    for checkpoint in folder.glob("checkpoint-*"):
        mark = checkpoint / "complete.json"
        if not mark.exists():  # the one that was being written, which the next start removes
            assert checkpoint == max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            continue
        for name, size in json.loads(mark.read_text())["files"].items():
            assert (checkpoint / name).stat().st_size == size, name
        assert load_file(checkpoint / "adapter_model.safetensors")
        assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    if (folder / "adapter").exists():
        assert load_file(folder / "adapter" / "adapter_model.safetensors")
        json.loads((folder / "adapter" / "adapter_config.json").read_text())
    for events in (folder / "logs").glob("events*"):
        list(EventFileLoader(str(events)).Load())


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def say(line: str) -> None:
    """For the report of a failure, or with -s."""
    sys.stdout.write(line + "\n")
