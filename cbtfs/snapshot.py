"""Snapshot: the instant of a VM that a restore point will show, as long as the pool holds it.

Life of a snapshot, each step tagged and repeatable::

    take ──> copied ──> committed ──> retire    its disks become bases: metadata only,
      │                                         the bases before them are destroyed
      └───────────────> failed                  all of it is destroyed by its name, as what dead
                                                runs left is; older bases stay

Rules of this file:

1. The name is random and on disk in the store before the pool is asked, so that a snapshot is ours
   even if we are killed before its tag is written.
2. A base is destroyed only after a newer one of the same disk is committed, or once its disk is
   gone; and only by runs for the directory of the store that its tag names.
3. Of a VM's snapshot the VM goes first: ``data_destroy`` waits for its VBDs to disappear
   (xen-api, xapi_vdi.ml).
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import errors
from .catalogue import VMHistory
from .inventory import VDI, VM, Inventory, Owned, read_owner
from .plan import VMPlan
from .pool import Pool


@dataclass(frozen=True, slots=True)
class Naming:
    """What our snapshots in the pool are called, and tagged with."""

    name: str
    owner: Owned


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A tagged snapshot of a VM, or of one VDI (then ``vm`` is None).

    Attributes:
        disks: the snapshot VDIs by device of the plan; a disk that went away is missing.
        others: snapshot VDIs that came along though nobody asked for them.
        inventory: the pool as it was just after.
    """

    inventory: Inventory
    vm: VM | None = None
    disks: Mapping[str, VDI] = field(default_factory=dict[str, VDI])
    others: tuple[VDI, ...] = ()


async def take(pool: Pool, plan: VMPlan, naming: Naming) -> Snapshot:
    """Snapshot all disks of ``plan`` and tag what that made.

    Raises:
        PoolError: the pool refused; an untagged snapshot may be left, known by its name.
    """
    if plan.vm_ref:
        ref = await pool.snapshot_vm(plan.vm_ref, naming.name)
        inventory = await pool.inventory()
        snapshot = of_vm(inventory, plan, ref)
        await pool.tag("VM", ref, naming.owner)
        for vdi in (*snapshot.disks.values(), *snapshot.others):
            await pool.tag("VDI", vdi.ref, naming.owner)
        return snapshot
    disk = plan.disks[0]
    ref = await pool.snapshot_vdi(disk.vdi_ref, name=naming.name, owner=naming.owner)
    inventory = await pool.inventory()
    return Snapshot(inventory, disks={disk.device: _known(inventory, ref)})


def of_vm(inventory: Inventory, plan: VMPlan, ref: str) -> Snapshot:
    """Return what the snapshot VM ``ref`` holds, by the disks of ``plan``.

    What stands in it as itself, or is attached elsewhere too, was not made by it: never ours. But a
    control domain that has it only reads it, above all for a run that was killed just now. A disk
    that its VM has twice may be there twice, as two snapshots.

    Raises:
        PoolError: there is no such VM.
    """
    vm = inventory.vms.get(ref)
    if vm is None:
        raise errors.PoolError(f"the snapshot of VM {plan.vm_name!r} vanished as it was taken")
    here = set(vm.vbd_refs)
    made = [
        disk.vdi
        for disk in inventory.disks_of(vm)
        if disk.vdi.is_a_snapshot
        and all(ref in here or _is_of_dom0(inventory, disk.vdi, ref) for ref in disk.vdi.vbd_refs)
    ]
    found = {vdi.snapshot_of: vdi for vdi in made}
    disks = {d.device: found[d.vdi_ref] for d in plan.disks if d.vdi_ref in found}
    chosen = {vdi.ref for vdi in disks.values()}
    return Snapshot(inventory, vm, disks, tuple(vdi for vdi in made if vdi.ref not in chosen))


def _is_of_dom0(inventory: Inventory, vdi: VDI, vbd_ref: str) -> bool:
    """Tell whether a control domain has this VBD of ``vdi``, or had it until just now."""
    vbd = inventory.vbds.get(vbd_ref)
    if vbd is None:
        # gone between the reading of VDIs and that of VBDs; but whose was it?
        return read_owner(vdi.other_config, vdi.uuid) is not None
    vm = inventory.vms.get(vbd.vm_ref)
    return vm is not None and vm.is_control_domain


def _known(inventory: Inventory, ref: str) -> VDI:
    vdi = inventory.vdis.get(ref)
    if vdi is None:
        raise errors.PoolError("the snapshot of the disk vanished as it was taken")
    return vdi


