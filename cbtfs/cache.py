"""Cache: chunks of disks read so far, over any Reader; one fetch per chunk, bounded memory.

::

    reader     |------------------------------------------------------------------|--    size
    CHUNK      |        0        |        1        |        2        |        3   |      of a stream
    GRAIN      |-|-|-|-|-|-|-|-|-|-| …                                                   of others
    read 4 KiB          =                                     fetches one grain
    read more           ======                                fetches the whole chunk
    in order   ==================                             chunks 1, 2, … are fetched ahead

1. What a reader's ``key`` names never changes: what was once read is true for ever. A disk that a
   guest writes to is not a Reader; a snapshot of it is.
2. However many ask for a chunk at the same time, one of them fetches it and the others wait. Should
   the one who fetches be cancelled, one of the waiting takes over; should it fail, all fail. What
   is fetched ahead belongs to the cache: nobody's cancellation ends it.
3. Chunks are forgotten in the order of their last use, but those that a file has read to their end
   come first: who reads all of a disk does not drive out what others use, and goes round in memory
   that the processor has at hand. Memory is at most ``limit`` for what is kept, and ``FETCHES``
   chunks for what is on its way, half of it ahead, and as many again behind hosts that are silent
   (``room.py``); readers beyond it wait.
4. Nothing is fetched to be forgotten before it is asked for. So what may be ahead, at most half of
   ``limit``, is shared by all files that are read; and where there are too many of them for each to
   have a chunk here, they get what they ask for, and nothing but grains is kept.
5. Buffers are used again: a view that ``read`` returns is true until the next checkpoint.
"""

import mmap
from collections import OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import trio

from . import extents, units
from .extents import Extent
from .readahead import Streams
from .room import Room

CHUNK = units.MiB
"""Bytes fetched at a time for a stream: servers are fast from here on."""

GRAIN = 64 * units.KiB
"""Bytes fetched at a time where there is no order; a multiple of every sector size."""

LIMIT = 96 * units.MiB
"""Bytes kept by default: what a few dozen sequential readers have before them."""

FETCHES = 32
"""Chunks on their way at the same time, over all readers."""

STALE = 60.0
"""Seconds after which a file does not count as being read, and what was fetched ahead for it may be
forgotten: long enough for each of many readers to get its turn at the connections."""


class Reader(Protocol):
    """Bytes that never change, such as a snapshot's."""

    @property
    def key(self) -> str:
        """Name of the contents: two readers with one key have the same bytes."""
        ...

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def is_hole(self, wanted: Extent) -> bool:
        """Tell whether it is known that all of ``wanted`` is zero."""
        ...

    def reading(self) -> AbstractAsyncContextManager["Reading"]:
        """Wait until it can be read, which may take long: nobody must hold a buffer meanwhile."""
        ...

    async def recovers(self, error: Exception, *, failures: int) -> bool:
        """Tell, perhaps after a pause, whether a read that failed so often may be tried again."""
        ...


