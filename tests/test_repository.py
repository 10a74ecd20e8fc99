"""The habits of this repository, checked: layer order, light start, module size, plain text, pinned versions."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import LONG_FILES

MAX_LINES = 350
COMMANDS = {
    "train",
    "report",
    "advise",
    "plan",
    "fit",
    "compare",
    "show",
    "explain",
    "export",
    "frontier",
    "verify",
    "devices",
    "calibrate",
    "env",
}
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")
# In two parts, so that this file does not find itself.
MACHINE_PATH = re.compile("/" + r"(work|opt|root|home|Users|mnt)/")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)


def test_files_that_are_begun_first_are_there(repository: Path) -> None:
    assert len(set(LONG_FILES)) == len(LONG_FILES)
    assert [name for name in LONG_FILES if not (repository / "tests" / f"{name}.py").is_file()] == []


@pytest.fixture(scope="module")
def texts(repository: Path) -> dict[str, bytes]:
    """Every file that git would keep, by its path."""
    if shutil.which("git") is None or not (repository / ".git").exists():
        pytest.skip("not a git working tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        check=True,
    )
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return {name: (repository / name).read_bytes() for name in names if (repository / name).is_file()}


@pytest.mark.slow  # make lint, with which make test begins, checks the same
def test_imports_point_down(repository: Path) -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_is_light() -> None:
    result = run_python(f"import sys, rematree; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str]]]:
    """What `--help` of each command prints, and which heavy modules that is the first to import, in one process."""
    result = run_python(
        "import contextlib, io, json, sys\n"
        "from rematree.cli.main import app\n"
        "found, seen = {}, set()\n"
        f"for command in {['', *sorted(COMMANDS)]}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        app([*command.split(), '--help'], standalone_mode=False)\n"
        f"    heavy = {{*{HEAVY}}} & sys.modules.keys() - seen\n"
        "    seen |= heavy\n"
        "    found[command] = out.getvalue(), sorted(heavy)\n"
        "print(json.dumps(found))\n"
    )
    assert (result.returncode, result.stderr.strip()) == (0, "")
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", ["", *sorted(COMMANDS)])
def test_help_is_light(command: str, helps: dict[str, tuple[str, list[str]]]) -> None:
    text, heavy = helps[command]
    assert heavy == []
    assert re.search(rf"Usage: \S+ {command}", text)


def test_commands_are_frozen(repository: Path) -> None:
    from typer.main import get_command

    from rematree.cli.main import app

    assert set(getattr(get_command(app), "commands")) == COMMANDS  # noqa: B009
    readme = (repository / "README.md").read_text(encoding="ascii")
    assert set(re.findall(r"^\| `rematree (\w+)` \|", readme, re.MULTILINE)) == COMMANDS


def test_modules_are_small(repository: Path) -> None:
    sizes = {
        str(path.relative_to(repository)): len(path.read_text(encoding="ascii").splitlines())
        for path in (repository / "src").rglob("*.py")
    }
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}


def test_no_module_is_called_utils(repository: Path) -> None:
    assert [path for path in (repository / "src").rglob("*") if path.stem in ("utils", "util", "helpers", "misc")] == []


def test_text_is_ascii(texts: dict[str, bytes]) -> None:
    assert [name for name, content in texts.items() if not content.isascii()] == []


def test_text_ends_with_one_newline(texts: dict[str, bytes]) -> None:
    assert [name for name, text in texts.items() if text and (not text.endswith(b"\n") or b"\r" in text)] == []


def test_no_path_of_one_machine(texts: dict[str, bytes]) -> None:
    found = {
        f"{name}:{number}"
        for name, content in texts.items()
        for number, line in enumerate(content.decode("ascii", "replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    }
    assert found == set()


def test_every_dependency_is_pinned_within_its_bounds(repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text(encoding="ascii").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="ascii"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier
