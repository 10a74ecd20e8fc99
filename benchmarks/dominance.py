"""What the frontier benchmark promises, checked on its points: one line each, with the numbers, PASS or MISS.

Peaks are bytes above the weights; times are medians of the same run. D5 is the solver's and is not measured here.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

MARGIN: Final = 0.03  # in time or memory
PEAK_OFF, TIME_OFF = 0.03, 0.20  # worst errors that the accuracy log allows
GONE: Final = 0.60  # of the activations, at no extra time
# Of workloads: time to that of HF's flag within its peak, eager and compiled.
AT_HF: Final[Mapping[str, tuple[float, float]]] = {"smollm2": (0.55, 0.40), "wide": (0.75, 0.55)}
# Of workloads: the smallest peak to that of HF's flag, and its time to the plain step's, eager and compiled.
SMALLEST: Final[Mapping[str, tuple[float, float, float | None]]] = {
    "smollm2": (0.10, 0.80, 0.50),
    "wide": (0.40, 1.30, None),
}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One promise about one workload. `holds` is None where it cannot be said."""

    goal: str
    what: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        mark = {True: "PASS", False: "MISS", None: "----"}[self.holds]
        return f"{mark}  {self.goal}  {self.what}: {self.found}"


def measured(rows: Sequence[Row], *series: str) -> list[Row]:
    """The rows of `series` that have a peak and a time."""
    return [
        row for row in rows if row["series"] in series and not row["error"] and row["above_bytes"] and row["seconds"]
    ]


def ahead(peers: Sequence[Row], ours: Sequence[Row], margin: float = MARGIN) -> list[Row]:
    """The peers that none of our points matches: within `margin` of their peak and of their time at once."""
    return [
        peer
        for peer in peers
        if not any(
            row["above_bytes"] <= peer["above_bytes"] * (1 + margin)
            and row["seconds"] <= peer["seconds"] * (1 + margin)
            for row in ours
        )
    ]


def verdicts(workload: str, rows: Sequence[Row]) -> list[Verdict]:
    """Everything that can be said of one workload's points."""
    by_name = {row["name"]: row for row in rows if not row["error"] and row["seconds"]}
    plain, flag = by_name.get("plain"), by_name.get("HF flag")
    ours = measured(rows, "ours", "ours compiled")
    if plain is None or flag is None or not ours:
        return [Verdict("D1", "frontier", "the plain step, HF's flag and a plan are needed", None)]
    found = [_dominance(rows, ours)]
    eager, compiled = measured(rows, "ours"), measured(rows, "ours compiled")
    found += _at_hf(workload, flag, eager, compiled)
    found += _smallest(workload, plain, flag, eager, compiled)
    found.append(_for_free(plain, eager))
    found += _predictions(rows)
    return found


def _mib(row: Row) -> str:
    return f"{row['above_bytes'] / 2**20:.1f} MiB {row['seconds']:.3f} s"


def _dominance(rows: Sequence[Row], ours: Sequence[Row]) -> Verdict:
    peers = measured(rows, "plain", "peer")
    better = ahead(peers, ours)
    said = ", ".join(f"{row['name']} ({_mib(row)})" for row in better) or f"none of {len(peers)}"
    return Verdict("D1", f"peers ahead of our frontier by more than {MARGIN:.0%}", said, not better)


def _at_hf(workload: str, flag: Row, eager: Sequence[Row], compiled: Sequence[Row]) -> list[Verdict]:
    limits = AT_HF.get(workload, (None, None))
    found: list[Verdict] = []
    for name, some, limit in (("eager", eager, limits[0]), ("compiled", [*eager, *compiled], limits[1])):
        if name == "compiled" and not compiled:
            found.append(Verdict("D2", "compiled, within HF flag's peak", "no compiled plan", limit and False))
            continue
        fitting = [row for row in some if row["above_bytes"] <= flag["above_bytes"]]
        if not fitting:
            found.append(Verdict("D2", f"{name}, within HF flag's peak", "no plan fits", False))
            continue
        best = min(fitting, key=lambda row: row["seconds"])
        ratio = best["seconds"] / flag["seconds"]
        wanted = "" if limit is None else f", at most {limit:.2f}"
        said = f"{ratio:.2f} x HF flag's time{wanted} ({best['name']}, {_mib(best)})"
        found.append(Verdict("D2", f"{name}, within HF flag's peak", said, None if limit is None else ratio <= limit))
    return found


