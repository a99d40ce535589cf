"""Disks: what open files read: a snapshot itself, or a temporary snapshot of a live disk.

A disk that a guest writes to has no contents that could be called its own: two reads see two
instants. So a live disk is read through a temporary snapshot, and everything that reads, caches or
connects deals with immutable VDIs only. A ``Source`` is such a VDI to be, shared by open files::

    open A     open B      close A    close B                       open C
      |----------|--------------|-------|···· linger ····|             |-------…
           first read                                    gone               first read
           takes the snapshot                                               takes another one

What a user sees of a live disk:

1. ``open`` and ``close`` touch nothing; the first read takes the snapshot.
2. All files that are open at the same time show the same instant. They have to: the kernel keeps
   one set of pages for all of them, and two instants in it would be a mix.
3. **Opening a disk that nobody has open shows it as it is now**, even while the snapshot of an
   earlier open lingers: who copies a disk twice wants two instants, and a script that freezes its
   guest before the copy must not get a copy from before the freeze. The earlier snapshot then goes
   at once, so that at most one per disk stays, however often it is opened.
4. A snapshot that is no longer read stays for ``linger`` seconds, for whoever wants to compare a
   copy with it, its connections for a moment only; then, or at the end of the mount, it is
   destroyed. What a killed process left is removed by the next one on the same machine
   (``remove_leftovers``).

A snapshot VDI needs no instant, but its connection is kept in the same way, to be used again.
"""

import itertools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

import trio

from . import errors, instant, process
from .bitmap import ChangeBitmap
from .connections import CLOSE_LIMIT, LIMIT, Connections, Exporter, Use
from .extents import Extent
from .holes import REST, WORTH, Holes, Teller
from .instant import DESTROY_LIMIT, ROLE
from .inventory import VDI, Inventory, read_owner

log = logging.getLogger(__name__)

LINGER = 60.0
"""Seconds that connections and temporary snapshots stay after the last close, by default."""

TRIES = 3
"""How often a read is tried, each time on a fresh connection, before it fails."""


class Pool(Exporter, Teller, instant.Pool, Protocol):
    """What is needed of a pool."""


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """How disks are read.

    Attributes:
        live: whether live disks may be read, through temporary snapshots.
        linger: seconds that a snapshot and its connection stay after the last close.
        connections: how many may be open at a time.
    """

    live: bool = True
    linger: float = LINGER
    connections: int = LIMIT


@dataclass(slots=True, eq=False)
class _Instant:
    """One attempt of a source to have something to read: ``ref``, or ``error``, once ``ready``.

    ``read`` is how many bytes have come from the pool, ``long`` is set once they are many, and
    ``allocated`` is what else there is to be read, as far as that is known.
    """

    ref: str = ""
    read: int = 0
    long: trio.Event = field(default_factory=trio.Event)
    allocated: ChangeBitmap | None = None
    error: Exception | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    gone: trio.Event = field(default_factory=trio.Event)
    task: trio.CancelScope = field(default_factory=lambda: trio.CancelScope(shield=True))


@dataclass(slots=True, eq=False)
class Source:
    """An immutable VDI that open files read, or will; it fits ``cache.Reader``.

    ``Disks`` alone writes to it: ``files`` is how many have it open; ``instant`` exists from the
    first read on; ``idle`` is cancelled, at once or by its deadline, when the time of the source is
    over; ``previous`` is what lingers of an earlier source of the same disk.

    Attributes:
        vdi: the disk that the file shows.
        size: bytes that the file shows; the size of a file does not change while it is mounted.
        number: which source of this process it is; never given again, as an ``id()`` is.
    """

    disks: "Disks" = field(repr=False)
    vdi: VDI
    size: int
    previous: "Source | None" = field(default=None, repr=False)
    files: int = 0
    instant: _Instant | None = field(default=None, repr=False)
    idle: trio.CancelScope = field(default_factory=trio.CancelScope, repr=False)
    number: int = field(default_factory=itertools.count(1).__next__, init=False)

    @property
    def key(self) -> str:
        """Name of the contents for the cache: that of a snapshot, else a new one each time."""
        return self.vdi.uuid if self.vdi.is_a_snapshot else f"{self.vdi.uuid} {self.number}"

    def may_be_joined(self) -> bool:
        """Whether a file that is opened now shows what this one shows; see rules 2 and 3."""
        return self.files > 0 or (self.vdi.is_a_snapshot and not self.idle.cancel_called)

    def is_hole(self, wanted: Extent) -> bool:
        """Tell whether it is known that there is nothing there, so that it reads as zeros."""
        if self.instant is None or self.instant.allocated is None:
            return False
        return self.instant.allocated.is_clear(*wanted)

    def note_read(self, length: int) -> None:
        """Note that so many bytes came from the pool."""
        if self.instant is not None:
            self.instant.read += length
            if self.instant.read >= WORTH and self.size - self.instant.read >= REST:
                self.instant.long.set()

    def reading(self) -> "Reading":
        """Return a read of it, to be entered: the first one prepares what it takes."""
        return Reading(self.disks, self)

    async def recovers(self, error: Exception, *, failures: int) -> bool:
        """Tell, after a pause, whether a read that failed so often may be tried again."""
        if not isinstance(error, errors.ExportLost) or failures >= TRIES:
            return False
        log.info("reading %s anew: %s", self.vdi.uuid, error)
        await trio.sleep(failures)  # xapi needs a moment to clean up after a lost one
        return True

    async def wait_gone(self) -> None:
        """Wait until everything it held is given back."""
        if self.instant is not None:
            await self.instant.gone.wait()

    def give_up(self) -> None:
        """Abandon whatever it still holds."""
        if self.instant is not None:
            self.instant.task.cancel()


