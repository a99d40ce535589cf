"""Connections: NBD connections to the VDIs that are being read, opened and closed one by one.

A connection costs its host a plugged device and one of 16 places, and opening one takes seconds. So
a VDI gets one by its first read, and others only while that one is busy without a break and slow,
each after the one before has done some work. One stays while somebody may want to read (``want``),
the others until they have been idle for a moment: a sync or ``list_changed_blocks`` that waits for
the VDI must not wait long. When all places that we allow ourselves are taken, the one that has been
idle longest gives way; if none is idle, a reader waits.

Each connection lives in a task of its own. That task is shielded: it ends because it is told to,
after saying goodbye to the host, so that the host's device is unplugged when ``close`` returns.
"""

import math
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from . import errors

LIMIT = 8
"""Connections of one mount by default: a host has 16 places, and a sync wants some too."""

EACH = 3
"""Connections to one VDI: hosts answer one request at a time on each."""

WORK = 32
"""Reads that a connection has done in a row, never idle, when it shows how fast it is."""

FAST = 900_000_000
"""Bytes a second of a connection from which on another one is not worth its while: it would share
the same processors. One to a serial server with 2 ms a request gives 300 MB/s in reads of 1 MiB."""

IDLE = 5.0
"""Seconds that a connection stays idle before it is closed, but for the one that is wanted."""

CLOSE_LIMIT = 60.0
"""Seconds that a host gets to unplug its device before we hang up without it."""


