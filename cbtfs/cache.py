"""Cache: chunks of disks read so far, over any Reader; one fetch per chunk, bounded memory.

::

    reader    |--------------------------------------------------|--      size
    chunks    |   0   |   1   |   2   |   3   |   4   |   5   |  6 |      the last one may be short
    read                  |=========|                                     touches 1 and 2

1. What a reader's ``key`` names never changes: a chunk once read is true for ever. A disk that a
   guest writes to is not a Reader; a snapshot of it is.
2. However many ask for a chunk at the same time, one of them fetches it and the others wait. Should
   the one who fetches be cancelled, one of the waiting takes over; should it fail, all fail.
3. Chunks are forgotten in the order of their last use. Memory is at most ``limit`` for what is kept
   and ``FETCHES`` chunks for what is on its way; a reader beyond that waits.

The kernel asks for 128 KiB at a time while a server is fast at 1 MiB and more, hence the chunk.
Read-ahead will be a second caller of ``Cache.read``: rule 2 makes it meet the first.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

import trio

from . import extents, units
from .extents import Extent

CHUNK = units.MiB
"""Bytes fetched at a time; a multiple of every sector size, as NBD servers of hosts demand."""

LIMIT = 64 * units.MiB
"""Bytes kept by default: what a few dozen sequential readers have before them."""

FETCHES = 32
"""Chunks on their way at the same time, over all readers."""


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

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; if cancelled, never touch it after."""
        ...


_Key = tuple[str, int]


@dataclass(slots=True, eq=False)
class _Fetch:
    """A chunk on its way; exactly one of ``data`` and ``error`` is set unless it was cancelled."""

    done: trio.Event = field(default_factory=trio.Event)
    data: memoryview | None = None
    error: Exception | None = None


class Cache:
    """Chunks of any number of readers.

    ``_chunks`` and ``_fetches`` change only between awaits, each together with the other, so that a
    chunk is in one of them or in neither.

    Args:
        limit: bytes to keep.
        chunk: bytes to fetch at a time.
    """

    def __init__(self, *, limit: int = LIMIT, chunk: int = CHUNK) -> None:
        self._limit = limit
        self._chunk = chunk
        self._chunks: OrderedDict[_Key, memoryview] = OrderedDict()
        self._fetches: dict[_Key, _Fetch] = {}
        self._kept = 0
        self._room = trio.CapacityLimiter(FETCHES)

    def __repr__(self) -> str:
        kept, limit = units.format_size(self._kept), units.format_size(self._limit)
        return f"<Cache {kept} of {limit}, {len(self._fetches)} on their way>"

    @property
    def kept(self) -> int:
        """Bytes kept now."""
        return self._kept

    async def read(self, reader: Reader, *, offset: int, length: int) -> bytes | memoryview:
        """Return the bytes of ``reader`` at ``offset``: ``length`` of them, fewer at its end.

        A view into one chunk where that is possible: it is true for ever, and not to be written to.

        Raises:
            Exception: whatever ``reader.read_into`` raises; nothing of it is kept.
        """
        wanted = Extent(offset, min(offset + length, reader.size))
        if wanted.start >= wanted.stop:
            return b""
        parts: list[memoryview] = []
        for piece in extents.split([wanted], size=self._chunk):
            index, start = divmod(piece.start, self._chunk)
            chunk = await self._get(reader, index)
            parts.append(chunk[start : start + piece.length])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _get(self, reader: Reader, index: int) -> memoryview:
        key = (reader.key, index)
        while True:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
                return chunk
            fetch = self._fetches.get(key)
            if fetch is None:
                return await self._fetch(reader, key)
            await fetch.done.wait()
            if fetch.error is not None:
                raise fetch.error
            if fetch.data is not None:  # it may have been forgotten since
                return fetch.data

    async def _fetch(self, reader: Reader, key: _Key) -> memoryview:
        fetch = self._fetches[key] = _Fetch()
        try:
            async with self._room:
                fetch.data = await self._read_chunk(reader, key[1])
        except Exception as error:
            fetch.error = error
            raise
        finally:
            del self._fetches[key]
            fetch.done.set()
        self._keep(key, fetch.data)
        return fetch.data

    async def _read_chunk(self, reader: Reader, index: int) -> memoryview:
        start = index * self._chunk
        buffer = bytearray(min(self._chunk, reader.size - start))
        await reader.read_into(buffer, start)
        return memoryview(buffer).toreadonly()

    def _keep(self, key: _Key, data: memoryview) -> None:
        self._chunks[key] = data
        self._kept += len(data)
        while self._kept > self._limit:
            _, dropped = self._chunks.popitem(last=False)
            self._kept -= len(dropped)
