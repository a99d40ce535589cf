"""Disk copy: one disk of a restore point, from its snapshot in the pool to a finished image.

::

    method        begins as            reads                            writes
    full          nothing              what may hold data, or all       what it read
    incremental   clone of the base    changed blocks, and a sample     the changed blocks
    compare       clone of an image    what may hold data, or all       the blocks that differ
    resume        its half-made image  what is left of one of these     as that

The plan was made before the snapshot was taken, so what the snapshot shows goes before it: its
size, and whether the pool can really name the changed blocks. And what the pool says is not
believed blindly: blocks that should be as they were are read, a few of them, and compared. One that
differs turns an increment into a comparison of everything, over the same image.

Rules of this file:

1. ``list_changed_blocks`` comes before everything that attaches the snapshot: xapi refuses it while
   a VBD is attached, and ours in dom0 counts (xen-api, xapi_vdi.ml). An export of the block
   allocation table comes next, the NBD connections last.
2. A list of blocks that turned out wrong is on record in the journal before all is read.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from random import Random, SystemRandom

import trio

from . import errors, extents, plan as planning, units
from .bitmap import ChangeBitmap
from .catalogue import DiskPoint
from .copier import Buffers, Copier, Source
from .image import Image
from .inventory import VDI
from .landing import Landing
from .logbook import Logbook
from .plan import DiskPlan, Reason
from .pool import Pool
from .progress import Progress
from .rate import Rate
from .sample import Sample
from .store import Stage, file_names
from .work import Work

WORTH_ASKING = 16 * units.MiB
"""Size of a disk from which on the pool is asked what may hold data: to attach the disk for that
takes longer than to read one that is smaller."""

WORTH_CONNECTING = 64 * units.MiB
"""Bytes to read for which one more connection is worth its while: a host takes seconds to plug the
disk into its dom0, and to unplug it again."""


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy.

    Attributes:
        connections: NBD connections to use, at most; fewer if there is little to read.
        sample: how many blocks that need not be read are read nevertheless, and compared.
        rate: shared with all other disks, or None.
        buffers: shared with all other disks, or None.
        rng: draws the sample; nobody can foresee what it will be.
    """

    connections: int = 2
    sample: Sample = field(default_factory=Sample)
    rate: Rate | None = None
    buffers: Buffers | None = None
    rng: Random = field(default_factory=SystemRandom)


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told how the disk called ``key`` gets on."""

    progress: Progress
    key: str

    def advanced(self, read: int, written: int) -> None:
        """Pass on what one more piece added, in bytes."""
        self.progress.advanced(self.key, read=read, written=written)

    def message(self, text: str) -> None:
        """Tell a sentence about the disk."""
        self.progress.message(f"{self.key}: {text}")


async def copy_disk(
    pool: Pool, stage: Stage, disk: DiskPlan, vdi: VDI, *, options: CopyOptions, told: Told
) -> DiskPoint:
    """Copy the snapshot ``vdi`` of ``disk`` into ``stage``; return its record.

    If it fails for anything but the store, or is cancelled, what was copied is on record in the
    stage's journal, and a later call for the same snapshot goes on from there.

    Args:
        pool: where the snapshot is.
        stage: the restore point in the making.
        disk: what was planned for the disk.
        vdi: its snapshot, which no NBD client has open yet.
        options: how to.
        told: hears of the progress; ``disk_finished`` is the caller's to tell.

    Raises:
        CbtfsError: the disk could not be copied; its half-made image stays in ``stage``.
    """
    return await _DiskCopy(pool, stage, disk, vdi, options, told).run()


class _DiskCopy:
    """One disk on its way; made for one ``run``."""

    def __init__(
        self,
        pool: Pool,
        stage: Stage,
        disk: DiskPlan,
        vdi: VDI,
        options: CopyOptions,
        told: Told,
    ) -> None:
        self._pool = pool
        self._stage = stage
        self._vdi = vdi
        self._options = options
        self._told = told
        entry = stage.journaled.get(disk.device) if disk.method == "resume" else None
        if disk.method == "resume" and entry is None:  # the journal could be read a moment ago only
            disk = replace(disk, method="full" if disk.base is None else "compare")
        self._plan = disk
        self._log = Logbook(stage, vdi, entry)
        self._allocated = -1
        self._compared = self._wrong = 0

    async def run(self) -> DiskPoint:
        before = self._log.before
        if before is not None and before.finished is not None:
            if await self._is_as_it_was(before.finished):
                return before.finished
            method = before.method if self._plan.base is not None else "full"
            self._plan = replace(self._plan, method=method)
            self._log.begin_anew()
        work, image = await self._open_image(await self._decide())
        try:
            wrong = await self._copy(work, image)
            while wrong is not None:
                work = await self._distrusting(work, str(wrong))
                wrong = await self._copy(work, image)
            root = await trio.to_thread.run_sync(image.finish)
        finally:
            image.close()
        point = self._point(work, root)
        await self._log.finish(work, point)
        return point

    # ── what to do ───────────────────────────────────────────────────────────────────────────────

    async def _decide(self) -> Work:
        """Return what to do, given what the pool knows of the snapshot."""
        disk, vdi = self._plan, self._vdi
        if self._log.before is not None:
            disk = replace(disk, method=self._log.before.method)
        base = disk.base
        if base is not None and vdi.size < base.disk.size:
            detail = f"the disk shrank since {base.time}"
            disk = planning.fall_back(disk, reason=Reason.RESIZED, detail=detail)
        elif base is not None and disk.method == "incremental":
            try:
                changes = await self._pool.changed_blocks(base.snapshot_ref, vdi.ref, size=vdi.size)
            except errors.ChangesUnknown as exc:
                self._log.begin_anew()
                disk = planning.fall_back(disk, reason=Reason(exc.reason), detail=str(exc))
            else:
                return self._sampled(Work(disk=disk, size=vdi.size, expected=changes))
        return await self._all_of_it(disk)

    def _sampled(self, work: Work) -> Work:
        """Return ``work`` with its sample, and beginning where the logbook says."""
        sampled = work.sampled(self._options.sample, self._options.rng)
        return replace(sampled, offset=self._log.offset)

    async def _all_of_it(self, disk: DiskPlan) -> Work:
        """Return the work of reading all that may hold data."""
        self._allocated = -1
        work = Work(disk=disk, size=self._vdi.size)
        if work.size < WORTH_ASKING or self._log.distrusted:
            return self._sampled(work)
        try:
            allocated = await self._pool.allocated(self._vdi.ref, size=work.size)
        except errors.AllocationUnknown as exc:
            detail = f"{disk.detail}; all of it is read: {exc}"
            return self._sampled(replace(work, disk=replace(disk, detail=detail)))
        self._allocated = allocated.changed_bytes
        return self._sampled(replace(work, expected=allocated))

    async def _distrusting(self, work: Work, why: str) -> Work:
        """Return what to do instead of ``work``, whose list of blocks turned out wrong."""
        disk = work.disk
        if disk.method == "incremental":
            self._told.message(
                f"the pool's list of changed blocks is wrong ({why}); the whole disk is compared"
            )
            disk = replace(disk, method="compare", reason=Reason.CBT_MISMATCH, detail=why)
        else:
            self._told.message(f"the pool's list of allocated blocks is wrong ({why}); all is read")
            disk = replace(disk, detail=f"{disk.detail}; {why}")
            self._log.distrusted = True
        await self._log.start_over(replace(work, disk=disk))
        return await self._all_of_it(disk)

    # ── the image ────────────────────────────────────────────────────────────────────────────────

    async def _open_image(self, work: Work) -> tuple[Work, Image]:
        spent = 0

        def copied(count: int) -> None:
            nonlocal spent
            spent += count
            # without reflinks a clone takes long, and must not outlive a Ctrl-C
            trio.from_thread.check_cancelled()

        if self._log.before is not None:
            try:
                return work, await trio.to_thread.run_sync(self._make_image, work, copied)
            except errors.ImageDamaged:
                self._log.begin_anew()
                work = replace(work, offset=0)
        try:
            image = await trio.to_thread.run_sync(self._make_image, work, copied)
        except errors.ImageDamaged as exc:
            damaged = planning.fall_back(work.disk, reason=Reason.BASE_DAMAGED, detail=str(exc))
            work = await self._all_of_it(damaged)
            image = await trio.to_thread.run_sync(self._make_image, work, copied)
        if image.origin == "copy":
            self._told.message(
                "the store cannot share blocks (no XFS or btrfs), so"
                f" {units.format_size(spent)} of the last image were copied, and take space again"
            )
        return work, image

    def _make_image(self, work: Work, copied: Callable[[int], None]) -> Image:
        """Open the image to copy into; ``copied`` hears of the bytes where a clone is a copy."""
        file, _ = file_names(work.disk.device)
        base = work.disk.base
        if self._log.before is not None:
            return self._stage.reopened_image(file, size=work.size)
        if base is None:
            return self._stage.new_image(file, size=work.size)
        return self._stage.cloned_image(
            file, base_time=base.time, base=base.disk, size=work.size, copied=copied
        )

    async def _is_as_it_was(self, point: DiskPoint) -> bool:
        """Tell whether the image that an interrupted run had finished is still as it was."""
        file, _ = file_names(point.device)
        try:
            image = await trio.to_thread.run_sync(
                lambda: self._stage.reopened_image(file, size=point.size)
            )
            with image:
                await trio.to_thread.run_sync(image.recheck)
        except errors.StoreError:
            return False
        return image.root == point.digest_root

    # ── copying ──────────────────────────────────────────────────────────────────────────────────

    async def _copy(self, work: Work, image: Image) -> errors.BitmapWrong | None:
        """Bring ``work`` over; return why it must be done otherwise, None when it is done."""
        self._told.progress.disk_started(
            self._told.key,
            method=self._method(work),
            reason=work.disk.reason,
            total=work.remaining,
        )
        if work.disk.method == "compare" and work.expected is not None:
            await trio.to_thread.run_sync(_clear_rest, image, work.expected)
        landing = Landing(image, work)
        copier = Copier(
            lambda: _connect(self._pool, self._vdi),
            landing,
            connections=min(self._options.connections, 1 + work.remaining // WORTH_CONNECTING),
            advanced=self._advanced,
            rate=self._options.rate,
            buffers=self._options.buffers,
        )
        failure: errors.CbtfsError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._log.keep, copier, work, image, nursery.cancel_scope)
                try:
                    await copier.copy(work.wanted())
                except errors.CbtfsError as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
            failure = failure or self._log.failure
        finally:
            if not self._wrong:  # so many, up to the first list of blocks that was wrong
                self._compared += landing.compared
                self._wrong = landing.wrong
            if copier.position is not None and not isinstance(failure, _NOTHING_TO_NOTE):
                with trio.CancelScope(shield=True), suppress(errors.StoreError):
                    await self._log.note(copier, work, image)
        if failure is None or isinstance(failure, errors.BitmapWrong):
            return failure
        raise failure

    def _advanced(self, read: int, written: int) -> None:
        self._log.advanced(read, written)
        self._told.advanced(read, written)

    def _method(self, work: Work) -> str:
        return "resume" if self._log.before is not None else work.disk.method

    # ── records ──────────────────────────────────────────────────────────────────────────────────

    def _point(self, work: Work, root: str) -> DiskPoint:
        disk, vdi = work.disk, self._vdi
        read, written, seconds = self._log.totals
        file, digests = file_names(disk.device)
        return DiskPoint(
            device=disk.device,
            file=file,
            digests=digests,
            digest_root=root,
            vdi_uuid=disk.vdi_uuid,
            vdi_name=vdi.name,
            sr_uuid=disk.sr_uuid,
            size=vdi.size,
            snapshot_uuid=vdi.uuid,
            cbt=vdi.cbt_enabled,
            method=self._method(work),
            resumed=disk.method if self._log.before is not None else "",
            reason=disk.reason,
            detail=disk.detail,
            base=disk.base.time if disk.base else "",
            base_snapshot_uuid=disk.base.snapshot_uuid if disk.base else "",
            extents=work.extent_count(),
            bytes_changed=work.total,
            blocks_sampled=self._compared,
            blocks_mismatched=self._wrong,
            allocated=self._allocated,
            bytes_read=read,
            bytes_written=written,
            seconds=seconds,
        )


_NOTHING_TO_NOTE = errors.StoreError, errors.BitmapWrong
"""Failures after which an entry in the journal cannot be written, or would be of no use."""


def _clear_rest(image: Image, allocated: ChangeBitmap) -> None:
    """Make holes of all that is not ``allocated``: it reads as zeros, and is not read."""
    for start, stop in extents.complement(allocated.extents(), stop=image.size):
        image.zero(start, stop - start)


@asynccontextmanager
async def _connect(pool: Pool, vdi: VDI) -> AsyncGenerator[Source]:
    async with pool.open_export(vdi.ref) as export:
        if export.size != vdi.size:
            raise errors.ExportError(
                f"the host exports {export.size} bytes of VDI {vdi.uuid}, xapi says {vdi.size};"
                " nothing was copied: scan the SR and run sync again"
            )
        yield export
