"""Tests of cbtfs.cache: one fetch per chunk, bounded memory, no way to hang or to lose a reader."""

import errno
import mmap
import os
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from cbtfs import cache, errors, readahead, room
from cbtfs.cache import Cache, open_cache
from cbtfs.extents import Extent
from cbtfs.readahead import Streams

CHUNK = 16


@dataclass
class SlowReader:
    """A reader that answers when ``gate`` is open, and notes what it was asked."""

    key: str = "disk"
    data: bytes = bytes(range(100))
    asked: list[tuple[int, int]] = field(default_factory=list)
    gate: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None
    holes: tuple[Extent, ...] = ()

    def is_hole(self, wanted: Extent) -> bool:
        return any(hole.start <= wanted.start <= wanted.stop <= hole.stop for hole in self.holes)

    @property
    def size(self) -> int:
        return len(self.data)

    async def recovers(self, error: Exception, *, failures: int) -> bool:
        return False

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator["SlowReader"]:
        yield self

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


def small(nursery: trio.Nursery, *, chunks: int = 4) -> Cache:
    return Cache(nursery, limit=chunks * CHUNK, chunk=CHUNK, grain=CHUNK)


def fine(nursery: trio.Nursery, *, chunks: int = 8) -> Cache:
    """A cache whose chunks have four grains."""
    return Cache(nursery, limit=chunks * CHUNK, chunk=CHUNK, grain=CHUNK // 4)


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
    reader: SlowReader,
    offset: int,
    length: int,
    asked: list[tuple[int, int]],
    nursery: trio.Nursery,
) -> None:
    data = await small(nursery).read(reader, offset=offset, length=length)

    assert bytes(data) == reader.data[offset : offset + length]
    assert reader.asked == asked


async def test_the_second_read_of_a_chunk_asks_nobody(
    reader: SlowReader, nursery: trio.Nursery
) -> None:
    chunks = small(nursery)
    await chunks.read(reader, offset=0, length=4)

    assert bytes(await chunks.read(reader, offset=4, length=8)) == reader.data[4:12]
    assert reader.asked == [(0, 16)]


async def test_who_reads_all_of_a_disk_leaves_the_chunks_of_others(nursery: trio.Nursery) -> None:
    disk, other = SlowReader(data=bytes(640)), SlowReader(key="other")
    disk.gate.set()
    other.gate.set()
    chunks = small(nursery, chunks=8)
    for at in (0, 16, 32):
        await chunks.read(other, offset=at, length=4)
    before = list(other.asked)

    streams = Streams(640, most=32)
    for at in range(0, 640, 16):
        await chunks.read(disk, offset=at, length=16, streams=streams)
    for at in (0, 16, 32):
        await chunks.read(other, offset=at, length=4)

    assert other.asked == before
    assert len(disk.asked) == 40


async def test_holes_are_not_fetched(nursery: trio.Nursery) -> None:
    data = bytes(range(32)) + bytes(48) + bytes(range(20))
    reader = SlowReader(data=data, holes=(Extent(32, 80),))
    reader.gate.set()
    chunks, streams = small(nursery, chunks=16), Streams(100, most=64)

    found = [
        bytes(await chunks.read(reader, offset=at, length=8, streams=streams))
        for at in range(0, 100, 8)
    ]
    across = bytes(await chunks.read(reader, offset=10, length=80))
    looked = chunks.look(reader, offset=50, length=10)

    assert b"".join(found) == data
    assert across == data[10:90]
    assert looked is not None
    assert bytes(looked) == bytes(10)
    assert sorted(reader.asked) == [(0, 16), (16, 16), (80, 16), (96, 4)]


async def test_readers_of_one_key_share_chunks_and_others_do_not(
    reader: SlowReader, nursery: trio.Nursery
) -> None:
    other = SlowReader(key="other", data=bytes(100), gate=reader.gate)
    chunks = small(nursery)
    await chunks.read(reader, offset=0, length=1)

    assert bytes(await chunks.read(other, offset=0, length=1)) == b"\0"
    assert await chunks.read(SlowReader(), offset=0, length=1) == b"\0"
    assert other.asked == [(0, 16)]


