"""Under a limit of the operating system a plan is the difference between a run that completes and one that dies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits mapped memory on Linux only")
def test_the_plan_completes_where_everything_else_dies(repository: Path, tmp_path: Path) -> None:
    output = tmp_path / "hard_limit.json"
    command = [sys.executable, str(repository / "benchmarks" / "hard_limit.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert [(what, outcome) for _, what, outcome, _ in result["rows"]] == [
        ("plan, before loading", "completes"),
        ("plain step", "dies of memory"),
        ("HF's flag", "dies of memory"),
        ("the plan", "completes"),
        ("plan, before loading", "is refused"),
        ("the smallest plan, forced", "dies of memory"),
    ]
