"""Write what became of every architecture as a page: what went wrong first, then a line for each that is exact."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accuracy import conditions

from rematree.units import KIB

Rows = Sequence[Mapping[str, Any]]
ORDER = ("WRONG", "failed", "refused", "not repeatable", "not built", "exact")
MEANING = {
    "exact": "every gradient under every plan is bit for bit the plain step's",
    "WRONG": "it is not",
    "failed": "planning or stepping ended in an error that is not a refusal",
    "refused": "refused by name, before anything was changed",
    "not repeatable": "the plain step itself draws outside torch's generators",
    "not built": "one rule of shrinking does not fit its config, or it does not train on text alone",
}
INTRO = """Each model type that transformers names for a task, tiny, from its own config, one step on 2 x 48 tokens of
text in fp32 on a CPU: a plan for the smallest peak any plan reaches, one half-way to the plain step's, and where those
compute the loss in chunks the same again with that forbidden. LoRA is on all linear layers with dropout 0.1; "all":
PEFT does not take it so, and everything is trained. "Share" is the smallest peak over the plain step's, weights
included. "Below" is how far the measured peak was below the predicted one, the nearer of the two plans; 256 KiB of it
are allowed for tensors that a step makes outside the model."""


def page(rows: Rows) -> str:
    """The whole page in Markdown."""
    known = conditions(torch.device("cpu"))
    lines = ["# Architectures", "", INTRO, "", *(f"- {name}: {value}" for name, value in known.items()), ""]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines += ["| task | " + " | ".join(ORDER) + " |", "|---|" + "--:|" * len(ORDER)]
    for task in tasks:
        counts = collections.Counter(row["outcome"] for row in rows if row["task"] == task)
        lines.append(f"| {task} | " + " | ".join(str(counts[outcome]) for outcome in ORDER) + " |")
    lines += ["", *(f"- {name}: {MEANING[name]}." for name in ORDER), ""]
    for task in tasks:
        lines += [f"## {task}", "", "| model type | trained | outcome | share | below | |", "|---|---|---|--:|--:|---|"]
        some = [row for row in rows if row["task"] == task]
        for row in sorted(some, key=lambda row: (ORDER.index(row["outcome"]), row["kind"])):
            lines.append("| " + " | ".join(_cells(row)) + " |")
        lines.append("")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    share = f"{row['share']:.2f}" if "share" in row else ""
    below = f"{row['below_bytes'] / KIB:.0f} KiB" if "below_bytes" in row else ""
    detail = row.get("detail", "").replace("|", "\\|")
    return [row["kind"], row.get("trained", ""), row["outcome"], share, below, detail]
