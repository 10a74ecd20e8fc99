"""A plan as JSON: what is written is read back equal, and anything else is refused."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematree.errors import PlanMismatchError, UsageError
from rematree.plans import PLAN_FORMAT, Action, BlockRow, Decision, Fingerprint, LedgerLine, Levers, Plan

SIZES = st.integers(0, 2**50)
SECONDS = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.text(max_size=12)
FINGERPRINTS = st.builds(
    Fingerprint,
    model_class=NAMES,
    parameters=NAMES,
    trainable=NAMES,
    dropout=NAMES,
    batch=st.lists(st.tuples(NAMES, st.lists(st.integers(0, 9), max_size=3).map(tuple), NAMES), max_size=3).map(tuple),
    device=NAMES,
    attention=NAMES,
    left_out=st.lists(NAMES, max_size=2).map(tuple),
    hooked=st.lists(NAMES, max_size=2).map(tuple),
)
PLANS = st.builds(
    Plan,
    decisions=st.dictionaries(NAMES, st.builds(Decision, st.sampled_from(Action), st.booleans()), max_size=4),
    loss_chunk_rows=st.none() | st.integers(1, 4096),
    budget_bytes=st.none() | SIZES,
    predicted_peak_bytes=SIZES,
    predicted_step_seconds=SECONDS,
    ledger=st.lists(st.builds(LedgerLine, NAMES, SIZES, NAMES), max_size=3).map(tuple),
    rows=st.lists(st.builds(BlockRow, NAMES, NAMES, SIZES, SECONDS), max_size=3).map(tuple),
    fingerprint=FINGERPRINTS,
    lean=st.lists(NAMES, max_size=2).map(tuple),
    compiled=st.dictionaries(NAMES, st.floats(0, 1), max_size=2),
    groups=st.lists(st.lists(NAMES, max_size=3).map(tuple), max_size=2).map(tuple),
    bound_seconds=st.none() | SECONDS,
    notes=st.lists(NAMES, max_size=2).map(tuple),
    versions=st.dictionaries(NAMES, NAMES, max_size=2),
)

FINGERPRINT = Fingerprint(
    model_class="LlamaForCausalLM",
    parameters="5d41402a",
    trainable="7d793037",
    dropout="9e107d9d",
    batch=(("input_ids", (4, 512), "torch.int64"), ("labels", (4, 512), "torch.int64")),
    device="cpu",
    attention="sdpa",
    left_out=("attention_mask",),
    hooked=("layers.0.mlp",),
)
PLAN = Plan(
    decisions={
        "layers.0": Decision(Action.RECOMPUTE),
        "layers.0.mlp.up_proj": Decision(Action.SAVE),
        "layers.0.self_attn:core": Decision(Action.SAVE, stash=True),
    },
    loss_chunk_rows=128,
    budget_bytes=1000,
    predicted_peak_bytes=900,
    predicted_step_seconds=0.5,
    ledger=(LedgerLine("base weights, bf16", 600, "counted"), LedgerLine("saved tensors", 300, "simulated")),
    rows=(BlockRow("layers.0", "recompute, save mlp.up_proj", 300, 0.125),),
    fingerprint=FINGERPRINT,
    lean=("layers.1.mlp.up_proj",),
    compiled={"layers.2": 0.5},
    groups=(("layers.3", "layers.4"),),
    bound_seconds=0.375,
    notes=("the blocks were not found; planned in coarser regions",),
    versions={"torch": "2.13.0"},
)
# Stored plans outlive the library: a change here needs a new PLAN_FORMAT and a line in CHANGELOG.md.
WRITTEN: dict[str, Any] = {
    "format": 4,
    "decisions": {
        "layers.0": ["recompute", False],
        "layers.0.mlp.up_proj": ["save", False],
        "layers.0.self_attn:core": ["save", True],
    },
    "loss_chunk_rows": 128,
    "budget_bytes": 1000,
    "predicted_peak_bytes": 900,
    "predicted_step_seconds": 0.5,
    "ledger": [
        {"category": "base weights, bf16", "num_bytes": 600, "obtained": "counted"},
        {"category": "saved tensors", "num_bytes": 300, "obtained": "simulated"},
    ],
    "rows": [{"path": "layers.0", "option": "recompute, save mlp.up_proj", "saved_bytes": 300, "extra_seconds": 0.125}],
    "fingerprint": {
        "model_class": "LlamaForCausalLM",
        "parameters": "5d41402a",
        "trainable": "7d793037",
        "dropout": "9e107d9d",
        "batch": [["input_ids", [4, 512], "torch.int64"], ["labels", [4, 512], "torch.int64"]],
        "device": "cpu",
        "attention": "sdpa",
        "left_out": ["attention_mask"],
        "hooked": ["layers.0.mlp"],
    },
    "lean": ["layers.1.mlp.up_proj"],
    "compiled": {"layers.2": 0.5},
    "groups": [["layers.3", "layers.4"]],
    "bound_seconds": 0.375,
    "notes": ["the blocks were not found; planned in coarser regions"],
    "versions": {"torch": "2.13.0"},
    "run": {},
}


def test_format_is_frozen() -> None:
    assert json.loads(PLAN.to_json()) == WRITTEN
    assert Plan.from_json(json.dumps(WRITTEN)) == PLAN


@given(PLANS)
def test_round_trip(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert text.isascii()


@given(st.integers(0, len(PLAN.to_json()) - 1))
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(UsageError, match="not a plan"):
        Plan.from_json(PLAN.to_json()[:length])


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_missing_field_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Plan.from_json(json.dumps({key: value for key, value in WRITTEN.items() if key != name}))
    assert (
        caught.value.message
        == f"not a plan: {f'there is no {name}' if name != 'format' else 'no format version in it'}"
    )


ANOTHER_FORMAT = "plan of another format version; this library reads version 4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": PLAN_FORMAT + 1}, ANOTHER_FORMAT),
        ({"format": "1"}, ANOTHER_FORMAT),
        ({"format": True}, ANOTHER_FORMAT),
        ({"format": 1.0}, ANOTHER_FORMAT),
        ({"decisions": []}, "not a plan: decisions: expected an object, found a list"),
        (
            {"decisions": {"layers.0": ["forget", False]}},
            "not a plan: decisions['layers.0'][0]: expected one of 'save', 'recompute', found 'forget'",
        ),
        ({"decisions": {"layers.0": ["save"]}}, "not a plan: decisions['layers.0']: expected 2 values, found 1"),
        (
            {"decisions": {"layers.0": ["save", 1]}},
            "not a plan: decisions['layers.0'][1]: expected true or false, found 1",
        ),
        (
            {"decisions": {"layers.0": [["save"], False]}},
            "not a plan: decisions['layers.0'][0]: expected one of 'save', 'recompute', found a list",
        ),
        ({"loss_chunk_rows": 1.5}, "not a plan: loss_chunk_rows: expected a whole number, found 1.5"),
        ({"budget_bytes": "1GiB"}, "not a plan: budget_bytes: expected a whole number, found '1GiB'"),
        ({"predicted_peak_bytes": True}, "not a plan: predicted_peak_bytes: expected a whole number, found true"),
        ({"predicted_peak_bytes": None}, "not a plan: predicted_peak_bytes: expected a whole number, found null"),
        ({"predicted_step_seconds": math.nan}, "not a plan: predicted_step_seconds: expected a number, found nan"),
        ({"predicted_step_seconds": 10**400}, "not a plan: predicted_step_seconds: expected a number, found inf"),
        ({"ledger": [{"category": "weights"}]}, "not a plan: there is no ledger[0].num_bytes"),
        ({"rows": 3}, "not a plan: rows: expected a list, found 3"),
        ({"fingerprint": {}}, "not a plan: there is no fingerprint.model_class"),
        (
            {"fingerprint": {**WRITTEN["fingerprint"], "batch": [["labels", [4, "512"], "int64"]]}},
            "not a plan: fingerprint.batch[0][1][1]: expected a whole number, found '512'",
        ),
        ({"notes": "none"}, "not a plan: notes: expected a list, found 'none'"),
        ({"versions": {"torch": 2}}, "not a plan: versions['torch']: expected a string, found 2"),
        ({"surprise": 1}, "not a plan: unknown field surprise"),
    ],
)
def test_a_changed_file_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Plan.from_json(json.dumps({**WRITTEN, **change}))
    assert str(caught.value) == message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(set(WRITTEN) - {"format"})), JSON_VALUES)
def test_any_value_in_any_field_is_a_plan_or_a_usage_error(name: str, value: Any) -> None:
    try:
        plan = Plan.from_json(json.dumps({**WRITTEN, name: value}))
    except UsageError:
        return
    assert Plan.from_json(plan.to_json()) == plan


def test_a_whole_number_is_a_number() -> None:
    assert type(Plan.from_json(json.dumps({**WRITTEN, "predicted_step_seconds": 2})).predicted_step_seconds) is float


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "1" * 10_000 + "}"], ids=["deep", "long"])
def test_what_the_json_reader_cannot_take_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^not a plan: "):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["", "plan", "[]", "3", "null", "{}", '"format"'])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a plan"):
        Plan.from_json(text)


def test_a_plan_is_frozen() -> None:
    for part in (PLAN, PLAN.fingerprint, PLAN.decisions["layers.0"], PLAN.ledger[0], PLAN.rows[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


def test_what_follows_from_the_fields() -> None:
    assert PLAN.headroom_bytes == 100
    assert dataclasses.replace(PLAN, budget_bytes=None).headroom_bytes is None
    assert not PLAN.exact
    assert not dataclasses.replace(PLAN, loss_chunk_rows=None).exact
    assert dataclasses.replace(PLAN, loss_chunk_rows=None, compiled={}).exact
    assert PLAN.recomputes
    saves = {"layers.0": Decision(Action.SAVE)}
    assert dataclasses.replace(PLAN, decisions=saves).recomputes
    assert not dataclasses.replace(PLAN, decisions=saves, groups=()).recomputes
    assert Plan.of(PLAN.levers, FINGERPRINT).levers == PLAN.levers


def test_levers_without_some_blocks() -> None:
    left = PLAN.levers.without({"layers.0", "layers.3"})
    assert left == Levers({}, 128, PLAN.lean, PLAN.compiled, (("layers.4",),))
    assert PLAN.levers.without({"layers.1", "layers.2"}).lean == ()
    assert PLAN.levers.without({"layers.1", "layers.2"}).compiled == {}
    assert PLAN.levers.without(set()) == PLAN.levers
    assert sum(line.num_bytes for line in PLAN.ledger) == PLAN.predicted_peak_bytes


@given(FINGERPRINTS, FINGERPRINTS)
def test_differences_name_exactly_the_fields_that_differ(mine: Fingerprint, theirs: Fingerprint) -> None:
    differ = [
        item.name for item in dataclasses.fields(Fingerprint) if getattr(mine, item.name) != getattr(theirs, item.name)
    ]
    assert [line.partition(":")[0] for line in mine.differences(theirs)] == differ
    assert mine.differences(mine) == []


def test_a_plan_for_something_else_is_refused() -> None:
    PLAN.check(FINGERPRINT)
    with pytest.raises(PlanMismatchError) as caught:
        PLAN.check(dataclasses.replace(FINGERPRINT, trainable="e4d909c2", device="cuda"))
    assert str(caught.value) == (
        "the plan was made for another model, batch shape or trainable set\n"
        "  trainable: planned for 7d793037, here e4d909c2\n"
        "  device: planned for cpu, here cuda\n"
        "What would work:\n"
        "  plan again: rematree.plan(model, batch, budget=...)"
    )


def test_a_plan_prints_as_a_folded_table() -> None:
    blocks = [BlockRow(f"model.layers.{i}", "recompute, save mlp.up_proj", 1024, 0.125) for i in range(3)]
    plan = dataclasses.replace(PLAN, rows=(*blocks, BlockRow("model.layers.3", "save all", 2048, 0.0)))
    assert str(plan) == (
        "plan for LlamaForCausalLM on cpu: input_ids 4x512, labels 4x512\n"
        "regions inside model\n"
        "\n"
        "region        decision                                saved  added time\n"
        "layers.{0-2}  recompute, save mlp.up_proj       3 x 1.0 KiB      375 ms\n"
        "layers.3      save all                              2.0 KiB         0 s\n"
        "head          chunked loss, 128 rows at a time\n"
        "sum                                                 5.0 KiB      375 ms\n"
        "\n"
        "predicted peak 900 B of 1000 B (headroom 100 B), step 500 ms, of it 375 ms recomputation\n"
        "note: the blocks were not found; planned in coarser regions"
    )


@given(PLANS)
def test_every_plan_prints(plan: Plan) -> None:
    assert plan.title() in str(plan)
    assert plan.summary() in str(plan)
