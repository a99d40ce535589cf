"""In place: a restore point written over the disks that it is of; only blocks that differ.

::

    check       the disks are there, as large as then, their VM halted
    snapshot    of the VM as it is now, the user's to keep; of an interrupted run, the one it took
    learn       which blocks differ (see divergence)      a few disks at a time
    write       these, and read some or all of it back
    finish      the snapshot is no longer marked

Rules of this file:

1. The safety snapshot has no tag of ours: nothing of cbtfs ever destroys it.
2. While its restore is not finished it is marked, with its own uuid. A run that finds the mark goes
   on: what differs is learned anew from the disks as they are, so nothing has to be remembered. A
   snapshot of a finished restore is never taken for it, as the VM has lived since.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import trio

from . import divergence, errors, readback
from .bitmap import ChangeBitmap
from .catalogue import DiskPoint, Reference
from .chunks import Chunks
from .committed import Committed
from .inventory import VDI, VM, Inventory
from .newdisks import DISKS_AT_ONCE, Goal, Images, Restored
from .pool import Pool
from .progress import Progress
from .readback import Written
from .store import Store

MARK = "cbtfs:restoring"
"""Key in ``other_config`` of a safety snapshot whose restore is not finished."""


@dataclass(frozen=True, slots=True)
class Safety:
    """The snapshot that brings back what was there before."""

    ref: str
    uuid: str
    reused: bool = False

    @property
    def way_back(self) -> str:
        """The command that goes back to it."""
        return f"xe snapshot-revert snapshot-uuid={self.uuid}"


def vm_of(inventory: Inventory, goal: Goal) -> VM:
    """Return the VM whose disks are restored, once it is sure that they can be.

    Raises:
        NotFound: the VM is gone, or a disk.
        PoolError: it is not halted, or a disk is not as large as it was, or attached elsewhere.
    """
    vm = next((vm for vm in inventory.live_vms() if vm.uuid == goal.point.history.uuid), None)
    if vm is None:
        raise errors.NotFound(
            f"the pool has no VM {goal.point.history.uuid}, which {goal.label} is of; restore it"
            " with --to-sr SR"
        )
    own = {disk.vdi.ref for disk in inventory.disks_of(vm)}
    for disk in goal.disks:
        vdi = vdi_of(inventory, disk)
        if vdi.ref not in own:
            raise errors.PoolError(
                f"VDI {vdi.uuid} is no disk of VM {vm.name!r} any more; restore it with --to-sr SR"
            )
        _check_size(vdi, disk)
        _check_users(inventory, vm, vdi)
    if vm.power_state != "Halted":
        raise errors.PoolError(
            f"VM {vm.name!r} is {vm.power_state.lower()}, and its disks can only be written while"
            f" it is halted: xe vm-shutdown uuid={vm.uuid}"
        )
    return vm


def vdi_of(inventory: Inventory, disk: DiskPoint) -> VDI:
    """Return the disk of the pool that ``disk`` is of; raises NotFound."""
    vdi = inventory.find_vdi(disk.vdi_uuid)
    if vdi is None or vdi.is_a_snapshot or not vdi.is_readable:
        raise errors.NotFound(
            f"VDI {disk.vdi_uuid}, which {disk.device} is of, is not in the pool any more; restore"
            " it with --to-sr SR"
        )
    return vdi


def _check_size(vdi: VDI, disk: DiskPoint) -> None:
    if vdi.size != disk.size:
        raise errors.PoolError(
            f"{disk.device} has {vdi.size} bytes and had {disk.size} when the restore point was"
            " made; restore it with --to-sr SR"
        )


def _check_users(inventory: Inventory, vm: VM, vdi: VDI) -> None:
    for vbd in map(inventory.vbds.get, vdi.vbd_refs):
        other = inventory.vms.get(vbd.vm_ref) if vbd is not None else None
        if vbd is not None and vbd.currently_attached and other is not None and other != vm:
            raise errors.PoolError(
                f"VDI {vdi.uuid} is attached to VM {other.name!r} too; shut that down, or detach"
                " the disk from it"
            )


class InPlace:
    """One restore over the disks that a point is of.

    Args:
        pool: that has them.
        store: of the point.
        goal: the point.
        inventory: the pool just now.
        progress: told of each disk.
    """

    def __init__(
        self, pool: Pool, store: Store, goal: Goal, inventory: Inventory, progress: Progress
    ) -> None:
        self._pool = pool
        self._store = store
        self._goal = goal
        self._inventory = inventory
        self._progress = progress
        self._error: errors.CbtfsError | None = None
        self._done: dict[str, Restored] = {}

    async def safety(self, vm: VM) -> Safety:
        """Take the safety snapshot, or return the one of the same restore that was interrupted.

        Raises:
            PoolError: the pool refused.
        """
        for snapshot in reversed(self._inventory.vm_snapshots_of(vm)):
            if snapshot.other_config.get(MARK) == self._mark(snapshot.uuid):
                return Safety(snapshot.ref, snapshot.uuid, reused=True)
        name = f"cbtfs before restore of {self._goal.label}"
        ref, uuid = await self._pool.vms.snapshot(vm.ref, name, key=MARK, value=self._mark)
        return Safety(ref, uuid)

    def _mark(self, uuid: str) -> str:
        return f"{uuid} {self._goal.point.point.time}"

    async def finish(self, safety: Safety) -> None:
        """Note that the restore is done."""
        await self._pool.vms.unmark(safety.ref, MARK)

    async def differences(self, images: Images) -> list[tuple[DiskPoint, int, str]]:
        """Return for each disk the bytes that differ, and how that is known; nothing is written."""
        found: list[tuple[DiskPoint, int, str]] = []
        for disk, _, _ in images.disks:
            suspects, blocks = await self._differing(disk)
            found.append((disk, blocks.changed_bytes, suspects.how))
        return found

    async def run(self, images: Images) -> Sequence[Restored]:
        """Write what differs; if interrupted, another run does the rest.

        Raises:
            ImageDamaged: a block of an image is not what its digest says.
            PoolError: the pool refused, or holds something else than it was sent.
            ExportError: a disk cannot be read.
        """
        at_once = trio.CapacityLimiter(DISKS_AT_ONCE)
        async with trio.open_nursery() as nursery:

            async def one(disk: DiskPoint, image: Committed) -> None:
                async with at_once:
                    try:
                        self._done[disk.device] = await self._one(disk, image)
                    except errors.CbtfsError as exc:
                        self._progress.disk_finished(self._key(disk), None, str(exc))
                        self._error = self._error or exc
                        nursery.cancel_scope.cancel()

            for disk, image, _ in images.disks:
                nursery.start_soon(one, disk, image)
        if self._error is not None:
            raise self._error
        return [self._done[disk.device] for disk, _, _ in images.disks]

    async def _differing(
        self, disk: DiskPoint, *, key: str = ""
    ) -> tuple[divergence.Suspects, ChangeBitmap]:
        """Return what was read of a disk, and which blocks differ; told under ``key``, if any."""
        history, point = self._goal.point.history, self._goal.point.point

        def started(found: divergence.Suspects) -> None:
            if key:
                self._progress.disk_started(
                    key, method="restore", reason=found.how, total=found.blocks.changed_bytes
                )

        return await divergence.until_now(
            self._pool,
            self._store,
            Reference(history, point, disk),
            divergence.Live(self._inventory, vdi_of(self._inventory, disk), history),
            started=started,
            advanced=lambda count: self._progress.advanced(key, read=count, written=0),
        )

    async def _one(self, disk: DiskPoint, image: Committed) -> Restored:
        key, begun, vdi = self._key(disk), time.monotonic(), vdi_of(self._inventory, disk)
        suspects, blocks = await self._differing(disk, key=key)
        source = await trio.to_thread.run_sync(
            lambda: Chunks(
                image,
                lambda: divergence.pieces(blocks),
                advanced=lambda count: self._progress.advanced(key, read=0, written=count),
            )
        )
        if source.data:
            await self._pool.disks.write(vdi.ref, source)
        written = Written(vdi.ref, vdi.uuid, vdi.size)
        verified = await readback.compare(
            self._pool, written, image, whole=self._goal.whole, changed=blocks
        )
        seconds = time.monotonic() - begun
        told = msgspec.structs.replace(
            disk, method="restore", reason="", base="", resumed="", seconds=seconds,
            bytes_read=suspects.blocks.changed_bytes, bytes_written=source.data,
        )  # fmt: skip
        self._progress.disk_finished(key, told)
        return Restored(disk, written, source.data, verified, seconds)

    def _key(self, disk: DiskPoint) -> str:
        return f"{self._goal.point.history.name}/{disk.device}"
