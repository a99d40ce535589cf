"""Tests of cbtfs.connections: one connection per VDI, bounded, closed in good order."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

import cbtfs.connections
from cbtfs import errors
from cbtfs.connections import Connections
from tests import memory
from tests.memory import MemoryExport, MemoryPool


@dataclass
class GatedPool(MemoryPool):
    """A pool whose connections take until ``gate`` is open, to open and to close."""

    gate: trio.Event = field(default_factory=trio.Event)
    refusal: str = ""

    @asynccontextmanager
    async def open_export(self, vdi_ref: str) -> AsyncGenerator[MemoryExport, None]:
        await self.gate.wait()
        if self.refusal:
            raise errors.ExportLost(self.refusal)
        async with super().open_export(vdi_ref) as export:
            yield export
            await self.gate.wait()


REFS = ["a", "b", "c", "d"]


@pytest.fixture
def pool() -> GatedPool:
    pool = GatedPool({ref: bytearray(ref.encode() * 8) for ref in REFS})
    pool.gate.set()
    return pool


@pytest.fixture
async def connections(pool: GatedPool) -> AsyncIterator[Connections]:
    async with trio.open_nursery() as nursery:
        connections = Connections(pool, nursery, limit=2)
        yield connections
        pool.gate.set()
        await connections.close_all()


async def read(connections: Connections, ref: str) -> bytes:
    buffer = bytearray(4)
    async with connections.use(ref) as use:
        await use.read_into(buffer, 0)
    return bytes(buffer)


async def test_one_connection_serves_all_reads(pool: GatedPool, connections: Connections) -> None:
    for _ in range(3):
        assert await read(connections, "a") == b"aaaa"

    assert pool.opened == {"a": 1}
    assert pool.open_now == {"a"}


async def test_many_first_reads_make_one_connection(
    pool: GatedPool, connections: Connections
) -> None:
    pool.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(read, connections, "a")
        await trio.testing.wait_all_tasks_blocked()
        pool.gate.set()

    assert pool.opened == {"a": 1}


async def test_close_returns_when_the_host_is_done(
    pool: GatedPool, connections: Connections
) -> None:
    await read(connections, "a")
    await connections.close("a")
    await connections.close("a")

    assert pool.open_now == set()
    assert await read(connections, "a") == b"aaaa"


async def test_the_longest_idle_gives_way(
    pool: GatedPool, connections: Connections, autojump_clock: trio.abc.Clock
) -> None:
    for ref in ("a", "b", "a", "c"):
        await read(connections, ref)
        await trio.sleep(1)

    assert pool.open_now == {"a", "c"}
    assert pool.most_open == 2


async def test_a_busy_connection_is_waited_for(pool: GatedPool, connections: Connections) -> None:
    pool.stop()
    async with trio.open_nursery() as nursery:
        for ref in ("a", "b", "c"):
            nursery.start_soon(read, connections, ref)
            await trio.testing.wait_all_tasks_blocked()
        assert pool.open_now == {"a", "b"}
        pool.go()

    assert "c" in pool.open_now
    assert pool.most_open == 2


async def test_who_is_always_busy_gives_way_after_a_turn(
    pool: GatedPool, connections: Connections, autojump_clock: trio.abc.Clock
) -> None:
    """Also when all that a busy one does overlaps; it goes on when its turn comes again."""
    over = trio.Event()
    served: list[str] = []
    for ref in REFS:
        connections.want(ref)

    async def reader(ref: str) -> None:
        while not over.is_set():
            assert await read(connections, ref) == ref.encode() * 4
            served.append(ref)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for ref in ("a", "b", "c", "d"):
            for _ in range(3):
                nursery.start_soon(reader, ref)
        await trio.sleep(10 * cbtfs.connections.TURN)
        over.set()

    assert pool.most_open == 2
    assert min(served.count(ref) for ref in "abcd") > len(served) / 8
    assert all(2 <= pool.opened[ref] <= 6 for ref in "abcd")


async def test_a_reader_in_order_keeps_its_connection_between_two_reads(
    pool: GatedPool, connections: Connections, autojump_clock: trio.abc.Clock
) -> None:
    async def reader(ref: str) -> None:
        connections.want(ref)
        for _ in range(20):
            await read(connections, ref)
            await trio.sleep(0.1)
        connections.leave(ref)

    async with trio.open_nursery() as nursery:
        for ref in REFS:
            nursery.start_soon(reader, ref)

    assert all(pool.opened[ref] == 1 for ref in REFS)


async def busy(connections: Connections, *, readers: int, reads: int) -> None:
    """Read one VDI, by several readers at a time, each again and again."""

    async def reader() -> None:
        for _ in range(reads):
            await read(connections, "a")

    async with trio.open_nursery() as nursery:
        for _ in range(readers):
            nursery.start_soon(reader)


async def test_a_slow_connection_that_is_never_idle_gets_help(
    pool: GatedPool, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    await busy(connections, readers=3, reads=12)
    assert pool.opened == {"a": 1}
    monkeypatch.setattr(cbtfs.connections, "WORK", 8)

    await busy(connections, readers=3, reads=12)

    assert pool.opened == {"a": 2}  # as many as there may be


async def test_one_that_is_idle_at_times_or_fast_stays_alone(
    pool: GatedPool, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cbtfs.connections, "WORK", 8)
    await busy(connections, readers=1, reads=100)
    monkeypatch.setattr(cbtfs.connections, "FAST", 1)
    await busy(connections, readers=3, reads=100)

    assert pool.opened == {"a": 1}


async def test_a_lost_connection_is_not_used_again(
    pool: GatedPool, connections: Connections
) -> None:
    pool.lost.append("gone")

    with pytest.raises(errors.ExportLost):
        await read(connections, "a")

    assert await read(connections, "a") == b"aaaa"
    assert pool.opened == {"a": 2}


async def test_a_connection_that_cannot_be_made_tells_why_each_time(
    connections: Connections,
) -> None:
    for _ in range(2):
        with pytest.raises(errors.PoolError, match="no VDI nothing"):
            await read(connections, "nothing")


async def test_one_that_was_refused_is_not_called_lost(
    pool: GatedPool, connections: Connections
) -> None:
    pool.refusal = "no host let us connect"

    with pytest.raises(errors.ExportError, match="no host") as caught:
        await read(connections, "a")
    assert not isinstance(caught.value, errors.ExportLost)


async def test_one_made_for_a_cancelled_reader_serves_the_next(
    pool: GatedPool, connections: Connections
) -> None:
    pool.gate = trio.Event()
    with trio.move_on_after(0):
        await read(connections, "a")
    pool.gate.set()

    assert await read(connections, "a") == b"aaaa"
    assert pool.opened == {"a": 1}


async def test_closing_gives_up_what_was_not_yet_made(
    pool: GatedPool, connections: Connections
) -> None:
    pool.gate = trio.Event()
    with trio.move_on_after(0):
        await read(connections, "a")

    await connections.close_all()

    assert pool.opened == {}
    assert repr(connections) == "<Connections 0 of 2, 0 busy>"


async def test_a_host_that_never_lets_go_is_left(
    pool: GatedPool, connections: Connections, autojump_clock: trio.abc.Clock
) -> None:
    await read(connections, "a")
    pool.gate = trio.Event()

    await connections.close("a")
    await trio.testing.wait_all_tasks_blocked()

    assert pool.open_now == set()


def test_the_pool_in_memory_counts() -> None:
    assert memory.filled(8192)[:4096] != memory.filled(8192)[4096:]
