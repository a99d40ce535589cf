"""Divergence: which blocks of a disk of the pool are not as in a restore point.

::

    block                  | 0 | 1 | 2 | 3 | 4 | 5 |
    point and a later one        x   x                  their digests differ
    the later one and now            x       x          the pool's change tracking
    suspects                     x   x       x          read from the pool, digested
    differing                    x           x          to be written

Without change tracking all that may hold data, here or there, is suspect. Only blocks that were
read and found to differ are differing, so one that was written as it had been costs nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import merge
from threading import Lock

import trio

from . import committed, digests, errors, extents
from .bitmap import ChangeBitmap
from .catalogue import DiskPoint, Reference
from .committed import Committed
from .copier import Copier
from .extents import Extent
from .inventory import VDI, Inventory
from .pool import Pool
from .store import Store

CONNECTIONS = 2
"""Connections to each disk that is compared."""

GAP = 2 * digests.BLOCK
"""Bytes between two suspects that are read along: one request less."""


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


async def suspects(
    pool: Pool, store: Store, vdi: VDI, image: Committed, later: Later | None
) -> Suspects:
    """Return which blocks of a disk may differ from ``image``; the disk is attached nowhere.

    Raises:
        ImageDamaged: the digests of the later point are damaged.
        PoolError: the pool refused for another reason than that it cannot tell.
    """
    if later is not None:
        try:
            changed = await pool.changed_blocks(later.snapshot_ref, vdi.ref, size=vdi.size)
        except errors.ChangesUnknown as exc:
            return await _all_with_data(pool, vdi, image, why=str(exc))

        def both() -> ChangeBitmap:
            between = _between(store, image, later)
            return ChangeBitmap.of_extents(merge(changed.extents(), between), size=vdi.size)

        time = later.point.point.time
        return Suspects(await trio.to_thread.run_sync(both), f"changes since {time}")
    return await _all_with_data(pool, vdi, image, why="no base of it is in the pool")


async def _all_with_data(pool: Pool, vdi: VDI, image: Committed, *, why: str) -> Suspects:
    try:
        found = await pool.allocated(vdi.ref, size=vdi.size)
    except errors.AllocationUnknown:
        everything = ChangeBitmap.of_extents([Extent(0, vdi.size)], size=vdi.size)
        return Suspects(everything, f"all of it ({why})")
    both = await trio.to_thread.run_sync(
        lambda: ChangeBitmap.of_extents(merge(found.extents(), image.pieces()), size=vdi.size)
    )
    return Suspects(both, f"all that holds data ({why})")


def find_later(
    store: Store, inventory: Inventory, point: Reference, disk: DiskPoint
) -> Later | None:
    """Return the newest point with ``disk`` that the pool can compare itself with; None if none."""
    for candidate in reversed(point.history.points):
        for known in candidate.disks:
            base = inventory.find_vdi(known.snapshot_uuid)
            if (known.vdi_uuid, known.size) != (disk.vdi_uuid, disk.size) or base is None:
                continue
            if base.is_a_snapshot and known.device not in store.damaged(
                candidate.vm_uuid, candidate.time
            ):
                return Later(Reference(point.history, candidate, known), known, base.ref)
    return None


def _between(store: Store, image: Committed, later: Later) -> list[Extent]:
    """Return where the digests of ``image`` and those of the later point differ."""
    with ExitStack() as stack:
        files = stack.enter_context(store.image_files(later.point, later.disk))
        other = stack.enter_context(
            committed.opened(files, size=later.disk.size, root=later.disk.digest_root)
        )
        pieces = extents.split(
            extents.merge(merge(image.pieces(), other.pieces())), size=committed.PIECE
        )
        return [
            Extent(piece.start + start, piece.start + stop)
            for piece in pieces
            for start, stop in digests.differences(
                image.digests_of(*piece), other.digests_of(*piece), length=piece.length
            )
        ]


async def differing(
    pool: Pool, vdi: VDI, image: Committed, found: Suspects, *, advanced: Callable[[int], None]
) -> ChangeBitmap:
    """Read the suspects, and return which blocks differ.

    Args:
        pool: that has the disk.
        vdi: the disk, attached nowhere.
        image: of the same size.
        found: what to read.
        advanced: called with the bytes read since the last call.

    Raises:
        ExportError: the disk cannot be read.
        PoolError: no host exports it.
    """
    check = _Check(image)
    copier = Copier(
        lambda: pool.open_export(vdi.ref),
        check,
        connections=CONNECTIONS,
        advanced=lambda read, _: advanced(read),
    )
    await copier.copy(extents.merge(found.blocks.extents(), gap=GAP))
    return ChangeBitmap.of_extents(sorted(check.found), size=vdi.size)


class _Check:
    """Where the bytes land: nowhere; what differs is noted."""

    def __init__(self, image: Committed) -> None:
        self.found: list[Extent] = []
        self._image = image
        self._lock = Lock()

    def write(self, offset: int, data: memoryview) -> int:
        """Compare what was read at ``offset``; nothing is stored."""
        found = digests.of_blocks(data)
        expected = self._image.digests_of(offset, offset + len(data))
        wrong = [
            Extent(offset + start, offset + stop)
            for start, stop in digests.differences(found, expected, length=len(data))
        ]
        with self._lock:
            self.found += wrong
        return 0


def pieces(blocks: ChangeBitmap) -> Iterable[tuple[Extent, list[Extent]]]:
    """Yield the set blocks, zeros or not, in pieces to be sent whole."""
    return ((piece, [piece]) for piece in _split(blocks))


def _split(blocks: ChangeBitmap) -> Iterator[Extent]:
    return extents.split(blocks.extents(), size=committed.PIECE)
