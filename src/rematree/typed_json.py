"""Decoded JSON as typed, frozen data: every value has the declared type, or the error names the place. And back.

`json.loads` gives whatever is in the file. A dataclass does not look at what it is given, and a wrong type would come
to light far away, in the executor.
"""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

_NAMES: Final[Mapping[type, str]] = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_MAX_SHOWN: Final = 40


def read_typed(kind: Any, value: Any, place: str) -> Any:
    """`value` as `kind`.

    Args:
        kind: int, float, str, bool, an enum, a dataclass (all its fields must be there), or made of these:
            `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `Mapping[str, X]`.
        value: What `json.loads` returned.
        place: Path of the value in the file, for the error.
    Raises:
        ValueError: says where, what was expected and what is there.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else read_typed(arguments[0], value, place)
    if origin is tuple:
        items = _expect(list, value, place)
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else arguments
        if len(items) != len(kinds):
            raise ValueError(f"{place}: expected {len(kinds)} values, found {len(items)}")
        return tuple(
            read_typed(each, item, f"{place}[{i}]") for i, (each, item) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is not None:
        entries = _expect(dict, value, place)
        return {name: read_typed(arguments[1], item, f"{place}[{name!r}]") for name, item in entries.items()}
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, place)
    if issubclass(kind, enum.Enum):
        if value not in [member.value for member in kind]:
            options = ", ".join(repr(member.value) for member in kind)
            raise ValueError(f"{place}: expected one of {options}, found {_shown(value)}")
        return kind(value)
    return _expect(kind, value, place)


def without_nan(value: Any) -> Any:
    """`value` with None for every float that JSON has no word for: a training that diverged has losses of these."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in cast(Sequence[Any], value)]
    return value


def _read_fields(kind: Any, value: Any, place: str) -> Any:
    entries = _expect(dict, value, place or "the file")
    prefix = f"{place}." if place else ""
    hints = typing.get_type_hints(kind)
    fields = [item.name for item in dataclasses.fields(kind)]
    for name in fields:
        if name not in entries:
            raise ValueError(f"there is no {prefix}{name}")
    for name in entries:
        if name not in fields:
            raise ValueError(f"unknown field {prefix}{name}")
    return kind(**{name: read_typed(hints[name], entries[name], prefix + name) for name in fields})


def _expect(kind: type, value: Any, place: str) -> Any:
    if kind is float and type(value) is int:
        value = _as_float(value)
    # Exactly the type: True is an int to isinstance. NaN and infinity are no JSON, but Python's reader takes them.
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{place}: expected {_NAMES[kind]}, found {_shown(value)}")
    return value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, dict)):
        return _NAMES[list if isinstance(value, list) else dict]
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
