"""Resume: whether what an interrupted run had begun can be gone on with, and how.

::

    .partial-TIME/journal.json       says how far each disk got, and of which snapshot
            │
            ▼        the snapshot is still there, ours, and has its data
    the same plan as for a new point, but for the disks that were begun: method ``resume``

The point will show the instant at which the interrupted run took its snapshot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from . import snapshot as snapshots, units
from .catalogue import DiskPoint, VMHistory
from .inventory import VDI, VM, Inventory, read_owner
from .journal import DiskJournal
from .owner import Owned
from .plan import Base, Damaged, DiskPlan, Reason, VMPlan
from .snapshot import Snapshot
from .stage import Intent, Leftover


@dataclass(frozen=True, slots=True)
class Resumption:
    """A partial point to go on with, and the snapshot that it is a copy of."""

    leftover: Leftover
    snapshot: Snapshot
    plan: VMPlan


def find(  # noqa: PLR0913  # one keyword per fact that decides
    inventory: Inventory,
    target: VM | VDI,
    plan: VMPlan,
    leftovers: Sequence[Leftover],
    *,
    store: str,
    history: VMHistory | None,
    damaged: Damaged,
) -> Resumption | None:
    """Return the newest of ``leftovers`` that can be gone on with, None if none can.

    Args:
        inventory: the pool now.
        target: what the leftovers are of.
        plan: what would be done without them.
        leftovers: of ended runs, oldest first.
        store: uuid of the store.
        history: the restore points there are.
        damaged: tells which images cannot be built on.
    """
    latest = history.latest.time if history and history.latest else ""
    for leftover in reversed(leftovers):
        begun_on = _less_damaged(leftover, history, damaged)
        begun = _begun(plan, begun_on.journal)
        if leftover.intent is None or not begun or leftover.time <= latest:
            continue
        of_run = Owned(self_uuid="", role="base", store=store, vm=plan.vm_uuid, point=leftover.time)
        snapshot = _snapshot_of(inventory, target, plan, of_run)
        if snapshot is None or not _holds(snapshot, begun):
            continue
        if not _lost(plan, snapshot, leftover.intent):
            return Resumption(
                leftover, snapshot, _resumed(plan, begun_on, snapshot, history=history)
            )
    return None


def _less_damaged(leftover: Leftover, history: VMHistory | None, damaged: Damaged) -> Leftover:
    """Return ``leftover`` without the disks that began as an image which was then found damaged."""

    def is_damaged(entry: DiskJournal) -> bool:
        image = _image_of(entry, history)
        return image is not None and damaged(entry.base, image.device)

    journal = {device: e for device, e in leftover.journal.items() if not is_damaged(e)}
    return replace(leftover, journal=journal)


def _image_of(entry: DiskJournal, history: VMHistory | None) -> DiskPoint | None:
    """Return the image that a disk began as, as ``plan`` chose it; None if it is not there.

    The disk may have had another device name then, and another disk its name.
    """
    points = history.points if history else ()
    point = next((point for point in points if point.time == entry.base), None)
    if point is None:
        return None
    same = (disk for disk in point.disks if disk.vdi_uuid == entry.vdi_uuid)
    return next(same, None) or point.disk(entry.device)


def _begun(plan: VMPlan, journal: Mapping[str, DiskJournal]) -> dict[str, DiskJournal]:
    """Return the entries of disks that are still to be copied; {} if none of them got anywhere."""
    planned = {disk.device: disk.vdi_uuid for disk in plan.disks}
    found = {name: entry for name, entry in journal.items() if planned.get(name) == entry.vdi_uuid}
    return found if any(entry.offset or entry.finished for entry in found.values()) else {}


def _snapshot_of(
    inventory: Inventory, target: VM | VDI, plan: VMPlan, of_run: Owned
) -> Snapshot | None:
    """Return the one snapshot that the interrupted run tagged, if it is there."""
    if isinstance(target, VM):
        vms = [vm for vm in inventory.vm_snapshots_of(target) if _is_of(vm, of_run)]
        return snapshots.of_vm(inventory, plan, vms[0].ref) if len(vms) == 1 else None
    vdis = [vdi for vdi in inventory.snapshots_of(target) if _is_of(vdi, of_run)]
    if len(vdis) != 1 or not plan.disks:
        return None
    return Snapshot(inventory, disks={plan.disks[0].device: vdis[0]})


def _is_of(record: VM | VDI, of_run: Owned) -> bool:
    tag = read_owner(record.other_config, record.uuid)
    return snapshots.is_base_of(record, of_run) and tag is not None and tag.point == of_run.point


def _holds(snapshot: Snapshot, begun: Mapping[str, DiskJournal]) -> bool:
    """Tell whether the snapshot has all that was begun, with its data."""
    for device, entry in begun.items():
        vdi = snapshot.disks.get(device)
        if vdi is None or (vdi.uuid, vdi.size) != (entry.snapshot_uuid, entry.size):
            return False
        if not vdi.is_readable:
            return False
    return True


def _lost(plan: VMPlan, snapshot: Snapshot, intent: Intent) -> bool:
    """Tell whether a disk of which the snapshot was taken is not in it any more."""
    return any(
        disk.vdi_uuid in intent.vdis and disk.device not in snapshot.disks for disk in plan.disks
    )


def _resumed(
    plan: VMPlan, leftover: Leftover, snapshot: Snapshot, *, history: VMHistory | None
) -> VMPlan:
    there = [disk for disk in plan.disks if disk.device in snapshot.disks]
    late = [
        (disk.device, f"it was attached after the interrupted run of {leftover.time} had begun")
        for disk in plan.disks
        if disk.device not in snapshot.disks
    ]
    return replace(
        plan,
        disks=tuple(
            _resumed_disk(plan, disk, leftover, snapshot=snapshot, history=history)
            for disk in there
        ),
        skipped=(*plan.skipped, *late),
        resumes=leftover.time,
    )


def _resumed_disk(
    plan: VMPlan,
    disk: DiskPlan,
    leftover: Leftover,
    *,
    snapshot: Snapshot,
    history: VMHistory | None,
) -> DiskPlan:
    """Return ``disk`` as going on, or as planned if it had not begun or its base is gone."""
    disk = replace(disk, size=snapshot.disks[disk.device].size)
    entry = leftover.journal.get(disk.device)
    if entry is None or entry.vdi_uuid != disk.vdi_uuid:
        return disk
    base = _base_of(entry, snapshot.inventory, history) if entry.base else None
    if entry.base and base is None and entry.finished is None:
        return disk
    if entry.finished is not None:
        progress = "was finished"
    else:
        done, size = units.format_size(entry.offset), units.format_size(entry.size)
        progress = f"goes on from {done} of {size}"
    return replace(
        disk,
        method="resume",
        reason=Reason(entry.reason) if entry.reason in set(Reason) else disk.reason,
        detail=f"interrupted in {leftover.time} ({entry.method}), {progress}",
        base=base,
    )


def _base_of(entry: DiskJournal, inventory: Inventory, history: VMHistory | None) -> Base | None:
    """Return what the disk was cloned from, if it still is as it was."""
    known = _image_of(entry, history)
    if known is None:
        return None
    if entry.method != "incremental":
        return Base(time=entry.base, disk=known)
    snapshot = inventory.find_vdi(entry.base_snapshot_uuid)
    if snapshot is None or known.snapshot_uuid != snapshot.uuid:
        return None
    return Base(time=entry.base, snapshot_ref=snapshot.ref, snapshot_uuid=snapshot.uuid, disk=known)
