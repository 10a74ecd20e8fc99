"""`--ranks` and `--engine`: the bytes of the Python API's `Ranks`, and refusals that say what would work."""

from pathlib import Path

import pytest
import torch

import rematree as rematree_library
from command_line import rematree, remedies
from models import build
from rematree.cli import options
from rematree.finetune.target import Target
from rematree.plans import Plan
from rematree.pricing.devices import find_device
from rematree.referee.ranks import Ranks, Stage3

FORBIDDEN = ("chunked_loss", "groups", "lean_adapters")
WORDS = ["--lora-target-modules", "down_proj", "--batch-size", "8", "--max-length", "64", "--device", "h100"]
WORDS.extend(["--forbid", ",".join(FORBIDDEN)])
DDP, FSDP2, ZERO2, ZERO3 = (["--ranks", "2", "--engine", name] for name in ("ddp", "fsdp2", "zero2", "zero3"))
STAGE3 = ["--stage3-prefetch-bucket-size", "0", "--stage3-param-persistence-threshold", "1"]
STAGE3.extend(["--stage3-max-live-parameters", "2", "--stage3-max-reuse-distance", "3"])
TWO = {
    "ddp": Ranks("ddp", 2),
    "ddp view": Ranks("ddp", 2, bucket_view=True),
    "fsdp2": Ranks("fsdp2", 2),
    "fsdp2 whole": Ranks("fsdp2", 2, reshard=False),
    "zero2": Ranks("zero2", 2),
    "zero2 told": Ranks("zero2", 2, bucket_elements=16_777_216, overlaps=True),
    "zero3": Ranks("zero3", 2),
    "zero3 told": Ranks("zero3", 2, bucket_elements=9, stage3=Stage3(0, 1, 2, 3)),
}
OPTIONS = {
    "ddp": DDP,
    "ddp view": [*DDP, "--gradient-as-bucket-view"],
    "fsdp2": FSDP2,
    "fsdp2 whole": [*FSDP2, "--no-reshard"],
    "zero2": ZERO2,
    "zero2 told": [*ZERO2, "--reduce-bucket-size", "16777216", "--overlap-comm"],
    "zero3": ZERO3,
    "zero3 told": [*ZERO3, "--reduce-bucket-size", "9", *STAGE3],
}
COMMANDS = ("plan", "fit", "frontier", "advise", "compare")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config of two layers, without weights."""
    path = tmp_path_factory.mktemp("ranks")
    build("llama", layers=2).config.save_pretrained(path)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return str(path / "config.json")


@pytest.mark.parametrize("name", TWO)
def test_the_options_are_the_fields_of_ranks(name: str) -> None:
    """Any command says so before it plans; a length that no model has ends it there."""
    asked: list[Ranks | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Target, "among", lambda target, ranks: asked.append(ranks) or target)
        outcome = rematree("plan", "llama-3-8b", "--device", "h100", *OPTIONS[name], "--budget", "1TiB")
    assert (outcome.code, asked) == (2, [TWO[name]]), outcome.err


def test_the_bytes_are_those_of_the_python_api(model: str) -> None:
    outcome = rematree("plan", model, *WORDS, *OPTIONS["fsdp2 whole"], "--full", "--json")
    assert outcome.code == 0, outcome.err
    assert "planning for H100 SXM5 80GB, one of 2 ranks under FSDP2" in outcome.err
    plan = Plan.from_json(outcome.out)
    assert (plan.run["ranks"], plan.run["engine"], plan.run["reshard"]) == ("2", "fsdp2", "false")
    assert "for one of 2 ranks under FSDP2; all bytes are those of one rank" in plan.notes
    target = Target.named("h100")
    config = options.TrainConfig(
        model=model, data="", budget=1, output_dir=Path(), per_device_train_batch_size=8, max_length=64
    )
    shape = target.shape(config, full=True)
    planner = rematree_library.Planner(
        shape.model,
        shape.batch,
        ranks=TWO["fsdp2 whole"],
        forbid=FORBIDDEN,
        device=torch.device("cuda", 0),
        capability=(9, 0),
        cost=find_device("h100").roofline(),
    )
    expected = planner.plan(target.budget(None))
    assert plan.ledger == expected.ledger
    assert plan.levers == expected.levers
    assert plan.predicted_peak_bytes == sum(line.num_bytes for line in plan.ledger)


def test_every_remedy_keeps_the_ranks(model: str) -> None:
    outcome = rematree("plan", model, *WORDS, *OPTIONS["fsdp2 whole"], "--full", "--budget", "700KiB")
    assert outcome.code == 3
    found = remedies(outcome)
    assert found
    for words in found:
        assert (words[words.index("--ranks") + 1], words[words.index("--engine") + 1]) == ("2", "fsdp2")
        assert "--no-reshard" in words


def test_fit_says_for_which_ranks(model: str) -> None:
    outcome = rematree("fit", model, *WORDS, *DDP, "--find", "device")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("The smallest device that fits is H100 SXM5 80GB: it takes at least ")
    assert "All of it for one of 2 ranks under DDP." in outcome.out


def test_a_plan_of_several_ranks_is_not_verified_in_one_process(model: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    made = rematree("plan", model, *WORDS, *DDP, "--output", file)
    assert made.code == 0, made.err
    assert "for one of 2 ranks under DDP; all bytes are those of one rank" in made.out
    assert rematree("show", file).out == made.out
    outcome = rematree("verify", file, model)
    assert outcome.code == 2
    assert "is for one of 2 ranks, and this command runs one process" in outcome.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_plans_a_shape_has_the_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    outcome = rematree(command, "--help")
    named = ("--ranks", "--engine", "--no-reshard", "--gradient-as-bucket-view", "--reduce-bucket-size")
    for option in (*named, "--overlap-comm", *STAGE3[::2]):
        assert option in outcome.out
    assert "ddp (every rank holds the model), fsdp2" in outcome.out


@pytest.mark.parametrize(
    ("words", "message", "remedy"),
    [
        (["--engine", "ddp"], "--engine is about several ranks, and --ranks is missing", "--ranks 2"),
        (["--no-reshard"], "--no-reshard is about several ranks, and --ranks is missing", "--ranks 2"),
        (["--gradient-as-bucket-view"], "--gradient-as-bucket-view is about several ranks", "--ranks 2"),
        (["--overlap-comm"], "--overlap-comm is about several ranks, and --ranks is missing", "--ranks 2"),
        (["--reduce-bucket-size", "9"], "--reduce-bucket-size is about several ranks", "--ranks 2"),
        ([*DDP, "--overlap-comm"], "--overlap-comm is ZeRO-2's, and --engine is ddp", "--engine zero2"),
        ([*FSDP2, "--reduce-bucket-size", "9"], "--reduce-bucket-size is ZeRO-2's", "--engine zero2"),
        ([*ZERO2, "--no-reshard"], "--no-reshard is FSDP2's, and --engine is zero2", "--engine fsdp2"),
        ([*ZERO2, *STAGE3], "--stage3-prefetch-bucket-size is ZeRO-3's, and --engine is zero2", "--engine zero3"),
        ([*ZERO3, "--overlap-comm"], "--overlap-comm is ZeRO-2's, and --engine is zero3", "--engine zero2"),
        ([*ZERO3, "--load-in-4bit"], "how ZeRO-3 shards packed weights is not covered", "--engine ddp"),
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
def test_ranks_that_cannot_be_are_refused(words: list[str], message: str, remedy: str) -> None:
    outcome = rematree("plan", "llama-3-8b", "--device", "h100", *words)
    assert (outcome.code, outcome.out) == (2, "")
    first, _, below = outcome.err.partition("What would work:\n")
    assert message in first
    assert remedy in below


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_them_before_it_imports_what_planning_needs(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "plan_only", lambda: pytest.fail("planning was imported"))
    extra = ["--find", "max-length"] if command == "fit" else []
    outcome = rematree(command, "llama-3-8b", "--device", "h100", *extra, "--ranks", "2", "--engine", "fsdp")
    assert (outcome.code, outcome.out) == (2, "")
    assert "unknown engine 'fsdp'; the nearest are fsdp2, ddp" in outcome.err
