"""Copier: bring extents of an export into an image, over several connections at once.

::

    extents ──split──> pieces ──> connection 1 ──> reader, reader, … ──> image.write (threads)
                          └─────> connection 2 ──> reader, reader, …

Every reader owns one buffer of whole pages (an image writes those past the page cache) and has one
request under way; the image digests and writes a piece in a worker thread while the other readers
wait for the network. A server that does one request at a time is thus never idle, and more
connections mean more of its hands.

Shared state is one ``_Pieces`` and one ``Tally``, both changed only between checkpoints: a piece is
taken synchronously, and is either written or given back before its reader ends.
"""

import mmap
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import trio

from . import errors, extents, units
from .extents import Extent

REQUEST = 4 * units.MiB
"""Bytes asked for at once. On one connection of a serial server with 2 ms a request, 256 KiB gave
104 MB/s, 1 MiB 300 and 4 MiB 540."""

DEPTH = 2
"""Requests in flight on each connection: one is written while the next arrives."""

WRITERS = 2
"""Threads that digest and write for one disk: more of them wait for each other's interpreter."""

ATTEMPTS = 5
"""Connections tried in a row without one piece copied before a disk counts as failed."""


class Source(Protocol):
    """What is read: an open export."""

    async def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        ...


class Target(Protocol):
    """What is written: an image; called from worker threads, several at once."""

    def write(self, offset: int, data: memoryview) -> int:
        """Write ``data`` at ``offset``; return the bytes stored, zeros not counted."""
        ...


@dataclass(slots=True)
class Tally:
    """What a copy has done so far, in bytes; ``pieces`` is the number of requests."""

    read: int = 0
    written: int = 0
    pieces: int = 0


class _Pieces:
    """The pieces still to be copied; given back ones come first."""

    def __init__(self, wanted: Iterable[Extent]) -> None:
        self._fresh = iter(extents.split(wanted, size=REQUEST))
        self._returned: deque[Extent] = deque()

    def take(self) -> Extent | None:
        if self._returned:
            return self._returned.popleft()
        return next(self._fresh, None)

    def give_back(self, piece: Extent) -> None:
        self._returned.append(piece)

    def remain(self) -> bool:
        piece = self.take()
        if piece is not None:
            self.give_back(piece)
        return piece is not None


class Copier:
    """Copies extents of one disk.

    Args:
        connect: opens one more connection to the disk.
        image: where the bytes go.
        connections: how many connections to use; one must succeed.
        advanced: called after each piece with the bytes read and written.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Source]],
        image: Target,
        *,
        connections: int,
        advanced: Callable[[int, int], None],
    ) -> None:
        self.tally = Tally()
        self._connect = connect
        self._image = image
        self._connections = connections
        self._advanced = advanced
        self._writers = trio.CapacityLimiter(WRITERS)
        self._serving = 0
        self._error: errors.CbtfsError | None = None

    async def copy(self, wanted: Iterable[Extent]) -> Tally:
        """Copy ``wanted`` (sorted, block-aligned); without any, no connection is made.

        Raises:
            ExportLost: the disk cannot be read any more, also over fresh connections.
            ExportError, AuthenticationFailed, StoreError: as the connection and the image say.
        """
        pieces = _Pieces(wanted)
        # Once is enough unless a connection was lost after the others had finished.
        while self._error is None and pieces.remain():
            self._serving = self._connections
            async with trio.open_nursery() as nursery:
                for _ in range(self._connections):
                    nursery.start_soon(self._serve, pieces, nursery.cancel_scope)
        if self._error is not None:
            raise self._error
        return self.tally

    async def _serve(self, pieces: _Pieces, everyone: trio.CancelScope) -> None:
        """Copy pieces over one connection; the last one left reconnects while that gets further."""
        attempts = 0
        while attempts < ATTEMPTS and self._error is None:
            before = self.tally.pieces
            connected = False
            failure: errors.CbtfsError | None
            try:
                async with self._connect() as export:
                    connected = True
                    failure = await self._drain(pieces, export, everyone)
            except errors.CbtfsError as exc:
                failure = exc
            attempts = 0 if self.tally.pieces > before else attempts + 1
            if not connected:
                attempts = ATTEMPTS  # every host was tried, several times: see exports
            if failure is None or not self._may_retry(failure, attempts, everyone):
                break
        self._serving -= 1

    def _may_retry(
        self, failure: errors.CbtfsError, attempts: int, everyone: trio.CancelScope
    ) -> bool:
        """Tell whether to connect again; if nobody is left to copy, that was the end."""
        if isinstance(failure, errors.AuthenticationFailed):
            self._fail(failure, everyone)
            return False
        if self._serving > 1:
            return False  # the others take over what this connection had
        if isinstance(failure, errors.ExportLost) and attempts < ATTEMPTS:
            return True
        self._fail(failure, everyone)
        return False

    async def _drain(
        self, pieces: _Pieces, export: Source, everyone: trio.CancelScope
    ) -> errors.ExportLost | None:
        """Copy until no piece is left (None) or the connection is lost (why)."""
        lost: list[errors.ExportLost] = []

        async def reader() -> None:
            buffer = memoryview(mmap.mmap(-1, REQUEST))
            while not lost and (piece := pieces.take()) is not None:
                try:
                    await self._piece(piece, export, buffer[: piece.length])
                except errors.ExportLost as exc:
                    pieces.give_back(piece)
                    lost.append(exc)
                except errors.CbtfsError as exc:
                    self._fail(exc, everyone)

        async with trio.open_nursery() as readers:
            for _ in range(DEPTH):
                readers.start_soon(reader)
        return lost[0] if lost else None

    async def _piece(self, piece: Extent, export: Source, buffer: memoryview) -> None:
        await export.read_into(buffer, piece.start)
        written = await trio.to_thread.run_sync(
            self._image.write, piece.start, buffer, limiter=self._writers
        )
        self.tally.read += piece.length
        self.tally.written += written
        self.tally.pieces += 1
        self._advanced(piece.length, written)

    def _fail(self, error: errors.CbtfsError, everyone: trio.CancelScope) -> None:
        """Remember the first error and stop all connections of this disk."""
        self._error = self._error or error
        everyone.cancel()