async def test_many_who_wait_for_one_chunk_make_one_fetch(nursery: trio.Nursery) -> None:
    reader, chunks, got = SlowReader(), small(nursery), list[bytes]()

    async def read() -> None:
        got.append(bytes(await chunks.read(reader, offset=2, length=3)))

    async with trio.open_nursery() as readers:
        for _ in range(64):
            readers.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        reader.gate.set()

    assert got == [reader.data[2:5]] * 64
    assert reader.asked == [(0, 16)]


async def test_a_waiter_takes_over_from_a_cancelled_fetch(nursery: trio.Nursery) -> None:
    reader, chunks, got = SlowReader(), small(nursery), list[bytes]()

    async def read(scope: trio.CancelScope) -> None:
        with scope:
            got.append(bytes(await chunks.read(reader, offset=0, length=3)))

    async with trio.open_nursery() as readers:
        first = trio.CancelScope()
        readers.start_soon(read, first)
        await trio.testing.wait_all_tasks_blocked()
        readers.start_soon(read, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        reader.gate.set()

    assert got == [reader.data[:3]]
    assert reader.asked == [(0, 16), (0, 16)]


async def test_all_who_wait_for_a_failing_fetch_fail_and_the_next_tries_again(
    nursery: trio.Nursery,
) -> None:
    reader, chunks, failed = SlowReader(error=errors.ExportError("no")), small(nursery), list[str]()

    async def read() -> None:
        try:
            await chunks.read(reader, offset=0, length=3)
        except errors.ExportError as error:
            failed.append(str(error))

    async with trio.open_nursery() as readers:
        for _ in range(3):
            readers.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        reader.gate.set()
    reader.error = None

    assert failed == ["no"] * 3
    assert bytes(await chunks.read(reader, offset=0, length=3)) == reader.data[:3]
    assert len(reader.asked) == 2


async def test_what_was_used_last_stays(reader: SlowReader, nursery: trio.Nursery) -> None:
    chunks = small(nursery, chunks=2)
    for offset in (0, 16, 0, 32):
        await chunks.read(reader, offset=offset, length=1)
    reader.asked.clear()

    await chunks.read(reader, offset=0, length=1)
    assert reader.asked == []
    await chunks.read(reader, offset=16, length=1)
    assert reader.asked == [(16, 16)]


async def test_no_more_than_the_limit_is_kept(reader: SlowReader, nursery: trio.Nursery) -> None:
    chunks = small(nursery, chunks=3)

    for offset in range(0, 100, CHUNK):
        await chunks.read(reader, offset=offset, length=1)
        assert chunks.kept <= 3 * CHUNK

    assert chunks.kept == 3 * CHUNK
    assert repr(chunks) == "<Cache 48 B of 48 B, 0 on their way>"


async def test_a_cache_too_small_for_a_chunk_still_reads(
    reader: SlowReader, nursery: trio.Nursery
) -> None:
    chunks = Cache(nursery, limit=1, chunk=CHUNK, grain=CHUNK)

    assert bytes(await chunks.read(reader, offset=10, length=30)) == reader.data[10:40]
    assert chunks.kept == 0


async def test_fetches_on_their_way_are_bounded(nursery: trio.Nursery) -> None:
    reader = SlowReader(data=bytes(CHUNK * 100))
    chunks = small(nursery, chunks=200)

    async with trio.open_nursery() as readers:
        for index in range(100):
            readers.start_soon(read_at, chunks, reader, index * CHUNK)
        await trio.testing.wait_all_tasks_blocked()
        asked = len(reader.asked)
        reader.gate.set()

    assert asked == cache.FETCHES // 2
    assert len(reader.asked) == 100


async def read_at(chunks: Cache, reader: SlowReader, offset: int) -> None:
    await chunks.read(reader, offset=offset, length=1)


async def test_a_disk_whose_host_is_silent_keeps_no_other_waiting_for_long(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    chunks = small(nursery, chunks=4 * cache.FETCHES)
    silent, other = SlowReader(data=bytes(CHUNK * 100)), SlowReader(key="other")
    other.gate.set()
    for index in range(cache.FETCHES // 2):
        nursery.start_soon(read_at, chunks, silent, index * CHUNK)
    await trio.testing.wait_all_tasks_blocked()

    with trio.fail_after(room.STALLED + 1):
        assert bytes(await chunks.read(other, offset=0, length=100)) == other.data
    assert trio.current_time() >= room.STALLED


async def test_reads_for_which_there_is_no_memory_keep_no_later_one_waiting(
    reader: SlowReader,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.abc.Clock,
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    chunks = small(nursery)
    with trio.fail_after(60), monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        for _ in range(cache.FETCHES):
            with pytest.raises(OSError, match="memory"):
                await chunks.read(reader, offset=0, length=4)

    assert await chunks.read(reader, offset=0, length=4) == reader.data[:4]


async def test_what_a_read_returned_cannot_be_written_to(
    reader: SlowReader, nursery: trio.Nursery
) -> None:
    data = await small(nursery).read(reader, offset=0, length=4)

    assert isinstance(data, memoryview)
    assert data.readonly


# ── without order ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("offset", "length", "asked"),
    [
        (20, 4, [(20, 4)]),
        (21, 2, [(20, 4)]),
        (22, 4, [(16, 16)]),  # two grains: then rather one request for all of the chunk
        (30, 4, [(28, 4), (32, 4)]),
        (99, 1, [(96, 4)]),
    ],
)
async def test_a_short_read_without_order_fetches_little(
    reader: SlowReader,
    offset: int,
    length: int,
    asked: list[tuple[int, int]],
    nursery: trio.Nursery,
) -> None:
    chunks = fine(nursery)

    assert (
        bytes(await chunks.read(reader, offset=offset, length=length))
        == (reader.data[offset : offset + length])
    )
    assert reader.asked == asked


async def test_a_grain_is_taken_from_its_chunk_if_that_is_there(
    reader: SlowReader, nursery: trio.Nursery
) -> None:
    chunks = fine(nursery)
    await chunks.read(reader, offset=16, length=16)

    assert bytes(await chunks.read(reader, offset=20, length=2)) == reader.data[20:22]
    assert reader.asked == [(16, 16)]


# ── in order ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def long() -> SlowReader:
    reader = SlowReader(data=random.Random(1).randbytes(64 * CHUNK + 5))
    reader.gate.set()
    return reader


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "FIRST", CHUNK)
    monkeypatch.setattr(readahead, "SLACK", 0)


async def test_a_file_read_in_order_is_fetched_ahead_and_once(
    long: SlowReader, nursery: trio.Nursery
) -> None:
    chunks, streams = fine(nursery, chunks=32), Streams(long.size, most=8 * CHUNK)
    got, ahead = b"", 0
    for offset in range(0, long.size, 6):
        got += await chunks.read(long, offset=offset, length=6, streams=streams)
        await settled()
        ahead = max(ahead, max(start + length for start, length in long.asked) - len(got))

    assert got == long.data
    assert ahead >= 7 * CHUNK
    starts = [start for start, _ in long.asked]
    assert len(starts) == len(set(starts))
    assert sum(length for _, length in long.asked) == long.size


async def test_what_is_fetched_ahead_of_a_silent_host_keeps_no_other_waiting_for_long(
    long: SlowReader, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    chunks, streams = fine(nursery, chunks=4 * cache.FETCHES), Streams(long.size, most=long.size)
    for index in range(6):
        await chunks.read(long, offset=index * CHUNK, length=CHUNK, streams=streams)
    long.gate = trio.Event()
    nursery.start_soon(read_on, chunks, long, streams)
    await settled()
    assert len(chunks._fetches) >= cache.FETCHES // 2
    other, its = SlowReader(key="other"), Streams(100, most=100)
    other.gate.set()

    with trio.fail_after(room.STALLED + 1):
        for offset in range(0, 100, 10):
            await chunks.read(other, offset=offset, length=10, streams=its)
    assert trio.current_time() >= room.STALLED


async def read_on(chunks: Cache, reader: SlowReader, streams: Streams) -> None:
    for offset in range(0, reader.size, CHUNK):
        await chunks.read(reader, offset=offset, length=CHUNK, streams=streams)


async def test_what_is_ahead_and_not_asked_for_is_bounded(
    long: SlowReader, nursery: trio.Nursery
) -> None:
    chunks, streams = fine(nursery, chunks=8), Streams(long.size, most=32 * CHUNK)
    for offset in range(0, 16 * CHUNK, CHUNK):
        await chunks.read(long, offset=offset, length=CHUNK, streams=streams)
        await settled()

        assert len(long.asked) * CHUNK <= offset + CHUNK + 4 * CHUNK
        assert chunks.kept <= 8 * CHUNK
    assert len(long.asked) >= 16 + 3


async def test_a_cache_of_nothing_fetches_nothing_ahead(
    long: SlowReader, nursery: trio.Nursery
) -> None:
    chunks, streams = fine(nursery, chunks=0), Streams(long.size)
    for offset in range(0, 4 * CHUNK, CHUNK):
        await chunks.read(long, offset=offset, length=CHUNK, streams=streams)
        await settled()

    assert long.asked == [(offset, CHUNK) for offset in range(0, 4 * CHUNK, CHUNK)]


async def test_what_nobody_asked_for_makes_room_for_others(
    long: SlowReader, nursery: trio.Nursery, autojump_clock: trio.abc.Clock
) -> None:
    chunks, left = fine(nursery, chunks=8), Streams(long.size)
    other = SlowReader(key="other", data=long.data, gate=long.gate)
    for offset in range(0, 8 * CHUNK, CHUNK):
        await chunks.read(long, offset=offset, length=CHUNK, streams=left)
    await settled()
    await trio.sleep(cache.STALE)

    streams = Streams(other.size)
    for offset in range(0, 4 * CHUNK, CHUNK):
        await chunks.read(other, offset=offset, length=CHUNK, streams=streams)
    await settled()

    assert len(other.asked) > 4


async def test_a_cancelled_reader_does_not_end_what_is_fetched_ahead(
    long: SlowReader, nursery: trio.Nursery
) -> None:
    chunks, streams = fine(nursery), Streams(long.size)
    await chunks.read(long, offset=0, length=CHUNK, streams=streams)
    long.gate = trio.Event()
    await settled()
    with trio.move_on_after(0):
        await chunks.read(long, offset=CHUNK, length=CHUNK, streams=streams)
    await settled()
    asked = len(long.asked)
    long.gate.set()
    await settled()

    assert await chunks.read(long, offset=CHUNK, length=CHUNK) == long.data[CHUNK : 2 * CHUNK]
    assert len(long.asked) == asked


async def test_what_failed_ahead_is_told_to_those_who_wait_and_tried_again(
    long: SlowReader, nursery: trio.Nursery
) -> None:
    chunks, streams = fine(nursery), Streams(long.size)
    long.error = errors.ExportError("no")
    with pytest.raises(errors.ExportError):
        await chunks.read(long, offset=0, length=1, streams=streams)
    await settled()
    long.error = None

    assert await chunks.read(long, offset=CHUNK, length=2) == long.data[CHUNK : CHUNK + 2]


async def test_closing_ends_what_is_fetched_ahead(long: SlowReader) -> None:
    streams = Streams(long.size)
    with trio.fail_after(5):
        async with open_cache() as chunks:
            await chunks.read(long, offset=0, length=1, streams=streams)
            long.gate = trio.Event()
            await chunks.read(long, offset=1, length=1, streams=streams)


@given(
    st.lists(st.tuples(st.integers(0, 640), st.integers(0, 40)), max_size=40),
    st.integers(1, 12),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
async def test_whatever_is_read_however_is_right(
    reads: list[tuple[int, int]], chunks: int, files: int
) -> None:
    data = random.Random(2).randbytes(610)

    async def read(cache_: Cache, number: int) -> None:
        reader = SlowReader(data=data)
        reader.gate.set()
        streams = Streams(reader.size, most=4 * CHUNK)
        for offset, length in reads[number:] + reads[:number]:
            got = await cache_.read(reader, offset=offset, length=length, streams=streams)
            assert got == data[offset : offset + length]
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        made = fine(nursery, chunks=chunks)
        async with trio.open_nursery() as readers:
            for number in range(files):
                readers.start_soon(read, made, number)
        assert made.kept <= chunks * CHUNK
        nursery.cancel_scope.cancel()
