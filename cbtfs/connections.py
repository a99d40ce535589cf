"""Connections: NBD connections to the VDIs that are being read, opened and closed one by one.

A connection costs its host a plugged device and one of 16 places, and opening one takes seconds. So
a VDI gets one by its first read, and others only while that one is busy without a break and slow,
each after the one before has done some work. One stays while somebody may want to read (``want``),
the others until they have been idle for a moment: a sync or ``list_changed_blocks`` that waits for
the VDI must not wait long.

When all places that we allow ourselves are taken, VDIs queue for them, first come, first served::

    waiting        e  f  g                    one connection ends for each of them, first those
    connected      a  a  b  c  d              that help another, then the one that is idle longest,
                      ↑ ends                  then the one that has had its turn: it does what it
                                              was asked for, and its VDI queues again

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

PAUSE = 0.3
"""Seconds that a connection is idle before it gives way: who reads in order comes again at once."""

TURN = 5.0
"""Seconds that a connection has in any case while others wait: to open it takes about as long."""

PRESS = 0.1
"""Seconds between two looks of those who wait."""

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

    Since ``begun`` it has not been idle, and has done ``reads`` of ``done`` bytes in all. It is to
    be used since ``opened``. One that is ``retiring`` ends as soon as nobody uses it.
    """

    ref: str
    users: int = 0
    begun: float = 0.0
    reads: int = 0
    done: int = 0
    used: float = 0.0
    opened: float = math.inf
    closing: bool = False
    retiring: bool = False
    export: Export | None = None
    error: Exception | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    hold: trio.CancelScope = field(default_factory=trio.CancelScope)
    task: trio.CancelScope = field(default_factory=lambda: trio.CancelScope(shield=True))

    @property
    def ending(self) -> bool:
        """Whether it is of no use to anybody any more."""
        return self.closing or self.retiring or self.hold.cancel_called

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
        if self.retiring and not self.users:
            self.end()

    def retire(self) -> None:
        """Have it closed as soon as it has done what it was asked for."""
        self.retiring = True
        if not self.users:
            self.end()

    def may_go(self, *, wanted: bool) -> bool:
        """Tell whether it may be closed for another VDI; ``wanted``: somebody has it open."""
        now = trio.current_time()
        idle = not self.users and (not wanted or now - self.used >= PAUSE)
        return idle or now - self.opened >= TURN

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
        """Return why it is not there; a pool has made several attempts before it says so.

        Of one that was there already, it tells to try again.
        """
        if self.error is None or self.opened < math.inf:
            return errors.ExportLost("the connection was closed")
        if isinstance(self.error, errors.ExportLost):
            return errors.ExportError(str(self.error))
        return self.error


class Use:
    """One read of a VDI: entered, it has a connection that nobody closes before it is left.

    So who waits for anything else while inside never waits for those who wait for a connection.
    """

    def __init__(self, connections: "Connections", ref: str) -> None:
        self._connections = connections
        self._ref = ref
        self._connection: _Connection | None = None
        self._done = 0

    async def __aenter__(self) -> "Use":
        """Wait for a connection, made if there is none; why it cannot be made, a read tells.

        If cancelled while it is being made, it is made all the same, for the next.
        """
        connection = self._connection = await self._connections.enter(self._ref)
        try:
            if not connection.ready.is_set():
                await connection.ready.wait()
        except BaseException:
            self._connections.left(connection, 0)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave the connection, which stays open."""
        if self._connection is not None:
            self._connections.left(self._connection, self._done)

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``.

        Raises:
            ExportLost: the connection was lost, which is left then; another use makes another one.
            CbtfsError: it could not be made, or the VDI not be read.
        """
        connection = self._connection
        if connection is None:
            raise errors.ExportLost("the connection was lost")
        try:
            if connection.export is None:
                raise connection.why_not()
            await connection.export.read_into(buffer, offset)
            self._done = len(buffer)
        except errors.ExportLost:
            connection.end()
            self._connection = None
            self._connections.left(connection, 0)
            raise


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
        self._queue: dict[str, int] = {}  # VDIs that wait for a place, and how many reads of each

    def __repr__(self) -> str:
        connections = [c for group in self._open.values() for c in group]
        busy = sum(bool(c.users) for c in connections)
        return f"<Connections {len(connections)} of {self._limit}, {busy} busy>"

    def use(self, ref: str) -> "Use":
        """Return a use of a VDI, to be entered: it then has a place until it is left."""
        return Use(self, ref)

    async def enter(self, ref: str) -> _Connection:
        """Return the least busy connection to a VDI, made if there is none, for one more user."""
        connection = await self._find(ref)
        connection.enter()
        return connection

    def left(self, connection: _Connection, done: int) -> None:
        """Note that a user of a connection has left, after reading so many bytes."""
        connection.leave(done)
        if not connection.users:
            self._rest(connection.ref)
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
        usable = self._usable(ref)
        if not usable:
            usable = await self._queued(ref)
        elif self._is_short(usable):
            self._begin(ref)
        # one that is not ready is no help while another one is
        return min(usable, key=lambda c: (not c.ready.is_set(), c.users))

    def _usable(self, ref: str) -> list[_Connection]:
        return [c for c in self._open.get(ref, ()) if not c.ending]

    async def _queued(self, ref: str) -> list[_Connection]:
        """Wait for a place for a VDI, and return the connection that has it."""
        self._queue[ref] = self._queue.get(ref, 0) + 1
        try:
            while not (usable := self._usable(ref)):
                free = self._limit - self._count()
                if ref not in self._open and ref in list(self._queue)[: max(free, 0)]:
                    return [self._begin(ref)]
                self._press()
                with trio.move_on_after(PRESS):
                    await self._changed.wait()
            return usable
        finally:
            self._queue[ref] -= 1
            if not self._queue[ref]:
                del self._queue[ref]
                self._tell()

    def _press(self) -> None:
        """Have as many connections end as VDIs wait for their places."""
        connections = [c for group in self._open.values() for c in group]
        going = sum(c.ending for c in connections)
        short = len(self._queue) - (self._limit - len(connections)) - going
        for helper in [c for group in self._open.values() for c in group[1:] if not c.ending]:
            if short > 0:
                helper.retire()
                short -= 1
        idle_first = sorted(
            connections, key=lambda c: (c.users > 0, c.used if not c.users else c.opened)
        )
        for connection in idle_first:
            if (
                short > 0
                and not connection.ending
                and connection.may_go(wanted=connection.ref in self._wanted)
            ):
                connection.retire()
                short -= 1

    def _is_short(self, group: list[_Connection]) -> bool:
        """Tell whether another connection would have something to do, and may be made now."""
        return (
            len(group) < EACH
            and not self._queue
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
            connection.opened = trio.current_time()
            connection.begin()
            self._rest(connection.ref)
            with connection.hold:
                await trio.sleep_forever()
            connection.closing = True

    def _tell(self) -> None:
        if self._queue:
            self._changed.set()
            self._changed = trio.Event()