class Reading(Protocol):
    """A reader that can be read now."""

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; if cancelled, never touch it after."""
        ...


_AT_ONCE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
"""Memory given out at once. Page after page as it is written to, and shared, which is what mmap
does by default, it took a fifth of the time of a long read."""

_T = TypeVar("_T")

_Key = tuple[str, int, int]
"""Name of the contents, size of the chunk, and its number."""


@dataclass(slots=True, eq=False)
class _Fetch:
    """A chunk on its way, for which ``waiting`` readers wait; ``error`` says why it failed."""

    done: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None
    waiting: int = 0


@dataclass(slots=True, eq=False)
class _Chunk:
    """A chunk kept: ``data`` is the used part of ``buffer``, ``fetch`` how it came."""

    data: memoryview
    buffer: memoryview
    fetch: _Fetch


class Grain(NamedTuple):
    """What is kept of a disk from ``offset`` on; the view is true until the next checkpoint."""

    offset: int
    data: memoryview


@dataclass(slots=True)
class _Use:
    """An open file that is read: when it was last, and how many chunks are there ahead of it."""

    last: float = 0.0
    ahead: int = 0


class Cache:
    """Chunks of any number of readers; made by ``open_cache``.

    ``_chunks`` and ``_fetches`` change only between awaits, each together with the other, so that a
    chunk is in one of them or in neither.

    Args:
        nursery: what is fetched ahead runs here.
        limit: bytes to keep.
        chunk, grain: bytes to fetch at a time.
    """

    def __init__(
        self, nursery: trio.Nursery, *, limit: int = LIMIT, chunk: int = CHUNK, grain: int = GRAIN
    ) -> None:
        self._nursery = nursery
        self._limit = limit
        self._chunk = chunk
        self._grain = grain
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()
        self._fetches: dict[_Key, _Fetch] = {}
        self._unread: dict[_Key, Streams] = {}  # fetched ahead, and of which file
        self._files: OrderedDict[Streams, _Use] = OrderedDict()
        self._kept = 0
        self._free: dict[int, list[memoryview]] = defaultdict(list)
        self._spare = 0  # bytes of buffers in _free
        self._lent = 0  # bytes of buffers that are being filled
        self._zeros = memoryview(bytes(chunk))
        self._room = Room(FETCHES // 2)
        self._room_ahead = Room(FETCHES // 2)

    def __repr__(self) -> str:
        kept, limit = units.format_size(self._kept), units.format_size(self._limit)
        return f"<Cache {kept} of {limit}, {len(self._fetches)} on their way>"

    @property
    def kept(self) -> int:
        """Bytes kept now."""
        return self._kept

    async def read(
        self, reader: Reader, *, offset: int, length: int, streams: Streams | None = None
    ) -> bytes | bytearray | memoryview:
        """Return the bytes of ``reader`` at ``offset``: ``length`` of them, fewer at its end.

        A view into one chunk where that is possible, not to be written to; see rule 4. ``look`` is
        faster where all of it is in a chunk.

        Args:
            reader: what to read.
            offset: in bytes.
            length: in bytes.
            streams: those of the open file, to fetch ahead of; None does not.

        Raises:
            Exception: whatever ``reader`` raises; nothing of it is kept.
        """
        wanted = Extent(offset, min(offset + length, reader.size))
        if wanted.start >= wanted.stop:
            return b""
        in_order = streams is not None and self._fetch_ahead(reader, wanted, streams)
        if reader.is_hole(wanted):
            return bytes(wanted.length)
        if self._is_crowded():
            in_order = False
            if not self._is_kept(reader, wanted):
                return await self._through(reader, wanted)
        if wanted.start // self._chunk == (wanted.stop - 1) // self._chunk:
            key = self._key(reader, wanted, in_order=in_order)
            data = await self._get(reader, key)
            if in_order:
                self._pass(key, wanted)
            return _cut(data, key, wanted)
        whole = bytearray(wanted.length)
        for part in extents.split([wanted], size=self._chunk):
            if reader.is_hole(part):
                continue
            key = self._key(reader, part, in_order=in_order)
            at = part.start - wanted.start
            whole[at : at + part.length] = _cut(await self._get(reader, key), key, part)
        return whole

    def look(
        self, reader: Reader, *, offset: int, length: int, streams: Streams | None = None
    ) -> memoryview | None:
        """Return what ``read`` would, if it is in one large chunk or in a hole; else None."""
        index = offset // self._chunk
        key = (reader.key, self._chunk, index)
        wanted = Extent(offset, min(offset + length, reader.size))
        if not offset < wanted.stop <= (index + 1) * self._chunk:
            return None
        is_hole = key not in self._chunks and reader.is_hole(wanted)
        if key not in self._chunks and not is_hole:
            return None
        if streams is not None:
            self._fetch_ahead(reader, wanted, streams)
        if is_hole:
            return self._zeros[: wanted.length]
        data = self._use(key)
        if streams is not None:
            self._pass(key, wanted)
        return _cut(data, key, wanted)

    def grain(self, reader: Reader, offset: int) -> "Grain | None":
        """Return the grain that has the byte at ``offset``, if it is kept."""
        index = offset // self._grain
        kept = self._chunks.get((reader.key, self._grain, index))
        return None if kept is None else Grain(index * self._grain, kept.data)

    def _use(self, key: _Key) -> memoryview:
        """Return what a chunk that is there has."""
        self._chunks.move_to_end(key)
        self._was_read(key)
        return self._chunks[key].data

    def _pass(self, key: _Key, part: Extent) -> None:
        """Note that a file has read ``part``; a chunk read to its end is the next to go."""
        chunk = self._chunks.get(key)
        if chunk is not None and part.stop == key[1] * key[2] + len(chunk.data):
            self._chunks.move_to_end(key, last=False)

    def _key(self, reader: Reader, part: Extent, *, in_order: bool) -> _Key:
        """Return the chunk that has ``part``, a part of a large one, or else the grain to fetch."""
        large = (reader.key, self._chunk, part.start // self._chunk)
        one_grain = part.start // self._grain == (part.stop - 1) // self._grain
        if in_order or not one_grain or large in self._chunks or large in self._fetches:
            return large
        return (reader.key, self._grain, part.start // self._grain)

    # ── fetching what is asked for ───────────────────────────────────────────────────────────────

    async def _get(self, reader: Reader, key: _Key) -> memoryview:
        while True:
            if key in self._chunks:
                return self._use(key)
            fetch = self._fetches.get(key)
            if fetch is None:
                return await self._fetch(reader, key, self._begin(key), self._room)
            fetch.waiting += 1
            try:
                await fetch.done.wait()
            finally:
                fetch.waiting -= 1
            if fetch.error is not None:
                raise fetch.error

    def _begin(self, key: _Key) -> _Fetch:
        """Note that a chunk is on its way: whoever wants it from now on waits for it."""
        fetch = self._fetches[key] = _Fetch()
        return fetch

    async def _fetch(self, reader: Reader, key: _Key, fetch: _Fetch, room: Room) -> memoryview:
        _, size, index = key
        length = min(size, reader.size - index * size)
        try:
            buffer = await _until_read(reader, lambda: self._filled(reader, key, length, room))
        except BaseException as error:
            if isinstance(error, Exception):
                fetch.error = error
            self._was_read(key)
            raise
        finally:
            del self._fetches[key]
            fetch.done.set()
        chunk = _Chunk(buffer[:length].toreadonly(), buffer, fetch)
        self._keep(key, chunk)
        return chunk.data

    async def _filled(self, reader: Reader, key: _Key, length: int, room: Room) -> memoryview:
        """Return a buffer with the first ``length`` bytes of a chunk; after a failure without."""
        _, size, index = key
        async with reader.reading() as reading:
            place = await room.take(reader.key)
            try:
                buffer = self._buffer(size)
                try:
                    await reading.read_into(buffer[:length], index * size)
                except BaseException:
                    self._lent -= size
                    self._give(buffer)
                    raise
            finally:
                room.leave(place)
        return buffer

    # ── fetching ahead ───────────────────────────────────────────────────────────────────────────

    def _fetch_ahead(self, reader: Reader, wanted: Extent, streams: Streams) -> bool:
        """Start to fetch what a stream will want; return whether ``wanted`` is part of one."""
        self._note_use(streams)
        stream, due = streams.note(*wanted)
        if due.length:
            for index in range(due.start // self._chunk, -(-due.stop // self._chunk)):
                if not self._start(reader, (reader.key, self._chunk, index), streams):
                    break
                streams.fetched(stream, min((index + 1) * self._chunk, reader.size))
        return stream.window > 0

    def _start(self, reader: Reader, key: _Key, streams: Streams) -> bool:
        """Start to fetch a chunk ahead unless it is there; return False if there is no room."""
        if key in self._chunks or key in self._fetches:
            return True
        _, size, index = key
        if reader.is_hole(Extent(index * size, min((index + 1) * size, reader.size))):
            return True
        use, files = self._files[streams], len(self._files)
        room = min(self._limit // 2, self._limit - files * self._chunk) // self._chunk
        if len(self._unread) >= room or use.ahead >= room // files:
            return False
        self._unread[key] = streams
        use.ahead += 1
        self._nursery.start_soon(self._ahead, reader, key, self._begin(key))
        return True

    async def _ahead(self, reader: Reader, key: _Key, fetch: _Fetch) -> None:
        with suppress(Exception):  # those who wait for it are told, and the next one tries again
            await self._fetch(reader, key, fetch, self._room_ahead)

    def close(self, streams: Streams) -> None:
        """Note that a file is not read any more."""
        use = self._files.pop(streams, None)
        if use is not None and use.ahead:
            self._unread = {k: s for k, s in self._unread.items() if s is not streams}

    def _note_use(self, streams: Streams) -> None:
        now = trio.current_time()
        self._files.setdefault(streams, _Use()).last = now
        self._files.move_to_end(streams)
        while (oldest := next(iter(self._files))) is not streams:
            if now - self._files[oldest].last < STALE:
                break
            self.close(oldest)

    def _was_read(self, key: _Key) -> None:
        """Note that a chunk does not count as fetched ahead, if it did."""
        streams = self._unread.pop(key, None)
        if streams is not None:
            self._files[streams].ahead -= 1

    # ── more files than chunks ───────────────────────────────────────────────────────────────────

    def _is_crowded(self) -> bool:
        """Tell whether chunks would be forgotten before they are read to their end."""
        return len(self._files) * self._chunk > self._limit // 3 * 2

    def _is_kept(self, reader: Reader, wanted: Extent) -> bool:
        """Tell whether ``wanted`` is in a grain, or in a chunk that is there or on its way."""
        key = self._key(reader, wanted, in_order=False)
        _, size, index = key
        if wanted.stop > (index + 1) * size:
            return False
        return size == self._grain or key in self._chunks or key in self._fetches

    async def _through(self, reader: Reader, wanted: Extent) -> bytearray:
        """Return bytes that nobody else shall have."""

        async def read() -> bytearray:
            async with reader.reading() as reading:
                place = await self._room.take(reader.key)
                try:
                    whole = bytearray(wanted.length)
                    await reading.read_into(whole, wanted.start)
                finally:
                    self._room.leave(place)
            return whole

        return await _until_read(reader, read)

    # ── memory ───────────────────────────────────────────────────────────────────────────────────

    def _keep(self, key: _Key, chunk: _Chunk) -> None:
        self._chunks[key] = chunk
        self._kept += len(chunk.buffer)
        self._lent -= len(chunk.buffer)
        while self._kept > self._limit:
            # not to be used again before those who wait have seen it
            settled = (old for old, kept in self._chunks.items() if not kept.fetch.waiting)
            oldest = next(settled, None)
            if oldest is None:
                return
            buffer = self._chunks.pop(oldest).buffer
            self._was_read(oldest)
            self._kept -= len(buffer)
            self._give(buffer)

    def _buffer(self, size: int) -> memoryview:
        free = self._free[size]
        if free:
            buffer = free.pop()
            self._spare -= size
        else:
            buffer = memoryview(mmap.mmap(-1, size, flags=_AT_ONCE))
        self._lent += size
        return buffer

    def _give(self, buffer: memoryview) -> None:
        """Take a buffer back, for what is fetched next: as many as there may be on their way."""
        if self._spare + self._lent + len(buffer) <= self._chunk * FETCHES:
            self._free[len(buffer)].append(buffer)
            self._spare += len(buffer)


@asynccontextmanager
async def open_cache(*, limit: int = LIMIT) -> AsyncGenerator[Cache]:
    """Yield a cache of ``limit`` bytes; on exit nothing is fetched any more."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield Cache(nursery, limit=limit)
        except Exception as exc:  # carried out of the nursery, which would put it in a group
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _until_read(reader: Reader, read: Callable[[], Awaitable[_T]]) -> _T:
    """Return what ``read`` does, which is called again as long as its reader recovers.

    A place is never held meanwhile: those who have what it takes to read would wait for that.
    """
    failures = 0
    while True:
        try:
            return await read()
        except Exception as error:
            failures += 1
            if not await reader.recovers(error, failures=failures):
                raise


def _cut(data: memoryview, key: _Key, piece: Extent) -> memoryview:
    start = piece.start - key[1] * key[2]
    return data[start : start + piece.length]
