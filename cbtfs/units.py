"""Sizes, rates and durations: the numbers of cbtfs and how people write them.

Every quantity in this package is in bytes or in seconds; a name carries a suffix (``_ns``,
``_blocks``) only where it is something else. Sizes are binary: ``1K`` is 1024 bytes.
"""

import re

from . import errors

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

CBT_BLOCK = 64 * KiB
"""Granularity of changed block tracking: one bit of a bitmap (blktap, include/cbt-util.h)."""

SLOWEST = CBT_BLOCK
"""Bytes per second; a limit below it is a suffix forgotten: ``50`` for ``50M``."""

_SIZE = re.compile(r"([0-9]+)(\.[0-9]+)?\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTOR = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` (``4096``, ``64K``, ``1.5G``, ``2TiB``) means.

    Raises:
        UsageError: ``text`` is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise errors.UsageError(f"{text!r} is not a size; write for example 512M or 2G")
    factor = _FACTOR[match[3].upper()]
    return int(match[1]) * factor + int(float(match[2] or 0) * factor)


def parse_rate(text: str) -> int:
    """Return the bytes per second that ``text`` (``50M``, ``1.5G/s``) means; ``0`` is no limit.

    Raises:
        UsageError: ``text`` is not a rate, or one at which no disk would ever be copied.
    """
    try:
        rate = parse_size(text.strip().removesuffix("/s"))
    except errors.UsageError:
        raise errors.UsageError(f"{text!r} is not a rate; write for example 50M or 1G") from None
    if 0 < rate < SLOWEST:
        raise errors.UsageError(
            f"{text!r} is {format_rate(rate)}, less than one block a second; write for example 50M"
        )
    return rate


def parse_duration(text: str) -> float:
    """Return the seconds that ``text`` (``90s``, ``10m``, ``2h``, ``7d``, ``5ms``) means.

    Nothing, ``0``, needs no unit.

    Raises:
        UsageError: ``text`` is not a duration.
    """
    if text.strip() == "0":
        return 0.0
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise errors.UsageError(f"{text!r} is not a duration; write for example 90s, 10m or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def format_size(size: float) -> str:
    """Return ``size`` in bytes for people: ``0 B``, ``64 KiB``, ``1.2 GiB``."""
    value = float(size)
    larger = ["TiB", "GiB", "MiB", "KiB"]
    unit = "B"
    # rounded before compared, or 1023.9 KiB would be written 1024 KiB
    while larger and abs(_rounded(value, unit)) >= 1024:
        value /= 1024
        unit = larger.pop()
    value = _rounded(value, unit)
    return f"{value:.{0 if value.is_integer() else 1}f} {unit}"


def _rounded(value: float, unit: str) -> float:
    return round(value, 0 if unit == "B" or abs(value) >= 100 else 1)


def format_rate(rate: float) -> str:
    """Return ``rate`` in bytes per second for people: ``210 MiB/s``."""
    return f"{format_size(rate)}/s"


def format_duration(seconds: float) -> str:
    """Return ``seconds`` for people: ``0.4 s``, ``14 s``, ``2 m 05 s``, ``3 h 12 m``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
