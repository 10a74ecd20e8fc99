"""Examples are read, split, tokenised; what is wrong with a line is said with its number."""

from pathlib import Path
from typing import Any

import pytest

from rematree.errors import UsageError
from rematree.finetune.data import load_data, planning_batch, split_records
from rematree.finetune.docstrings import clean_answer, stdlib_questions
from rematree.finetune.records import Message, Record, parse_record, read_records
from rematree.finetune.tokens import IGNORED, tokenize
from test_finetune_tiny import sums, tiny_tokenizer, write_jsonl

EXPECTED = (
    '  expected one JSON object a line: {"prompt": "...", "completion": "..."}\n'
    '  or {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)


def trained_text(record: Record, tokenizer: Any) -> str:
    example = tokenize(record, tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def chat(*turns: tuple[str, str]) -> Record:
    return Record("key", tuple(Message(role, content) for role, content in turns))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", ', "not JSON: Expecting property name enclosed in double quotes at column 17"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'"a"', "a JSON string, not an object"),
        (b"{}", 'an object with no fields, without "prompt" and "completion" or "messages"'),
        (b'{"prompt": "a"}', 'an object with "prompt", without "prompt" and "completion" or "messages"'),
        (b'{"prompt": "a", "completion": 3}', '"completion" is a number, not a string'),
        (b'{"messages": []}', '"messages" is empty'),
        (b'{"messages": "a"}', '"messages" is a string, not a list'),
        (b'{"messages": ["a"]}', "message 1 is a string, not an object"),
        (b'{"messages": [{"role": "user"}]}', 'message 1 has no "content" that is a string'),
        (
            b'{"messages": [{"role": "user", "content": "a"}]}',
            'no message has the role "assistant", so there is nothing to train on',
        ),
        (
            b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
            'message 1 has "tool_calls", which is not read: a turn is role and content',
        ),
        (
            b'{"messages": [{"role": "user", "content": "a", "weight": 0}]}',
            'message 1 has a "weight", which is not read: every answer is trained on',
        ),
        (b'{"prompt": "a", "completion": "b", "tools": [{}]}', '"tools" is not read: a conversation is its messages'),
        (
            b'{"prompt": "a", "completion": "cut: \\ud83d"}',
            "half of a character, '\\ud83d', which no tokenizer takes",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}]}',
            'the first message has the role "assistant", so there is nothing to answer',
        ),
    ],
)
def test_malformed_line_is_named_with_what_was_expected(tmp_path: Path, line: bytes, reason: str):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line + b"\n")
    with pytest.raises(UsageError) as caught:
        read_records(str(path))
    assert str(caught.value) == f"{path}, line 3: {reason}\n  there: {line.decode().strip()}\n{EXPECTED}"


def test_line_that_is_not_utf8_is_named(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(UsageError, match=r"d\.jsonl, line 1: not UTF-8: invalid start byte at byte 12"):
        read_records(str(path))


def test_long_line_is_shown_in_part(tmp_path: Path):
    path = write_jsonl(tmp_path / "d.jsonl", ["x" * 500])
    with pytest.raises(UsageError) as caught:
        read_records(str(path))
    assert caught.value.details[0] == 'there: "' + "x" * 79 + "..."


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_records(str(path))
    assert str(caught.value) == f"{path} is empty: no example in it\n{EXPECTED}"


@pytest.mark.parametrize(
    ("spec", "message", "detail"),
    [
        ("./no.jsonl", "data './no.jsonl' is not there", "there is no file no.jsonl"),
        ("/tmp", "data '/tmp' is not there", "/tmp is a directory"),
        ("builtin:poems", "there is no built-in data set 'builtin:poems'", None),
    ],
)
def test_data_that_is_not_there(spec: str, message: str, detail: str | None):
    with pytest.raises(UsageError) as caught:
        read_records(spec)
    assert caught.value.message == message
    assert caught.value.details == (() if detail is None else (detail,))
    assert "--data builtin:stdlib-docstrings" in caught.value.remedies


def test_hub_data_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UsageError) as caught:
        read_records("someone/something")
    assert caught.value.message == "data 'someone/something' is not there"
    assert caught.value.details == (
        "there is no such file here, and the Hub says: Couldn't reach 'someone/something' on the Hub",
    )


