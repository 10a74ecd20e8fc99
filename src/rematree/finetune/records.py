"""Read training examples from a JSONL file, a Hub data set or the built-in questions, as conversations."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from rematree.errors import UsageError

BUILTIN: Final = "builtin:stdlib-docstrings"
_EXPECTED: Final = (
    'expected one JSON object a line: {"prompt": "...", "completion": "..."}',
    'or {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
)
_FORMS: Final = (
    "--data train.jsonl",
    f"--data {BUILTIN}",
    "--data trl-lib/Capybara   (an id on the Hub; needs a network or a filled cache)",
)
_MAX_SHOWN: Final = 80
# What a chat template may put into a turn beside its content; without it another conversation would be trained on.
_NOT_READ: Final = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        key: What the held-out split goes by: records with equal keys are on the same side.
        messages: The turns; those of the assistant are trained on.
    """

    key: str
    messages: tuple[Message, ...]


def read_records(spec: str) -> list[Record]:
    """All examples that `spec` names, in their own order.

    Args:
        spec: Path of a .jsonl file, "builtin:stdlib-docstrings", or a Hub data set id.
    Raises:
        UsageError: there is no such data, it is empty, or a line of it is not an example; names the line.
    """
    if spec.startswith("builtin:"):
        return _read_builtin(spec)
    path = Path(spec).expanduser()
    if path.is_file():
        return _read_jsonl(path)
    if path.suffix in (".jsonl", ".json") or path.is_absolute() or spec.startswith((".", "~")) or path.is_dir():
        reason = f"{path} is a directory" if path.is_dir() else f"there is no file {path}"
        raise UsageError(f"data {spec!r} is not there", details=[reason], remedies=_FORMS)
    return _read_hub(spec)


def parse_record(row: Any) -> Record:
    """The example in one decoded row.

    Raises:
        ValueError: says what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a JSON {_kind(row)}, not an object")
    row = cast(Mapping[str, Any], row)
    if row.get("tools"):
        raise ValueError('"tools" is not read: a conversation is its messages')
    if "messages" in row:
        messages = _parse_messages(row["messages"])
    elif "prompt" in row and "completion" in row:
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str):
                raise ValueError(f'"{name}" is a {_kind(row[name])}, not a string')
        messages = (Message("user", row["prompt"]), Message("assistant", row["completion"]))
    else:
        names = ", ".join(f'"{name}"' for name in row) or "no fields"
        raise ValueError(f'an object with {names}, without "prompt" and "completion" or "messages"')
    text = json.dumps([[m.role, m.content] for m in messages], ensure_ascii=False)
    try:
        return Record(hashlib.sha256(text.encode("utf-8")).hexdigest(), messages)
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a character, {text[error.start]!a}, which no tokenizer takes") from error


def _parse_messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'"messages" is {"empty" if value == [] else f"a {_kind(value)}, not a list"}')
    messages: list[Message] = []
    for number, item in enumerate(cast(list[Any], value), 1):
        if not isinstance(item, Mapping):
            raise ValueError(f"message {number} is a {_kind(item)}, not an object")
        item = cast(Mapping[str, Any], item)
        for name in _NOT_READ:
            if item.get(name):
                raise ValueError(f'message {number} has "{name}", which is not read: a turn is role and content')
        for name in ("role", "content"):
            if not isinstance(item.get(name), str):
                raise ValueError(f'message {number} has no "{name}" that is a string')
        if item.get("weight", 1) not in (1, None):
            raise ValueError(f'message {number} has a "weight", which is not read: every answer is trained on')
        messages.append(Message(item["role"], item["content"]))
    if all(message.role != "assistant" for message in messages):
        raise ValueError('no message has the role "assistant", so there is nothing to train on')
    if messages[0].role == "assistant":
        raise ValueError('the first message has the role "assistant", so there is nothing to answer')
    return tuple(messages)


def _read_jsonl(path: Path) -> list[Record]:
    records: list[Record] = []
    # Lines end at \n only: str.splitlines would also cut at separators that JSON allows inside a string.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            records.append(parse_record(json.loads(raw)))
        except UnicodeDecodeError as error:
            raise _bad_line(path, number, raw, f"not UTF-8: {error.reason} at byte {error.start}") from error
        except json.JSONDecodeError as error:
            raise _bad_line(path, number, raw, f"not JSON: {error.msg} at column {error.colno}") from error
        except ValueError as error:
            raise _bad_line(path, number, raw, str(error)) from error
    if not records:
        raise UsageError(f"{path} is empty: no example in it", details=_EXPECTED)
    return records


def _bad_line(path: Path, number: int, raw: bytes, reason: str) -> UsageError:
    text = raw.decode("utf-8", "replace").strip()
    shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return UsageError(f"{path}, line {number}: {reason}", details=[f"there: {shown}", *_EXPECTED])


def _read_builtin(spec: str) -> list[Record]:
    from rematree.finetune.docstrings import stdlib_questions

    if spec != BUILTIN:
        raise UsageError(f"there is no built-in data set {spec!r}", remedies=[f"--data {BUILTIN}"])
    return [
        Record(item.name, (Message("user", item.prompt), Message("assistant", item.completion)))
        for item in stdlib_questions()
    ]


def _read_hub(spec: str) -> list[Record]:
    import datasets

    library: Any = datasets
    try:
        rows: Iterable[Any] = library.load_dataset(spec, split="train")
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"data {spec!r} is not there",
            details=[f"there is no such file here, and the Hub says: {reason}"],
            remedies=_FORMS,
        ) from error
    records: list[Record] = []
    for number, row in enumerate(rows, 1):
        try:
            records.append(parse_record(row))
        except ValueError as error:
            columns = "expected the columns prompt and completion (strings), or messages (role, content)"
            raise UsageError(f"data set {spec}, row {number}: {error}", details=[columns]) from error
    if not records:
        raise UsageError(f"data set {spec} is empty: no example in its train split")
    return records


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type[Any], str] = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    return names.get(cast(type[Any], type(value)), type(value).__name__)
