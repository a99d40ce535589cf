"""Disk copy: one disk of a restore point, from its snapshot in the pool to a finished image.

::

    changed blocks known?  yes: clone the base, copy only those      (incremental)
                           no:  begin empty, copy everything         (full)

The plan was made before the snapshot was taken, so what the snapshot shows goes before it: its
size, and whether the pool can really name the changed blocks.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Self

import trio

from . import errors, plan as planning, units
from .bitmap import ChangeBitmap
from .catalogue import DiskPoint
from .copier import Copier, Source
from .extents import Extent
from .image import Image
from .inventory import VDI
from .plan import Base, DiskPlan, Reason
from .pool import Pool
from .progress import Progress
from .store import Stage, file_names


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told how the disk called ``key`` gets on."""

    progress: Progress
    key: str

    def advanced(self, read: int, written: int) -> None:
        """Pass on what one more piece added, in bytes."""
        self.progress.advanced(self.key, read=read, written=written)


async def copy_disk(
    pool: Pool, stage: Stage, disk: DiskPlan, vdi: VDI, *, connections: int, told: Told
) -> DiskPoint:
    """Copy the snapshot ``vdi`` of ``disk`` into ``stage``; return its record.

    Args:
        pool: where the snapshot is.
        stage: the restore point in the making.
        disk: what was planned for the disk.
        vdi: its snapshot, which no NBD client has open yet.
        connections: how many NBD connections to use.
        told: hears of the progress; ``disk_finished`` is the caller's to tell.

    Raises:
        CbtfsError: the disk could not be copied; its half-made image stays in ``stage``.
    """
    begun = monotonic()
    work = await _decide(pool, disk, vdi)
    spent = 0

    def copied(count: int) -> None:
        nonlocal spent
        spent += count
        # without reflinks a clone takes long, and must not outlive a Ctrl-C
        trio.from_thread.check_cancelled()

    try:
        image = await trio.to_thread.run_sync(work.open_image, stage, copied)
    except errors.ImageDamaged as exc:
        work = _Work.full(disk, vdi, reason=Reason.BASE_DAMAGED, detail=str(exc))
        image = await trio.to_thread.run_sync(work.open_image, stage, copied)
    if image.origin == "copy":
        told.progress.message(
            f"{told.key}: the store cannot share blocks (no XFS or btrfs), so"
            f" {units.format_size(spent)} of the last image were copied, and take space again"
        )
    told.progress.disk_started(
        told.key, method=work.disk.method, reason=work.disk.reason, total=work.bytes_changed
    )
    try:
        copier = Copier(
            lambda: _connect(pool, vdi), image, connections=connections, advanced=told.advanced
        )
        tally = await copier.copy(work.extents())
        root = await trio.to_thread.run_sync(image.finish)
    finally:
        image.close()
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
        method=work.disk.method,
        reason=work.disk.reason,
        base=work.base.time if work.base else "",
        base_snapshot_uuid=work.base.snapshot_uuid if work.base else "",
        extents=work.extent_count(),
        bytes_changed=work.bytes_changed,
        bytes_read=tally.read,
        bytes_written=tally.written,
        seconds=round(monotonic() - begun, 3),
    )


async def _decide(pool: Pool, disk: DiskPlan, vdi: VDI) -> "_Work":
    """Return what to copy of ``vdi``, the snapshot; all of it where the pool cannot tell."""
    base = disk.base
    if base is None:
        return _Work(disk, vdi.size)
    if vdi.size < base.disk.size:
        detail = f"the disk shrank since {base.time}"
        return _Work.full(disk, vdi, reason=Reason.RESIZED, detail=detail)
    try:
        changes = await pool.changed_blocks(base.snapshot_ref, vdi.ref, size=vdi.size)
    except errors.ChangesUnknown as exc:
        return _Work.full(disk, vdi, reason=Reason(exc.reason), detail=str(exc))
    return _Work(disk, vdi.size, changes)


@asynccontextmanager
async def _connect(pool: Pool, vdi: VDI) -> AsyncGenerator[Source]:
    async with pool.open_export(vdi.ref) as export:
        if export.size != vdi.size:
            raise errors.ExportError(
                f"the host exports {export.size} bytes of VDI {vdi.uuid}, xapi says {vdi.size};"
                " nothing was copied: scan the SR and run sync again"
            )
        yield export


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be copied of one snapshot: ``changes``, or without them all of it."""

    disk: DiskPlan
    size: int
    changes: ChangeBitmap | None = None

    @classmethod
    def full(cls, disk: DiskPlan, vdi: VDI, *, reason: Reason, detail: str) -> Self:
        """Return a full copy of ``vdi`` in place of the increment that was planned."""
        return cls(planning.fall_back(disk, reason=reason, detail=detail), vdi.size)

    @property
    def base(self) -> Base | None:
        """What the image is cloned from."""
        return self.disk.base if self.changes is not None else None

    @property
    def bytes_changed(self) -> int:
        """Bytes that the pool says differ from the base; all, if it cannot say."""
        return self.size if self.changes is None else self.changes.changed_bytes

    def extents(self) -> Iterator[Extent]:
        """Return what to read, in order."""
        if self.changes is not None:
            return self.changes.extents()
        return iter([Extent(0, self.size)] if self.size else [])

    def extent_count(self) -> int:
        """Return how many extents there are to read."""
        return self.changes.extent_count() if self.changes is not None else int(self.size > 0)

    def open_image(self, stage: Stage, copied: Callable[[int], None]) -> Image:
        """Make the image to copy into; ``copied`` hears of the bytes where a clone is a copy."""
        file, _ = file_names(self.disk.device)
        if self.base is None:
            return stage.new_image(file, size=self.size)
        return stage.cloned_image(
            file,
            base_time=self.base.time,
            base=self.base.disk,
            size=self.size,
            copied=copied,
        )
