"""Agreement: whether the image of a restore point is what the pool has, block by block.

::

    block           | 0 | 1 | 2 | 3 | 4 | 5 |
    changed since         x           x         by the pool's change tracking: not comparable
    may hold data     #   #       #   #         by the image's digests, or allocated in the pool
    compared          |---|       |---|         read from the pool, digested
    differs                       !             on record: this image is never a base again

What ``verify`` knows without the pool is that image and digests agree; an image that was made
wrong agrees with its digests. Blocks that read as zeros in the pool and hold data in the image are
counted apart: change tracking does not see what a guest discards (blktap, drivers/block-log.c).

Rules of this file:

1. Nothing of the store is locked while the pool is read: a sync of the same VM may run meanwhile.
   If that replaces what is compared with, the comparison ends and says so. While one runs, the
   snapshot of a point is left alone: it would have to wait with destroying it.
2. Only a full comparison clears a record, and only of blocks that it compared.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from threading import Lock

import trio

from . import counterpart, damage, digests, divergence, errors, extents, instant
from .bitmap import ChangeBitmap, Marks
from .catalogue import DiskPoint, Reference
from .counterpart import Counterpart, Missing
from .damage import Disagreement, Scope
from .difference import DigestArray
from .divergence import Readable
from .extents import Extent
from .pool import Pool
from .progress import Progress
from .store import Store


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison with the pool found.

    Attributes:
        how: what was compared with what.
        comparable: bytes that may hold data, and are as they were when the point was made.
        compared: bytes of these that were compared.
        found: what differs.
        warnings: sentences about what could not be put on record.
        unseen: why blocks that are zeros in the image were not compared; "" if they were.
    """

    how: str
    comparable: int
    compared: int
    found: Disagreement
    warnings: tuple[str, ...] = ()
    unseen: str = ""


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told how the disk called ``key`` gets on."""

    progress: Progress
    key: str


@dataclass(frozen=True, slots=True)
class _Reach:
    """What is to be compared of a disk.

    Attributes:
        disk: what to read.
        how: why all of that is comparable.
        changed: blocks that are not; None if there is none.
        allocated: blocks that may hold data in the pool; why it cannot tell, if so.
    """

    disk: Readable
    how: str
    changed: ChangeBitmap | None
    allocated: ChangeBitmap | str

    @property
    def unseen(self) -> str:
        """Why what is zero in the image is not compared, "" if it is."""
        return self.allocated if isinstance(self.allocated, str) else ""

    def comparable(self, known: DigestArray) -> Iterator[Extent]:
        """Yield what may hold data, here or there, and is as it was."""
        data: Iterable[Extent] = known.data()
        if not isinstance(self.allocated, str):
            data = extents.merge(merge(data, self.allocated.extents()))
        return extents.common(data, self._unchanged(known.size))

    def is_void(self, known: DigestArray) -> bool:
        """Return whether nothing of a disk is as it was."""
        return known.size > 0 and next(self._unchanged(known.size), None) is None

    def proven(self, known: DigestArray) -> Iterator[Extent]:
        """Yield what is known to agree if nothing of ``comparable`` differs."""
        if self.unseen:
            return self.comparable(known)
        return self._unchanged(known.size)

    def _unchanged(self, size: int) -> Iterator[Extent]:
        # of a disk that grew, a last block that was not whole is longer now
        stop = size if self.disk.size == size else size - size % digests.BLOCK
        changed = self.changed.extents() if self.changed is not None else ()
        return extents.complement(changed, stop=stop)


async def compare(
    pool: Pool, store: Store, reference: Reference, *, scope: Scope, told: Told
) -> Agreement | Missing:
    """Compare the image of a disk with what the pool has, and put on record what differs.

    Args:
        pool: where the disk is.
        store: of the image.
        reference: one disk of a point.
        scope: how much of what can be compared.
        told: hears of the progress.

    Returns:
        What was found; or why the pool has nothing to compare with.

    Raises:
        ImageDamaged: the image's digests are not as committed.
        StoreError: the point is gone.
        PoolError, ExportError: what is in the pool cannot be read.
    """
    if reference.disk is None:
        raise errors.UsageError("a comparison with the pool is of one disk")
    comparison = _Comparison(pool, store, reference, reference.disk, scope, told)
    try:
        return await comparison.run()
    except (errors.AuthenticationFailed, errors.PoolUnreachable):
        raise
    except (errors.PoolError, errors.ExportError) as exc:
        await comparison.explain(exc)
        raise


class _Comparison:
    """One disk; made for one ``run``."""

    def __init__(
        self,
        pool: Pool,
        store: Store,
        reference: Reference,
        disk: DiskPoint,
        scope: Scope,
        told: Told,
    ) -> None:
        self._pool = pool
        self._store = store
        self._reference = reference
        self._disk = disk
        self._scope = scope
        self._told = told
        self._begun: Counterpart | None = None

    async def run(self) -> Agreement | Missing:
        inventory = await self._pool.inventory()
        there = counterpart.find(inventory, self._reference.point, self._disk)
        if isinstance(there, Missing):
            return there
        self._begun = there
        if there.live is None and (why := self._locked()):
            return Missing(why)
        await self._pool.check_nbd()
        opening = trio.to_thread.run_sync(
            divergence.opened, self._store, self._reference, self._disk
        )
        with await opening as known:
            if there.live is None:
                return await self._snapshot(there, known)
            async with instant.held(self._pool, inventory, there.live) as ref:
                return await self._since(there, Readable(ref, there.live.size), known)

    def _locked(self) -> str:
        """Return why its own snapshot is not to be read, "" if it is: a sync may be destroying it.

        What has only its metadata left is not read, so a sync can do with that what it wants.
        """
        try:
            with self._store.lock(self._reference.history.uuid):
                return ""
        except errors.StoreLocked as exc:
            return str(exc)
        except errors.StoreError:  # a store that can only be read is locked by nobody
            return ""

    async def explain(self, exc: errors.CbtfsError) -> None:
        """Raise what made ``exc`` happen, if that was a sync of the same VM; else return."""
        try:
            inventory = await self._pool.inventory()
        except errors.PoolError:
            return
        there = counterpart.find(inventory, self._reference.point, self._disk)
        before = self._begun
        if before is None or (
            isinstance(there, Counterpart) and (there.live is None) is (before.live is None)
        ):
            return
        raise errors.PoolError(
            "what it is compared with went while that was read, perhaps as a sync ended; run the"
            " command again"
        ) from exc

    async def _snapshot(self, there: Counterpart, known: DigestArray) -> Agreement | Missing:
        """Compare with the point's own snapshot."""
        disk = Readable(there.snapshot.ref, there.snapshot.size)
        allocated = await self._allocated(disk)
        return await self._read(_Reach(disk, "its snapshot", None, allocated), known)

    async def _since(
        self, there: Counterpart, disk: Readable, known: DigestArray
    ) -> Agreement | Missing:
        """Compare with what has not changed since."""
        # before everything that attaches the disk: xapi refuses it while that is
        try:
            changed = await self._pool.changed_blocks(there.snapshot.ref, disk.ref, size=disk.size)
        except errors.ChangesUnknown as exc:
            return Missing(str(exc))
        allocated = await self._allocated(disk)
        reach = _Reach(disk, "what did not change since", changed, allocated)
        if reach.is_void(known):  # to call that equal would prove a wrong image right
            return Missing("all of it has changed since")
        return await self._read(reach, known, there=there)

    async def _allocated(self, disk: Readable) -> ChangeBitmap | str:
        try:
            return await self._pool.allocated(disk.ref, size=disk.size)
        except errors.AllocationUnknown as exc:
            return str(exc)

    async def _read(
        self, reach: _Reach, known: DigestArray, *, there: Counterpart | None = None
    ) -> Agreement | Missing:
        wanted, comparable = await trio.to_thread.run_sync(self._wanted, reach, known)
        compared = wanted.changed_bytes
        if reach.unseen and known.size and not comparable:
            return Missing(f"the image has no data to compare, and of its zeros: {reach.unseen}")
        self._told.progress.disk_started(
            self._told.key, method="compare", reason=reach.how, total=compared
        )
        check = _Check(known)
        await divergence.read(
            self._pool, reach.disk, check, wanted.extents(),
            advanced=lambda count: self._told.progress.advanced(
                self._told.key, read=count, written=0
            ),
        )  # fmt: skip
        differs, zeros = check.differs.bitmap(), check.zeros.bitmap()
        if differs.changed_blocks and there is not None and there.live is not None:
            differs, zeros = await self._confirmed(there, reach.disk, differs, zeros)
        found = Disagreement(
            blocks=differs.changed_blocks,
            zeros=zeros.changed_blocks,
            extents=tuple(islice(differs.extents(), damage.KEPT_EXTENTS)),
            sampled=self._scope.share < 1,
        )
        warnings = await trio.to_thread.run_sync(
            lambda: self._store.record_agreement(
                self._reference, self._disk.device, found,
                unproven=lambda recorded: _unproven(recorded, reach.proven(known), known.size),
            )
        )  # fmt: skip
        return Agreement(reach.how, comparable, compared, found, tuple(warnings), reach.unseen)

    def _wanted(self, reach: _Reach, known: DigestArray) -> tuple[ChangeBitmap, int]:
        """Return what to read, and the bytes that are comparable."""
        found = ChangeBitmap.of_extents(reach.comparable(known), size=known.size)
        comparable = found.changed_bytes
        if self._scope.share == 1:
            return found, comparable
        drawn = self._scope.drawn(found.extents(), comparable)
        return ChangeBitmap.of_extents(drawn, size=known.size), comparable

    async def _confirmed(
        self, there: Counterpart, disk: Readable, differs: ChangeBitmap, zeros: ChangeBitmap
    ) -> tuple[ChangeBitmap, ChangeBitmap]:
        """Return what differs without what changed while it was read.

        Nothing can of a snapshot. But a disk that nobody had attached is free between two
        connections, and a guest that was started and ended then may have written to it.
        """
        if there.live is None or disk.ref != there.live.ref:
            return differs, zeros
        changed = await self._pool.changed_blocks(there.snapshot.ref, disk.ref, size=disk.size)

        def without(found: ChangeBitmap) -> ChangeBitmap:
            same = extents.complement(changed.extents(), stop=found.size)
            return ChangeBitmap.of_extents(extents.common(found.extents(), same), size=found.size)

        return without(differs), without(zeros)


