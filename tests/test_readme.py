"""README, tried as a new user would: its Python runs as it is written, and its commands exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import rematree
from command_line import rematree as command
from models import assert_same, batch_for, build, gradients, with_lora
from rematree.cli.main import app
from rematree.pricing.cost import Roofline
from rematree.units import parse_bytes


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="ascii")


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def indented(text: str) -> list[str]:
    """Lines of code blocks that are indented by four spaces."""
    return [line.strip() for line in re.findall(r"(?:^|\n)\n((?:    .+\n)+)", text) for line in line.splitlines()]


def test_the_python_runs_as_it_is_written(
    readme: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny Llama under LoRA; of the text only the budget is another one, so that it binds."""
    monkeypatch.setattr("rematree.planning.observed.Measured", lambda device: Roofline(5e10, 1e10))
    model = with_lora(build("llama", layers=2), target_modules=["q_proj", "down_proj"])
    batch = batch_for(model, rows=8)
    planner = rematree.Planner(model, batch)
    least, most = planner.min_peak_bytes(), planner.plan(None).predicted_peak_bytes
    budget = (least + most) // 2
    (snippet,) = fenced(readme, "python")
    code, count = re.subn(r'budget="[\d.]+ ?[KMG]i?B"', f'budget="{budget}B"', snippet)
    assert count == 1
    expected = gradients(model, batch, seed=5)

    import torch

    torch.manual_seed(5)
    names: dict[str, Any] = {"model": model, "batch": batch}
    exec(compile(code, "README.md", "exec"), names)

    plan: rematree.Plan = names["plan"]
    assert plan.predicted_peak_bytes <= budget == plan.budget_bytes
    assert plan.recomputes
    assert capsys.readouterr().out == f"{plan}\n"
    assert names["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if plan.exact:
        assert_same(expected, {"loss": names["loss"].detach(), **found})
    assert found.keys() == expected.keys() - {"loss"}, "the gradients are those of the step, also after verify"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_every_function_it_names_is_public(readme: str) -> None:
    names = set(re.findall(r"\brematree\.(\w+)\(", readme))
    assert {"plan", "apply", "verify", "frontier", "saved_tensors"} <= names
    assert names <= set(rematree.__all__)


def test_the_commands_of_its_table_are_those_of_the_help(readme: str) -> None:
    table = re.findall(r"^\| `rematree (\w+)` \|", readme, re.MULTILINE)
    outcome = command("--help")
    assert outcome.code == 0
    listed = re.findall(r"^\W*(\w+)\s{2,}\S", outcome.out.partition("Commands")[2], re.MULTILINE)
    assert table == listed
    for name in table:
        assert command(name, "--help").code == 0


def test_every_option_of_its_command_lines_exists(readme: str) -> None:
    click: Any = typer.main.get_command(app)
    lines = [shlex.split(line) for line in indented(readme) if line.startswith("rematree ")]
    assert lines
    for words in lines:
        subcommand = click.commands[words[1]]
        options = {option for parameter in subcommand.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
        given = dict(zip(words[2::2], words[3::2], strict=True))
        assert parse_bytes(given["--budget"]) > 0


def test_its_make_targets_and_files_exist(readme: str, repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="ascii")
    targets = {word for line in indented(readme) if line.startswith("make ") for word in [line.split()[1]]}
    assert targets == {"demo", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    for name in re.findall(r"`((?:src/|solve/|execute/)?[\w/]+\.(?:py|md|txt))`", readme):
        assert (repository / name).exists() or (repository / "src" / "rematree" / name).exists(), name
