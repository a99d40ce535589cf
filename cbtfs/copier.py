"""Copier: bring extents of an export into an image, over several connections at once.

::

    wanted     |---####---##-#----########|########--|     cut at multiples of REQUEST
    batches        1111   11 1    22222222 33333333        up to EXTENTS of them, REQUEST bytes
                    │
                    ├─> connection 1 ──> reader, reader, … ──> image.write (threads)
                    └─> connection 2 ──> reader, reader, …

A reader borrows a buffer for each batch: its extents are requested all at once, each for a part
of the buffer that begins on a page (an image writes whole pages past the page cache), and then one
worker thread digests and writes them all, while the other readers wait for the network. A server
that does one request at a time is thus never idle, and more connections mean more of its hands. The
buffers bound the memory, over all disks: one disk alone has more of them than one of many.

Shared state is one ``_Pieces`` and one ``Tally``, both changed only between checkpoints: a piece is
taken synchronously, and is either written or given back before its reader ends.
"""

import heapq
import math
import mmap
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from . import errors, extents, units
from .extents import Extent
from .rate import Rate

# Seconds for 2 GiB by contrib/bench/copyout.py, into XFS in memory, on two cores busy with other
# work too, so that a tenth means nothing; connections x DEPTH x REQUEST in MiB, 2 or 3 writers:
#
#   like xapi-nbd, 2 ms a request (medians of 6)    2x2x4  3.8  2x3x2  3.8  1x2x4  3.8  1x3x2  4.5
#   a file without delay (medians of 4)             2x2x4  2.9    3x2x4  2.9    2x2x2  2.9
#
# So 4 MiB serve a single connection best, and cost the others nothing. On a quiet machine, to XFS
# on a disk that takes 2 GB/s, from a file without delay, in GB/s (connections x DEPTH, WRITERS):
#
#   2 GiB    1x2 2  1.14    1x4 2  1.45    1x4 4  1.61    2x4 4  1.42
#   4 GiB    1x4 4  1.35    1x6 4  1.46    1x6 6  1.50    1x8 8  1.48
#
# So where one connection is enough, another one hinders.

REQUEST = 4 * units.MiB
"""Bytes of a batch, and so of a request. On one connection of a serial server with 2 ms a request,
256 KiB gave 104 MB/s, 1 MiB 300 and 4 MiB 540."""

EXTENTS = 16
"""Extents of a batch: as many as an export has under way on one connection."""

DEPTH = 6
"""Batches in flight on each connection, as far as there are buffers: some are written while the
others arrive."""

WRITERS = 6
"""Threads that digest and write for one disk: they wait for it half of the time."""

BUFFERS = 24
"""Batches in flight over all disks of a process: 96 MiB of memory."""

WINDOW = 64 * units.MiB
"""Bytes after each of which it shows whether one connection is fast enough; the first do not count,
for which buffers are made and the disk finds its pace."""

FAST = 900_000_000
"""Bytes a second of one connection from which on others are not opened: they would take places of
the host for nothing. One connection to a serial server with 2 ms a request gives 800 MB/s."""

ATTEMPTS = 5
"""Connections tried in a row without one piece copied before a disk counts as failed."""

Part = tuple[memoryview, int]
"""Bytes of a disk: where they are in memory, and their offset on the disk."""


