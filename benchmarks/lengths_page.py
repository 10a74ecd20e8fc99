"""What `lengths.py` found, as a page in Markdown and as lines that say what holds."""

from collections.abc import Mapping, Sequence
from typing import Any

MIB = 2**20
INTRO = """Steps (forward and backward) on batches of many lengths, one row each, all ways in one process and in turns.
The budget is the peak of Hugging Face's flag on the longest batch. "One plan" is our fastest for the longest batch
within it, in force for all; "plans by length" are those of the second table, each batch under the first that covers it.
"No recomputation" is measured where it fits the budget, and compared on those batches alone."""
RATES = ("| way | batches | peak MiB | tokens/s | to HF flag |", "|---|--:|--:|--:|--:|")
FASTER = 1.15


def tokens_a_second(way: Mapping[str, Any], lengths: Sequence[str] | None = None) -> float:
    """Of the batches of `lengths`, or of all that were stepped this way. JSON makes text of lengths."""
    chosen = list(way["seconds"]) if lengths is None else lengths
    return sum(int(length) for length in chosen) / sum(way["seconds"][length] for length in chosen)


def by_name(log: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The ways, with lengths as text whether read or just measured."""
    found: dict[str, dict[str, Any]] = {}
    for way in log["ways"]:
        keyed = {part: {str(k): v for k, v in way[part].items()} for part in ("seconds", "losses")}
        found[way["name"]] = {**way, **keyed}
    return found


def verdicts(log: Mapping[str, Any]) -> list[str]:
    """What holds of what was promised, one line each."""
    ways = by_name(log)
    flag, fixed, ours, nothing = (ways[n] for n in ("HF flag", "one plan", "plans by length", "no recomputation"))
    to_flag = tokens_a_second(ours) / tokens_a_second(flag)
    to_fixed = tokens_a_second(ours) / tokens_a_second(fixed)
    lines = [
        _line(to_flag >= FASTER, f"plans by length: {to_flag:.2f} x the flag's tokens a second, at least {FASTER}"),
        _line(to_fixed > 1, f"plans by length: {to_fixed:.2f} x those of one plan, above 1"),
        _line(
            max(ours["peak_bytes"], fixed["peak_bytes"]) <= log["budget_bytes"],
            f"peak {ours['peak_bytes'] / MIB:.1f} MiB (one plan {fixed['peak_bytes'] / MIB:.1f}) within "
            f"{log['budget_bytes'] / MIB:.1f}",
        ),
    ]
    short = list(nothing["seconds"])
    if short:
        share = tokens_a_second(ours, short) / tokens_a_second(nothing)
        lines.append(
            f"      where no recomputation fits ({len(short)} of {len(flag['seconds'])} batches): {share:.2f} x its "
            "tokens a second"
        )
    worst = max(abs(ours["losses"][length] / loss - 1) for length, loss in flag["losses"].items())
    exact = all(plan["exact"] for plan in log["plans"])
    told = "no plan changes rounding" if exact else "a plan chunks the loss, which changes rounding"
    lines.append(_line(worst <= (0 if exact else 1e-2), f"losses: at most {worst:.1e} from the flag's; {told}"))
    lines.append(f"      {len(log['plans'])} plans in {log['planning_seconds']:.1f} s")
    return lines


def _line(holds: bool, text: str) -> str:
    return f"{'PASS' if holds else 'MISS'}  {text}"


def page(log: Mapping[str, Any], lines: Sequence[str]) -> str:
    """The whole page."""
    ways = by_name(log)
    parts = ["# Batches of many lengths", "", INTRO, ""]
    parts += [f"- {name}: {value}" for name, value in log["conditions"].items()]
    parts += [f"- model: {log['title']}, {log['dtype']}; weights: {log['weights']}; {log['rounds']} rounds"]
    parts += ["", "```", *lines, "```", "", *RATES]
    for name, way in ways.items():
        if way["seconds"]:
            rate = tokens_a_second(way)
            to_flag = rate / tokens_a_second(ways["HF flag"], list(way["seconds"]))
            parts.append(
                f"| {name} | {len(way['seconds'])} | {way['peak_bytes'] / MIB:.1f} | {rate:.1f} | {to_flag:.2f} |"
            )
    parts += ["", "| up to tokens | predicted peak MiB | predicted s | of it recomputation |", "|--:|--:|--:|--:|"]
    parts += [
        f"| {plan['tokens']} | {plan['predicted_peak_bytes'] / MIB:.1f} | {plan['predicted_seconds']:.3f} | "
        f"{plan['recomputation_seconds'] / plan['predicted_seconds']:.0%} |"
        for plan in log["plans"]
    ]
    parts += ["", f"| tokens | {' | '.join(f'{name}, s' for name in ways)} |", "|--:|" + "--:|" * len(ways)]
    for length in sorted(log["lengths"]):
        cells = [f"{way['seconds'][str(length)]:.3f}" if str(length) in way["seconds"] else "" for way in ways.values()]
        parts.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"
