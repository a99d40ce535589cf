"""A rate is kept over time, by all who share it, and by those who give up."""

import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from cbtfs import rate
from cbtfs.rate import Rate

MB = 10**6


async def elapsed(shared: Rate, counts: list[int]) -> float:
    begun = trio.current_time()
    for count in counts:
        await shared.take(count)
    return trio.current_time() - begun


@pytest.mark.parametrize("count", [10_000, 100_000, 5 * MB])
async def test_a_rate_is_kept(count: int, autojump_clock: MockClock) -> None:
    took = await elapsed(Rate(MB), [count] * (20 * MB // count))

    assert 20 - rate.BURST <= took <= 20


async def test_the_first_bytes_go_at_once(autojump_clock: MockClock) -> None:
    shared = Rate(MB)

    assert await elapsed(shared, [shared.step]) == 0


async def test_a_pause_earns_no_more_than_a_burst(autojump_clock: MockClock) -> None:
    shared = Rate(MB)
    await shared.take(MB)
    await trio.sleep(3600)

    took = await elapsed(shared, [10_000] * 100)

    assert took >= 1 - rate.BURST


@given(st.lists(st.integers(1, 3 * MB), min_size=1, max_size=50))
@settings(deadline=None)
def test_no_second_sees_more_than_the_rate_and_a_burst(counts: list[int]) -> None:
    gone: list[tuple[float, int]] = []

    async def main() -> None:
        shared = Rate(MB)
        for count in counts:
            await shared.take(count)
            gone.append((trio.current_time(), count))

    trio.run(main, clock=MockClock(autojump_threshold=0))
    for begin in range(len(gone)):
        since = gone[begin][0]
        passed = sum(count for at, count in gone[begin + 1 :] if at <= since + 1)
        assert passed <= MB * (1 + rate.BURST) + 1


async def test_those_who_share_a_rate_get_the_same(autojump_clock: MockClock) -> None:
    shared = Rate(MB)
    got = [0, 0, 0]

    async def reader(number: int) -> None:
        while True:
            await shared.take(50_000)
            got[number] += 50_000

    with trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(reader, number)

    assert max(got) - min(got) <= 50_000
    assert sum(got) == pytest.approx(60 * MB, rel=0.02)


async def test_who_gives_up_has_taken_nothing(autojump_clock: MockClock) -> None:
    shared = Rate(MB)
    await shared.take(MB)

    with trio.move_on_after(1):
        await shared.take(1000 * MB)
    took = await elapsed(shared, [MB])

    assert took <= 1


@pytest.mark.parametrize("nothing", [0, -1])
def test_a_rate_of_nothing_is_none(nothing: int) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Rate(nothing)


def test_a_rate_tells_what_it_is() -> None:
    assert repr(Rate(200 << 20)) == "<Rate 200 MiB/s>"