class Source(Protocol):
    """What is read: an open export."""

    async def read_each(self, parts: Sequence[Part]) -> list[errors.ExportError | None]:
        """Fill each part from the disk; return for each None, or why it could not be."""
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
    """The pieces to be copied, in order: taken in batches, written or given back one by one.

    ::

        |~~~~~~~~~|####|~~~|##|==========|         ~ written
                   ▲ position                      # taken, or given back    = fresh

    Args:
        wanted: sorted and disjoint.
        limit: bytes of a batch.
    """

    def __init__(self, wanted: Iterable[Extent], *, limit: int) -> None:
        self._limit = limit
        self._fresh = extents.split(wanted, size=limit)
        self._next = next(self._fresh, None)
        self._returned: list[Extent] = []
        self._taken: set[Extent] = set()

    @property
    def position(self) -> int | None:
        """Start of the first piece that is not written yet; None when all are."""
        first = [] if self._next is None else [self._next]
        return min((*self._taken, *self._returned[:1], *first), default=(None,))[0]

    def remain(self) -> bool:
        """Tell whether there is a piece that nobody has taken."""
        return bool(self._returned) or self._next is not None

    def take(self) -> list[Extent]:
        """Return a batch; those given back come first. An empty one: nothing is left."""
        batch: list[Extent] = []
        room = self._limit
        while len(batch) < EXTENTS and (piece := self._pop(room)) is not None:
            batch.append(piece)
            room -= _paged(piece.length)
        self._taken.update(batch)
        return batch

    def give_back(self, piece: Extent) -> None:
        """Note that a taken piece has yet to be copied."""
        self._taken.remove(piece)
        heapq.heappush(self._returned, piece)

    def written(self, piece: Extent) -> None:
        """Note that a taken piece is copied."""
        self._taken.remove(piece)

    def _pop(self, room: int) -> Extent | None:
        piece = self._returned[0] if self._returned else self._next
        if piece is None or piece.length > room:
            return None
        if self._returned:
            return heapq.heappop(self._returned)
        self._next = next(self._fresh, None)
        return piece


class Buffers:
    """Memory for batches: so many at a time, each used again, whoever copies.

    Args:
        count: of ``REQUEST`` bytes each; made when they are needed.
    """

    def __init__(self, count: int = BUFFERS) -> None:
        self._places = trio.Semaphore(count)
        self._free: list[memoryview] = []

    @asynccontextmanager
    async def one(self) -> AsyncGenerator[memoryview]:
        """Lend a buffer of whole pages; those who wait get theirs in the order of asking."""
        async with self._places:
            buffer = self._free.pop() if self._free else memoryview(mmap.mmap(-1, REQUEST))
            try:
                yield buffer
            finally:
                self._free.append(buffer)


