"""Shapes of models that are often fine-tuned, known by name: their published configs without the weights.

Light on purpose: a command line completes and refuses names without importing torch. The data, with a source for every
entry, is in `shapes.json` beside this file.
"""

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rematree.errors import UsageError

_FILE: Final = Path(__file__).with_name("shapes.json")
_NEAREST: Final = 4


@dataclass(frozen=True, slots=True)
class NamedShape:
    """One model of the catalogue.

    Attributes:
        name: As it is given on a command line.
        hub: Id on the Hub of the model whose config this is.
        aliases: Other names of it.
        parameters: Number of parameters, each counted once; checked against the published number.
        config: Contents of its config.json, as far as they decide shapes and what is computed.
        sources: Where the figures stand.
        note: In what this is not the published model; empty if in nothing.
        partial: Whether the checkpoint on the Hub holds more than this: a vision tower.
    """

    name: str
    hub: str
    aliases: tuple[str, ...]
    parameters: int
    config: dict[str, Any]
    sources: tuple[str, ...]
    note: str
    partial: bool

    def is_id(self, spec: str) -> bool:
        """Whether `spec` is the id on the Hub, which means all of what is there, and not a name of this shape."""
        return spec.strip().lower() == self.hub.lower()


@functools.cache
def _catalogue() -> tuple[NamedShape, ...]:
    data = json.loads(_FILE.read_text(encoding="ascii"))
    return tuple(
        NamedShape(
            name,
            entry["hub"],
            tuple(entry["aliases"]),
            entry["parameters"],
            entry["config"],
            tuple(data["sources"][source] for source in entry["sources"]),
            entry.get("note", ""),
            entry.get("partial", False),
        )
        for name, entry in data["shapes"].items()
    )


def shapes() -> tuple[NamedShape, ...]:
    """All of them."""
    return _catalogue()


def find_shape(name: str) -> NamedShape | None:
    """The shape called `name`: its name, an alias, or its id on the Hub, in any case. None if there is none."""
    wanted = name.strip().lower()
    for shape in _catalogue():
        if wanted in (shape.name, shape.hub.lower(), *shape.aliases):
            return shape
    return None


def looks_like_shape(spec: str) -> bool:
    """Whether `spec` can only be meant as a name of the catalogue: it is neither a path nor an id with an owner."""
    return bool(spec.strip()) and not any(mark in spec for mark in "/\\~:") and not Path(spec).exists()


def nearest_names(name: str) -> list[str]:
    """Names of the catalogue that resemble `name`, best first."""
    wanted = name.strip().lower().rpartition("/")[2]
    names = [known for shape in _catalogue() for known in (shape.name, *shape.aliases)]
    return difflib.get_close_matches(wanted, names, n=_NEAREST, cutoff=0.5)


def unknown_shape(name: str) -> UsageError:
    """What is said of a name that is none."""
    near = nearest_names(name)
    names = near or [shape.name for shape in _catalogue()]
    details = [f"{'nearest names' if near else 'names'}: {', '.join(names)}"]
    return UsageError(
        f"there is no model called {name!r}",
        details=details,
        remedies=[
            *near[:1],
            "an id on the Hub, as in Qwen/Qwen3-8B",
            "./config.json   or   ./folder   (a config alone is enough)",
        ],
    )