class Export(Protocol):
    """One connection."""

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; if cancelled, never touch it after."""
        ...


class Exporter(Protocol):
    """What makes connections: a pool."""

    def open_export(self, vdi_ref: str) -> AbstractAsyncContextManager[Export]:
        """Connect to a VDI; on exit the host has unplugged it."""
        ...


@dataclass(slots=True, eq=False)
class _Connection:
    """A connection; ``users`` reads are under way or waiting for it, ``used`` is when one ended.

    Since ``begun`` it has not been idle, and has done ``reads`` of ``done`` bytes in all.
    """

    ref: str
    users: int = 0
    begun: float = 0.0
    reads: int = 0
    done: int = 0
    used: float = 0.0
    closing: bool = False
    export: Export | None = None
    error: Exception | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    hold: trio.CancelScope = field(default_factory=trio.CancelScope)
    task: trio.CancelScope = field(default_factory=lambda: trio.CancelScope(shield=True))

    @property
    def ending(self) -> bool:
        """Whether it is of no use to anybody any more."""
        return self.closing or self.hold.cancel_called

    def end(self) -> None:
        """Have it closed in good order."""
        self.closing = True
        self.hold.cancel()
        if not self.ready.is_set():  # nothing to say goodbye to yet
            self.task.cancel()

    def enter(self) -> None:
        """Note that a read begins."""
        if not self.users:
            self.begin()
        self.users += 1
        self.hold.deadline = math.inf

    def leave(self, length: int) -> None:
        """Note that a read of so many bytes has ended, 0 if it failed."""
        self.users -= 1
        self.reads += 1
        self.done += length
        self.used = trio.current_time()

    def begin(self) -> None:
        """Look anew at how fast it is."""
        self.begun, self.reads, self.done = trio.current_time(), 0, 0

    def is_slow(self) -> bool:
        """Tell whether it has shown that it is busy all the time, and slow."""
        if not self.users or self.reads < WORK:
            return False
        if self.done < FAST * (trio.current_time() - self.begun):
            return True
        self.begin()
        return False

    def why_not(self) -> Exception:
        """Return why it could not be made; a pool has made several attempts before it says so."""
        if self.error is None:
            return errors.ExportError("the connection was closed")
        if isinstance(self.error, errors.ExportLost):
            return errors.ExportError(str(self.error))
        return self.error


class Connections:
    """The connections of one mount, by VDI reference.

    ``_open`` holds a connection from before it is made until it is gone, ``_wanted`` the VDIs that
    somebody may want to read. They change only between awaits; after each await a caller looks
    again.

    Args:
        exporter: makes them.
        nursery: their tasks run here; the caller closes all of them before it leaves the nursery.
        limit: how many may be open at a time.
    """

    def __init__(self, exporter: Exporter, nursery: trio.Nursery, *, limit: int = LIMIT) -> None:
        self._exporter = exporter
        self._nursery = nursery
        self._limit = limit
        self._open: dict[str, list[_Connection]] = {}
        self._wanted: set[str] = set()
        self._changed = trio.Event()
        self._waiting = 0  # tasks that wait for it

    def __repr__(self) -> str:
        connections = [c for group in self._open.values() for c in group]
        busy = sum(bool(c.users) for c in connections)
        return f"<Connections {len(connections)} of {self._limit}, {busy} busy>"

    async def read_into(self, ref: str, buffer: memoryview | bytearray, offset: int) -> None:
        """Read from a VDI over its least busy connection, made if there is none; it stays open.

        If cancelled while it is being made, it is made all the same, for the next.

        Raises:
            ExportLost: the connection was lost, and a fresh one may work.
            CbtfsError: it could not be made, or the VDI not be read.
        """
        connection = await self._find(ref)
        connection.enter()
        done = 0
        try:
            if connection.export is None:
                await connection.ready.wait()
            if connection.export is None:
                raise connection.why_not()
            await connection.export.read_into(buffer, offset)
            done = len(buffer)
        except errors.ExportLost:
            connection.end()
            raise
        finally:
            connection.leave(done)
            if not connection.users:
                self._rest(ref)
                self._tell()

    def want(self, ref: str) -> None:
        """Keep one connection to a VDI, once there is one: somebody may want to read it."""
        self._wanted.add(ref)
        self._rest(ref)

    def leave(self, ref: str) -> None:
        """Close the connections to a VDI that are idle, in a moment."""
        self._wanted.discard(ref)
        self._rest(ref)

    async def close(self, ref: str) -> None:
        """Close the connections to a VDI; when this returns the host is done."""
        self._wanted.discard(ref)
        connections = list(self._open.get(ref, ()))
        for connection in connections:
            connection.end()
        with trio.move_on_after(CLOSE_LIMIT):
            for connection in connections:
                await connection.gone.wait()
        for connection in connections:
            connection.task.cancel()

    async def close_all(self) -> None:
        """Close every connection, all at the same time."""
        async with trio.open_nursery() as nursery:
            for ref in self._open:
                nursery.start_soon(self.close, ref)

    async def _find(self, ref: str) -> _Connection:
        """Return a connection to a VDI, as soon as it has a place; it may not be ready."""
        while True:
            group = self._open.get(ref, [])
            usable = [c for c in group if not c.ending]
            if usable:
                if self._is_short(usable):
                    self._begin(ref)
                # one that is not ready is no help while another one is
                return min(usable, key=lambda c: (not c.ready.is_set(), c.users))
            if group:
                await group[0].gone.wait()
            elif self._count() < self._limit:
                return self._begin(ref)
            else:
                await self._make_room()

    def _is_short(self, group: list[_Connection]) -> bool:
        """Tell whether another connection would have something to do, and may be made now."""
        return (
            len(group) < EACH
            and self._count() < self._limit
            and all(c.ready.is_set() and c.is_slow() for c in group)
        )

    def _begin(self, ref: str) -> _Connection:
        connection = _Connection(ref)
        self._open.setdefault(ref, []).append(connection)
        self._nursery.start_soon(self._run, connection)
        return connection

    def _count(self) -> int:
        return sum(map(len, self._open.values()))

    def _rest(self, ref: str) -> None:
        """Set the time of those connections to a VDI that are idle, but for one if it is wanted."""
        group = [c for c in self._open.get(ref, ()) if not c.ending]
        idle = [c for c in group if not c.users]
        if ref in self._wanted and len(idle) == len(group):
            for connection in idle[:1]:
                connection.hold.deadline = math.inf
            del idle[:1]
        for connection in idle:
            connection.hold.deadline = trio.current_time() + IDLE

    async def _make_room(self) -> None:
        """Close the connection that has been idle longest, or wait for something to change."""
        connections = [c for group in self._open.values() for c in group]
        idle = [c for c in connections if not c.users and not c.ending]
        if idle:
            oldest = min(idle, key=lambda c: c.used)
            oldest.end()
            await oldest.gone.wait()
        else:
            self._waiting += 1
            try:
                await self._changed.wait()
            finally:
                self._waiting -= 1

    async def _run(self, connection: _Connection) -> None:
        try:
            with connection.task:
                await self._hold(connection)
        except Exception as error:  # whatever it is, it belongs to those who read
            connection.error = error
        finally:
            connection.closing = True
            connection.export = None
            self._open[connection.ref].remove(connection)
            if not self._open[connection.ref]:
                del self._open[connection.ref]
            connection.ready.set()
            connection.gone.set()
            self._tell()

    async def _hold(self, connection: _Connection) -> None:
        async with self._exporter.open_export(connection.ref) as connection.export:
            connection.ready.set()
            connection.begin()
            self._rest(connection.ref)
            with connection.hold:
                await trio.sleep_forever()
            connection.closing = True

    def _tell(self) -> None:
        if self._waiting:
            self._changed.set()
            self._changed = trio.Event()
