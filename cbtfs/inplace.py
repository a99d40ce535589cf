"""In place: a restore point written over the disks that it is of; only blocks that differ.

::

    check       the disks are there, as large as then, their VM halted
    snapshot    of the VM as it is now, the user's to keep; of an interrupted run, the one it took
    block       the VM cannot be started any more
    learn       which blocks differ (see divergence)      a few disks at a time
    write       these, and read some or all of it back
    finish      the snapshot is no longer called unfinished; the VM can be started again

Rules of this file:

1. The safety snapshot has no tag of ours: nothing of cbtfs ever destroys it.
2. Until its restore is finished its name says so. A run that finds such a one goes on with it only
   if it still is what was there before: the VM is blocked by the run that took it, and so has not
   lived since; or the pool's change tracking says that nothing has been written. What differs is
   learned anew from the disks as they are, so nothing else has to be remembered.
3. The block comes after the snapshot: who goes back to it gets the VM without. It stays where a run
   ends early and has written, because what is half restored is not to be started by an oversight.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import trio

from . import divergence, errors, owner, process, readback, vms
from .bitmap import ChangeBitmap
from .catalogue import DiskPoint, Reference
from .chunks import Chunks
from .committed import Committed
from .inventory import VBD, VDI, VM, Inventory
from .newdisks import DISKS_AT_ONCE, Goal, Images, Restored
from .owner import RESTORING, SAFETY, UNFINISHED, Block, Owned
from .pool import Pool
from .process import Process
from .progress import Progress
from .readback import Written
from .store import Store
from .vdis import IN_USE_PAUSES

_HALF = "cbtfs half restored, before restore of "
"""How the name of a snapshot begins that was taken of a half restored VM, whose own is gone."""

_PATIENCE = 30.0
"""Seconds that the pool gets to take a block away that has turned out not to be needed."""


@dataclass(frozen=True, slots=True)
class Safety:
    """The snapshot that brings back what was there before.

    Attributes:
        is_lost: whether that one was removed, and this was taken of what was half restored.
    """

    ref: str
    uuid: str
    is_lost: bool = False

    @property
    def way_back(self) -> str:
        """How to go back to it."""
        if self.is_lost:
            return "not possible, as the snapshot of what was there before was removed"
        return f"xe snapshot-revert snapshot-uuid={self.uuid}"


async def found(pool: Pool, goal: Goal) -> tuple[Inventory, VM]:
    """Return the pool, and of it the VM whose disks are restored, once it is sure that they can be.

    A control domain that has a disk is waited for a while: it lets go of what was sent, or read,
    by a run that was killed just now.

    Raises:
        NotFound: the VM is gone, or a disk.
        PoolBusy: another run is at work on the VM.
        PoolError: it is not halted, or a disk is not as large as it was, or attached elsewhere.
    """
    vbds: list[VBD] = []
    for pause in (*IN_USE_PAUSES, None):
        inventory = await pool.inventory()
        vm = vm_of(inventory, goal)
        vbds = [v for d in goal.disks for v in _vbds_of_domains(inventory, vdi_of(inventory, d))]
        if not vbds:
            return inventory, vm
        if pause is not None:
            await trio.sleep(pause)
    raise errors.PoolError(
        f"a control domain has disks of {goal.label} attached: somebody reads or writes them; wait"
        " for that to end, or if nobody does, detach them yourself, and run the command again: "
        + " and ".join(f"xe vbd-unplug uuid={vbd.uuid}" for vbd in vbds)
    )


def vm_of(inventory: Inventory, goal: Goal) -> VM:
    """Return the VM whose disks are restored, if they can be but for control domains.

    Raises:
        NotFound: the VM is gone, or a disk.
        PoolBusy: another run is at work on the VM.
        PoolError: it is not halted, or a disk is not as large as it was, or attached elsewhere.
    """
    vm = next((vm for vm in inventory.live_vms() if vm.uuid == goal.point.history.uuid), None)
    if vm is None:
        raise errors.NotFound(
            f"the pool has no VM {goal.point.history.uuid}, which {goal.label} is of; restore it"
            " with --to-sr SR"
        )
    former = owner.read_block(vm.blocked_operations, vm.uuid)
    if former is not None and not _is_dead(former):
        raise vms.busy(former, vm.name)
    _check_half(vm, owner.read_standing_block(vm.blocked_operations, vm.uuid), goal)
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


def _check_half(vm: VM, former: Block | None, goal: Goal) -> None:
    """Refuse to restore some of the disks that an earlier run may have left half written.

    In the end the VM could be started.
    """
    missing = set(former.disks) - {disk.vdi_uuid for disk in goal.disks} if former else set[str]()
    if former is not None and missing:
        way_back = Safety("", former.snapshot).way_back
        raise errors.PoolError(
            f"VM {vm.name!r} is half restored, to {former.point}, and {goal.label} is not of all of"
            f" its disks that are; finish that first, or go back: {way_back}"
        )


def _check_size(vdi: VDI, disk: DiskPoint) -> None:
    if vdi.size != disk.size:
        raise errors.PoolError(
            f"{disk.device} has {vdi.size} bytes and had {disk.size} when the restore point was"
            " made; restore it with --to-sr SR"
        )


def _check_users(inventory: Inventory, vm: VM, vdi: VDI) -> None:
    for other in _users(inventory, vdi):
        if other != vm and not other.is_control_domain:
            raise errors.PoolError(
                f"VDI {vdi.uuid} is attached to VM {other.name!r} too; shut that down, or detach"
                " the disk from it"
            )


def _vbds_of_domains(inventory: Inventory, vdi: VDI) -> list[VBD]:
    """Return by what control domains have a disk."""
    domains = {ref for ref, vm in inventory.vms.items() if vm.is_control_domain}
    return [vbd for vbd in _attached(inventory, vdi) if vbd.vm_ref in domains]


def _users(inventory: Inventory, vdi: VDI) -> list[VM]:
    """Return the VMs to which a disk is attached now."""
    owners = [inventory.vms.get(vbd.vm_ref) for vbd in _attached(inventory, vdi)]
    return [vm for vm in owners if vm is not None]


def _attached(inventory: Inventory, vdi: VDI) -> list[VBD]:
    found = [vbd for vbd in map(inventory.vbds.get, vdi.vbd_refs) if vbd is not None]
    return [vbd for vbd in found if vbd.currently_attached]


class InPlace:
    """One restore over the disks that a point is of.

    Args:
        pool: that has them.
        store: of the point.
        goal: the point.
        inventory: the pool just now.
        progress: told of each disk.

    Attributes:
        left: sentences that must be heard about how the VM was left by a run that failed.
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
        self._is_half = False
        self.left: list[str] = []
        self._sent: dict[str, int] = {}
        self._done: dict[str, Restored] = {}

    @asynccontextmanager
    async def held(self, vm: VM) -> AsyncGenerator[Safety]:
        """Keep the VM from starting, with a snapshot of it; at the end of the block it is done.

        Raises:
            PoolBusy: another run is at work on the VM.
            PoolError: the pool refused, or the VM has been started.
        """
        former = owner.read_standing_block(vm.blocked_operations, vm.uuid)
        self._is_half = former is not None
        safety = await self._safety(vm, former)
        block = self._block(vm, safety)
        try:
            await self._pool.vms.block(vm.ref, self._sentence(vm), block, is_dead=_is_dead)
            yield safety
        except BaseException:
            await self._give_up(vm, safety, block)
            raise
        with trio.CancelScope(shield=True):
            try:
                if not safety.is_lost:
                    await self._pool.vms.rename(safety.ref, self._name)
                await self._pool.vms.unblock(vm.ref, is_dead=lambda found: found == block)
            except errors.PoolError as exc:
                raise errors.PoolError(
                    f"all is written, but {vm.name} cannot be started yet, because of this: {exc};"
                    " run the command again, or cbtfs clean --unblock"
                ) from exc

    async def _safety(self, vm: VM, former: Block | None) -> Safety:
        """Take the safety snapshot, or return the one of a restore that was interrupted."""
        for snapshot in reversed(self._inventory.vm_snapshots_of(vm)):
            is_its = former is not None and former.snapshot == snapshot.uuid
            is_one = snapshot.name.startswith(SAFETY) and snapshot.name.endswith(UNFINISHED)
            if not is_its and not is_one:
                continue
            if is_its or (former is None and await self._is_same(vm, snapshot)):
                is_lost = snapshot.name.startswith(_HALF)
                found = Safety(snapshot.ref, snapshot.uuid, is_lost)
                self._tell(vm, "is kept from the run before", found)
                return found
            self._progress.message(
                f"snapshot {snapshot.uuid} is of an interrupted restore, too, and stays: the VM may"
                " have changed since it was taken"
            )
        is_lost = former is not None
        ref, uuid = await self._pool.vms.snapshot(
            vm.ref,
            f"{_HALF}{self._goal.label}" if is_lost else f"{self._name}{UNFINISHED}",
            late=lambda uuid: self._tell(vm, "was taken, too", Safety("", uuid, is_lost)),
        )
        taken = Safety(ref, uuid, is_lost)
        self._tell(vm, "was taken", taken)
        return taken

    def _tell(self, vm: VM, what: str, safety: Safety) -> None:
        self._progress.message(f"a snapshot of {vm.name} {what}; to go back: {safety.way_back}")

    async def _is_same(self, vm: VM, snapshot: VM) -> bool:
        """Tell whether a VM certainly is as in a snapshot; False if the pool cannot tell.

        All of its disks, restored or not: who goes back to the snapshot goes back with all.
        """
        found = [disk.vdi for disk in self._inventory.disks_of(snapshot)]
        taken = {vdi.snapshot_of: vdi for vdi in found if vdi.is_a_snapshot}
        lives = {disk.vdi.ref: disk.vdi for disk in self._inventory.disks_of(vm)}
        if lives.keys() != taken.keys():
            return False
        for ref, live in lives.items():
            old = taken[ref]
            if old.size != live.size:
                return False
            try:
                changed = await self._pool.changed_blocks(old.ref, live.ref, size=live.size)
            except errors.ChangesUnknown:
                return False
            if changed.changed_bytes:
                return False
        return True

    async def _give_up(self, vm: VM, safety: Safety, block: Block) -> None:
        """Let the VM start again if it is as it was; say what else there is to do."""
        if not self._is_half:
            why = "the pool did not answer in time"
            with trio.move_on_after(_PATIENCE, shield=True):
                try:
                    await self._pool.vms.unblock(vm.ref, is_dead=lambda found: found == block)
                except errors.CbtfsError as exc:
                    why = str(exc)
                else:
                    return
            self.left.append(f"{vm.name} stays blocked until cbtfs clean --unblock: {why}")
            return
        self.left.append(
            f"{vm.name} is half restored and cannot be started: run the command again to finish it,"
            f" or go back: {safety.way_back}; cbtfs clean --unblock lets it start as it is"
        )

    @property
    def _name(self) -> str:
        return f"{SAFETY}{self._goal.label}"

    def _sentence(self, vm: VM) -> str:
        return (
            f"cbtfs is writing over the disks of this VM, or was killed at it: run the restore of"
            f" {self._goal.point.point.time} again, or let it start as it is: cbtfs clean --unblock, or"
            f" xe vm-param-remove uuid={vm.uuid} param-name=blocked-operations param-key=start and"
            " the same with param-key=start_on"
        )

    def _block(self, vm: VM, safety: Safety) -> Block:
        this = process.this_process()
        return Block(
            self_uuid=vm.uuid,
            role=RESTORING,
            point=self._goal.point.point.time,
            host=this.host,
            pid=this.pid,
            boot=this.boot,
            starttime=this.starttime,
            snapshot=safety.uuid,
            disks=tuple(disk.vdi_uuid for disk in self._goal.disks),
        )

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
        self, disk: DiskPoint, *, key: str = "", trusting: bool = True
    ) -> tuple[divergence.Suspects, ChangeBitmap]:
        """Return what was read of a disk, and which blocks differ; told under ``key``, if any.

        Unless ``trusting``, the pool is not asked what has changed.
        """
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
            divergence.Live(
                self._inventory, vdi_of(self._inventory, disk), history if trusting else None
            ),
            started=started,
            advanced=lambda count: self._progress.advanced(key, read=count, written=0),
        )

    async def _one(self, disk: DiskPoint, image: Committed) -> Restored:
        try:
            return await self._brought(disk, image)
        except errors.BitmapWrong:
            # another run would be told the same by the pool
            self._progress.message(
                f"{self._key(disk)}: the pool's change tracking lacks blocks that differ; now all"
                " that may hold data is read"
            )
            return await self._brought(disk, image, trusting=False)

    async def _brought(
        self, disk: DiskPoint, image: Committed, *, trusting: bool = True
    ) -> Restored:
        """Write what differs, and read it back; see ``_differing``."""
        key, begun, vdi = self._key(disk), time.monotonic(), vdi_of(self._inventory, disk)
        suspects, blocks = await self._differing(disk, key=key, trusting=trusting)
        source = await trio.to_thread.run_sync(
            lambda: Chunks(
                image,
                lambda: divergence.pieces(blocks),
                advanced=lambda count: self._progress.advanced(key, read=0, written=count),
            )
        )
        if source.data:
            self._is_half = True
            await self._pool.disks.write(vdi.ref, source)
        sent = self._sent[key] = self._sent.get(key, 0) + source.data
        written = Written(vdi.ref, vdi.uuid, vdi.size)
        verified = await readback.compare(
            self._pool, written, image, whole=self._goal.whole, changed=blocks
        )
        seconds = time.monotonic() - begun
        told = msgspec.structs.replace(
            disk, method="restore", reason="", base="", resumed="", seconds=seconds,
            bytes_read=suspects.blocks.changed_bytes, bytes_written=sent,
        )  # fmt: skip
        self._progress.disk_finished(key, told)
        return Restored(disk, written, sent, verified, seconds)

    def _key(self, disk: DiskPoint) -> str:
        return f"{self._goal.point.history.name}/{disk.device}"


def _is_dead(tag: Owned) -> bool:
    return Process(tag.host, tag.boot, tag.pid, tag.starttime).is_dead()