async def retire(
    pool: Pool,
    snapshot: Snapshot,
    *,
    committed: Iterable[str],
    history: VMHistory | None,
    owner: Owned,
) -> list[str]:
    """Turn the ``committed`` devices into bases; destroy what they replace and dead runs left.

    Everything is tried as long as the pool answers; the sentences returned say what failed. The
    next run of the same VM tries again, so a failure costs space in the pool and nothing else.
    """
    cleaner = _Cleaner(pool)
    if snapshot.vm is not None:
        await cleaner.destroy_vm(snapshot.vm)
    held_by_vm = bool(cleaner.problems)
    kept = set(committed)
    bases = [vdi for device, vdi in snapshot.disks.items() if device in kept]
    failed = [vdi for device, vdi in snapshot.disks.items() if device not in kept]
    old = _superfluous(snapshot.inventory, bases, history, owner)
    for vdi in (*failed, *snapshot.others, *old):
        await cleaner.destroy_vdi(vdi)
    if held_by_vm:
        return cleaner.problems  # their data goes with the next run, when they are replaced
    for vdi in bases:
        await cleaner.keep_as_base(vdi)
    return cleaner.problems


def _superfluous(
    inventory: Inventory, new: Sequence[VDI], history: VMHistory | None, owner: Owned
) -> list[VDI]:
    """Return what earlier runs of ``owner`` made and nobody needs any more, now ``new`` are bases.

    ``snapshot_of`` alone would miss the bases of a disk that was replaced, and the store's records
    alone those of points that somebody removed by hand.
    """
    renewed = {vdi.snapshot_of for vdi in new}
    fresh = {vdi.uuid for vdi in new}
    disk_of = {
        disk.snapshot_uuid: inventory.find_vdi(disk.vdi_uuid)
        for point in (history.points if history else ())
        for disk in point.disks
    }

    def needed(vdi: VDI) -> bool:
        if vdi.snapshot_of in renewed:
            return False
        if vdi.uuid in disk_of:
            disk = disk_of[vdi.uuid]  # left out this time, or failed: its base is still its base
            return disk is not None and disk.ref not in renewed
        # of no point that can be read: with its data it is what a dead run left, and without its
        # disk nothing can ever be built on it
        return vdi.type == "cbt_metadata" and vdi.snapshot_of in inventory.vdis

    return [
        vdi
        for vdi in inventory.vdis.values()
        if vdi.uuid not in fresh and is_base_of(vdi, owner) and not needed(vdi)
    ]


def is_base_of(record: VDI | VM, owner: Owned) -> bool:
    """Tell whether ``record`` is a snapshot that a sync into the same directory as ``owner`` made.

    Such a directory is locked by its run, so of another run than ours it is a dead one's.
    """
    tag = read_owner(record.other_config, record.uuid)
    return (
        record.is_a_snapshot
        and tag is not None
        and (tag.role, tag.store, tag.vm) == ("base", owner.store, owner.vm)
    )


async def clear_vms(
    pool: Pool, inventory: Inventory, vm: VM, owner: Owned, *, kept: VM | None = None
) -> list[str]:
    """Destroy the snapshot VMs that earlier runs of ``owner`` left of ``vm``; disks stay.

    ``kept``, if any, is the one that is gone on with.
    """
    cleaner = _Cleaner(pool)
    for snapshot in inventory.vm_snapshots_of(vm):
        if is_base_of(snapshot, owner) and snapshot != kept:
            await cleaner.destroy_vm(snapshot)
    return cleaner.problems


class _Cleaner:
    """Destroys one thing after the other, and remembers what refused.

    When nobody answers any more, the rest is left for the next run: it would be waited for as long,
    each time, to be told the same.
    """

    def __init__(self, pool: Pool) -> None:
        self.problems: list[str] = []
        self._pool = pool
        self._given_up = False

    async def destroy_vm(self, vm: VM) -> None:
        await self._remove("snapshot VM", vm, self._pool.destroy_snapshot_vm)

    async def destroy_vdi(self, vdi: VDI) -> None:
        await self._remove("snapshot", vdi, self._pool.destroy_vdi)

    async def keep_as_base(self, vdi: VDI) -> None:
        """Keep metadata only; a snapshot without change tracking can be no base at all."""
        if vdi.cbt_enabled:
            await self._remove("the data of snapshot", vdi, self._pool.data_destroy)
        else:
            await self.destroy_vdi(vdi)

    async def _remove(
        self, what: str, record: VDI | VM, remove: Callable[[str], Awaitable[None]]
    ) -> None:
        if self._given_up:
            return
        try:
            await remove(record.ref)
        except errors.PoolError as exc:
            self.problems.append(f"could not remove {what} {record.uuid} from the pool: {exc}")
            self._given_up = isinstance(exc, errors.PoolUnreachable | errors.AuthenticationFailed)