def test_hub_data_set_with_other_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [sums(1)[0], {"text": "a"}])
    with pytest.raises(UsageError, match=r'someone/something, row 2: an object with "text"'):
        read_records("someone/something")


def test_only_answers_are_trained_on():
    tokenizer = tiny_tokenizer()
    record = chat(("user", "hi"), ("assistant", "yes"), ("user", "more"), ("assistant", "no"))
    assert trained_text(record, tokenizer) == "yes</s>no</s>"
    assert tokenizer.decode(tokenize(record, tokenizer).input_ids) == (
        "<|user|>hi</s><|assistant|>yes</s><|user|>more</s><|assistant|>no</s>"
    )


def test_without_a_chat_template_prompt_and_completion_are_put_together():
    tokenizer = tiny_tokenizer(chat_template=None)
    record = parse_record({"prompt": "1+1=", "completion": "2"})
    assert tokenizer.decode(tokenize(record, tokenizer).input_ids) == "<s>1+1=2</s>"
    assert trained_text(record, tokenizer) == "2</s>"


def test_without_a_chat_template_conversations_are_refused():
    with pytest.raises(UsageError, match="the tokenizer has no chat template, so conversations of several turns"):
        tokenize(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), tiny_tokenizer(None))


def test_template_that_drops_earlier_reasoning_trains_the_last_answer():
    # Like templates of reasoning models: what was thought is shown for the last answer only.
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
        "{{ m['content'] if loop.last or m['role'] == 'user' else m['content'][-1:] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    record = chat(("user", "a"), ("assistant", "think b"), ("user", "c"), ("assistant", "think d"))
    assert trained_text(record, tiny_tokenizer(template)) == "think d</s>"


def test_template_that_rewrites_the_prompt_is_refused():
    template = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UsageError, match="changes the prompt once the answer is there"):
        tokenize(chat(("user", "a"), ("assistant", "b")), tiny_tokenizer(template))


def test_what_is_empty_beside_the_content_of_a_turn_is_no_matter():
    turns = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": "b", "tool_calls": [], "weight": 1, "name": "x"},
    ]
    assert parse_record({"messages": turns, "tools": None}) == parse_record({"prompt": "a", "completion": "b"})


def test_a_conversation_that_the_template_refuses_is_shown():
    template = "{{ raise_exception('system turns are not supported') }}"
    with pytest.raises(UsageError, match="refuses a conversation: system turns are not supported") as error:
        tokenize(chat(("system", "be brief"), ("user", "a"), ("assistant", "b")), tiny_tokenizer(template))
    assert error.value.details == ("its turns: system, user", "it begins: 'be brief'")


def test_the_question_is_one_that_can_be_answered(tmp_path: Path):
    rows = [{"prompt": "p" * 30 + str(i), "completion": "a"} for i in range(40)]
    path = str(write_jsonl(tmp_path / "d.jsonl", [*rows, *sums(10)]))
    split = load_data(path, tiny_tokenizer(), max_length=60, heldout=40)
    first = load_data(path, tiny_tokenizer(), max_length=60, heldout=40, longest_prompt=20).question
    assert split.question is not None
    assert split.question.answer == "a"  # a long one is first
    assert first is not None
    assert first.answer != "a"
    assert load_data(path, tiny_tokenizer(), max_length=60, heldout=40, longest_prompt=-4).question is None


def test_long_examples_are_cut_and_counted_once(tmp_path: Path):
    rows = [*sums(6), {"prompt": "a", "completion": "b" * 100}, {"prompt": "p" * 100, "completion": "never reached"}]
    split = load_data(str(write_jsonl(tmp_path / "d.jsonl", rows)), tiny_tokenizer(), max_length=40, heldout=0)
    assert split.report.lines() == [
        "data: 7 examples in 4 rows of 40 tokens (86% filled), 0 held out",
        "1 of 8 examples are longer than --max-length 40 and were cut",
        "1 of 8 examples have no token of an answer within --max-length 40 and were left out",
    ]
    assert all(len(row) == 40 for name in split.train.column_names for row in split.train[name])


