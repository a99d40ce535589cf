"""Copier against exports that lose connections, refuse and fail, all in memory."""

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from threading import Lock

import pytest
import trio
from hypothesis import given, settings, strategies as st

from cbtfs import copier, errors, units
from cbtfs.copier import Copier, Source, Tally
from cbtfs.extents import Extent

PIECE = 256 * units.KiB
SIZE = 9 * PIECE + 3 * units.CBT_BLOCK


@pytest.fixture(scope="module", autouse=True)
def _small_requests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copier, "REQUEST", PIECE)
        yield


class Image:
    def __init__(self) -> None:
        self.content = bytearray(SIZE)
        self.written: list[Extent] = []
        self.lock = Lock()
        self.error: errors.CbtfsError | None = None

    def write(self, offset: int, data: memoryview) -> int:
        if self.error is not None:
            raise self.error
        with self.lock:
            self.content[offset : offset + len(data)] = data
            self.written.append(Extent(offset, offset + len(data)))
        return len(data) - bytes(data).count(0)


class Export:
    def __init__(self, content: bytes, good: int, error: errors.CbtfsError) -> None:
        self.content = content
        self.good = good
        self.error = error

    async def read_into(self, buffer: memoryview, offset: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.good <= 0:
            raise self.error
        self.good -= 1
        buffer[:] = self.content[offset : offset + len(buffer)]


LOST = errors.ExportLost("the connection is gone")


class Server:
    """Each connection serves as many reads as ``lives`` says; then comes ``error``."""

    def __init__(
        self,
        content: bytes,
        lives: Iterator[int | errors.CbtfsError],
        error: errors.CbtfsError = LOST,
    ) -> None:
        self.content = content
        self.lives = lives
        self.error = error
        self.connections = 0

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Source]:
        self.connections += 1
        await trio.lowlevel.checkpoint()
        life = next(self.lives, 10**6)
        if isinstance(life, errors.CbtfsError):
            raise life
        yield Export(self.content, life, self.error)


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
