"""Listing: what ``ls`` and ``info`` say of each disk, worked out from records alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cbtfs import errors, names, plan, selection
from cbtfs.catalogue import Catalogue, VMHistory
from cbtfs.inventory import VDI, VM, Inventory
from cbtfs.plan import DiskPlan, VMPlan
from cbtfs.sync import Target

Planner = Callable[[Target], VMPlan]
"""Tells what the next sync would do with a VM, or with a disk by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRow:
    """One disk in a list.

    Attributes:
        device: name in its VM; ``disk`` for a disk without VM.
        sr: name of its storage repository.
        cbt: ``on``, ``off``, or ``none`` where changes cannot be tracked.
        snapshots: those with data, oldest first.
        last_point: time of the newest restore point that has this disk, "" for none.
        next: what the next sync would do; None without a store, or if it would do nothing.
        skipped: why the next sync would leave the disk out, "" if it would not.
    """

    device: str
    vdi: VDI
    sr: str
    cbt: str
    snapshots: tuple[VDI, ...] = ()
    last_point: str = ""
    next: DiskPlan | None = None
    skipped: str = ""

    @property
    def intent(self) -> str:
        """What the next sync would do, in a word or two."""
        if self.next is not None:
            reason = "" if self.next.reason == plan.Reason.CHANGED else f" ({self.next.reason})"
            return f"{self.next.method}{reason}"
        return "skip" if self.skipped else "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class VMRow:
    """A VM in a list, with its disks; ``vm`` is None for the disks without one."""

    vm: VM | None
    disks: tuple[DiskRow, ...]
    last_point: str = ""


def build(
    inventory: Inventory,
    *,
    catalogue: Catalogue | None,
    planner: Planner | None = None,
    patterns: Sequence[str] = (),
) -> list[VMRow]:
    """Return the VMs by name with their disks, then the disks without VM.

    Args:
        inventory: the pool.
        catalogue: the restore points, if any.
        planner: what the next sync would do; None if there is no store to sync to.
        patterns: names, globs, ``tag:…``, ``sr:…``; nothing selects everything.

    Raises:
        NotFound: ``patterns`` select nothing.
    """
    vms = selection.select_vms(inventory, patterns) if patterns else inventory.live_vms()
    rows = [_vm_row(inventory, vm, catalogue=catalogue, planner=planner) for vm in vms]
    if not patterns:
        detached = tuple(
            disk_row(inventory, vdi, catalogue=catalogue, planner=planner)
            for vdi in inventory.detached_disks()
        )
        if detached:
            rows.append(VMRow(vm=None, disks=detached))
    return rows


def _vm_row(
    inventory: Inventory, vm: VM, *, catalogue: Catalogue | None, planner: Planner | None
) -> VMRow:
    history = catalogue.vms.get(vm.uuid) if catalogue else None
    planned = planner(vm) if planner is not None else None
    disks = tuple(
        _row(inventory, disk.vdi, device=disk.device, history=history, planned=planned)
        for disk in inventory.disks_of(vm)
    )
    last = history.latest.time if history and history.latest else ""
    return VMRow(vm=vm, disks=disks, last_point=last)


def disk_row(
    inventory: Inventory,
    vdi: VDI,
    *,
    catalogue: Catalogue | None,
    planner: Planner | None = None,
) -> DiskRow:
    """Return the row of a disk by itself, as if no VM had it."""
    history = catalogue.vms.get(f"vdi-{vdi.uuid}") if catalogue else None
    planned = planner(vdi) if planner is not None and not vdi.is_a_snapshot else None
    return _row(inventory, vdi, device="disk", history=history, planned=planned)


def _row(
    inventory: Inventory,
    vdi: VDI,
    *,
    device: str,
    history: VMHistory | None,
    planned: VMPlan | None,
) -> DiskRow:
    sr = inventory.srs.get(vdi.sr_ref)
    capable = not plan.tracking_obstacle(inventory, vdi)
    disks = planned.disks if planned else ()
    skipped = dict(planned.skipped) if planned else {}
    skipped |= {disk.device: disk.error for disk in planned.refused} if planned else {}
    return DiskRow(
        device=device,
        vdi=vdi,
        sr=sr.name if sr else "",
        cbt="on" if vdi.cbt_enabled else "off" if capable else "none",
        snapshots=tuple(s for s in inventory.snapshots_of(vdi) if s.is_readable),
        last_point=_last_point(history, vdi),
        next=next((disk for disk in disks if disk.device == device), None),
        skipped=skipped.get(device, ""),
    )


def _last_point(history: VMHistory | None, vdi: VDI) -> str:
    for point in reversed(history.points if history else ()):
        if any(disk.vdi_uuid == vdi.uuid for disk in point.disks):
            return point.time
    return ""


def find_disk(inventory: Inventory, text: str) -> VDI:
    """Return the VDI that ``text`` names: a uuid, ``VM/DEVICE``, or a name that only one has.

    Raises:
        NotFound: there is none.
        UsageError: the name is not unique.
    """
    vm_name, slash, device = text.rpartition("/")
    try:
        return inventory.vdi_by_uuid(text)
    except errors.NotFound:
        if slash and any(_is_vm(vm, vm_name) for vm in inventory.live_vms()):
            return _disk_of_vm(inventory, inventory.find_vm(vm_name), device)
    readable = [vdi for vdi in inventory.vdis.values() if vdi.is_readable]
    named = [vdi for vdi in readable if vdi.name == text]
    named = named or [vdi for vdi in readable if names.shown(vdi.name) == text]
    live = [vdi for vdi in named if not vdi.is_a_snapshot] or named
    if len(live) == 1:
        return live[0]
    if live:
        uuids = ", ".join(sorted(vdi.uuid for vdi in live))
        raise errors.UsageError(f"{len(live)} disks are called {text!r}; use a uuid: {uuids}")
    raise errors.NotFound(
        f"pool {inventory.pool.name!r} has no disk {text!r}; write a uuid, a name, or VM/DEVICE"
        " such as web1/xvda"
    )


def _is_vm(vm: VM, text: str) -> bool:
    return text in {vm.name, vm.uuid} or text in names.spellings(vm.name, vm.uuid)


def _disk_of_vm(inventory: Inventory, vm: VM, device: str) -> VDI:
    disks = inventory.disks_of(vm)
    found = next((disk.vdi for disk in disks if disk.device == device), None)
    if found is None:
        there = ", ".join(disk.device for disk in disks) or "none"
        raise errors.NotFound(f"VM {vm.name!r} has no disk {device!r}; it has: {there}")
    return found


def matching(histories: Iterable[VMHistory], patterns: Sequence[str]) -> list[VMHistory]:
    """Return the histories whose VM's name or uuid matches a glob, by name; all without globs.

    Raises:
        NotFound: ``patterns`` match nothing.
    """
    found = [
        history
        for history in sorted(histories, key=lambda h: (h.name, h.uuid))
        if not patterns or any(_is_called(history, pattern) for pattern in patterns)
    ]
    if patterns and not found:
        raise errors.NotFound(f"the store has no restore point of {', '.join(patterns)}")
    return found


def _is_called(history: VMHistory, pattern: str) -> bool:
    called = (history.name, history.uuid)
    return pattern in names.spellings(*called) or any(fnmatchcase(n, pattern) for n in called)
