"""`--ranks` and `--engine`: the bytes of the Python API's `Ranks`, and refusals that say what would work."""

from pathlib import Path
from typing import Any

import pytest

from command_line import rematree, remedies
from models import build
from rematree.cli import options
from rematree.finetune.config import TrainConfig
from rematree.finetune.target import Target
from rematree.plans import Plan
from rematree.referee.ranks import Ranks

WORDS = ["--lora-target-modules", "down_proj", "--batch-size", "8", "--max-length", "64", "--device", "h100"]
WORDS += ["--forbid", "chunked_loss,groups,lean_adapters"]
DDP, FSDP2 = ["--ranks", "2", "--engine", "ddp"], ["--ranks", "2", "--engine", "fsdp2"]
TWO = {
    "ddp": Ranks("ddp", 2),
    "ddp view": Ranks("ddp", 2, bucket_view=True),
    "fsdp2": Ranks("fsdp2", 2),
    "fsdp2 whole": Ranks("fsdp2", 2, reshard=False),
}
OPTIONS = {
    "ddp": DDP,
    "ddp view": [*DDP, "--gradient-as-bucket-view"],
    "fsdp2": FSDP2,
    "fsdp2 whole": [*FSDP2, "--no-reshard"],
}
COMMANDS = ("plan", "fit", "frontier", "advise", "compare")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config of two layers, without weights."""
    path = tmp_path_factory.mktemp("ranks")
    build("llama", layers=2).config.save_pretrained(path)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return str(path / "config.json")


@pytest.mark.parametrize("name", TWO)
def test_the_bytes_are_those_of_the_python_api(name: str, model: str) -> None:
    outcome = rematree("plan", model, *WORDS, *OPTIONS[name], "--full", "--json")
    assert outcome.code == 0, outcome.err
    assert f"planning for H100 SXM 80GB, {TWO[name]}" in outcome.err
    plan = Plan.from_json(outcome.out)
    target = Target.named("h100").among(TWO[name])
    config = TrainConfig(
        model=model,
        data="",
        budget=1,
        output_dir=Path(),
        per_device_train_batch_size=8,
        max_length=64,
        forbid=("chunked_loss", "groups", "lean_adapters"),
    )
    expected = target.planner(target.shape(config, full=True), config).plan(target.budget(None))
    assert plan.ledger == expected.ledger
    assert plan.predicted_peak_bytes == sum(line.num_bytes for line in plan.ledger)
    assert plan.levers == expected.levers
    assert f"for {TWO[name]}; all bytes are those of one rank" in plan.notes
    assert (plan.run["ranks"], plan.run["engine"]) == ("2", TWO[name].engine)
    assert plan.run.get("reshard") == {"fsdp2": "true", "fsdp2 whole": "false"}.get(name)
    assert plan.run.get("gradient_as_bucket_view") == {"ddp": "false", "ddp view": "true"}.get(name)


def test_the_table_says_whose_bytes_they_are(model: str) -> None:
    outcome = rematree("plan", model, *WORDS, *FSDP2)
    assert outcome.code == 0, outcome.err
    assert "for one of 2 ranks under FSDP2; all bytes are those of one rank" in outcome.out


def test_every_remedy_keeps_the_ranks(model: str) -> None:
    outcome = rematree("plan", model, *WORDS, *FSDP2, "--no-reshard", "--full", "--budget", "560MiB")
    assert outcome.code == 3
    found = remedies(outcome)
    assert found
    for words in found:
        assert words[words.index("--ranks") + 1] == "2"
        assert words[words.index("--engine") + 1] == "fsdp2"
        assert "--no-reshard" in words
        assert rematree(*words).code == 0, words


def test_more_rows_fit_two_ranks_that_share_the_weights(model: str) -> None:
    """Full fine-tuning of a model whose weights and state are much of the budget."""
    words = [*WORDS, "--full", "--find", "device", "--json"]
    alone = rematree("fit", model, *words).data
    both = rematree("fit", model, *words, *FSDP2).data
    assert alone["ranks"] is None
    assert both["ranks"] == {"engine": "fsdp2", "count": 2, "bucket_view": False, "reshard": True}
    assert both["probes"][0]["least_bytes"] < alone["probes"][0]["least_bytes"]
    said = rematree("fit", model, *WORDS, "--full", "--find", "device", *FSDP2).out
    assert "All of it for one of 2 ranks under FSDP2." in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_plans_a_shape_has_the_options(command: str) -> None:
    outcome = rematree(command, "--help")
    for option in ("--ranks", "--engine", "--no-reshard", "--gradient-as-bucket-view"):
        assert option in outcome.out
    assert "ddp (every rank holds" in " ".join(outcome.out.replace("│", " ").split())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["--engine", "ddp"], "--engine is about several ranks, and --ranks is missing", "--ranks 2"),
        (["--no-reshard"], "--no-reshard is about several ranks, and --ranks is missing", "--ranks 2"),
        (["--gradient-as-bucket-view"], "--gradient-as-bucket-view is about several ranks", "--ranks 2"),
        (["--ranks", "1", "--engine", "ddp"], "--ranks is 1; a step is distributed over at least 2", "leave out"),
        (["--ranks", "-3"], "--ranks is -3; a step is distributed over at least 2", "leave out --ranks"),
        (["--ranks", "2"], "--engine, which says how, is missing", "--engine fsdp2"),
        (["--ranks", "2", "--engine", "FSDP"], "unknown engine 'FSDP'; the nearest are fsdp2, ddp", "--engine fsdp2"),
        (["--ranks", "2", "--engine", "dp"], "unknown engine 'dp'; the nearest are ddp, fsdp2", "--engine ddp"),
        ([*DDP, "--no-reshard"], "--no-reshard is FSDP2's", "--engine fsdp2"),
        ([*FSDP2, "--gradient-as-bucket-view"], "--gradient-as-bucket-view is DDP's", "--engine ddp"),
        ([*FSDP2, "--load-in-4bit"], "--load-in-4bit packs weights", "--engine ddp"),
        ([*FSDP2, "--load-in-8bit"], "--load-in-8bit packs weights", "--engine ddp"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    command: str, words: list[str], message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "plan_only", lambda: pytest.fail("refused only after planning was imported"))
    extra = ["--find", "max-length"] if command == "fit" else []
    outcome = rematree(command, "llama-3-8b", "--device", "h100", *extra, *words)
    assert (outcome.code, outcome.out) == (2, "")
    first, _, below = outcome.err.partition("What would work:\n")
    assert message in first
    assert remedy in below


def test_a_plan_of_several_ranks_is_not_verified_in_one_process(model: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert rematree("plan", model, *WORDS, *DDP, "--output", file).code == 0
    outcome = rematree("verify", file, model)
    assert outcome.code == 2
    assert "is for one of 2 ranks, and this command runs one process" in outcome.err
    shown: Any = rematree("show", file)
    assert "all bytes are those of one rank" in shown.out
