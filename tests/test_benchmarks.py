"""The frontier benchmark: its judgement on made-up points, its picture, and the whole of it on a tiny model."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

Row = dict[str, Any]
MIB = 2**20


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _benchmarks_importable(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


def point(name: str, series: str, mib: float, seconds: float, **fields: Any) -> Row:
    known = {"name": name, "series": series, "above_bytes": int(mib * MIB), "seconds": seconds, "error": None}
    return {**known, "peak_error": None, "time_error": None, **fields}


PLAIN, FLAG = point("plain", "plain", 1000, 10.0), point("HF flag", "peer", 500, 12.0)


def said(rows: list[Row], workload: str = "smollm2") -> dict[str, list[tuple[bool | None, str]]]:
    found: dict[str, list[tuple[bool | None, str]]] = {}
    for verdict in load("dominance").verdicts(workload, rows):
        found.setdefault(verdict.goal, []).append((verdict.holds, verdict.found))
    return found


@pytest.mark.parametrize(
    ("peer", "is_ahead"),
    [
        ((100, 8.0), False),  # the same point
        ((97.5, 8.0), False),  # less memory, by less than the margin
        ((96.0, 8.0), True),
        ((100, 7.8), False),
        ((100, 7.7), True),
        ((97.5, 7.8), False),  # within the margin of both at once
        ((300, 7.9), False),  # beaten by the other point
        ((90, 100.0), True),  # slow, but smaller than all of ours
    ],
)
def test_a_peer_is_ahead_if_no_point_of_ours_matches_it(peer: tuple[float, float], is_ahead: bool) -> None:
    ours = [point("a", "ours", 100, 8.0), point("b", "ours compiled", 200, 6.0)]
    found = said([PLAIN, FLAG, point("peer", "peer", *peer), *ours])["D1"]
    assert [holds for holds, _ in found] == [not is_ahead]
    assert ("peer (" in found[0][1]) == is_ahead


def test_a_point_beside_ours_is_not_matched_by_two_halves() -> None:
    """One point of ours has the memory, another the time: none has both."""
    ours = [point("small", "ours", 50, 20.0), point("fast", "ours", 900, 5.0)]
    assert said([PLAIN, FLAG, point("peer", "peer", 100, 10.0), *ours])["D1"][0][0] is False


def test_peers_that_failed_are_not_ahead() -> None:
    failed = point("peer", "peer", 1, 0.1, error="RuntimeError: no")
    assert said([PLAIN, FLAG, failed, point("a", "ours", 100, 8.0)])["D1"][0] == (True, "none of 2")


def test_goals_of_one_workload() -> None:
    ours = [
        point("least", "ours", 49, 7.9, peak_error=0.01, time_error=-0.19),
        point("at flag", "ours", 480, 6.5),
        point("more than flag", "ours", 501, 1.0),
        point("compiled", "ours compiled", 45, 4.9, peak_error=-0.04),
    ]
    found = said([PLAIN, FLAG, *ours])
    assert [holds for holds, _ in found["D2"]] == [True, False]  # 6.5 / 12 of 0.55, 4.9 / 12 of 0.40
    assert [holds for holds, _ in found["D3"]] == [True, True]
    assert found["D4"] == [(True, "95.1% at 0.79 x, at least 60% (least)")]
    assert [holds for holds, _ in found["D6"]] == [False, True]
    assert "-4.0% of 2 points" in found["D6"][0][1]


def test_times_are_also_compared_over_the_plain_steps() -> None:
    plain = {**PLAIN, "time_error": 0.5}  # a slow minute for everything
    ours = [point("a", "ours", 100, 8.0, time_error=0.2), point("b", "ours", 90, 8.0, time_error=0.53)]
    assert said([plain, FLAG, *ours])["D6"][-1] == (None, "off by 11.0% in the median of 2 points, at most -20.0% (a)")
    assert len(said([plain, FLAG, point("a", "ours", 100, 8.0)])["D6"]) == 2


def test_misses_are_said() -> None:
    ours = [point("least", "ours", 60, 10.1)]
    found = said([PLAIN, FLAG, *ours])
    assert [holds for holds, _ in found["D2"]] == [False, False]
    assert "0.84 x HF flag's time" in found["D2"][0][1]
    assert [holds for holds, _ in found["D3"]] == [False, False]
    assert found["D4"][0] == (False, "no plan is as fast as the plain step")
    assert [holds for holds, _ in found["D6"]] == [None, None]
    # Goals with numbers are for two of the workloads.
    assert [holds for holds, _ in said([PLAIN, FLAG, *ours], "smollm2-4096")["D3"]] == [None, None]
    assert said([PLAIN], "smollm2") == {"D1": [(None, "the plain step, HF's flag and a plan are needed")]}


def test_the_picture_is_one_that_a_browser_takes() -> None:
    picture = load("picture")
    rows = [PLAIN, FLAG, point("<&> peer", "peer", 300, 9.0), point("broken", "peer", 1, 1.0, error="no")]
    rows += [point("a", "ours", 100, 8.0), point("b", "ours", 200, 7.0), point("worse", "ours", 300, 7.5)]
    rows += [point("c", "ours compiled", 80, 6.0)]
    root = ElementTree.fromstring(picture.picture("peak & time", rows))
    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{name}text")]
    assert "peak & time" in texts
    assert "2  <&> peer" in texts
    assert texts[-1] == "broken"
    # Shapes tell the series apart: a filled square for each plan, an open one for a compiled plan, and in the legend.
    squares = [element.get("fill") for element in root.iter(f"{name}rect")][1:]
    assert squares.count("white") == 2
    assert len(squares) == 6
    assert [row["name"] for row in picture.frontier_of(rows[4:7])] == ["a", "b"]
    with pytest.raises(ValueError, match="no point was measured"):
        picture.picture("nothing", [rows[3]])


def test_budgets_at_what_peers_need() -> None:
    interleave, ours = load("interleave"), load("ours")

    def needing(name: str, above: int | None) -> Any:
        return interleave.Point(name, "peer", "", above and (1000 + above) * MIB, above and above * MIB)

    points = [
        needing("plain", 2000),
        needing("HF flag", 600),
        needing("TRL selective", 700),
        needing("by hand: chunked loss", 1200),
        needing("by hand: broken", None),
        needing("by hand: chunked, every 2nd block", 610),  # as much as the flag
        needing("by hand: chunked, every block", 110),
        needing("by hand: chunked, compiled 0.0", 112),
    ]
    eager = ours.peer_budgets(points, 1000 * MIB, 0.1, compiled=False)
    assert eager == {
        "0.4 of plain's peak": 1800 * MIB,
        "0.1 of HF flag's peak": 1060 * MIB,
        "HF flag's peak": 1600 * MIB,
        "as by hand: chunked loss": 2200 * MIB,
        "as by hand: chunked, every block": 1110 * MIB,
    }
    compiled = ours.peer_budgets(points, 1000 * MIB, 0.1, compiled=True)
    assert [*compiled][2:] == ["as by hand: chunked, compiled 0.0"]


def test_lora_layers_by_hand_have_the_gradients_of_pefts() -> None:
    """A peer that trains something else would be no peer."""
    workloads, peers_lean, peers = load("workloads"), load("peers_lean"), load("peers")
    workload = replace(workloads.QUICK["tiny"], dropout=0.0)
    built = workloads.build(workload, torch.device("cpu"), torch.float32)

    def gradients(way: Any) -> list[torch.Tensor]:
        built.model.zero_grad(set_to_none=True)
        with way.around() as loss:
            loss(built.model, built.batch).backward()
        return [parameter.grad for parameter in built.model.parameters() if parameter.requires_grad]

    plain, *_ = peers.own_peers(built)
    expected = gradients(plain)
    ways = peers_lean.lean_peers(built)
    assert len(ways) == 4
    for way in ways:
        for found, wanted in zip(gradients(way), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert peers_lean.lean_peers(replace(built, workload=workloads.QUICK["tiny"])) == []  # it has dropout


def test_readme_table_of_a_frontier() -> None:
    points = [PLAIN, FLAG, point("ours, a", "ours", 400, 9.0), point("ours compiled, b", "ours compiled", 450, 6.0)]
    rows = [{**row, "time_to_plain": row["seconds"] / PLAIN["seconds"]} for row in points]
    found = {"title": "a model", "dtype": "bfloat16", "rounds": 3, "points": rows}
    lines = load("readme_table").frontier_lines
    alike = "| a model, bfloat16 | 1.00, 1000 MiB | 1.20, 500 MiB | - | 0.90, 400 MiB | 0.60, 450 MiB | 0.90, 400 MiB |"
    assert lines([found])[-1] == f"{alike} 0.90, 400 MiB | 0 of 2 |"
    larger = {**found, "points": [*rows[:2], {**rows[2], "above_bytes": 501 * MIB}]}
    nothing = "| a model, bfloat16 | 1.00, 1000 MiB | 1.20, 500 MiB | - | - | - | 0.90, 501 MiB |"
    assert lines([larger])[-1] == f"{nothing} 0.90, 501 MiB | 0 of 2 |"
    by_hand = {**rows[0], "name": "by hand", "series": "peer", "above_bytes": 300 * MIB}
    ahead = lines([{**found, "points": [*rows, by_hand]}])[-1]
    assert "| 1.00, 300 MiB |" in ahead
    assert ahead.endswith("| 1 of 3 |")


@pytest.mark.usefixtures("stated_prices")
def test_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load("workloads").TINY, "num_hidden_layers", 4)
    output = tmp_path / "frontier.json"
    options = ["--quick", "--output", str(output), "--rounds", "1", "--only", "chunked, every", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["frontier.py", *options])
    load("frontier").main()
    log = json.loads(output.read_text())
    assert {"device", "versions", "date", "command"} <= log["conditions"].keys()
    found = log["workloads"]["tiny"]
    assert found["rounds"] == 1
    points = {row["name"]: row for row in found["points"]}
    assert {row["series"] for row in points.values()} <= {"plain", "peer", "ours"}
    assert {"plain", "HF flag", "by hand: chunked, every block", "by hand: chunked, every 2nd block"} <= points.keys()
    for row in points.values():
        assert row["error"] is None
        assert 0 < row["above_bytes"] < row["peak_bytes"]
        assert len(row["all_seconds"]) == 1
        assert row["time_to_plain"] == pytest.approx(row["seconds"] / points["plain"]["seconds"])
        assert row["loss"] == pytest.approx(points["plain"]["loss"], rel=1e-3)
        if row["series"] == "ours":
            peer = row["name"].removeprefix("ours, budget as ")
            assert row["peak_bytes"] <= points[peer]["peak_bytes"]
    assert points["HF flag"]["exact"] is True
    assert points["HF flag"]["peak_to_plain"] < 0.5
    for name in ("plain", "HF flag"):
        assert 0 <= points[name]["predicted_peak_bytes"] - points[name]["peak_bytes"] <= 256 * 1024
    text = output.with_suffix(".md").read_text()
    assert "![peak and time](frontier-tiny.svg)" in text
    ElementTree.fromstring((tmp_path / "frontier-tiny.svg").read_text())
    # What is there is not run again.
    before = output.stat().st_mtime_ns
    load("frontier").main()
    assert output.stat().st_mtime_ns == before


@pytest.mark.usefixtures("stated_prices")
def test_the_gpu_benchmark_runs_dry_and_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, gpu = tmp_path / "gpu.json", load("gpu")
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        patched.setattr(sys, "argv", ["gpu.py", "--output", str(output)])
        with pytest.raises(SystemExit, match=r"^no CUDA device; --dry-run runs"):
            gpu.main()
    assert not output.exists()
    options = ["--dry-run", "--workload", "8b-4k", "--peers", "none", "--rounds", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    gpu.main()
    out = capsys.readouterr().out
    rows = json.loads(output.read_text())["workloads"]["8b-4k"]["points"]
    assert {row["series"] for row in rows} == {"plain", "peer", "ours"}
    for row in rows:
        assert row["error"] is None
        if row["series"] == "ours":
            assert row["exact"] or row["difference"] < 1e-2
            assert 0 <= row["predicted_peak_bytes"] - row["peak_bytes"] <= 256 * 1024
    assert all(name in out for name in ("D1", "D2", "D3", "D4", "D6"))


def test_bookkeeping_is_what_is_over_a_second_run() -> None:
    overhead = load("overhead")
    model, layers, step = overhead.tiny_chain(3)
    seconds = overhead.measure(model, layers, step, 1, 1)
    assert list(seconds) == ["plain", "every layer run twice", "torch.utils.checkpoint", "SAC", "rematree"]
    assert all(value > 0 for value in seconds.values())
    made_up = {"plain": 1.0, "every layer run twice": 2.0, "SAC": 2.5, "rematree": 2.25}
    assert overhead.per_region(made_up, 5) == pytest.approx({"SAC": 1e5, "rematree": 5e4})
