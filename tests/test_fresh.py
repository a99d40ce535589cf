"""Who gets which reading, when several ask at the same time."""

import pytest
import trio
import trio.testing

from cbtfs import errors
from cbtfs.fresh import Fresh


class Slow:
    """Readings that end when told to; each gives its number, or fails."""

    def __init__(self) -> None:
        self.begun = 0
        self.fail = False
        self._ends = trio.Semaphore(0)
        self.fresh = Fresh(self._read)
        self.results: list[tuple[str, int]] = []

    async def _read(self) -> int:
        self.begun += 1
        number = self.begun
        await self._ends.acquire()
        if self.fail:
            raise errors.PoolUnreachable(f"reading {number}")
        return number

    async def ask(self, name: str) -> None:
        try:
            self.results.append((name, await self.fresh.get()))
        except errors.PoolUnreachable as exc:
            self.results.append((f"{name}: {exc}", 0))

    async def asked(self, nursery: trio.Nursery, *names: str) -> None:
        """Start asking and return when all wait."""
        for name in names:
            nursery.start_soon(self.ask, name)
            await trio.testing.wait_all_tasks_blocked()

    async def end_one(self) -> None:
        """End one reading; return when those who wait for it have it."""
        self._ends.release()
        await trio.testing.wait_all_tasks_blocked()


async def test_who_asks_during_a_reading_shares_the_next_one() -> None:
    slow = Slow()
    async with trio.open_nursery() as nursery:
        await slow.asked(nursery, "a", "b", "c")
        await slow.end_one()
        await slow.end_one()

    assert slow.results == [("a", 1), ("b", 2), ("c", 2)]


async def test_who_asks_later_gets_a_later_reading() -> None:
    slow = Slow()
    async with trio.open_nursery() as nursery:
        await slow.asked(nursery, "a")
        await slow.end_one()
        await slow.asked(nursery, "b")
        await slow.end_one()

    assert slow.results == [("a", 1), ("b", 2)]


async def test_who_shares_a_reading_shares_its_failure() -> None:
    slow = Slow()
    slow.fail = True
    async with trio.open_nursery() as nursery:
        await slow.asked(nursery, "a", "b", "c")
        await slow.end_one()
        await slow.end_one()

    assert [name for name, _ in slow.results] == ["a: reading 1", "b: reading 2", "c: reading 2"]


async def test_after_a_failure_it_is_read_again() -> None:
    slow = Slow()
    slow.fail = True
    async with trio.open_nursery() as nursery:
        await slow.asked(nursery, "a")
        await slow.end_one()
        slow.fail = False
        await slow.asked(nursery, "b")
        await slow.end_one()

    assert slow.results[1] == ("b", 2)


async def test_a_reading_that_is_cancelled_is_begun_again_by_the_next() -> None:
    slow = Slow()
    async with trio.open_nursery() as nursery:
        await slow.asked(nursery, "a")
        with trio.CancelScope() as impatient:
            async with trio.open_nursery() as inner:
                await slow.asked(inner, "b")
                await slow.end_one()  # b reads now
                nursery.start_soon(slow.ask, "c")
                await trio.testing.wait_all_tasks_blocked()
                impatient.cancel()
        await trio.testing.wait_all_tasks_blocked()
        await slow.end_one()

    assert slow.results == [("a", 1), ("c", 3)]


async def test_nothing_is_kept_when_nobody_waits() -> None:
    slow = Slow()
    async with trio.open_nursery() as nursery:
        await slow.asked(nursery, "a", "b")
        await slow.end_one()
        await slow.end_one()

    assert slow.fresh._value is None
    with pytest.raises(trio.WouldBlock):
        slow._ends.acquire_nowait()
