"""Sizes and times as people write and read them."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rematree.errors import UsageError
from rematree.units import GIB, KIB, MIB, format_bytes, format_seconds, parse_bytes

FACTORS = {
    "B": 1,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
}


def test_constants() -> None:
    assert (KIB, MIB, GIB) == (1024, 1_048_576, 1_073_741_824)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1B", 1),
        ("14GiB", 15_032_385_536),
        ("14 gib", 15_032_385_536),
        (" 900MiB\n", 943_718_400),
        ("24GB", 24_000_000_000),
        ("1.5KiB", 1536),
        (".5KiB", 512),
        ("2.KB", 2000),
        ("0.1GiB", 107_374_182),  # 107,374,182.4: down, never up
        ("0.9999999999999999999GB", 999_999_999),  # a float would make it 1 GB
        ("9007199254740993B", 2**53 + 1),  # no float has this value
        ("0" * 400 + "1KiB", 1024),
        ("1." + "0" * 5000 + "1KiB", 1024),
        ("9223372036854775807B", 2**63 - 1),
        (4096, 4096),
    ],
)
def test_parse(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "size '8' has no unit"),
        ("8.5", "size '8.5' has no unit"),
        ("8.", "size '8.' has no unit"),
        (".5", "size '.5' has no unit"),
        ("-8GiB", "size '-8GiB' is negative"),
        ("-8", "size '-8' is negative"),
        ("0GiB", "size '0GiB' is not positive"),
        ("0.4B", "size '0.4B' is not positive"),
        ("8GiBs", "size '8GiBs' has an unknown unit 'GiBs'"),
        ("8G", "size '8G' has an unknown unit 'G'"),
        ("GiB", "size 'GiB' is not a number with a unit"),
        ("8 GiB free", "size '8 GiB free' is not a number with a unit"),
        ("1e3MiB", "size '1e3MiB' is not a number with a unit"),
        ("1,5GiB", "size '1,5GiB' is not a number with a unit"),
        ("nanGiB", "size 'nanGiB' is not a number with a unit"),
        ("", "size '' is not a number with a unit"),
        (0, "size 0 is not positive"),
        (-1, "size -1 is not positive"),
        (True, "size True is not a number of bytes"),
    ],
)
def test_refused(text: str | int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert str(caught.value) == f'{message}; write it with a unit, such as "14GiB", "900MiB" or "24GB"'


@pytest.mark.parametrize("text", ["9223372036854775808B", "9" * 30 + "TiB", "1" * 400 + "GiB", "1" * 5000 + "B", 2**63])
def test_beyond_any_memory_is_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match=r"^size .{1,60} is larger than any memory; write it with a unit"):
        parse_bytes(text)


@given(
    st.integers(1, 4096),
    st.integers(0, 999),
    st.sampled_from(sorted(FACTORS)),
    st.sampled_from([str.lower, str.upper, str]),
    st.sampled_from(["", " "]),
)
def test_a_parsed_size_is_the_written_one_rounded_down(
    whole: int, part: int, unit: str, case: Callable[[str], str], gap: str
) -> None:
    written = Fraction(f"{whole}.{part:03}") * FACTORS[unit]
    parsed = parse_bytes(f"{whole}.{part:03}{gap}{case(unit)}")
    assert parsed == math.floor(written)


@given(st.text())
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        parsed = parse_bytes(text)
    except UsageError:
        return
    assert parsed > 0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (MIB - 1, "1.0 MiB"),
        (MIB - 52, "1023.9 KiB"),
        (GIB - 1, "1.00 GiB"),
        (GIB - MIB // 10, "1023.9 MiB"),
        (1 - GIB, "-1.00 GiB"),
        (12 * MIB, "12.0 MiB"),
        (GIB, "1.00 GiB"),
        (15_032_385_536, "14.00 GiB"),
        (2048 * GIB, "2048.00 GiB"),
        (-512, "-512 B"),
        (-3 * MIB // 2, "-1.5 MiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(1, 2**50))
def test_a_printed_size_parses_to_the_same_size_within_its_last_digit(num_bytes: int) -> None:
    unit, half_digit = next((u, h) for u, h in ((GIB, 0.005), (MIB, 0.05), (KIB, 0.05), (1, 0.0)) if num_bytes >= u)
    again = parse_bytes(format_bytes(num_bytes))
    assert abs(again - num_bytes) <= half_digit * unit + 1  # parsing rounds down to a byte


@given(st.integers(1, 1023), st.sampled_from([1, KIB, MIB, GIB]))
def test_whole_units_round_trip(count: int, unit: int) -> None:
    assert parse_bytes(format_bytes(count * unit)) == count * unit


@given(st.integers(-(2**50), 2**50))
def test_a_sign_only_adds_a_sign(num_bytes: int) -> None:
    assert format_bytes(-abs(num_bytes)).removeprefix("-") == format_bytes(abs(num_bytes))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 s"),
        (12.34, "12.3 s"),
        (1.0, "1 s"),
        (1234.5, "1234 s"),
        (0.00456, "4.56 ms"),
        (0.25, "250 ms"),
        (1.5e-5, "15 us"),
        (-0.25, "-250 ms"),
        (0.9996, "1 s"),
        (0.9994, "999 ms"),
        (0.0009996, "1 ms"),
        (999.7, "1000 s"),
        (99.96, "100 s"),
        (123456.0, "123456 s"),
        (2.5e-7, "0.25 us"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(1e-6, 1e6))
def test_seconds_have_three_digits_and_no_exponent(seconds: float) -> None:
    number, unit = format_seconds(seconds).split()
    assert "e" not in number
    scale = {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]
    assert float(number) * scale == pytest.approx(seconds, rel=0.0051)
    assert 1 <= float(number) <= 1000 or unit == "s"
