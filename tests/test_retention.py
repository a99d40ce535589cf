"""Which points stay: by the rules, and whatever the rules say."""

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings, strategies as st

from cbtfs import catalogue, errors, retention
from cbtfs.catalogue import DiskFailure, DiskPoint, Point, VMHistory
from cbtfs.retention import Facts, Keep, Verdict

VM = "00000000-0000-4000-8000-000000000001"
START = datetime(2026, 1, 1, tzinfo=UTC)


def disk(device: str = "xvda", *, vdi: str = "") -> DiskPoint:
    uuid = vdi or f"00000000-0000-4000-9000-{ord(device[-1]):012d}"
    return DiskPoint(device=device, file=f"{device}.raw", vdi_uuid=uuid, size=1)


def a_point(when: datetime, *disks: DiskPoint, failed: str = "") -> Point:
    failures = (DiskFailure(device=failed, vdi_uuid="x", error="?"),) if failed else ()
    return Point(
        time=catalogue.format_time(when),
        vm_uuid=VM,
        disks=disks or (disk(),),
        failures=failures,
        state="partial" if failed else "complete",
    )


def history(*points: Point) -> VMHistory:
    return catalogue.history_of(VM, points)


def every(step: timedelta, count: int, start: datetime = START) -> VMHistory:
    return history(*(a_point(start + step * number) for number in range(count)))


def kept(verdicts: list[Verdict]) -> list[str]:
    return [verdict.point.time for verdict in verdicts if verdict.kept]


def days(*numbers: int) -> list[str]:
    return [catalogue.format_time(START + timedelta(days=number)) for number in numbers]


# ── the rules ──


def test_last_keeps_the_newest() -> None:
    assert kept(retention.decide(every(timedelta(days=1), 10), Keep(last=3))) == days(7, 8, 9)


def test_daily_keeps_the_newest_of_each_day() -> None:
    found = retention.decide(every(timedelta(hours=6), 12), Keep(daily=2))

    assert kept(found) == ["20260102T180000Z", "20260103T180000Z"]
    assert found[-1].reasons == ("daily 1 of 2", "the newest")
    assert found[7].reasons == ("daily 2 of 2",)


def test_days_without_a_point_do_not_count() -> None:
    points = history(*(a_point(START + timedelta(days=n)) for n in (0, 1, 2, 60, 61)))

    assert kept(retention.decide(points, Keep(daily=4))) == days(1, 2, 60, 61)


def test_a_week_begins_on_monday_and_a_year_with_its_first_week() -> None:
    sunday, monday = datetime(2026, 1, 4, tzinfo=UTC), datetime(2026, 1, 5, tzinfo=UTC)
    new_year = datetime(2027, 1, 1, tzinfo=UTC)  # a Friday, of week 53 of 2026
    points = history(*map(a_point, (sunday, monday, new_year - timedelta(days=1), new_year)))

    assert kept(retention.decide(points, Keep(weekly=9))) == [
        "20260104T000000Z", "20260105T000000Z", "20270101T000000Z",
    ]  # fmt: skip


def test_a_point_may_have_several_reasons() -> None:
    (found,) = retention.decide(every(timedelta(days=1), 1), Keep(last=1, daily=1, yearly=5))

    assert found.reasons == ("last 1 of 1", "daily 1 of 1", "yearly 1 of 5", "the newest")


@pytest.mark.parametrize("keep", [Keep(), Keep(last=0, daily=0)])
def test_rules_that_keep_nothing_are_refused(keep: Keep) -> None:
    with pytest.raises(errors.UsageError, match="keeps nothing"):
        retention.decide(every(timedelta(days=1), 3), keep)


# ── whatever the rules say ──


def test_what_is_pinned_or_open_stays() -> None:
    facts = {days(1)[0]: Facts(pinned=True), days(2)[0]: Facts(open=True)}

    found = retention.decide(every(timedelta(days=1), 9), Keep(last=1), facts)

    assert kept(found) == days(1, 2, 8)
    assert (found[1].reasons, found[2].reasons) == (("pinned",), ("open",))


def test_a_damaged_point_takes_no_place_from_a_whole_one() -> None:
    facts = {days(8)[0]: Facts(damaged=frozenset({"xvda"}))}

    found = retention.decide(every(timedelta(days=1), 9), Keep(last=2), facts)

    assert kept(found) == days(6, 7, 8)
    assert found[7].reasons[0] == "last 1 of 2"
    assert found[8].reasons == ("the newest",)


def test_a_whole_point_stands_for_its_day_before_a_partial_one() -> None:
    morning, evening = START, START + timedelta(hours=12)
    points = history(
        a_point(morning), a_point(evening, failed="xvdb"), a_point(START + timedelta(days=1))
    )

    assert kept(retention.decide(points, Keep(daily=2))) == [
        "20260101T000000Z", "20260102T000000Z",
    ]  # fmt: skip


