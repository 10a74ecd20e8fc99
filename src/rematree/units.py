"""Bytes and seconds: the only place that knows what 1024 is.

Sizes print in powers of 1024 (KiB, MiB, GiB). Decimal units are accepted on input because cards are sold in them,
but a number without a unit is refused: nobody agrees on what "8" means.
"""

import math
import re
from fractions import Fraction
from typing import Final, NewType

from rematree.errors import UsageError

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)

_KIB: Final = 1024
_UNITS: Final[dict[str, int]] = {
    "b": 1,
    "kib": _KIB,
    "mib": _KIB**2,
    "gib": _KIB**3,
    "tib": _KIB**4,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
}
KIB: Final = Bytes(_KIB)
MIB: Final = Bytes(_KIB**2)
GIB: Final = Bytes(_KIB**3)

_SIZE: Final = re.compile(r"^\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]+)\s*$")
_LARGEST: Final = 2**63 - 1  # what an allocator can be asked for; a longer number is a slip of the hand
_MAX_DIGITS: Final = 40
_EXAMPLE: Final = 'write it with a unit, such as "14GiB", "900MiB" or "24GB"'


def parse_bytes(text: str | int) -> Bytes:
    """Number of bytes meant by `text`.

    Args:
        text: A number with a unit: B, KiB, MiB, GiB, TiB (powers of 1024) or KB, MB, GB, TB (powers of 1000), in any
            case. An `int` is taken as bytes.
    Returns:
        Whole bytes, rounded down, so that a parsed budget is never larger than the one written.
    Raises:
        UsageError: no unit, an unknown unit, not a number, negative, zero, or more than any address space.
    """
    if isinstance(text, bool):
        raise UsageError(f"size {text!r} is not a number of bytes; {_EXAMPLE}")
    if isinstance(text, int):
        return _within_limits(text, str(text))
    stripped = text.strip()
    shown = repr(text) if len(text) <= _MAX_DIGITS else repr(text[:_MAX_DIGITS]) + "..."
    if stripped.startswith("-"):
        raise UsageError(f"size {shown} is negative; {_EXAMPLE}")
    if re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", stripped):
        raise UsageError(f"size {shown} has no unit; {_EXAMPLE}")
    match = _SIZE.match(stripped)
    if match is None:
        raise UsageError(f"size {shown} is not a number with a unit; {_EXAMPLE}")
    number, unit = match.groups()
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise UsageError(f"size {shown} has an unknown unit {unit!r}; {_EXAMPLE}")
    whole, _, part = number.partition(".")
    if len(whole.lstrip("0")) > _MAX_DIGITS:
        raise UsageError(f"size {shown} is larger than any memory; {_EXAMPLE}")
    # Digits this far behind the point are below one byte in every unit; cut off, they round down.
    return _within_limits(math.floor(Fraction(f"{whole or 0}.{part[:_MAX_DIGITS] or 0}") * factor), shown)


def _within_limits(count: int, shown: str) -> Bytes:
    if count <= 0:
        raise UsageError(f"size {shown} is not positive; {_EXAMPLE}")
    if count > _LARGEST:
        raise UsageError(f"size {shown} is larger than any memory; {_EXAMPLE}")
    return Bytes(count)


def format_bytes(count: int) -> str:
    """`count` in the largest unit in which it does not round to below one: "1.50 GiB", "12.0 MiB", "512 B"."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size < KIB:
        return f"{sign}{size} B"
    # The unit is chosen by what is printed: one byte less than a GiB is "1.00 GiB", not "1024.0 MiB".
    for unit, name in ((KIB, "KiB"), (MIB, "MiB")):
        if round(size / unit, 1) < KIB:
            return f"{sign}{size / unit:.1f} {name}"
    return f"{sign}{size / GIB:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """`seconds` with three significant digits in s, ms or us: "12.3 s", "4.56 ms"."""
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        value = seconds * factor
        rounded = abs(float(f"{value:.3g}"))  # as it prints, so that 0.9996 s is "1 s" and not "1e+03 ms"
        if rounded >= 1 or unit == "us":
            return f"{value:.0f} {unit}" if rounded >= 100 else f"{value:.3g} {unit}"
    raise AssertionError("the last unit takes all")
