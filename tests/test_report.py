"""What is printed about a plan is what the plan says: sums, counts, reasons, units; reading it needs no torch."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematree.plans import Action, BlockRow, Decision, Fingerprint, LedgerLine, Plan
from rematree.report.explanation import explain_blocks, explain_facts, explain_text, next_exchange
from rematree.report.machine import Machine, host_memory
from rematree.report.tables import (
    FrontierPoint,
    PlainStep,
    frontier_columns,
    frontier_facts,
    plan_columns,
    plan_facts,
    verification_columns,
)
from rematree.units import GIB, KIB, MIB, format_bytes, format_seconds, parse_bytes

LAYERS = "model.layers"
ROWS = (
    BlockRow(f"{LAYERS}.0", "recompute all", 1 * MIB, 0.25),
    BlockRow(f"{LAYERS}.1", "recompute, save up_proj, self_attn", 3 * MIB, 0.125),
    BlockRow(f"{LAYERS}.2", "recompute all", 1 * MIB, 0.25),
    BlockRow(f"{LAYERS}.3", "save all", 8 * MIB, 0.0),
)
PLAN = Plan(
    decisions={
        f"{LAYERS}.0": Decision(Action.RECOMPUTE),
        f"{LAYERS}.1": Decision(Action.RECOMPUTE),
        f"{LAYERS}.1.mlp.up_proj": Decision(Action.SAVE),
        f"{LAYERS}.1.self_attn#attention": Decision(Action.SAVE, stash=True),
        f"{LAYERS}.2": Decision(Action.RECOMPUTE),
    },
    loss_chunk_rows=None,
    budget_bytes=80 * MIB,
    predicted_peak_bytes=75 * MIB,
    predicted_step_seconds=2.5,
    ledger=(
        LedgerLine("base weights, bf16", 60 * MIB, "counted"),
        LedgerLine("saved tensors", 15 * MIB, "simulated"),
    ),
    rows=ROWS,
    fingerprint=Fingerprint("LlamaForCausalLM", "a", "b", "c", (("input_ids", (4, 512), "int64"),), "cpu", "sdpa"),
)
SIZE = re.compile(r"-?\d+(\.\d+)? ?(B|KiB|MiB|GiB)")
TIME = re.compile(r"-?\d+(\.\d+)? (s|ms|us)")


def plans(rows: st.SearchStrategy[tuple[BlockRow, ...]]) -> st.SearchStrategy[Plan]:
    return rows.map(lambda rows: dataclasses.replace(PLAN, rows=rows))


PLANS = plans(
    st.lists(
        st.tuples(st.sampled_from(["save all", "recompute all"]), st.sampled_from([0, 5, 10 * MIB]), st.integers(0, 8)),
        max_size=12,
    ).map(lambda items: tuple(BlockRow(f"m.{i}", option, size, t / 8) for i, (option, size, t) in enumerate(items)))
)


@given(PLANS)
def test_the_folded_table_is_the_plan_in_fewer_lines(plan: Plan) -> None:
    facts = plan_facts(plan)
    assert sum(row["count"] for row in facts["rows"]) == len(plan.rows)
    saved = sum(row.saved_bytes for row in plan.rows)
    assert sum(row["count"] * row["saved_bytes"] for row in facts["rows"]) == saved
    seconds = sum(row.extra_seconds for row in plan.rows)  # eighths: every sum of them is exact
    assert sum(row["extra_seconds"] for row in facts["rows"]) == seconds == facts["extra_seconds"] == plan.extra_seconds

    *lines, total = plan_columns(plan).rows
    assert list(total) == ["sum", "", format_bytes(saved), format_seconds(seconds)]
    assert len(lines) == len(facts["rows"])
    for line, row in zip(lines, facts["rows"], strict=True):
        count, _, each = line[2].rpartition(" x ")
        assert (line[1], int(count or 1), each) == (row["option"], row["count"], format_bytes(row["saved_bytes"]))
        assert line[3] == format_seconds(row["extra_seconds"])


def test_a_chunked_loss_has_a_line_of_its_own() -> None:
    rows = plan_columns(dataclasses.replace(PLAN, loss_chunk_rows=256)).rows
    assert list(rows[-2]) == ["head", "chunked loss, 256 rows at a time", "", ""]


def test_facts_are_the_fields() -> None:
    facts = plan_facts(PLAN)
    for name in ("budget_bytes", "predicted_peak_bytes", "headroom_bytes", "predicted_step_seconds", "exact"):
        assert facts[name] == getattr(PLAN, name)
    assert facts["batch"] == {"input_ids": [4, 512]}
    assert [row["regions"] for row in facts["rows"]] == ["layers.{0,2}", "layers.1", "layers.3"]
    assert json.loads(json.dumps(facts)) == facts


def test_every_block_is_explained_once_and_by_what_is_done_inside_it() -> None:
    whole, inner, saved = explain_blocks(PLAN)
    assert (whole.regions, whole.count, whole.recomputed, whole.saved) == ("layers.{0,2}", 2, True, ())
    assert (inner.regions, inner.recomputed, inner.saved) == ("layers.1", True, ("mlp.up_proj", "self_attn#attention"))
    assert inner.stashed == ("self_attn#attention",)
    assert (saved.regions, saved.recomputed, saved.saved_bytes) == ("layers.3", False, 8 * MIB)
    blocks = [whole, inner, saved]
    assert sum(block.count * block.saved_bytes for block in blocks) == sum(row.saved_bytes for row in PLAN.rows)
    assert sum(block.count * block.extra_seconds for block in blocks) == PLAN.extra_seconds


def test_the_explanation_says_why() -> None:
    assert explain_text(PLAN) == (
        "plan for LlamaForCausalLM on cpu: input_ids 4x512\n"
        "\n"
        "At the peak, 75.0 MiB:\n"
        "  what                   bytes  share  how\n"
        "  base weights, bf16  60.0 MiB  80.0%  counted\n"
        "  saved tensors       15.0 MiB  20.0%  simulated\n"
        "\n"
        "Blocks, inside model:\n"
        "  layers.{0,2}: keeps 1.0 MiB each, adds 250 ms each\n"
        "    recomputed whole: only its input is kept\n"
        "  layers.1: keeps 3.0 MiB, adds 125 ms\n"
        "    saved, not run again: mlp.up_proj\n"
        "    saved with their output, which the recomputation reads: self_attn#attention\n"
        "    recomputed: everything else in the block\n"
        "  layers.3: keeps 8.0 MiB, adds 0 s\n"
        "    saved whole: nothing is run again\n"
        "\n"
        "Loss:\n"
        "  the model's own, all logits at once\n"
        "\n"
        "Budget:\n"
        "  5.0 MiB of 80.0 MiB are left\n"
        "  recomputation is 625 ms (25.0%) of the 2.5 s step; no larger budget can take off more than that from the "
        "blocks\n"
        "  about 2.0 MiB more would let model.layers.0 do as model.layers.1 does: about 125 ms less"
    )


def test_the_explanation_of_other_plans() -> None:
    chunked = dataclasses.replace(PLAN, loss_chunk_rows=128, budget_bytes=None, notes=("coarser regions", "and so on"))
    text = explain_text(chunked)
    assert "Loss:\n  in chunks of 128 rows: gradients differ from the plain model's by rounding\n" in text
    assert "Budget:\n  the plan is a point of the frontier, made for no budget\n" in text
    assert text.endswith("\nNotes:\n  coarser regions\n  and so on")
    empty = dataclasses.replace(
        PLAN, rows=(), decisions={}, ledger=(), predicted_peak_bytes=0, predicted_step_seconds=0.0
    )
    assert "recomputation is 0 s (0.0%) of the 0 s step" in explain_text(empty)


def test_the_facts_of_an_explanation_add_up() -> None:
    facts = explain_facts(PLAN)
    assert sum(facts["ledger"].values()) == facts["predicted_peak_bytes"] == PLAN.predicted_peak_bytes
    assert facts["headroom_bytes"] == PLAN.budget_bytes - PLAN.predicted_peak_bytes  # pyright: ignore[reportOptionalOperand]
    assert facts["extra_seconds"] == PLAN.extra_seconds
    assert facts["next_exchange"] == {
        "block": f"{LAYERS}.0",
        "like": f"{LAYERS}.1",
        "more_bytes": 2 * MIB,
        "fewer_seconds": 0.125,
    }
    assert json.loads(json.dumps(facts)) == {**facts, "blocks": json.loads(json.dumps(facts["blocks"]))}


@given(PLANS)
def test_the_next_exchange_is_the_cheapest_there_is(plan: Plan) -> None:
    pairs = [
        (other.saved_bytes - row.saved_bytes, row.extra_seconds - other.extra_seconds)
        for row in plan.rows
        for other in plan.rows
    ]
    useful = [(more, -fewer) for more, fewer in pairs if more > 0 and fewer > 0]
    found = next_exchange(plan)
    if found is None:
        assert useful == []
    else:
        assert (found.more_bytes, -found.fewer_seconds) == min(useful)


def test_blocks_of_different_lists_are_no_examples_for_each_other() -> None:
    rows = (BlockRow("encoder.0", "recompute all", 1, 1.0), BlockRow("decoder.0", "save all", 2, 0.0))
    assert next_exchange(dataclasses.replace(PLAN, rows=rows)) is None


@dataclasses.dataclass
class Checked:
    """Fields of a verification, without importing torch for it."""

    gradients_equal: bool = True
    num_gradients: int = 7
    largest_difference: float = 0.0
    loss_plain: float = 2.5
    loss_planned: float = 2.5
    predicted_peak_bytes: int = 102 * MIB
    measured_peak_bytes: int = 100 * MIB
    predicted_step_seconds: float = 0.9
    measured_step_seconds: float = 1.0
    plain_peak_bytes: int | None = 2 * GIB
    plain_step_seconds: float | None = 0.75


def verification(**changes: Any) -> Any:
    return verification_columns(Checked(**changes))  # pyright: ignore[reportArgumentType]


def test_a_verification_shows_predicted_beside_measured() -> None:
    columns = verification()
    assert list(columns.headers) == ["", "predicted", "measured", "difference", "plain model"]
    assert [list(row) for row in columns.rows] == [
        ["peak", "102.0 MiB", "100.0 MiB", "+2.0%", "2.00 GiB"],
        ["step", "900 ms", "1 s", "-10.0%", "750 ms"],
    ]
    assert list(columns.below) == [
        "loss and 7 gradients equal the plain model's bit for bit",
        "loss: plain 2.500000, under the plan 2.500000",
    ]
    rounded = verification(
        gradients_equal=False, largest_difference=1.25e-6, plain_peak_bytes=None, plain_step_seconds=None
    )
    assert rounded.below[0] == (
        "loss and 7 gradients are within rounding of the plain model's: largest difference 1.3e-06 of a gradient's "
        "largest entry"
    )
    assert [row[-1] for row in rounded.rows] == ["-", "-"]


POINTS = [FrontierPoint(20 * MIB, None), FrontierPoint(80 * MIB, PLAN)]


def test_a_frontier_is_told_against_the_plain_step() -> None:
    plain = PlainStep(150 * MIB, 2.0)
    assert [list(row) for row in frontier_columns(POINTS, plain).rows] == [
        ["20.0 MiB", "does not fit", "", "", "", ""],
        ["80.0 MiB", "75.0 MiB", "50%", "2.5 s", "1.25x", "whole"],
        ["", "150.0 MiB", "100%", "2 s", "1.00x", "plain step"],
    ]
    chosen = frontier_columns([FrontierPoint(None, dataclasses.replace(PLAN, loss_chunk_rows=64))], plain)
    assert list(chosen.headers) == ["peak", "of plain", "step", "of plain", "loss rows"]
    assert list(chosen.rows[0]) == ["75.0 MiB", "50%", "2.5 s", "1.25x", "64"]
    room = ("A device", min(point.plan.predicted_peak_bytes for point in POINTS if point.plan is not None))
    said = f"A device: {format_bytes(room[1])} may be taken, 1 of {len(POINTS)} points fit"
    assert list(frontier_columns(POINTS, plain, room).below) == [said]
    facts = frontier_facts(POINTS, plain, room)
    assert [point["fits"] for point in facts["points"]] == [False, True]
    facts = frontier_facts(POINTS, plain, (room[0], room[1] - 1))
    assert [point["fits"] for point in facts["points"]] == [False, False]
    assert facts["points"][1]["predicted_peak_bytes"] == room[1]
    facts = frontier_facts(POINTS, plain)
    assert [point["fits"] for point in facts["points"]] == [False, True]
    assert facts["points"][1]["predicted_peak_bytes"] == PLAN.predicted_peak_bytes
    assert json.loads(json.dumps(facts)) == facts


def printed_tables() -> dict[str, str]:
    return {
        "plan": plan_columns(PLAN).plain(),
        "frontier": frontier_columns(POINTS, PlainStep(150 * MIB, 2.0)).plain(),
        "verification": verification().plain(),
        "explanation": explain_text(PLAN),
    }


@pytest.mark.parametrize("name", sorted(printed_tables()))
def test_every_size_and_time_has_a_unit(name: str) -> None:
    """What is left of the text without sizes, times, shares and counts holds no number."""
    text = printed_tables()[name]
    assert len(SIZE.findall(text)) >= 3
    assert len(TIME.findall(text)) >= 2
    for pattern in (SIZE, TIME, re.compile(r"[+-]?\d+(\.\d+)?%"), re.compile(r"\d+\.\d\dx"), re.compile(r"\d+ x ")):
        text = pattern.sub("", text)
    for known in ("4x512", "layers.{0,2}", "loss and 7 gradients", "loss: plain 2.500000, under the plan 2.500000"):
        text = text.replace(known, "")
    assert re.findall(r"(?<!\.)\b\d+(?:\.\d+)?\b", text) == []


def test_columns_in_a_pipe_are_aligned_and_whole() -> None:
    columns = plan_columns(PLAN)
    lines = columns.plain().splitlines()
    assert lines[: len(columns.above)] == list(columns.above)
    assert lines[-1] == PLAN.summary()
    table = lines[len(columns.above) + 1 : -2]
    assert [re.split(r"\s{2,}", line)[0] for line in table] == ["region", *(row[0] for row in columns.rows)]
    ends = {line.rindex(size) + len(size) for line, (*_, size, _) in zip(table[1:], columns.rows, strict=True)}
    assert len(ends) == 1, "sizes end in the same column"


def cgroup(folder: Path, limit: str, used: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    return folder


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    total, free = host_memory(tmp_path)  # no such files: the whole machine
    assert 0 < free <= total
    assert host_memory(cgroup(tmp_path, "max", 0))[0] == total
    assert host_memory(cgroup(tmp_path, str(64 * MIB), 48 * MIB)) == (64 * MIB, 16 * MIB)
    assert host_memory(cgroup(tmp_path, str(64 * MIB), 80 * MIB)) == (64 * MIB, 0)


@pytest.mark.parametrize(
    ("free", "text"),
    [(2 * GIB + MIB // 2, "1536MiB"), (512 * MIB, "none: free some memory first"), (0, "none: free some memory first")],
)
def test_the_largest_budget_leaves_room_for_the_process_and_can_be_typed(free: int, text: str) -> None:
    machine = Machine("cpu", "x86_64", 2, 4 * GIB, free, True, {"torch": "2"})
    rows = dict(machine.rows())
    assert rows["largest budget now"] == text
    assert machine.facts()["largest_budget_bytes"] == (parse_bytes(text) if text.endswith("MiB") else 0)
    assert rows["memory"] == f"4.00 GiB, free {format_bytes(free)}"


@pytest.mark.parametrize(
    ("free", "budget"), [(2 * GIB + MIB // 2, 2560 * MIB), (4 * GIB - 100 * MIB, 4 * GIB), (0, 512 * MIB)]
)
def test_the_largest_budget_of_a_gpu_holds_the_context_that_this_process_has(free: int, budget: int) -> None:
    """What is free is without it, and a budget is with it."""
    machine = Machine("cuda", "A GPU", 2, 4 * GIB, free, True, {"torch": "2"})
    assert machine.facts()["largest_budget_bytes"] == budget
    assert dict(machine.rows())["largest budget now"] == f"{budget // MIB}MiB"


@pytest.mark.parametrize("command", ["show", "explain"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_stored_plan_is_read_without_torch_or_transformers(command: str, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(PLAN.to_json())
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'peft', 'datasets'):\n"
        "    sys.modules[name] = None  # importing it is an error\n"
        "from rematree.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    words = [sys.executable, "-c", program, command, "plan.json", *options]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    expected: dict[tuple[str, bool], Any] = {
        ("show", False): f"{plan_columns(PLAN).plain()}\n",
        ("explain", False): f"{explain_text(PLAN)}\n",
        ("show", True): plan_facts(PLAN),
        ("explain", True): json.loads(json.dumps(explain_facts(PLAN))),
    }
    found = json.loads(result.stdout) if options else result.stdout
    assert found == expected[command, bool(options)]


def test_sizes_are_powers_of_1024() -> None:
    assert format_bytes(PLAN.predicted_peak_bytes) in plan_columns(PLAN).plain()
    assert format_bytes(75 * KIB * KIB) == "75.0 MiB"