def test_nothing_left_to_train_on_is_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p" * 100, "completion": "a"}])
    with pytest.raises(UsageError, match=r"no example of .*d\.jsonl has a token of its answer within --max-length 20"):
        load_data(str(path), tiny_tokenizer(), max_length=20)


def records(count: int) -> list[Record]:
    return [parse_record(row) for row in sums(count)]


def test_split_puts_equal_examples_on_one_side():
    train, heldout = split_records(records(50) * 2, 0.3, seed=0)
    assert {r.key for r in train}.isdisjoint(r.key for r in heldout)
    assert len(train) + len(heldout) == 100
    assert 10 <= len(heldout) <= 50


def test_split_is_stable_when_examples_are_added():
    _, few = split_records(records(50), 0.3, seed=0)
    _, many = split_records(records(80), 0.3, seed=0)
    assert {r.key for r in few} <= {r.key for r in many}


@pytest.mark.parametrize(("heldout", "count"), [(0, 0), (1, 1), (7, 7)])
def test_split_by_number(heldout: float, count: int):
    _, rest = split_records(records(20), heldout, seed=3)
    assert len(rest) == count


def test_split_holds_out_one_at_least():
    train, rest = split_records(records(2), 0.001, seed=0)
    assert (len(train), len(rest)) == (1, 1)


def test_split_that_leaves_nothing_is_refused():
    with pytest.raises(UsageError, match="--heldout 20 leaves nothing to train on: there are 20 different examples"):
        split_records(records(20), 20, seed=0)


def test_planning_batch_needs_an_attention_mask(tmp_path: Path):
    # Rows that are one whole example need none, and the plan must hold for those that do.
    whole = [{"prompt": "a" * 5, "completion": chr(98 + i) * (64 - 9)} for i in range(3)]
    path = write_jsonl(tmp_path / "d.jsonl", whole + sums(10))
    for packing in (True, False):
        split = load_data(str(path), tiny_tokenizer(), max_length=64, heldout=0, packing=packing)
        batch = planning_batch(split.train, 2)
        if packing:
            assert (batch["position_ids"] == 0).sum(-1).min() > 1
        else:
            assert batch["attention_mask"].min(-1).values.max() == 0


def test_too_few_rows_for_a_step_are_refused(tmp_path: Path):
    split = load_data(str(write_jsonl(tmp_path / "d.jsonl", sums(4))), tiny_tokenizer(), max_length=128, heldout=0)
    with pytest.raises(UsageError) as caught:
        planning_batch(split.train, 8)
    assert caught.value.message == "a step takes 8 rows, the data fills only 1"
    assert caught.value.remedies[0] == "--per-device-train-batch-size 1"


def test_stdlib_questions_are_many_and_different():
    questions = stdlib_questions()
    assert len(questions) > 2000
    assert len({q.name for q in questions}) == len({q.completion for q in questions}) == len(questions)
    assert all(24 <= len(q.completion) <= 1000 for q in questions)
    dedent = next(q for q in questions if q.name == "textwrap.dedent")
    assert "textwrap.dedent(text)" in dedent.prompt
    assert dedent.completion.startswith("Remove any common leading whitespace")


def test_stdlib_questions_do_not_depend_on_what_is_imported():
    # torch, imported here, puts functions of its own into `inspect`.
    import inspect

    import torch

    assert inspect.getfile.__module__.startswith(torch.__name__)
    assert "inspect.getfile" in {question.name for question in stdlib_questions()}


def test_long_docstring_ends_at_a_paragraph_or_sentence():
    assert clean_answer("One.\n\n    " + "Two. " * 300) == "One."
    assert clean_answer("Word word. " * 200).endswith("word.")
    assert clean_answer("Do it.\n\n        Indented.\n    ") == "Do it.\n\nIndented."
