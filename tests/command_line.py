"""Run `rematree` in this process, as a shell would."""

import contextlib
import io
import json
import os
import shlex
from dataclasses import dataclass
from typing import Any

from rematree.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Standard output, which must be one JSON value."""
        return json.loads(self.out)


def rematree(*words: object) -> Outcome:
    """Run a command; unexpected exceptions pass through."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    compiler = os.environ.get("TORCHDYNAMO_DISABLE")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    assert os.environ.get("TORCHDYNAMO_DISABLE") == compiler  # who is next in this process may want to compile
    return Outcome(code, out.getvalue(), err.getvalue())


def remedies(outcome: Outcome) -> list[list[str]]:
    """The commands that an error says would work, as words without the leading "rematree"."""
    _, _, below = outcome.err.partition("What would work:\n")
    commands = [shlex.split(line) for line in below.splitlines() if line.startswith("  rematree ")]
    return [words[1:] for words in commands]