def _smallest(workload: str, plain: Row, flag: Row, eager: Sequence[Row], compiled: Sequence[Row]) -> list[Verdict]:
    limits = SMALLEST.get(workload, (None, None, None))
    share = limits[0]
    found: list[Verdict] = []
    for name, some, limit in (("eager", eager, limits[1]), ("compiled", compiled, limits[2])):
        if not some:
            found.append(Verdict("D3", f"{name}, smallest peak", "no such plan", limit and False))
            continue
        # The peak that is wanted may be reached by more than one plan: the fastest of them is the one that counts.
        small = [row for row in some if share is not None and row["above_bytes"] <= share * flag["above_bytes"]]
        best = min(small, key=lambda row: row["seconds"]) if small else min(some, key=lambda row: row["above_bytes"])
        peak, time = best["above_bytes"] / flag["above_bytes"], best["seconds"] / plain["seconds"]
        wanted = "" if share is None or limit is None else f", at most {share:.2f} and {limit:.2f}"
        said = f"{peak:.3f} x HF flag's peak at {time:.2f} x the plain time{wanted} ({best['name']})"
        holds = None if share is None or limit is None else peak <= share and time <= limit
        found.append(Verdict("D3", f"{name}, smallest peak", said, holds))
    return found


def _for_free(plain: Row, eager: Sequence[Row]) -> Verdict:
    free = [row for row in eager if row["seconds"] <= plain["seconds"]]
    what = "activation memory gone at no extra time, eager"
    if not free:
        return Verdict("D4", what, "no plan is as fast as the plain step", False)
    best = min(free, key=lambda row: row["above_bytes"])
    gone = 1 - best["above_bytes"] / plain["above_bytes"]
    said = f"{gone:.1%} at {best['seconds'] / plain['seconds']:.2f} x, at least {GONE:.0%} ({best['name']})"
    return Verdict("D4", what, said, gone >= GONE)


def _predictions(rows: Sequence[Row]) -> list[Verdict]:
    found: list[Verdict] = []
    for what, key, limit in (("peak", "peak_error", PEAK_OFF), ("time", "time_error", TIME_OFF)):
        known = [row for row in rows if row[key] is not None and not row["error"]]
        if not known:
            found.append(Verdict("D6", f"predicted {what}", "nothing was predicted", None))
            continue
        worst = max(known, key=lambda row: abs(row[key]))
        said = f"off by at most {worst[key]:+.1%} of {len(known)} points, {limit:.0%} allowed ({worst['name']})"
        found.append(Verdict("D6", f"predicted {what}", said, abs(worst[key]) <= limit))
    return found + _relative_times(rows)


def _relative_times(rows: Sequence[Row]) -> list[Verdict]:
    """Predicted times over the plain step's: without what the machine did to all of them. Nothing is promised of it."""
    errors = {row["name"]: row["time_error"] for row in rows if row["time_error"] is not None and not row["error"]}
    if errors.keys() <= {"plain"} or "plain" not in errors:
        return []
    plain = 1 + errors.pop("plain")
    ratios = {name: (1 + error) / plain - 1 for name, error in errors.items()}
    worst = max(ratios, key=lambda name: abs(ratios[name]))
    median = statistics.median(map(abs, ratios.values()))
    said = f"off by {median:.1%} in the median of {len(ratios)} points, at most {ratios[worst]:+.1%} ({worst})"
    return [Verdict("D6", "predicted time over the plain step's", said, None)]
