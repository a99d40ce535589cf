"""Connections: NBD connections to the VDIs that are being read, opened and closed one by one.

A connection costs its host a plugged device and one of 16 places, and opening one takes seconds. So
there is one per VDI, made by the first read and kept until ``close``. When all places that we allow
ourselves are taken, the one that has been idle longest gives way; if none is idle, a reader waits.

Each connection lives in a task of its own. That task is shielded: it ends because it is told to,
after saying goodbye to the host, so that the host's device is unplugged when ``close`` returns.
"""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from . import errors

LIMIT = 8
"""Connections of one mount by default: a host has 16 places, and a sync wants some too."""

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
    """A connection; ``users`` reads are under way or waiting for it, ``used`` is when one ended."""

    ref: str
    users: int = 0
    used: float = 0.0
    closing: bool = False
    export: Export | None = None
    error: Exception | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    hold: trio.CancelScope = field(default_factory=trio.CancelScope)
    task: trio.CancelScope = field(default_factory=lambda: trio.CancelScope(shield=True))

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

    ``_open`` holds a connection from before it is made until it is gone. It changes only between
    awaits; after each await a caller looks again.

    Args:
        exporter: makes them.
        nursery: their tasks run here; the caller closes all of them before it leaves the nursery.
        limit: how many may be open at a time.
    """

    def __init__(self, exporter: Exporter, nursery: trio.Nursery, *, limit: int = LIMIT) -> None:
        self._exporter = exporter
        self._nursery = nursery
        self._limit = limit
        self._open: dict[str, _Connection] = {}
        self._changed = trio.Event()

    def __repr__(self) -> str:
        busy = sum(bool(c.users) for c in self._open.values())
        return f"<Connections {len(self._open)} of {self._limit}, {busy} busy>"

    @asynccontextmanager
    async def use(self, ref: str) -> AsyncGenerator[Export, None]:
        """Yield the connection to a VDI, made if there is none; it stays open on exit.

        If cancelled while it is being made, it is made all the same, for the next.

        Raises:
            CbtfsError: it could not be made; not ``ExportLost``, which means a fresh one may work.
        """
        connection = await self._find(ref)
        connection.users += 1
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
            connection.used = trio.current_time()
            self._tell()

    async def close(self, ref: str) -> None:
        """Close the connection to a VDI if there is one; when this returns the host is done."""
        connection = self._open.get(ref)
        if connection is None:
            return
        connection.end()
        with trio.move_on_after(CLOSE_LIMIT):
            await connection.gone.wait()
        connection.task.cancel()

    async def close_all(self) -> None:
        """Close every connection, all at the same time."""
        async with trio.open_nursery() as nursery:
            for ref in self._open:
                nursery.start_soon(self.close, ref)

    async def _find(self, ref: str) -> _Connection:
        """Return the connection to a VDI, as soon as it has a place; it may not be ready."""
        while True:
            connection = self._open.get(ref)
            if connection is not None and not connection.closing:
                return connection
            if connection is not None:
                await connection.gone.wait()
            elif len(self._open) < self._limit:
                connection = self._open[ref] = _Connection(ref)
                self._nursery.start_soon(self._run, connection)
                return connection
            else:
                await self._make_room()

    async def _make_room(self) -> None:
        """Close the connection that has been idle longest, or wait for something to change."""
        idle = [c for c in self._open.values() if not c.users and not c.closing]
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
            del self._open[connection.ref]
            connection.ready.set()
            connection.gone.set()
            self._tell()

    async def _hold(self, connection: _Connection) -> None:
        async with self._exporter.open_export(connection.ref) as connection.export:
            connection.ready.set()
            with connection.hold:
                await trio.sleep_forever()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
