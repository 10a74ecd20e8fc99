"""Write the measured tables of README.md: from runs/demo/result.json, and what is there of budgets and frontier.

python benchmarks/readme_table.py [--result FILE] [--budgets FILE] [--frontier FILE]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dominance import measured

from rematree.units import format_bytes

_BEGIN, _END = "<!-- measured:begin -->", "<!-- measured:end -->"


def frontier_lines(found: Mapping[str, Any]) -> list[str]:
    """One workload of `frontier.py`: every peer, and the fastest of our plans that needs no more than it does."""
    points: Sequence[Mapping[str, Any]] = found["points"]
    lines = [
        "",
        f"{found['title']}, {found['dtype']}, forward and backward, rounds in turns: {found['rounds']}",
        "",
        "| what a user can pick | peak above weights | time | our fastest plan in that peak | also compiled |",
        "|---|--:|--:|--:|--:|",
    ]
    for peer in measured(points, "plain", "peer"):
        cells = [peer["name"], f"{peer['above_bytes'] / 2**20:.0f} MiB", f"{peer['time_to_plain']:.2f}"]
        for series in (("ours",), ("ours", "ours compiled")):
            within = [row for row in measured(points, *series) if row["above_bytes"] <= peer["above_bytes"]]
            best = min(within, key=lambda row: row["seconds"], default=None)
            cells.append("-" if best is None else f"{best['time_to_plain']:.2f}, {best['above_bytes'] / 2**20:.0f} MiB")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=Path("runs/demo/result.json"))
    parser.add_argument("--budgets", type=Path, default=Path("runs/ten_budgets.json"))
    parser.add_argument("--frontier", type=Path, default=Path("runs/frontier.json"))
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    lines = [
        f"`make demo` on {result['device']}; " + ", ".join(f"{k} {v}" for k, v in sorted(result["versions"].items())),
        "",
        "| step of 4 x 512 tokens, LoRA on all linear layers | peak | seconds |",
        "|---|---|---|",
        f"| plain | - | {result['plain_step_seconds']:.1f} |",
        f"| `gradient_checkpointing=True` | {format_bytes(result['hf_checkpointing_peak_bytes'])} | "
        f"{result['hf_checkpointing_step_seconds']:.1f} |",
        f"| rematree, budget {format_bytes(result['budget_bytes'])} | {format_bytes(result['measured_peak_bytes'])} "
        f"(predicted {format_bytes(result['predicted_peak_bytes'])}) | {result['budgeted_step_seconds']:.1f} |",
        "",
        "Medians of steps taken in turns. Peaks: what torch allocates, summed from the profiler's allocation events.",
        f"Held-out loss {result['heldout_loss_before']:.3f} before, {result['heldout_loss_after']:.3f} after.",
    ]
    if options.budgets.exists():
        lines += [
            "",
            "| budget | predicted | measured | predicted step | measured step |",
            "|---|---|---|---|---|",
        ]
        for row in json.loads(options.budgets.read_text())["rows"]:
            peaks = [row["budget_bytes"], row["predicted_peak_bytes"], row["measured_peak_bytes"]]
            times = [f"{row['predicted_step_seconds']:.1f} s", f"{row['measured_step_seconds']:.1f} s"]
            lines.append("| " + " | ".join([*map(format_bytes, peaks), *times]) + " |")
    if options.frontier.exists():
        for found in json.loads(options.frontier.read_text())["workloads"].values():
            lines += frontier_lines(found)
        lines += ["", "Times are to the plain step of the same run. The rest of it: `docs/frontier.md`."]
    readme = Path(__file__).resolve().parent.parent / "README.md"
    before, _, rest = readme.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    readme.write_text(before + _BEGIN + "\n" + "\n".join(lines) + "\n" + _END + after)


if __name__ == "__main__":
    main()