def _unproven(recorded: Sequence[Extent], proven: Iterator[Extent], size: int) -> Iterator[Extent]:
    """Yield what of ``recorded`` is not ``proven``."""
    cleared = extents.common(recorded, proven)
    return extents.common(recorded, extents.complement(cleared, stop=size))


class _Check:
    """Notes which blocks differ, and which of these are zeros in the pool."""

    def __init__(self, known: DigestArray) -> None:
        self.differs = Marks(size=known.size)
        self.zeros = Marks(size=known.size)
        self._known = known
        self._lock = Lock()

    def write(self, offset: int, data: memoryview) -> int:
        """Compare what was read at ``offset``; nothing is stored."""
        found = digests.of_blocks(data)
        expected = self._known.digests_of(offset, offset + len(data))
        for start, stop in digests.differences(found, expected, length=len(data)):
            runs = digests.runs(digests.part(found, start, stop), length=stop - start)
            zeros = [(first, last) for is_zero, first, last in runs if is_zero]
            self._note(offset + start, offset + stop, zeros)
        return 0

    def _note(self, start: int, stop: int, zeros: Iterable[tuple[int, int]]) -> None:
        with self._lock:
            self.differs.add(start, stop)
            for first, last in zeros:
                self.zeros.add(start + first, start + last)
