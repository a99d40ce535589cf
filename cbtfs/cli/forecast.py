"""Forecast: what the next sync would do with each disk, and how much that is (``sync -n``, ``ls``).

Nothing is changed in pool or store, and so not everything is known: a running VM's disk does not
tell its changes, only a snapshot of it does; nor does a live disk tell what of it is allocated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cbtfs import errors, names, plan as planning, units
from cbtfs.inventory import Inventory
from cbtfs.plan import DiskPlan, Reason, VMPlan
from cbtfs.pool import Pool

from . import output
from .output import Table


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a sync would do with a disk, and how much of it there is to read.

    Attributes:
        disk: the plan, as far as the pool says now that it can be carried out.
        changed: bytes to read; None where only a snapshot, or the run itself, could tell.
        extents: in how many pieces.
        at_most: whether ``changed`` is an upper bound: only what is allocated will be read.
    """

    disk: DiskPlan
    changed: int | None = None
    extents: int | None = None
    at_most: bool = False

    @property
    def amount(self) -> str:
        """What there is to read, for people."""
        if self.disk.method == "resume":
            return "the rest"
        if self.changed is None:
            return "changes"
        size = units.format_size(self.changed)
        return f"up to {size}" if self.at_most else f"{size} in {self.extents} extents"


async def of_disk(pool: Pool, inventory: Inventory, disk: DiskPlan) -> Forecast:
    """Return how much there is to read of ``disk``; where the pool can say it, it is asked."""
    if disk.method == "resume":
        return Forecast(disk)
    if disk.method != "incremental" or disk.base is None:
        return Forecast(disk, disk.size, 1, at_most=True)
    vbds = [inventory.vbds.get(ref) for ref in inventory.vdis[disk.vdi_ref].vbd_refs]
    if any(vbd is not None and vbd.currently_attached for vbd in vbds):
        return Forecast(disk)  # VDI_IN_USE: xapi tells only of a snapshot
    try:
        bitmap = await pool.changed_blocks(disk.base.snapshot_ref, disk.vdi_ref, size=disk.size)
    except errors.ChangesUnknown as exc:
        fallen = planning.fall_back(disk, reason=Reason(exc.reason), detail=str(exc))
        return Forecast(fallen, disk.size, 1, at_most=True)
    return Forecast(disk, bitmap.changed_bytes, bitmap.extent_count())


Planned = list[tuple[VMPlan, list[Forecast]]]


def show(plans: Planned, *, as_json: bool) -> None:
    """Print what ``sync -n`` prints."""
    if as_json:
        output.document({"dry_run": True, "vms": [_document(*item) for item in plans]})
        return
    table = Table(["DISK", "METHOD", "REASON", ">SIZE", ">TO READ", "WHY"], flexible=(0, 5))
    called = {plan.vm_uuid: plan.vm_name for plan, _ in plans}
    labels = names.safe_names(list(called.items()), reserved=())  # as the sync itself does
    for plan, disks in plans:
        label = labels[plan.vm_uuid]
        for forecast in disks:
            disk = forecast.disk
            table.add(
                f"{label}/{disk.device}",
                disk.method,
                disk.reason,
                units.format_size(disk.size),
                forecast.amount,
                disk.detail,
            )
        for device, why in plan.skipped:
            table.add(f"{label}/{device}", "skip", "", "", "", why)
        for failure in plan.refused:
            table.add(f"{label}/{failure.device}", "fail", "", "", "", failure.error)
    table.print()


def _document(plan: VMPlan, disks: Sequence[Forecast]) -> dict[str, object]:
    return {
        "vm": plan.vm_name,
        "uuid": plan.vm_uuid,
        "resumes": plan.resumes or None,
        "disks": [_disk_document(forecast) for forecast in disks],
        "skipped": [{"device": device, "why": why} for device, why in plan.skipped],
        "failures": [msgspec.structs.asdict(failure) for failure in plan.refused],
    }


def _disk_document(forecast: Forecast) -> dict[str, object]:
    disk = forecast.disk
    return {
        "device": disk.device,
        "vdi_uuid": disk.vdi_uuid,
        "method": disk.method,
        "reason": disk.reason,
        "detail": disk.detail,
        "size": disk.size,
        "base": disk.base.time if disk.base else None,
        "bytes_changed": forecast.changed,
        "at_most": forecast.at_most,
        "extents": forecast.extents,
        "enable_cbt": disk.enable_cbt,
    }
