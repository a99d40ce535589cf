"""Copier against exports that lose connections, refuse and fail, all in memory."""

import ctypes
import mmap
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
from hypothesis import given, settings, strategies as st

from cbtfs import copier, errors, units
from cbtfs.copier import Copier, Part, Source, Tally
from cbtfs.extents import Extent
from cbtfs.rate import Rate

PIECE = 256 * units.KiB
SIZE = 9 * PIECE + 3 * units.CBT_BLOCK


@pytest.fixture(scope="module", autouse=True)
def _small_requests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copier, "REQUEST", PIECE)
        patch.setattr(copier, "DEPTH", 2)
        patch.setattr(copier, "WINDOW", PIECE)
        patch.setattr(copier, "FAST", 10**30)  # no connection is fast enough to be left alone
        yield


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class Image:
    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.written: list[Extent] = []
        self.lock = threading.Lock()
        self.error: errors.CbtfsError | None = None
        self.threads: list[int] = []
        self.unaligned = 0

    def write(self, offset: int, data: memoryview) -> int:
        if self.error is not None:
            raise self.error
        with self.lock:
            self.threads.append(threading.get_ident())
            self.unaligned += address(data) % mmap.PAGESIZE != 0
            self.content[offset : offset + len(data)] = data
            self.written.append(Extent(offset, offset + len(data)))
        return len(data) - bytes(data).count(0)


class Export:
    def __init__(self, content: bytes, good: int, error: errors.ExportError) -> None:
        self.content = content
        self.good = good
        self.error = error
        self.asked: list[list[Extent]] = []

    async def read_each(self, parts: Sequence[Part]) -> list[errors.ExportError | None]:
        self.asked.append([Extent(offset, offset + len(view)) for view, offset in parts])
        await trio.lowlevel.checkpoint()
        return [self.read(*part) for part in parts]

    def read(self, buffer: memoryview, offset: int) -> errors.ExportError | None:
        if self.good <= 0:
            return self.error
        self.good -= 1
        buffer[:] = self.content[offset : offset + len(buffer)]
        return None


LOST = errors.ExportLost("the connection is gone")


class Server:
    """Each connection serves as many reads as ``lives`` says; then comes ``error``."""

    def __init__(
        self,
        content: bytes,
        lives: Iterator[int | errors.CbtfsError],
        error: errors.ExportError = LOST,
    ) -> None:
        self.content = content
        self.lives = lives
        self.error = error
        self.connections = 0
        self.exports: list[Export] = []

    @property
    def asked(self) -> list[list[Extent]]:
        return [batch for export in self.exports for batch in export.asked]

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Source]:
        self.connections += 1
        await trio.lowlevel.checkpoint()
        life = next(self.lives, 10**6)
        if isinstance(life, errors.CbtfsError):
            raise life
        self.exports.append(Export(self.content, life, self.error))
        yield self.exports[-1]


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


async def copy(
    connect: Callable[[], AbstractAsyncContextManager[Source]],
    image: Image,
    *,
    wanted: list[Extent] | None = None,
    connections: int = 2,
) -> Tally:
    told = Tally()

    def advanced(read: int, written: int) -> None:
        told.read += read
        told.written += written

    tally = await Copier(connect, image, connections=connections, advanced=advanced).copy(
        [Extent(0, SIZE)] if wanted is None else wanted
    )
    assert (told.read, told.written) == (tally.read, tally.written)
    return tally


async def test_copies_a_whole_disk_in_large_requests(content: bytes) -> None:
    image = Image()

    tally = await copy(Server(content, iter([])).connect, image)

    assert image.content == content
    assert tally.read == SIZE
    assert max(extent.length for extent in image.written) == copier.REQUEST


async def test_reads_only_what_is_wanted(content: bytes) -> None:
    wanted = [Extent(0, 65536), Extent(3 * PIECE, 5 * PIECE), Extent(SIZE - 65536, SIZE)]
    image = Image()

    tally = await copy(Server(content, iter([])).connect, image, wanted=wanted)

    assert tally.read == sum(extent.length for extent in wanted)
    for start, stop in wanted:
        assert image.content[start:stop] == content[start:stop]
    assert not any(image.content[65536 : 3 * PIECE])


async def test_nothing_wanted_makes_no_connection(content: bytes) -> None:
    server = Server(content, iter([]))

    assert (await copy(server.connect, Image(), wanted=[])).read == 0
    assert server.connections == 0


