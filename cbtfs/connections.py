"""Connections: NBD connections to the VDIs that are being read, opened and closed one by one.

A connection costs its host a plugged device and one of 16 places, and opening one takes seconds. So
a VDI gets one by its first read, and others only while that one is busy, each after the one before
has done some work. They stay while somebody may want to read (``want``), the others until they have
been idle for a moment: a sync or ``list_changed_blocks`` that waits for the VDI must not wait long.
When all places that we allow ourselves are taken, the one that has been idle longest gives way; if
none is idle, a reader waits.

Each connection lives in a task of its own. That task is shielded: it ends because it is told to,
after saying goodbye to the host, so that the host's device is unplugged when ``close`` returns.
"""

import math
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from . import errors

LIMIT = 8
"""Connections of one mount by default: a host has 16 places, and a sync wants some too."""

EACH = 3
"""Connections to one VDI: hosts answer one request at a time on each."""

WORK = 32
"""Reads that the connections of a VDI have done when another one is worth its while."""

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

    ``done`` is how many there have been.
    """

    ref: str
    users: int = 0
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

    def __repr__(self) -> str:
        connections = [c for group in self._open.values() for c in group]
        busy = sum(bool(c.users) for c in connections)
        return f"<Connections {len(connections)} of {self._limit}, {busy} busy>"

    @asynccontextmanager
    async def use(self, ref: str) -> AsyncGenerator[Export, None]:
        """Yield the least busy connection to a VDI, made if there is none; it stays open on exit.

        If cancelled while it is being made, it is made all the same, for the next.

        Raises:
            CbtfsError: it could not be made; not ``ExportLost``, which means a fresh one may work.
        """
        connection = await self._find(ref)
        connection.users += 1
        connection.hold.deadline = math.inf
        try:
            await connection.ready.wait()
            if connection.export is None:
                raise connection.why_not()
            yield connection.export
        except errors.ExportLost:
            connection.end()
            raise
        finally:
            connection.users -= 1
            connection.done += 1
            connection.used = trio.current_time()
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
            and all(c.ready.is_set() and c.users for c in group)
            and sum(c.done for c in group) >= WORK * len(group)
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
        spared = idle[:1] if ref in self._wanted and len(idle) == len(group) else []
        for connection in idle:
            until = math.inf if connection in spared else trio.current_time() + IDLE
            connection.hold.deadline = until

    async def _make_room(self) -> None:
        """Close the connection that has been idle longest, or wait for something to change."""
        connections = [c for group in self._open.values() for c in group]
        idle = [c for c in connections if not c.users and not c.ending]
        if idle:
            oldest = min(idle, key=lambda c: c.used)
            oldest.end()
            await oldest.gone.wait()
        else:
            await self._changed.wait()

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
            self._rest(connection.ref)
            with connection.hold:
                await trio.sleep_forever()
            connection.closing = True

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
