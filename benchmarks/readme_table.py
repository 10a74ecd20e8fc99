"""Write the measured tables of README.md: from runs/demo/result.json, and what is there of budgets and frontier.

python benchmarks/readme_table.py [--result FILE] [--budgets FILE] [--frontier FILE]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dominance import Row, ahead, measured

from rematree.units import format_bytes

_BEGIN, _END = "<!-- measured:begin -->", "<!-- measured:end -->"


def frontier_lines(workloads: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each workload of `frontier.py`: time to the plain step's and peak above the weights."""
    lines = [
        "",
        "| one step, forward and backward | plain | HF flag | best by hand within the flag's peak | ours within it |"
        " compiled | ours, least peak as fast as plain | ours, least peak | ahead of ours |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for found in workloads:
        points: Sequence[Row] = found["points"]
        peers, eager = measured(points, "plain", "peer"), measured(points, "ours")
        ours = [*eager, *measured(points, "ours compiled")]
        plain, flag = (next(row for row in peers if row["name"] == name) for name in ("plain", "HF flag"))
        by_hand = [row for row in peers if row not in (plain, flag)]
        free = [row for row in eager if row["seconds"] <= plain["seconds"]]
        cells = [
            f"{found['title']}, {found['dtype']}",
            _cell([plain]),
            _cell([flag]),
            *(_cell([row for row in rows if row["above_bytes"] <= flag["above_bytes"]]) for rows in (by_hand, eager)),
            "-" if ours == eager else _cell([row for row in ours if row["above_bytes"] <= flag["above_bytes"]]),
            _cell(free, key="above_bytes"),
            _cell(ours, key="above_bytes"),
            f"{len(ahead(peers, ours))} of {len(peers)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(rows: Sequence[Row], key: str = "seconds") -> str:
    """Of the one of `rows` that has least of `key`."""
    best = min(rows, key=lambda row: row[key], default=None)
    return "-" if best is None else f"{best['time_to_plain']:.2f}, {best['above_bytes'] / 2**20:.0f} MiB"


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
        lines += frontier_lines([*json.loads(options.frontier.read_text())["workloads"].values()])
        lines += [
            "",
            "Times are to the plain step's of the same run, peaks above the weights. By hand: what a user can pick or"
            " write, up to 27 ways (checkpointing every layer or some, a chunked loss, adapters that keep one input,"
            " compiled blocks, other libraries). Every point, the processor and what was promised and missed:"
            " `docs/frontier.md`.",
        ]
    readme = Path(__file__).resolve().parent.parent / "README.md"
    before, _, rest = readme.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    readme.write_text(before + _BEGIN + "\n" + "\n".join(lines) + "\n" + _END + after)


if __name__ == "__main__":
    main()
