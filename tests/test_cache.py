"""Tests of cbtfs.cache: one fetch per chunk, bounded memory, no way to hang or to lose a reader."""

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from cbtfs import cache, errors
from cbtfs.cache import Cache

CHUNK = 16


@dataclass
class SlowReader:
    """A reader that answers when ``gate`` is open, and notes what it was asked."""

    key: str = "disk"
    data: bytes = bytes(range(100))
    asked: list[tuple[int, int]] = field(default_factory=list)
    gate: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None

    @property
    def size(self) -> int:
        return len(self.data)

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        self.asked.append((offset, len(buffer)))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        buffer[:] = self.data[offset : offset + len(buffer)]


@pytest.fixture
def reader() -> SlowReader:
    reader = SlowReader()
    reader.gate.set()
    return reader


def small(*, chunks: int = 4) -> Cache:
    return Cache(limit=chunks * CHUNK, chunk=CHUNK)


@pytest.mark.parametrize(
    ("offset", "length", "asked"),
    [
        (0, 16, [(0, 16)]),
        (3, 5, [(0, 16)]),
        (15, 2, [(0, 16), (16, 16)]),
        (20, 40, [(16, 16), (32, 16), (48, 16)]),
        (90, 10, [(80, 16), (96, 4)]),
        (98, 50, [(96, 4)]),
        (100, 1, []),
        (500, 10, []),
        (5, 0, []),
    ],
)
async def test_a_read_fetches_the_chunks_it_touches(
    reader: SlowReader, offset: int, length: int, asked: list[tuple[int, int]]
) -> None:
    data = await small().read(reader, offset=offset, length=length)

    assert bytes(data) == reader.data[offset : offset + length]
    assert reader.asked == asked


async def test_the_second_read_of_a_chunk_asks_nobody(reader: SlowReader) -> None:
    chunks = small()
    await chunks.read(reader, offset=0, length=4)

    assert bytes(await chunks.read(reader, offset=4, length=8)) == reader.data[4:12]
    assert reader.asked == [(0, 16)]


async def test_readers_of_one_key_share_chunks_and_others_do_not(reader: SlowReader) -> None:
    other = SlowReader(key="other", data=bytes(100), gate=reader.gate)
    chunks = small()
    await chunks.read(reader, offset=0, length=1)

    assert bytes(await chunks.read(other, offset=0, length=1)) == b"\0"
    assert await chunks.read(SlowReader(), offset=0, length=1) == b"\0"
    assert other.asked == [(0, 16)]


async def test_many_who_wait_for_one_chunk_make_one_fetch() -> None:
    reader, chunks, got = SlowReader(), small(), list[bytes]()

    async def read() -> None:
        got.append(bytes(await chunks.read(reader, offset=2, length=3)))

    async with trio.open_nursery() as nursery:
        for _ in range(64):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        reader.gate.set()

    assert got == [reader.data[2:5]] * 64
    assert reader.asked == [(0, 16)]


async def test_a_waiter_takes_over_from_a_cancelled_fetch() -> None:
    reader, chunks, got = SlowReader(), small(), list[bytes]()

    async def read(scope: trio.CancelScope) -> None:
        with scope:
            got.append(bytes(await chunks.read(reader, offset=0, length=3)))

    async with trio.open_nursery() as nursery:
        first = trio.CancelScope()
        nursery.start_soon(read, first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(read, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        reader.gate.set()

    assert got == [reader.data[:3]]
    assert reader.asked == [(0, 16), (0, 16)]


async def test_all_who_wait_for_a_failing_fetch_fail_and_the_next_tries_again() -> None:
    reader, chunks, failed = SlowReader(error=errors.ExportError("no")), small(), list[str]()

    async def read() -> None:
        try:
            await chunks.read(reader, offset=0, length=3)
        except errors.ExportError as error:
            failed.append(str(error))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        reader.gate.set()
    reader.error = None

    assert failed == ["no"] * 3
    assert bytes(await chunks.read(reader, offset=0, length=3)) == reader.data[:3]
    assert len(reader.asked) == 2


async def test_what_was_used_last_stays(reader: SlowReader) -> None:
    chunks = small(chunks=2)
    for offset in (0, 16, 0, 32):
        await chunks.read(reader, offset=offset, length=1)
    reader.asked.clear()

    await chunks.read(reader, offset=0, length=1)
    assert reader.asked == []
    await chunks.read(reader, offset=16, length=1)
    assert reader.asked == [(16, 16)]


async def test_no_more_than_the_limit_is_kept(reader: SlowReader) -> None:
    chunks = small(chunks=3)

    for offset in range(0, 100, CHUNK):
        await chunks.read(reader, offset=offset, length=1)
        assert chunks.kept <= 3 * CHUNK

    assert chunks.kept == 2 * CHUNK + 4  # the last chunk is short
    assert repr(chunks) == "<Cache 36 B of 48 B, 0 on their way>"


async def test_a_cache_too_small_for_a_chunk_still_reads(reader: SlowReader) -> None:
    chunks = Cache(limit=1, chunk=CHUNK)

    assert bytes(await chunks.read(reader, offset=10, length=30)) == reader.data[10:40]
    assert chunks.kept == 0


async def test_fetches_on_their_way_are_bounded() -> None:
    reader = SlowReader(data=bytes(CHUNK * 100))
    chunks = small(chunks=200)

    async with trio.open_nursery() as nursery:
        for index in range(100):
            nursery.start_soon(read_at, chunks, reader, index * CHUNK)
        await trio.testing.wait_all_tasks_blocked()
        asked = len(reader.asked)
        reader.gate.set()

    assert asked == cache.FETCHES
    assert len(reader.asked) == 100


async def read_at(chunks: Cache, reader: SlowReader, offset: int) -> None:
    await chunks.read(reader, offset=offset, length=1)


async def test_what_a_read_returned_cannot_be_written_to(reader: SlowReader) -> None:
    data = await small().read(reader, offset=0, length=4)

    assert isinstance(data, memoryview)
    assert data.readonly
