"""A picture of points and our frontier as SVG, written by hand: shapes and labels tell, colour only helps."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 980, 640
LEFT, RIGHT, TOP, BOTTOM = 70, 250, 46, 56
COLOURS = {"plain": "#222222", "peer": "#a04000", "ours": "#0b5fa5", "ours compiled": "#1b7a3d"}
Row = Mapping[str, Any]
Place = Callable[[float], float]


def frontier_of(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats in both peak and time, fewest bytes first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["above_bytes"], row["seconds"])):
        if not front or row["seconds"] < front[-1]["seconds"]:
            front.append(row)
    return front


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within a logarithmic axis."""
    found: list[float] = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [factor * 10.0**exponent for factor in (1, 2, 5)]
    return [tick for tick in found if low <= tick <= high]


def _axis(values: Sequence[float], start: float, end: float) -> tuple[Place, list[float]]:
    low, high = min(values) / 1.15, max(values) * 1.15
    span = math.log(high / low)

    def place(value: float) -> float:
        return start + (end - start) * math.log(value / low) / span

    return place, _ticks(low, high)


def _mark(series: str, x: float, y: float) -> str:
    """A circle for the plain step, a cross for a peer, a filled square for a plan, an open one for a compiled plan."""
    colour = COLOURS[series]
    if series == "plain":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>'
    if series == "peer":
        arms = f"M{x - 5:.1f} {y - 5:.1f}L{x + 5:.1f} {y + 5:.1f}M{x - 5:.1f} {y + 5:.1f}L{x + 5:.1f} {y - 5:.1f}"
        return f'<path d="{arms}" stroke="{colour}" stroke-width="2" fill="none"/>'
    fill = colour if series == "ours" else "white"
    box = f'x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"'
    return f'<rect {box} fill="{fill}" stroke="{colour}" stroke-width="2"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(series: str, rows: Sequence[Row], across: Place, up: Place) -> str:
    """Our frontier as the staircase that a budget meets: the fastest point within it."""
    front = frontier_of([row for row in rows if row["series"] == series])
    if len(front) < 2:
        return ""
    places = [(across(row["above_bytes"] / 2**20), up(row["seconds"])) for row in front]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    for x, y in places[1:]:
        path += f"H{x:.1f}V{y:.1f}"
    dashes = "" if series == "ours" else ' stroke-dasharray="7 4"'
    return f'<path d="{path}" fill="none" stroke="{COLOURS[series]}" stroke-width="1.5"{dashes}/>'


def picture(title: str, rows: Sequence[Row]) -> str:
    """The SVG of one workload.

    Args:
        title: Above the picture.
        rows: Points as the benchmark writes them; those with an error are named below the legend.
    Raises:
        ValueError: no point has a peak and a time.
    """
    known = [row for row in rows if not row["error"] and row["above_bytes"] and row["seconds"]]
    if not known:
        raise ValueError(f"{title}: no point was measured")
    across, x_ticks = _axis([row["above_bytes"] / 2**20 for row in known], LEFT, WIDTH - RIGHT)
    up, y_ticks = _axis([row["seconds"] for row in known], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, title, size=16),
    ]
    for tick in x_ticks:
        x = across(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#dddddd"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{tick:g}", anchor="middle"))
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "peak above the weights, MiB", anchor="middle"))
    parts.append(_text(8, TOP - 10, "seconds of a step"))
    parts += [_line(series, known, across, up) for series in ("ours", "ours compiled")]
    parts += _marks(known, across, up)
    parts += _legend(known, [row["name"] for row in rows if row["error"]])
    return "\n".join([part for part in parts if part] + ["</svg>", ""])


def _numbered(rows: Sequence[Row]) -> dict[str, int]:
    """Peers are many and lie close: in the picture each has a number, in the legend its name."""
    return {row["name"]: number for number, row in enumerate((r for r in rows if r["series"] == "peer"), start=1)}


def _marks(rows: Sequence[Row], across: Place, up: Place) -> list[str]:
    numbers = _numbered(rows)
    parts: list[str] = []
    for row in rows:
        x, y = across(row["above_bytes"] / 2**20), up(row["seconds"])
        parts.append(_mark(row["series"], x, y))
        if row["series"] == "peer":
            parts.append(_text(x + 7, y - 6, str(numbers[row["name"]]), size=11))
        elif row["series"] == "plain":
            parts.append(_text(x, y - 11, "plain", anchor="middle"))
    return parts


def _legend(rows: Sequence[Row], failed: Sequence[str]) -> list[str]:
    x, y = WIDTH - RIGHT + 18, TOP + 8
    parts: list[str] = []
    names = {"plain": "plain step", "ours": "rematree, eager", "ours compiled": "rematree, compiled", "peer": "peers:"}
    present = {row["series"] for row in rows}
    for series, name in names.items():
        if series in present:
            parts += [_mark(series, x, y - 4), _text(x + 14, y, name)]
            y += 20
    for name, number in _numbered(rows).items():
        parts.append(_text(x, y, f"{number}  {name}", size=11))
        y += 15
    if failed:
        parts.append(_text(x, y + 6, "did not run here:", size=11))
        y += 21
    for name in failed:
        parts.append(_text(x, y, name, size=11))
        y += 15
    return parts