class Copier:
    """Copies extents of one disk, once.

    It begins with one connection; the others join once that is seen to be slow, or lost.

    Args:
        connect: opens one more connection to the disk.
        target: where the bytes go.
        connections: how many connections to use at most; one must succeed.
        advanced: called after each batch with the bytes read and written.
        rate: shared by all who read; None is no limit.
        buffers: shared by all who copy; None for its own.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Source]],
        target: Target,
        *,
        connections: int,
        advanced: Callable[[int, int], None],
        rate: Rate | None = None,
        buffers: Buffers | None = None,
    ) -> None:
        self.tally = Tally()
        self._connect = connect
        self._target = target
        self._connections = connections
        self._advanced = advanced
        self._rate = rate
        self._limit = REQUEST if rate is None else min(REQUEST, _blocks(rate.step))
        self._writers = trio.CapacityLimiter(WRITERS)
        self._buffers = buffers or Buffers()
        self._pieces: _Pieces | None = None
        self._serving = 0
        self._window_end, self._window_begun = WINDOW, math.inf  # in bytes read; when it began
        self._slow = trio.Event()  # or there is another reason not to wait any longer
        self._error: errors.CbtfsError | None = None

    @property
    def position(self) -> int | None:
        """Bytes of the disk up to which all that is wanted is written; None when all of it is.

        It is the start of the first piece that is not written yet, 0 before ``copy``, and stays
        where it was when a copy fails. Written is not on disk: that is the target's to say.
        """
        return self._pieces.position if self._pieces is not None else 0

    async def copy(self, wanted: Iterable[Extent]) -> Tally:
        """Copy ``wanted`` (sorted, disjoint, block-aligned); without any, no connection is made.

        Raises:
            ExportLost: the disk cannot be read any more, also over fresh connections.
            ExportError, AuthenticationFailed, StoreError: as the connection and the target say.
        """
        self._pieces = pieces = _Pieces(wanted, limit=self._limit)
        # Once is enough unless a connection was lost after the others had finished.
        while self._error is None and pieces.remain():
            self._serving = self._connections
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve, pieces, nursery.cancel_scope)
                for _ in range(1, self._connections):
                    nursery.start_soon(self._join, pieces, nursery.cancel_scope)
        if self._error is not None:
            raise self._error
        return self.tally

    # ── connections ──────────────────────────────────────────────────────────────────────────────

    async def _join(self, pieces: _Pieces, everyone: trio.CancelScope) -> None:
        """Copy pieces over one more connection if that is worth it."""
        await self._slow.wait()
        await self._serve(pieces, everyone)

    async def _serve(self, pieces: _Pieces, everyone: trio.CancelScope) -> None:
        """Copy pieces over one connection; the last one left reconnects while that gets further."""
        attempts = 0
        while attempts < ATTEMPTS and self._error is None and pieces.remain():
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
        self._slow.set()  # whoever has not joined yet does so, or ends

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

    def _fail(self, error: errors.CbtfsError, everyone: trio.CancelScope) -> None:
        """Remember the first error and stop all connections of this disk."""
        self._error = self._error or error
        everyone.cancel()

    # ── readers ──────────────────────────────────────────────────────────────────────────────────

    async def _drain(
        self, pieces: _Pieces, export: Source, everyone: trio.CancelScope
    ) -> errors.ExportLost | None:
        """Copy until no piece is left (None) or the connection is lost (why)."""
        lost: list[errors.ExportLost] = []

        async def reader() -> None:
            try:
                while not lost and pieces.remain():
                    await self._next(pieces, export)
            except errors.ExportLost as exc:
                lost.append(exc)
            except errors.CbtfsError as exc:
                self._fail(exc, everyone)

        async with trio.open_nursery() as readers:
            for _ in range(DEPTH):
                readers.start_soon(reader)
        return lost[0] if lost else None

    async def _next(self, pieces: _Pieces, export: Source) -> None:
        """Copy one batch, if there still is one when there is a buffer for it."""
        async with self._buffers.one() as buffer:
            batch = pieces.take()
            if batch:
                await self._batch(pieces, batch, export, buffer)

    async def _batch(
        self, pieces: _Pieces, batch: list[Extent], export: Source, buffer: memoryview
    ) -> None:
        """Read and write ``batch``; what cannot be is given back, also when cancelled."""
        unwritten = set(batch)
        try:
            if self._rate is not None:
                await self._rate.take(extents.total(batch))
            parts = list(_parts(batch, buffer))
            told = await export.read_each(parts)
            arrived = [part for part, problem in zip(parts, told, strict=True) if problem is None]
            if arrived:
                await self._write(arrived)
            for piece, problem in zip(batch, told, strict=True):
                if problem is None:
                    unwritten.remove(piece)
                    pieces.written(piece)
        finally:
            for piece in unwritten:
                pieces.give_back(piece)
        failed = [problem for problem in told if problem is not None]
        # what the server said of one extent counts more than that it then hung up
        failed.sort(key=lambda problem: isinstance(problem, errors.ExportLost))
        if failed:
            raise failed[0]

    async def _write(self, arrived: list[Part]) -> None:
        def write() -> int:
            return sum(self._target.write(offset, view) for view, offset in arrived)

        written = await trio.to_thread.run_sync(write, limiter=self._writers)
        read = sum(len(view) for view, _ in arrived)
        self.tally.read += read
        self.tally.written += written
        self.tally.pieces += len(arrived)
        self._advanced(read, written)
        self._judge()

    def _judge(self) -> None:
        """At the end of a window, have the other connections join if it came slowly."""
        if self.tally.read < self._window_end:
            return
        now = trio.current_time()
        if FAST * (now - self._window_begun) > WINDOW:
            self._slow.set()
        self._window_end, self._window_begun = self.tally.read + WINDOW, now


def _parts(batch: Iterable[Extent], buffer: memoryview) -> Iterable[Part]:
    """Lay a batch out in a buffer, each extent from the beginning of a page."""
    at = 0
    for piece in batch:
        yield buffer[at : at + piece.length], piece.start
        at += _paged(piece.length)


def _paged(length: int) -> int:
    return length + -length % mmap.PAGESIZE


def _blocks(length: int) -> int:
    """Return ``length`` in whole blocks, at least one."""
    return max(1, length // units.CBT_BLOCK) * units.CBT_BLOCK
