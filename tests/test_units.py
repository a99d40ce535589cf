"""People's sizes and durations, both ways."""

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors, units
from cbtfs.units import GiB, KiB, MiB, TiB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 64 * KiB),
        ("64k", 64 * KiB),
        ("1.5G", GiB * 3 // 2),
        ("2TiB", 2 * TiB),
        (" 512 MB ", 512 * MiB),
        ("7B", 7),
        ("9007199254740993", 9007199254740993),
        ("8191T", 8191 * TiB),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "-1", "1X", "K", "1 2", "1e3", "0x10", "½", "1..5M", "nan", "64Ki B", "٣K"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="not a size"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("50M", 50 * MiB), ("50M/s", 50 * MiB), ("1.5 GiB/s", 1.5 * GiB), ("64K", 64 * KiB), ("0", 0)],
)
def test_a_rate_is_a_size_with_or_without_per_second(text: str, rate: float) -> None:
    assert units.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "50M/h", "-1M", "/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match=r"not a rate; write for example 50M"):
        units.parse_rate(text)


def test_a_rate_whose_suffix_was_forgotten_is_refused() -> None:
    with pytest.raises(errors.UsageError, match=r"'50' is 50 B/s, less than one block a second"):
        units.parse_rate("50")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("5ms", 0.005),
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("7d", 604800),
        ("1.5 h", 5400),
    ],
)
def test_durations_have_a_unit(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "90", "s", "-1s", "1y", "1M", "٣s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(errors.UsageError, match="not a duration"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (64 * KiB, "64 KiB"),
        (1.2 * GiB, "1.2 GiB"),
        (100.4 * MiB, "100 MiB"),
        (16 * TiB, "16 TiB"),
        (5000 * TiB, "5000 TiB"),
        (-2 * KiB, "-2 KiB"),
        (MiB - 1, "1 MiB"),
        (1.97 * KiB, "2 KiB"),
        (1023.9 * GiB, "1 TiB"),
        (1234567 * TiB, "1234567 TiB"),
    ],
)
def test_sizes_are_written_for_people(size: float, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_a_size_for_people_is_near_the_truth_and_short(size: int) -> None:
    text = units.format_size(size)
    number, _, unit = text.partition(" ")

    assert units.parse_size(text) == pytest.approx(size, rel=0.06)
    assert unit == "TiB" or float(number) < 1024


def test_a_rate_is_a_size_per_second() -> None:
    assert units.format_rate(210 * MiB) == "210 MiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (14.2, "14 s"),
        (59.7, "1 m 00 s"),
        (125, "2 m 05 s"),
        (3599.6, "1 h 00 m"),
        (11520, "3 h 12 m"),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text