def test_the_newest_whole_image_of_each_disk_stays() -> None:
    facts = {days(3)[0]: Facts(damaged=frozenset({"xvda"}))}
    points = history(
        a_point(START, disk("xvda"), disk("xvdb")),
        a_point(START + timedelta(days=1), disk("xvda"), disk("xvdb")),
        a_point(START + timedelta(days=2), disk("xvda"), failed="xvdb"),
        a_point(START + timedelta(days=3), disk("xvda")),
    )

    found = retention.decide(points, Keep(last=1), facts)

    assert [verdict.reasons for verdict in found] == [
        (),
        ("last 1 of 1", "the newest whole image of xvdb", "the last that is whole"),
        ("the newest whole image of xvda",),
        ("the newest",),
    ]


# ── three years ──

HOURS = 3 * 365 * 24
RULES = st.builds(
    Keep,
    last=st.integers(0, 5),
    hourly=st.integers(0, 48),
    daily=st.integers(0, 31),
    weekly=st.integers(0, 9),
    monthly=st.integers(0, 40),
    yearly=st.integers(0, 5),
).filter(lambda keep: bool(keep.rules()))


def three_years(seed: int) -> tuple[VMHistory, dict[str, Facts]]:
    """Hourly points; some missed, doubled, partial, damaged or pinned, some of a wrong clock."""
    rng = random.Random(seed)
    points: dict[str, Point] = {}
    facts: dict[str, Facts] = {}
    hour = 0
    while hour < HOURS:
        hour += rng.choices((1, rng.randrange(2, 1000)), (0.995, 0.005))[0]
        skew = rng.choices((0, rng.randrange(-400 * 86400, 400 * 86400)), (0.99, 0.01))[0]
        for _ in range(1 + (rng.random() < 0.02)):
            when = START + timedelta(hours=hour, seconds=skew + rng.randrange(900))
            disks = [disk("xvda"), *([disk("xvdb")] if hour > 5000 else [])]
            point = a_point(when, *disks, failed="xvdc" if rng.random() < 0.01 else "")
            points[point.time] = point
            if rng.random() < 0.02:
                damaged = frozenset({"xvda"} if rng.random() < 0.5 else ())
                facts[point.time] = Facts(pinned=rng.random() < 0.3, damaged=damaged)
    return history(*points.values()), facts


_PERIODS: dict[str, Callable[[str], str]] = {
    "hourly": lambda time: time[:11],
    "daily": lambda time: time[:8],
    "weekly": lambda time: f"{catalogue.parse_time(time):%G %V}",
    "monthly": lambda time: time[:6],
    "yearly": lambda time: time[:4],
}
"""The periods, said in another way."""


@settings(max_examples=12, deadline=None)
@given(RULES, st.integers(0, 2**32))
def test_the_promises_hold_over_three_years(keep: Keep, seed: int) -> None:
    points, facts = three_years(seed)
    found = retention.decide(points, keep, facts)

    times = set(kept(found))
    good = {p.time for p in points.points if retention.is_good(p, facts.get(p.time, Facts()))}
    assert [verdict.point for verdict in found] == list(points.points)
    assert points.points[-1].time in times
    assert {time for time, known in facts.items() if known.pinned} <= times
    assert max(good, default="") in {*times, ""}
    for device in ("xvda", "xvdb"):
        whole = [
            p.time
            for p in points.points
            if p.disk(device) and device not in facts.get(p.time, Facts()).damaged
        ]
        assert not whole or whole[-1] in times
    assert set(sorted(good)[-keep.last :] if keep.last else ()) <= times
    for rule, period in _PERIODS.items():
        count = keep.rules().get(rule, 0)
        newest = sorted({period(p.time) for p in points.points})[-count:] if count else []
        for name in newest:
            of_period = {p.time for p in points.points if period(p.time) == name}
            best = max(of_period & good or of_period)
            assert best in times, (rule, name)
    # and nothing else stays but what was asked for, or spared
    limit = sum(keep.rules().values()) + sum(k.pinned for k in facts.values()) + 4
    assert len(times) <= limit


@settings(max_examples=12, deadline=None)
@given(RULES, st.integers(0, 2**32))
def test_what_was_kept_once_is_kept_again(keep: Keep, seed: int) -> None:
    points, facts = three_years(seed)
    first = kept(retention.decide(points, keep, facts))
    left = history(*(p for p in points.points if p.time in first))

    assert kept(retention.decide(left, keep, facts)) == first


@settings(max_examples=30, deadline=None)
@given(RULES, st.integers(0, 100), st.integers(1, 60))
def test_pruning_each_day_keeps_what_the_rules_ask_for(keep: Keep, seed: int, length: int) -> None:
    """Pruned as it grows, a history ends as it would if it were pruned once."""
    rng = random.Random(seed)
    whole: list[Point] = []
    left: list[Point] = []
    when = START
    for _ in range(length):
        when += timedelta(hours=rng.choice((1, 5, 24, 24, 24 * 8)))
        whole.append(a_point(when))
        left.append(a_point(when))
        stay = set(kept(retention.decide(history(*left), keep)))
        left = [point for point in left if point.time in stay]

    assert [p.time for p in left] == kept(retention.decide(history(*whole), keep))
