"""Write a log of accuracy runs as a page: the medians, the worst, every row. Misses stay in the table."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from speed import WITHIN

from rematree.units import format_bytes

Rows = Sequence[Mapping[str, Any]]
PEAK_MEDIAN, PEAK_WORST, PEAK_BELOW = 0.01, 0.03, 0.01
TIME_MEDIAN, TIME_WORST = 0.10, 0.20


def verdicts(rows: Rows) -> list[tuple[str, float, float, bool]]:
    """(what, found, limit, whether it holds) of each promise about a set of runs."""
    peaks = [row["peak_error"] for row in rows]
    times = [abs(row["time_error"]) for row in rows]
    found = [
        ("peak, median of the absolute error", statistics.median(map(abs, peaks)), PEAK_MEDIAN),
        ("peak, worst absolute error", max(map(abs, peaks)), PEAK_WORST),
        ("peak, furthest below the measured one", max(0.0, -min(peaks)), PEAK_BELOW),
        ("step time, median of the absolute error", statistics.median(times), TIME_MEDIAN),
        ("step time, worst absolute error", max(times), TIME_WORST),
    ]
    return [(what, value, limit, value <= limit) for what, value, limit in found]


def peaks_hold(rows: Rows) -> bool:
    """Whether every promise about peaks holds; times depend on what else the machine does."""
    return all(holds for what, _, _, holds in verdicts(rows) if what.startswith("peak"))


def page(title: str, intro: str, conditions: Mapping[str, str], rows: Rows) -> str:
    """The whole page in Markdown."""
    lines = [f"# {title}", "", intro, ""]
    lines += [f"- {name}: {value}" for name, value in conditions.items()]
    lines += ["", f"## {len(rows)} runs", "", "| what | found | promised | |", "|---|--:|--:|---|"]
    lines += [f"| {w} | {v:.2%} | {m:.0%} | {'holds' if ok else 'missed'} |" for w, v, m, ok in verdicts(rows)]
    lines += ["", _spread(rows), "", *_fairly(rows), "", *_groups(rows), "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _spread(rows: Rows) -> str:
    """How far the steps of one run are from each other: no prediction can be nearer to all of them."""
    spreads = [max(times) / min(times) - 1 for times in (row["all_seconds"] for row in rows)]
    median, worst = statistics.median(spreads), max(spreads)
    steady = [abs(row["machine"] - 1) <= WITHIN for row in rows]
    return (
        "Of the timed steps of one run, which are all the same step, the slowest takes "
        f"{median:.1%} longer than the fastest in the median over the runs, {worst:.1%} at worst. "
        f"{sum(steady)} of {len(rows)} runs were timed while the machine was within {WITHIN:.0%} of its speed when "
        "their ops were priced."
    )


def _fairly(rows: Rows) -> list[str]:
    """Two errors of the times that leave out some of what the machine did meanwhile; nothing is promised of them."""
    plain = {row["cell"]: row for row in rows if row["way"] == "plain"}
    fastest = [abs(row["predicted_seconds"] / min(row["all_seconds"]) - 1) for row in rows]
    ratios = [
        abs((1 + row["time_error"]) / (1 + plain[row["cell"]]["time_error"]) - 1)
        for row in rows
        if row["way"] != "plain" and row["cell"] in plain
    ]
    lines = ["| step time, nothing promised | number | median | worst |", "|---|--:|--:|--:|"]
    for what, found in (
        ("against the fastest of the timed steps, not their median", fastest),
        ("divided by the plain step's, predicted against measured", ratios),
    ):
        lines += [f"| {what} | {len(found)} | {statistics.median(found):.2%} | {max(found):.2%} |"] if found else []
    return lines


def _groups(rows: Rows) -> list[str]:
    lines = ["| runs | number | peak, median | peak, worst | time, median | time, worst |", "|---|--:|--:|--:|--:|--:|"]
    keys: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("way of stepping", lambda row: row["way"]),
        ("trained", lambda row: row["cell"].split()[1]),
        ("family", lambda row: row["cell"].split()[0]),
    ]
    for _, key in keys:
        for name in dict.fromkeys(map(key, rows)):
            some = [row for row in rows if key(row) == name]
            peaks = [abs(row["peak_error"]) for row in some]
            times = [abs(row["time_error"]) for row in some]
            cells = [statistics.median(peaks), max(peaks), statistics.median(times), max(times)]
            lines.append(f"| {name} | {len(some)} | " + " | ".join(f"{c:.2%}" for c in cells) + " |")
    return lines


def format_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _table(rows: Rows) -> list[str]:
    reserved = any(row["reserved_bytes"] for row in rows)
    head = [
        "model",
        "step",
        "predicted peak",
        "measured",
        "off by",
        *(["budget's peak", "reserved"] if reserved else []),
    ]
    head += ["first step's", "predicted time", "measured", "off by", "machine", ""]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 3) + "---|"]
    for row in rows:
        missed = [
            name
            for name, misses in (
                ("peak", abs(row["peak_error"]) > PEAK_WORST or row["peak_error"] < -PEAK_BELOW),
                ("time", abs(row["time_error"]) > TIME_WORST),
            )
            if misses
        ]
        peaks = (row.get("predicted_allocated_bytes", row["predicted_peak_bytes"]), row["measured_peak_bytes"])
        cells = [row["cell"], row["way"], *map(format_bytes, peaks), f"{row['peak_error']:+.2%}"]
        whole = (row["predicted_peak_bytes"], row["reserved_bytes"] or 0)
        cells += [*map(format_bytes, whole)] if reserved else []
        cells += [format_bytes(row["first_step_peak_bytes"])]
        cells += [format_time(row["predicted_seconds"]), format_time(row["measured_seconds"])]
        cells += [f"{row['time_error']:+.1%}"]
        cells += [f"{row['machine'] - 1:+.0%}"]
        lines.append("| " + " | ".join([*cells, f"missed: {' and '.join(missed)}" if missed else ""]) + " |")
    return lines
