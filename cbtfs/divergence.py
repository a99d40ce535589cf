"""Divergence: which blocks of a disk of the pool are not as in a restore point.

::

    block                  | 0 | 1 | 2 | 3 | 4 | 5 |
    point and a later one        x   x                  their digests differ
    the later one and now            x       x          the pool's change tracking
    suspects                     x   x       x          read from the pool, digested
    differing                    x           x

Without change tracking all that may hold data, here or there, is suspect. Only blocks that were
read and found to differ are differing, so one that was written as it had been costs nothing. Where
one of the two is larger, the other counts as zero beyond its end, as ``difference`` has it.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from heapq import merge
from threading import Lock
from typing import Protocol

import trio

from . import committed, difference, digests, errors, extents, instant
from .bitmap import ChangeBitmap, Marks
from .catalogue import DiskPoint, Reference, VMHistory
from .copier import Copier
from .difference import DigestArray
from .errors import AGAIN
from .extents import Extent
from .inventory import VDI, Inventory
from .nbd import Export
from .pool import Pool
from .store import Store

CONNECTIONS = 2
"""Connections to each disk that is compared."""

GAP = 2 * digests.BLOCK
"""Bytes between two suspects that are read along: one request less."""


@dataclass(frozen=True, slots=True)
class Readable:
    """A disk of the pool, or a snapshot, that stays as it is while it is read.

    Attributes:
        ref: its reference; no NBD client of ours has it open yet.
        size: in bytes.
    """

    ref: str
    size: int


@dataclass(frozen=True, slots=True)
class Suspects:
    """The blocks to look at, and how they are known."""

    blocks: ChangeBitmap
    how: str


@dataclass(frozen=True, slots=True)
class Later:
    """The newest point with a disk, of which the pool still has the snapshot."""

    point: Reference
    disk: DiskPoint
    snapshot_ref: str


@dataclass(frozen=True, slots=True)
class Live:
    """A live disk.

    Attributes:
        inventory: the pool just now.
        vdi: the disk in it.
        history: the restore points that may have it; None for none.
    """

    inventory: Inventory
    vdi: VDI
    history: VMHistory | None


async def suspects(
    pool: Pool, store: Store, disk: Readable, known: DigestArray, later: Later | None
) -> Suspects:
    """Return which blocks of a disk may differ from what ``known`` is of.

    Raises:
        ImageDamaged: the digests of the later point are damaged.
        PoolError: the pool refused for another reason than that it cannot tell.
    """
    if later is not None:
        try:
            changed = await pool.changed_blocks(later.snapshot_ref, disk.ref, size=disk.size)
        except errors.ChangesUnknown as exc:
            return await _all_with_data(pool, disk, known, why=str(exc))

        def both() -> ChangeBitmap:
            ends = _ends(disk.size, known.size, later.disk.size)
            if known.disk is later.disk:  # what a large array costs is to see that it is whole
                return _of(disk, changed.extents(), ends)
            with opened(store, later.point, later.disk) as array:
                return _of(disk, changed.extents(), difference.between(known, array), ends)

        time = later.point.point.time
        return Suspects(await trio.to_thread.run_sync(both), f"changes since {time}")
    return await _all_with_data(pool, disk, known, why="no base of it is in the pool")


async def _all_with_data(pool: Pool, disk: Readable, known: DigestArray, *, why: str) -> Suspects:
    try:
        found = await pool.allocated(disk.ref, size=disk.size)
    except errors.AllocationUnknown:
        return Suspects(_of(disk, [Extent(0, disk.size)]), f"all of it ({why})")
    both = await trio.to_thread.run_sync(lambda: _of(disk, found.extents(), known.data()))
    return Suspects(both, f"all that holds data ({why})")


def _of(disk: Readable, *found: Iterable[Extent]) -> ChangeBitmap:
    """Return the blocks of ``disk`` that are in one of ``found``, each of which is in order."""
    return ChangeBitmap.of_extents(extents.clip(merge(*found), stop=disk.size), size=disk.size)


def _ends(*sizes: int) -> list[Extent]:
    """Return the blocks that are longer on one disk than on another, of these ``sizes``."""
    starts = {size - size % digests.BLOCK for size in sizes if size % digests.BLOCK}
    return [Extent(s, s + digests.BLOCK) for s in sorted(starts) if len(set(sizes)) > 1]


def find_later(store: Store, inventory: Inventory, history: VMHistory, vdi: VDI) -> Later | None:
    """Return the newest point with ``vdi`` that the pool can compare itself with; None if none."""
    for candidate in reversed(history.points):
        for known in candidate.disks:
            base = inventory.find_vdi(known.snapshot_uuid)
            if known.vdi_uuid != vdi.uuid or known.size > vdi.size or base is None:
                continue
            if base.is_a_snapshot and known.device not in store.damaged(
                candidate.vm_uuid, candidate.time
            ):
                return Later(Reference(history, candidate, known), known, base.ref)
    return None


def opened(store: Store, point: Reference, disk: DiskPoint) -> DigestArray:
    """Open the digests of ``disk``, one of ``point``; closed by the caller.

    Raises:
        ImageDamaged: they are not as committed.
        StoreError: the point is gone, or they cannot be opened.
    """
    with store.opened_point(point.history.uuid, point.point.time) as folder:
        return DigestArray(folder, disk)


async def differing(
    pool: Pool,
    disk: Readable,
    known: DigestArray,
    found: Suspects,
    *,
    advanced: Callable[[int], None],
) -> ChangeBitmap:
    """Read the suspects, and return which blocks differ, also those that only ``known`` has.

    Args:
        pool: that has the disk.
        disk: what is read.
        known: the digests to compare with.
        found: what to read.
        advanced: called with the bytes read since the last call.

    Raises:
        ImageDamaged: the digests cannot be read.
        ExportError: the disk cannot be read.
        PoolError: no host exports it.
    """
    check = _Check(known, size=max(known.size, disk.size))
    await read(pool, disk, check, extents.merge(found.blocks.extents(), gap=GAP), advanced=advanced)
    if known.size > disk.size:
        await trio.to_thread.run_sync(check.add_beyond, disk.size)
    return check.marks.bitmap()


async def until_now(
    pool: Pool,
    store: Store,
    point: Reference,
    live: Live,
    *,
    started: Callable[[Suspects], None],
    advanced: Callable[[int], None],
) -> tuple[Suspects, ChangeBitmap]:
    """Return what was read of a live disk, and which blocks are not as in a restore point.

    A disk that is attached is read through a temporary snapshot.

    Args:
        pool: that has the disk.
        store: of the point.
        point: one disk of it.
        live: the disk as it is.
        started: told what is to be read before it is.
        advanced: called with the bytes read since the last call.

    Raises:
        ImageDamaged: the digests are not as committed.
        StoreError: the point is gone.
        ExportError: the disk cannot be read.
        PoolError: no host exports it, or no snapshot of it can be taken.
    """
    vdi, inventory, disk = live.vdi, live.inventory, point.disk
    if disk is None:
        raise errors.UsageError("a comparison is of one disk")
    if not vdi.is_readable:
        raise errors.ExportError(f"VDI {vdi.uuid} has no data to read (type {vdi.type})")
    later = find_later(store, inventory, live.history, vdi) if live.history else None
    with await trio.to_thread.run_sync(opened, store, point, disk) as known:
        async with instant.held(pool, inventory, vdi) as ref:
            readable = Readable(ref, vdi.size)
            found = await suspects(pool, store, readable, known, later)
            started(found)
            blocks = await differing(pool, readable, known, found, advanced=advanced)
    return found, blocks


class Check(Protocol):
    """Where the bytes land: nowhere; they are compared."""

    def write(self, offset: int, data: memoryview) -> int:
        """Compare what was read at ``offset``; return 0, as nothing is stored."""
        ...


async def read(
    pool: Pool,
    disk: Readable,
    check: Check,
    wanted: Iterable[Extent],
    *,
    advanced: Callable[[int], None],
) -> None:
    """Read ``wanted`` of a disk into ``check``; see ``differing``.

    Raises:
        ExportError: the disk cannot be read.
        PoolError: no host exports it; or it was destroyed meanwhile, and who knows what was read.
    """
    copier = Copier(
        lambda: _connected(pool, disk),
        check,
        connections=CONNECTIONS,
        advanced=lambda read, _: advanced(read),
    )
    await copier.copy(wanted)
    if copier.tally.pieces:
        vdi = (await pool.inventory()).vdis.get(disk.ref)
        if vdi is None or not vdi.is_readable:
            raise errors.PoolError(f"the disk was removed from the pool while it was read; {AGAIN}")


@asynccontextmanager
async def _connected(pool: Pool, disk: Readable) -> AsyncGenerator[Export]:
    async with pool.open_export(disk.ref) as export:
        if export.size != disk.size:
            raise errors.ExportError(
                f"the host exports {export.size} bytes of a disk of {disk.size}: it was resized"
                " meanwhile, or its SR has to be scanned; run the command again"
            )
        yield export


class _Check:
    """Notes which blocks differ."""

    def __init__(self, known: DigestArray, *, size: int) -> None:
        self.marks = Marks(size=size)
        self._known = known
        self._lock = Lock()

    def write(self, offset: int, data: memoryview) -> int:
        """Compare what was read at ``offset``; nothing is stored."""
        found = digests.of_blocks(data)
        expected = self._known.digests_of(offset, offset + len(data))
        for start, stop in digests.differences(found, expected, length=len(data)):
            with self._lock:
                self.marks.add(offset + start, offset + stop)
        return 0

    def add_beyond(self, size: int) -> None:
        """Note what holds data beyond the end of a disk of ``size`` bytes."""
        for start, stop in self._known.data():
            if stop > size:
                self.marks.add(max(start, -(-size // digests.BLOCK) * digests.BLOCK), stop)


def pieces(blocks: ChangeBitmap) -> Iterable[tuple[Extent, list[Extent]]]:
    """Yield the set blocks, zeros or not, in pieces to be sent whole."""
    return ((piece, [piece]) for piece in _split(blocks))


def _split(blocks: ChangeBitmap) -> Iterator[Extent]:
    return extents.split(blocks.extents(), size=committed.PIECE)
