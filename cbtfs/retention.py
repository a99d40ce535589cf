"""Retention: which restore points of a VM are kept, and by which rule each of them.

A rule says how many periods it covers: ``daily = 7`` keeps the newest point of each of the last
seven days that have one. Days without a point do not count, so that a machine that was off for a
month does not lose what it had. Periods are of UTC; a week begins on Monday (ISO 8601)::

    points    1  2     3        4  5        6 now
    day       |--Mon--|--Tue--|--Wed--|--Thu--|
    daily=2                         5        6            newest of Wed, newest of Thu
    last=3                       4  5        6
    removed   1  2     3

Whatever the rules say, these stay: the newest point; the newest whole image of every disk, which is
the base of its next increment, and may be its only copy; what is pinned; what is open.

Pure: no clock is asked, so that a clock that was wrong can only have given points odd names. One
from the future counts as any other.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Annotated

import msgspec

from . import catalogue, errors
from .catalogue import Point, VMHistory

_PERIODS: Mapping[str, Callable[[datetime], tuple[int, ...]]] = MappingProxyType(
    {
        "hourly": lambda time: (time.year, time.month, time.day, time.hour),
        "daily": lambda time: (time.year, time.month, time.day),
        "weekly": lambda time: tuple(time.isocalendar())[:2],
        "monthly": lambda time: (time.year, time.month),
        "yearly": lambda time: (time.year,),
    }
)
"""Rules but ``last``, with what two points of one period have in common."""


_Count = Annotated[int, msgspec.Meta(ge=0)]


class Keep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules: ``keep = { … }`` of a job, each with its number; 0 is no rule.

    Attributes:
        last: points, whatever their age.
        hourly, daily, weekly, monthly, yearly: periods that have a point.
    """

    last: _Count = 0
    hourly: _Count = 0
    daily: _Count = 0
    weekly: _Count = 0
    monthly: _Count = 0
    yearly: _Count = 0

    def rules(self) -> dict[str, int]:
        """Return the rules that there are, by name."""
        counts = {field: int(getattr(self, field)) for field in self.__struct_fields__}
        return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a point beside its record.

    Attributes:
        pinned: whether somebody wants to keep it.
        open: whether somebody reads one of its images.
        damaged: devices of which an image is known not to be whole.
    """

    pinned: bool = False
    open: bool = False
    damaged: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a point: it is kept for ``reasons``; without any it is removed."""

    point: Point
    reasons: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether the point stays."""
        return bool(self.reasons)


def check(keep: Keep) -> None:
    """Raise UsageError for a policy that keeps nothing by itself."""
    if not keep.rules():
        raise errors.UsageError(
            "this retention keeps nothing; say how many restore points to keep,"
            " for example keep = { last = 3, daily = 7 }"
        )


def most(keeps: Sequence[Keep | None]) -> Keep | None:
    """Return rules that keep what any of ``keeps`` does; None keeps all."""
    rules = [keep.rules() for keep in keeps if keep is not None]
    if len(rules) < len(keeps):
        return None
    return Keep(**{name: max(r.get(name, 0) for r in rules) for r in rules for name in r})


def decide(
    history: VMHistory, keep: Keep, facts: Mapping[str, Facts] | None = None
) -> list[Verdict]:
    """Return a verdict on every point of a VM, oldest first.

    Args:
        history: all points of the VM that are listed.
        keep: the rules.
        facts: what else is known of points, by time.

    Raises:
        UsageError: the policy keeps nothing.
    """
    check(keep)
    known = facts or {}
    reasons: dict[str, list[str]] = {point.time: [] for point in history.points}
    newest_first = history.points[::-1]
    good = [p for p in newest_first if is_good(p, known.get(p.time, Facts()))]

    for number, point in enumerate(good[: keep.last], start=1):
        reasons[point.time].append(f"last {number} of {keep.last}")
    when = {point.time: catalogue.parse_time(point.time) for point in history.points}
    for rule, count in keep.rules().items():
        if rule in _PERIODS:
            period = {time: _PERIODS[rule](at) for time, at in when.items()}
            for number, point in enumerate(_newest(newest_first, good, period)[:count], start=1):
                reasons[point.time].append(f"{rule} {number} of {count}")
    for time, why in _spared(newest_first, known):
        reasons[time].append(why)
    return [Verdict(point, tuple(reasons[point.time])) for point in history.points]


def is_good(point: Point, facts: Facts) -> bool:
    """Tell whether a point has all disks of its VM, all of them whole as far as is known."""
    return point.state == "complete" and not point.failures and not facts.damaged


def _newest(
    newest_first: Sequence[Point], good: Collection[Point], period: Mapping[str, tuple[int, ...]]
) -> list[Point]:
    """Return the newest good point of each period, newest first; of one without any, the newest.

    ``period`` tells for each time in which one it is.
    """
    chosen: dict[tuple[int, ...], Point] = {}
    times = {point.time for point in good}
    for point in newest_first:
        key = period[point.time]
        held = chosen.get(key)
        if held is None or (held.time not in times and point.time in times):
            chosen[key] = point
    # by period: a good point may stand in for a newer one of the same day, but not of another
    return [chosen[key] for key in sorted(chosen, reverse=True)]


def _spared(newest_first: Sequence[Point], facts: Mapping[str, Facts]) -> Iterable[tuple[str, str]]:
    """Yield the time of each point that no rule may remove, and why."""
    seen: set[str] = set()
    for index, point in enumerate(newest_first):
        known = facts.get(point.time, Facts())
        if not index:
            yield point.time, "the newest"
        if known.pinned:
            yield point.time, "pinned"
        if known.open:
            yield point.time, "open"
        whole = {d.vdi_uuid: d.device for d in point.disks if d.device not in known.damaged}
        for uuid in whole.keys() - seen if index else ():
            yield point.time, f"the newest whole image of {whole[uuid]}"
        seen |= whole.keys()
    last_good = next((p for p in newest_first if is_good(p, facts.get(p.time, Facts()))), None)
    if last_good is not None and last_good is not newest_first[0]:
        yield last_good.time, "the last that is whole"
