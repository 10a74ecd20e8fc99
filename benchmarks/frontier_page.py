"""The points of the frontier benchmark as a page in Markdown: what holds, then every point, errors included."""

from collections.abc import Mapping, Sequence
from typing import Any

INTRO = """One forward and backward, every way of stepping measured in one process, in turns. Peaks are allocated bytes
above weights and batch; ratios are to the plain step and to Hugging Face's flag in the same run. "exact": every
gradient is bit for bit the plain step's; otherwise the largest relative difference. Predicted: by the planner, before
it ran. Seconds are medians of the rounds; "least" is the fastest of them, which a busy machine disturbs least."""
HEAD = (
    "| way | peak MiB | to plain | to HF flag | seconds | to plain | to HF flag | least | rounds | peak off |"
    " time off | gradients |",
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
)


def page(log: Mapping[str, Any], lines: Sequence[str], stem: str) -> str:
    """The whole page.

    Args:
        log: What `frontier.py` writes.
        lines: What holds, one line each.
        stem: What the names of the pictures begin with.
    """
    parts = ["# Frontier", "", INTRO, ""]
    parts += [f"- {name}: {value}" for name, value in log.get("conditions", {}).items()]
    parts += ["", "```", *lines, "```"]
    for name, found in log["workloads"].items():
        parts += ["", f"## {found['title']}", ""]
        took = (
            f"{found['seconds'] / 60:.1f} minutes, of which {found['prepare_seconds'] / 60:.1f} before the first round"
        )
        parts += [f"{found['dtype']}; weights: {found['weights']}; {found['rounds']} rounds; {took}.", ""]
        if any(point["seconds"] for point in found["points"]):
            parts += [f"![peak and time]({stem}-{name}.svg)", ""]
        parts += [*HEAD, *(_row(point) for point in found["points"] if not point["error"])]
        failed = [point for point in found["points"] if point["error"]]
        if failed:
            parts += ["", "| did not run here | why |", "|---|---|"]
            parts += [f"| {point['name']} | {_cell(point['error'])} |" for point in failed]
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _row(point: Mapping[str, Any]) -> str:
    cells = [
        _cell(point["name"]),
        f"{point['above_bytes'] / 2**20:.1f}",
        _number(point["peak_to_plain"], "{:.2f}"),
        _number(point["peak_to_hf_flag"], "{:.2f}"),
        _number(point["seconds"], "{:.3f}"),
        _number(point["time_to_plain"], "{:.2f}"),
        _number(point["time_to_hf_flag"], "{:.2f}"),
        _number(min(point["all_seconds"], default=None), "{:.3f}"),
        str(len(point["all_seconds"])),
        _number(point["peak_error"], "{:+.1%}"),
        _number(point["time_error"], "{:+.1%}"),
        _gradients(point),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _gradients(point: Mapping[str, Any]) -> str:
    if point["exact"]:
        return "exact"
    return "other dropout masks" if point["difference"] is None else f"{point['difference']:.1e}"
