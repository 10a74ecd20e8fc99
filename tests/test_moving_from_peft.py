"""The scripts that README shows, before and after: both run, and train the same."""

import contextlib
import difflib
import io
import json
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from test_finetune_tiny import save_tiny_model, sums, write_jsonl

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "moving_from_peft"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("moving")
    rows = [{"text": row["prompt"] + " " + row["completion"]} for row in sums(8)]
    return save_tiny_model(folder / "model"), write_jsonl(folder / "data.jsonl", rows)


def run(script: str, *words: object) -> list[float]:
    out = io.StringIO()
    argv = sys.argv
    sys.argv = [script, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT alone says of itself
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        sys.argv = argv
    return json.loads(out.getvalue().splitlines()[-1])


@pytest.mark.parametrize("name", ["plain_loop", "trainer", "sft"])
def test_before_and_after_train_the_same(
    name: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "plain_loop":
        pytest.importorskip("bitsandbytes")
    if name == "sft":
        pytest.importorskip("trl")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = list(inputs) if name == "plain_loop" else [*inputs, tmp_path / "output"]
    before = run(f"{name}_before.py", *words)
    after = run(f"{name}_after.py", *words, "6MiB")
    assert len(before) == 4
    assert after == pytest.approx(before, rel=1e-4)


def test_readme_shows_what_changes() -> None:
    """All lines that differ, but for the title, the command line and what is read from it."""
    readme = (EXAMPLES.parent.parent / "README.md").read_text()
    for name in ("plain_loop", "trainer", "sft"):
        shown = re.search(rf"`{name}_after`\):\n\n```diff\n(.*?)```", readme, re.DOTALL)
        assert shown
        before, after = ((EXAMPLES / f"{name}_{when}.py").read_text().splitlines() for when in ("before", "after"))
        changed = [
            line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:2] not in ("--", "++", "@@")
        ]
        told = [line for line in changed if not re.match(r'[-+]("""|python |path, |$)', line)]
        assert shown[1].splitlines() == told