@given(lives=st.lists(st.integers(1, 6), max_size=12), connections=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
async def test_lost_connections_lose_no_piece(lives: list[int], connections: int) -> None:
    content = random.Random(1).randbytes(SIZE)
    image = Image()

    tally = await copy(Server(content, iter(lives)).connect, image, connections=connections)

    assert image.content == content
    assert tally.read == SIZE


async def test_gives_up_on_a_server_that_gets_no_further(content: bytes) -> None:
    server = Server(content, iter([3] + [0] * 100))

    with pytest.raises(errors.ExportLost):
        await copy(server.connect, Image(), connections=1)
    assert server.connections == 1 + copier.ATTEMPTS


async def test_hosts_that_let_nobody_in_are_not_asked_again(content: bytes) -> None:
    server = Server(content, iter([LOST, 10**6]))

    with pytest.raises(errors.ExportLost):
        await copy(server.connect, Image(), connections=1)
    assert server.connections == 1


async def test_one_connection_is_enough(content: bytes) -> None:
    refused = errors.ExportError("all slots are taken")
    image = Image()

    await copy(Server(content, iter([refused, 10**6, refused])).connect, image, connections=3)

    assert image.content == content


@pytest.mark.parametrize(("fast", "connections"), [(0, 1), (10**30, 3)])
async def test_other_connections_join_a_slow_one(
    content: bytes, fast: int, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "FAST", fast)
    server, image = Server(content, iter([])), Image()

    await copy(server.connect, image, connections=3)

    assert image.content == content
    assert server.connections == connections


async def test_other_connections_join_at_once_where_one_is_lost(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "FAST", 0)
    server, image = Server(content, iter([2])), Image()

    await copy(server.connect, image, connections=3)

    assert image.content == content
    assert server.connections == 3


async def test_an_impostor_on_an_extra_connection_stops_the_copy(content: bytes) -> None:
    impostor = errors.AuthenticationFailed("another certificate")

    with pytest.raises(errors.AuthenticationFailed):
        await copy(Server(content, iter([10**6, impostor])).connect, Image(), connections=2)


async def test_an_error_of_the_server_is_not_tried_again(content: bytes) -> None:
    server = Server(content, iter([4]), error=errors.ExportError("I/O error"))

    with pytest.raises(errors.ExportError, match="I/O error"):
        await copy(server.connect, Image(), connections=1)
    assert server.connections == 1


async def test_an_error_of_the_image_stops_all_connections(content: bytes) -> None:
    image = Image()
    image.error = errors.StoreFull("no space left")

    with pytest.raises(errors.StoreFull):
        await copy(Server(content, iter([])).connect, image, connections=3)


# ── batches ──────────────────────────────────────────────────────────────────────────────────────

BLOCK = units.CBT_BLOCK


def every_other(blocks: int) -> list[Extent]:
    return [Extent(2 * at * BLOCK, (2 * at + 1) * BLOCK) for at in range(blocks)]


async def test_small_extents_are_asked_for_together(content: bytes) -> None:
    server, image = Server(content, iter([])), Image()
    wanted = every_other(12)

    await copy(server.connect, image, wanted=wanted, connections=1)

    assert sorted(server.asked) == [wanted[0:4], wanted[4:8], wanted[8:12]]
    for start, stop in wanted:
        assert image.content[start:stop] == content[start:stop]


async def test_a_batch_has_a_limited_number_of_extents(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copier, "EXTENTS", 3)
    server = Server(content, iter([]))

    await copy(server.connect, Image(), wanted=every_other(7), connections=1)

    assert sorted(map(len, server.asked)) == [1, 3, 3]


async def test_every_extent_begins_on_a_page_of_memory(content: bytes) -> None:
    image = Image()
    short = [Extent(0, 512), Extent(BLOCK, BLOCK + 4608), Extent(2 * BLOCK, 3 * BLOCK)]

    await copy(Server(content, iter([])).connect, image, wanted=short)

    assert image.unaligned == 0
    for start, stop in short:
        assert image.content[start:stop] == content[start:stop]


async def test_buffers_are_used_again(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(fd: int, length: int) -> mmap.mmap:
        made.append(length)
        return real(fd, length)

    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", counted)

    await copy(Server(content, iter([1] * 8)).connect, Image(), connections=1)

    assert made
    assert made == [copier.REQUEST] * len(made)
    assert len(made) <= copier.DEPTH


@given(
    blocks=st.sets(st.integers(0, SIZE // BLOCK - 1)),
    lives=st.lists(st.integers(0, 6), max_size=4),
    connections=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
async def test_what_is_wanted_is_copied_once_and_nothing_else(
    blocks: set[int], lives: list[int], connections: int
) -> None:
    content = random.Random(1).randbytes(SIZE)
    image = Image()
    wanted = [Extent(at * BLOCK, (at + 1) * BLOCK) for at in sorted(blocks)]

    server = Server(content, iter(lives))
    tally = await copy(server.connect, image, wanted=wanted, connections=connections)

    assert tally.read == len(blocks) * BLOCK
    assert sorted(image.written) == wanted
    for at in range(SIZE // BLOCK):
        there = image.content[at * BLOCK : (at + 1) * BLOCK]
        assert there == (content[at * BLOCK : (at + 1) * BLOCK] if at in blocks else bytes(BLOCK))


# ── position ─────────────────────────────────────────────────────────────────────────────────────


class Watching(Image):
    """An image that holds every position it is shown against what is written."""

    def __init__(self, wanted: list[Extent]) -> None:
        super().__init__()
        self.wanted = wanted

    def unwritten(self) -> list[int]:
        with self.lock:
            return [start for start, _ in self.wanted if not self.has(start)]

    def has(self, start: int) -> bool:
        return any(extent.start <= start < extent.stop for extent in self.written)


@given(
    blocks=st.sets(st.integers(0, SIZE // BLOCK - 1), min_size=1),
    lives=st.lists(st.integers(0, 6), max_size=4),
    connections=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
async def test_all_that_is_wanted_before_the_position_is_written(
    blocks: set[int], lives: list[int], connections: int
) -> None:
    wanted = [Extent(at * BLOCK, (at + 1) * BLOCK) for at in sorted(blocks)]
    image = Watching(wanted)
    positions: list[int | None] = []

    def advanced(read: int, written: int) -> None:
        position = copying.position
        positions.append(position)
        if position is not None:
            assert all(start >= position for start in image.unwritten())

    server = Server(random.Random(1).randbytes(SIZE), iter(lives))
    copying = Copier(server.connect, image, connections=connections, advanced=advanced)
    positions.append(copying.position)
    await copying.copy(wanted)
    positions.append(copying.position)

    assert (positions[0], positions[-1]) == (0, None)
    known = [position for position in positions if position is not None]
    assert known == sorted(known)


async def test_a_copy_that_failed_keeps_its_position(content: bytes) -> None:
    server = Server(content, iter([3] + [0] * 100))
    image = Watching([Extent(at, at + PIECE) for at in range(0, SIZE, PIECE)])
    copying = Copier(server.connect, image, connections=1, advanced=lambda read, written: None)

    with pytest.raises(errors.ExportLost):
        await copying.copy([Extent(0, SIZE)])

    assert len(image.written) == 3
    assert copying.position == image.unwritten()[0]


async def test_what_was_under_way_when_cancelled_lies_behind_the_position(content: bytes) -> None:
    class Stuck(Export):
        async def read_each(self, parts: Sequence[Part]) -> list[errors.ExportError | None]:
            if self.good <= 0:
                stuck.set()
                await trio.sleep_forever()
            return await super().read_each(parts)

    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        yield Stuck(content, 2, LOST)

    stuck = trio.Event()
    copying = Copier(connect, Image(), connections=1, advanced=lambda read, written: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copying.copy, [Extent(PIECE, SIZE)])
        await stuck.wait()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert copying.position == 3 * PIECE


async def test_what_arrived_of_a_batch_is_not_read_again(content: bytes) -> None:
    server, image = Server(content, iter([3])), Image()

    await copy(server.connect, image, wanted=every_other(4), connections=1)

    assert server.asked == [every_other(4), every_other(4)[3:]]
    assert sorted(image.written) == every_other(4)


async def test_what_the_server_says_counts_more_than_that_it_hangs_up(content: bytes) -> None:
    class Closing(Export):
        async def read_each(self, parts: Sequence[Part]) -> list[errors.ExportError | None]:
            return [LOST, errors.ExportError("I/O error"), LOST]

    @asynccontextmanager
    async def connect() -> AsyncIterator[Source]:
        yield Closing(content, 0, LOST)

    with pytest.raises(errors.ExportError, match="I/O error"):
        await copy(connect, Image(), wanted=every_other(3), connections=1)


# ── rate ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_rate_is_kept(content: bytes, autojump_clock: trio.testing.MockClock) -> None:
    server = Server(content, iter([]))
    rate = Rate(SIZE / 10)
    begun = trio.current_time()

    await Copier(
        server.connect, Image(), connections=2, advanced=lambda read, written: None, rate=rate
    ).copy([Extent(0, SIZE)])

    assert 9 < trio.current_time() - begun < 11


async def test_a_slow_rate_makes_small_requests(
    content: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    server = Server(content, iter([]))
    rate = Rate(8 * 2.5 * BLOCK)  # in an eighth of a second two blocks and a half

    await Copier(
        server.connect, Image(), connections=1, advanced=lambda read, written: None, rate=rate
    ).copy([Extent(0, PIECE)])

    assert sorted(server.asked) == [[Extent(0, 2 * BLOCK)], [Extent(2 * BLOCK, 4 * BLOCK)]]


async def test_copiers_that_share_buffers_have_no_more_than_those(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = mmap.mmap

    def counted(fd: int, length: int) -> mmap.mmap:
        made.append(length)
        return real(fd, length)

    monkeypatch.setattr(mmap, "mmap", counted)
    shared = copier.Buffers(3)
    images = [Image() for _ in range(4)]

    def ignore(read: int, written: int) -> None:
        del read, written

    async with trio.open_nursery() as nursery:
        for image in images:
            server = Server(content, iter([]))
            copying = Copier(server.connect, image, connections=2, advanced=ignore, buffers=shared)
            nursery.start_soon(copying.copy, [Extent(0, SIZE)])

    assert all(image.content == content for image in images)
    assert len(made) == 3