class Reading:
    """One read of a source; it fits ``cache.Reading`` once it is entered.

    Entering it raises CbtfsError if the snapshot could not be taken.
    """

    def __init__(self, disks: "Disks", source: Source) -> None:
        self._disks = disks
        self._source = source
        self._use: Use | None = None

    async def __aenter__(self) -> "Reading":
        """Wait for the snapshot and for a connection."""
        use = await self._disks.use(self._source)
        self._use = await use.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        """Leave the connection to others."""
        if self._use is not None:
            await self._use.__aexit__(*error)

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``.

        Raises:
            CbtfsError: the disk could not be read; ``Source.recovers`` tells what to do then.
        """
        self._source.note_read(len(buffer))
        await cast(Use, self._use).read_into(buffer, offset)


class Disks:
    """The sources of one mount.

    ``_newest`` has the source that was opened last by VDI reference, ``_running`` those whose task
    runs. Both change only between awaits. The task of a source is shielded: it ends because it is
    told to, never in the middle of a call that changes the pool.

    Args:
        pool: takes and destroys the snapshots.
        connections: reads them.
        nursery: the tasks run here; the caller calls ``end`` before it leaves the nursery.
        options: what the user chose.
    """

    def __init__(
        self, pool: Pool, connections: Connections, nursery: trio.Nursery, *, options: DiskOptions
    ) -> None:
        self._pool = pool
        self._connections = connections
        self._holes = Holes(pool)
        self._nursery = nursery
        self._options = options
        self._newest: dict[str, Source] = {}
        self._running: set[Source] = set()
        self._taking: Counter[str] = Counter()  # VDIs of which a snapshot is being taken
        self._temporary: set[str] = set()  # snapshots that were taken here
        self._ended = False

    def allows(self, vdi: VDI) -> bool:
        """Whether ``vdi`` may be opened at all."""
        return vdi.is_a_snapshot or self._options.live

    def temporary(self, vdis: Iterable[VDI], *, known: Collection[str]) -> frozenset[str]:
        """Return the references of those of ``vdis`` that are, or may be, temporary snapshots.

        The pool tells of a snapshot before we can tag it, and before we know which one it is. It is
        none of those that are ``known`` for something else.
        """
        if not self._taking and not self._temporary:
            return frozenset()
        return frozenset(
            vdi.ref
            for vdi in vdis
            if vdi.is_a_snapshot
            and (
                vdi.ref in self._temporary
                or (self._taking[vdi.snapshot_of] and not vdi.vbd_refs and vdi.ref not in known)
            )
        )

    def open(self, vdi: VDI, *, size: int) -> Source:
        """Return what a file that is opened now reads, ``size`` bytes of ``vdi``.

        ``files`` of it is 1 if the file is the first. The caller hands it to ``close`` once.
        """
        source = self._newest.get(vdi.ref)
        if source is None or not source.may_be_joined():
            source = self._newest[vdi.ref] = Source(self, vdi, size, previous=source)
        source.files += 1
        source.idle.deadline = float("inf")
        if source.instant is not None and source.instant.ref:
            self._connections.want(source.instant.ref)
        return source

    def close(self, source: Source) -> None:
        """Note that a file is closed; after the last one the source lingers."""
        source.files -= 1
        if source.files:
            return
        if source.instant is not None:
            source.idle.deadline = trio.current_time() + self._options.linger
            self._connections.leave(source.instant.ref)
        elif source.previous is not None:
            self._newest[source.vdi.ref] = source.previous
        else:
            del self._newest[source.vdi.ref]

    async def use(self, source: Source) -> Use:
        """Return a use of what ``source`` reads from, which is taken if need be.

        Cancelling it leaves snapshot and connection to those who read next.

        Raises:
            CbtfsError: the snapshot could not be taken.
        """
        if self._ended:
            raise errors.ExportError("the mount is ending")
        instant = source.instant or self._start(source)
        if not instant.ready.is_set():  # who waits for what is there waits a turn all the same
            await instant.ready.wait()
        if instant.error is not None:
            raise instant.error
        return self._connections.use(instant.ref)

    def has_open(self, vdi_refs: Collection[str]) -> bool:
        """Tell whether a file of one of these VDIs is open."""
        return any(self._newest[ref].files for ref in vdi_refs if ref in self._newest)

    async def let_go(self, vdi_refs: Collection[str]) -> None:
        """Close what lingers of these snapshot VDIs, which nobody has open."""
        sources = [self._newest[ref] for ref in vdi_refs if ref in self._newest]
        for source in sources:
            source.idle.cancel()
        for source in sources:
            await source.wait_gone()

    async def end(self) -> None:
        """Close all connections and destroy all snapshots, as far as the pool lets us in time.

        Not to be cancelled, but bounded.
        """
        self._ended = True
        running = list(self._running)
        with trio.CancelScope(shield=True):
            for source in running:
                source.idle.cancel()
            with trio.move_on_after(CLOSE_LIMIT + DESTROY_LIMIT):
                for source in running:
                    await source.wait_gone()
            for source in running:
                source.give_up()
            await self._connections.close_all()

    def _start(self, source: Source) -> _Instant:
        if source.previous is not None:
            source.previous.idle.cancel()
            source.previous = None
        instant = source.instant = _Instant()
        self._running.add(source)
        self._nursery.start_soon(self._run, source, instant)
        return instant

    async def _run(self, source: Source, instant: _Instant) -> None:
        """Hold what ``source`` reads from its first read until its time is over."""
        try:
            with instant.task:
                instant.ref = await self._take(source.vdi)
                if source.files:
                    self._connections.want(instant.ref)
                instant.ready.set()
                await self._hold(source, instant)
                await self._drop(source.vdi, instant.ref)
        except Exception as error:  # whatever it is, it belongs to those who read
            instant.error = error
            source.instant = None  # the next read tries again
        finally:
            self._running.discard(source)
            if self._newest.get(source.vdi.ref) is source and not source.files:
                del self._newest[source.vdi.ref]
            instant.ready.set()
            instant.gone.set()

    async def _hold(self, source: Source, instant: _Instant) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._learn, source, instant)
            with source.idle:
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()

    async def _learn(self, source: Source, instant: _Instant) -> None:
        """Find out what there is to be read of ``source``, once it is read at length."""
        instant.allocated = self._holes.known(instant.ref)
        await instant.long.wait()
        failures = 0
        while True:
            try:
                instant.allocated = await self._holes.learn(
                    instant.ref,
                    size=source.vdi.size,
                    name=f"VDI {source.vdi.uuid}",
                    reading=source.reading(),
                )
                return
            except Exception as error:  # whatever it is, those who read are told by their own reads
                failures += 1
                if not await source.recovers(error, failures=failures):
                    log.info("the holes of VDI %s stay unknown: %s", source.vdi.uuid, error)
                    return

    async def _take(self, vdi: VDI) -> str:
        """Return the reference of an immutable VDI with the contents of ``vdi``."""
        if not vdi.is_readable:
            raise errors.ExportError(f"VDI {vdi.uuid} has no data to read (type {vdi.type})")
        if vdi.is_a_snapshot:
            return vdi.ref
        self._taking[vdi.ref] += 1
        try:
            ref = await instant.take(self._pool, vdi)
            self._temporary.add(ref)
            return ref
        finally:
            self._taking[vdi.ref] -= 1
            self._taking += Counter()  # without what is 0 now

    async def _drop(self, vdi: VDI, ref: str) -> None:
        """Close the connection, and destroy the snapshot if it is a temporary one."""
        await self._connections.close(ref)
        if vdi.is_a_snapshot:
            return
        if await instant.destroy(self._pool, vdi, ref):
            self._temporary.discard(ref)


@asynccontextmanager
async def open_disks(
    pool: Pool, *, options: DiskOptions | None = None
) -> AsyncGenerator[Disks, None]:
    """Yield the disks of ``pool``; on exit connections are closed and snapshots destroyed."""
    options = options or DiskOptions()
    try:
        async with trio.open_nursery() as nursery:
            connections = Connections(pool, nursery, limit=options.connections)
            disks = Disks(pool, connections, nursery, options=options)
            try:
                yield disks
            finally:
                await disks.end()
    except BaseExceptionGroup as group:
        # no task of ours raises anything: this is what the body raised, wrapped by the nursery
        raise group.exceptions[0] from None


async def remove_leftovers(pool: Pool, inventory: Inventory) -> None:
    """Destroy the temporary snapshots that dead mounts of this machine left in ``pool``.

    Those of a living process, of another machine, and everything without our tag stay. A failure is
    logged and nothing more: a mount can do without it.
    """
    for vdi in inventory.vdis.values():
        owner = read_owner(vdi.other_config, vdi.uuid)
        if owner is None or owner.role != ROLE or not vdi.is_a_snapshot:
            continue
        maker = process.Process(owner.host, owner.boot, owner.pid, owner.starttime)
        if not maker.is_dead():
            continue
        try:
            with trio.fail_after(DESTROY_LIMIT):
                await pool.destroy_vdi(vdi.ref)
            log.info("removed snapshot %s, left by process %d", vdi.uuid, owner.pid)
        except (errors.CbtfsError, trio.TooSlowError) as error:
            log.warning("snapshot %s, left by a dead mount, stays: %s", vdi.uuid, error)
