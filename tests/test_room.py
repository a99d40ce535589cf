"""Room: who waits for whom, and how many reads there are at most."""

import trio
import trio.testing

from cbtfs.room import STALLED, Place, Room

Clock = trio.testing.MockClock


class Takers:
    """Those who take places; ``since`` says when they were given one, in the order of keys."""

    def __init__(self, room: Room, nursery: trio.Nursery) -> None:
        self._room = room
        self._nursery = nursery
        self._places: list[tuple[str, float, Place]] = []

    @property
    def since(self) -> list[tuple[str, float]]:
        return sorted((key, begun) for key, begun, _ in self._places)

    async def take(self, *keys: str) -> None:
        """Have somebody want a place for each of ``keys``, and let them get as far as they do."""
        for key in keys:
            self._nursery.start_soon(self._take, key)
            await trio.testing.wait_all_tasks_blocked()

    async def _take(self, key: str) -> None:
        place = await self._room.take(key)
        self._places.append((key, trio.current_time(), place))

    async def leave(self, *keys: str) -> None:
        """Give back a place of each of ``keys``."""
        for key in keys:
            taken = next(taken for taken in self._places if taken[0] == key)
            self._places.remove(taken)
            self._room.leave(taken[2])
            await trio.testing.wait_all_tasks_blocked()


async def test_who_waits_gets_a_place_as_soon_as_one_is_left(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    takers = Takers(Room(2), nursery)
    await takers.take("a", "a", "b", "c")
    await trio.sleep(1)
    assert takers.since == [("a", 0), ("a", 0)]

    await takers.leave("a")

    assert takers.since == [("a", 0), ("b", 1)]


async def test_other_disks_do_not_wait_for_one_whose_reads_have_stalled(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    takers = Takers(Room(2), nursery)
    await takers.take("silent", "silent", "silent", "silent", "b", "c", "d")
    await trio.sleep(STALLED + 1)
    both = [("silent", 0), ("silent", 0)]
    assert takers.since == [("b", STALLED), ("c", STALLED), *both]

    await takers.leave("b")

    assert takers.since == [("c", STALLED), ("d", STALLED + 1), *both]


async def test_there_are_twice_as_many_places_at_most(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    takers = Takers(Room(2), nursery)
    await takers.take("a", "b", "c", "d", "e", "f")
    await trio.sleep(10 * STALLED)

    assert takers.since == [("a", 0), ("b", 0), ("c", STALLED), ("d", STALLED)]


async def test_a_disk_that_is_heard_of_again_has_places_as_before(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    takers = Takers(Room(2), nursery)
    await takers.take("silent", "silent", "silent", "b", "c")
    await trio.sleep(STALLED + 1)
    await takers.leave("silent", "b")
    assert takers.since == [("c", STALLED), ("silent", 0)]

    await takers.leave("silent")

    assert takers.since == [("c", STALLED), ("silent", STALLED + 1)]


async def test_when_all_is_well_again_there_are_as_many_places_as_in_the_beginning(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    takers = Takers(Room(2), nursery)
    await takers.take("a", "a", "b", "c")
    await trio.sleep(STALLED + 1)
    await takers.leave("a", "a", "b", "c")
    assert takers.since == []

    await takers.take("a", "b", "c")

    assert [key for key, _ in takers.since] == ["a", "b"]


async def test_who_gives_up_waiting_takes_nothing(autojump_clock: Clock) -> None:
    room = Room(1)
    place = await room.take("a")
    for _ in range(3):
        with trio.move_on_after(STALLED / 10):
            await room.take("a")
    room.leave(place)

    with trio.fail_after(0):
        await room.take("a")
