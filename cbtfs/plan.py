"""What sync will do with each disk, and why: decided from records, before anything is touched.

A disk is copied in full or incrementally. An increment needs a base: the newest restore point of
the very same VDI whose snapshot the pool still knows and has tagged as this store's. Whatever is
asked of the pool later (above all ``list_changed_blocks``) can still fail; ``fall_back`` then turns
the decision into a full copy with a reason of its own.

Rules of this file:

1. The size of a base is what its restore point says. The pool's size of a snapshot whose data was
   destroyed is nonsense (SR.scan sets it to the size of the log).
2. ``cbt_enabled`` on both ends does not prove a chain, but its absence on one end disproves it.
3. Nothing here reads a clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from . import errors, inventory as inventories, units
from .catalogue import DiskPoint, VMHistory
from .inventory import VBD, VDI, VM, Disk, Inventory

RAW_SM_TYPE = "raw"
"""``sm_config["type"]`` of an image without VHD or qcow2 header, which cannot be tracked."""


class Reason(StrEnum):
    """Why a disk is copied as it is; the words are part of the store's format."""

    CHANGED = "changed"
    FIRST = "first"
    REQUESTED = "requested"
    REPLACED = "replaced"
    RESIZED = "resized"
    BASE_LOST = "base-lost"
    BASE_DAMAGED = "base-damaged"
    CBT_OFF = "cbt-off"
    CBT_UNSUPPORTED = "cbt-unsupported"
    CBT_MISMATCH = "cbt-mismatch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What an increment builds on: a disk of a restore point, and its snapshot in the pool."""

    time: str
    snapshot_ref: str
    snapshot_uuid: str
    disk: DiskPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What will be done with one disk.

    Attributes:
        size: virtual size in bytes now; the snapshot may turn out larger.
        method: ``full`` or ``incremental``.
        detail: a sentence for people that explains ``reason``.
        base: for an increment what it builds on, else None.
        enable_cbt: whether to turn change tracking on before the snapshot.
    """

    device: str
    vdi_uuid: str
    vdi_ref: str
    vdi_name: str = ""
    sr_uuid: str = ""
    size: int
    method: str
    reason: Reason
    detail: str
    base: Base | None = None
    enable_cbt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VMPlan:
    """What will be done with the disks of one VM.

    Attributes:
        vm_uuid: name of the directory in the store: the VM's uuid, or ``vdi-`` and a disk's.
        vm_ref: the VM, "" for a disk without VM.
        skipped: device and why, for the disks that get no copy.
    """

    vm_uuid: str
    vm_ref: str
    vm_name: str
    disks: tuple[DiskPlan, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


# ── Deciding ─────────────────────────────────────────────────────────────────────────────────


def plan_vm(
    inventory: Inventory,
    vm: VM,
    history: VMHistory | None,
    *,
    store: str,
    full: bool = False,
    exclude: Sequence[str] = (),
) -> VMPlan:
    """Return what to do with each disk of ``vm``.

    Args:
        inventory: the pool now.
        vm: a live VM.
        history: the VM's restore points, None if it has none.
        store: uuid of the store, which the owner tags of its bases name.
        full: copy everything, whatever could be spared.
        exclude: globs; a disk whose device, name or uuid matches one is left out.
    """
    plans: list[DiskPlan] = []
    skipped: list[tuple[str, str]] = []
    for disk in inventory.disks_of(vm):
        obstacle = _obstacle(inventory, disk, exclude)
        if obstacle:
            skipped.append((disk.device, obstacle))
        else:
            plans.append(_plan_disk(inventory, disk, history, store=store, full=full))
    return VMPlan(
        vm_uuid=vm.uuid,
        vm_ref=vm.ref,
        vm_name=vm.name,
        disks=tuple(plans),
        skipped=tuple(skipped),
    )


def plan_vdi(
    inventory: Inventory,
    vdi: VDI,
    history: VMHistory | None,
    *,
    store: str,
    full: bool = False,
) -> VMPlan:
    """Return what to do with ``vdi`` by itself, as a VM of the one disk ``disk``.

    Args:
        inventory: the pool now.
        vdi: a disk that no VM has.
        history: the disk's restore points, None if it has none.
        store: uuid of the store, which the owner tags of its bases name.
        full: copy everything, whatever could be spared.
    """
    disk = Disk("disk", VBD(ref=""), vdi)
    obstacle = _obstacle(inventory, disk, ())
    known = () if obstacle else (_plan_disk(inventory, disk, history, store=store, full=full),)
    return VMPlan(
        vm_uuid=f"vdi-{vdi.uuid}",
        vm_ref="",
        vm_name=vdi.name,
        disks=known,
        skipped=((disk.device, obstacle),) if obstacle else (),
    )


def fall_back(disk: DiskPlan, *, reason: Reason, detail: str) -> DiskPlan:
    """Return ``disk`` as a full copy, because of something learned after it was planned."""
    return replace(disk, method="full", reason=reason, detail=detail, base=None)


def _obstacle(inventory: Inventory, disk: Disk, exclude: Sequence[str]) -> str:
    """Return why ``disk`` cannot or shall not be copied, "" if it can."""
    vdi = disk.vdi
    sr = inventory.srs.get(vdi.sr_ref)
    names = (disk.device, vdi.name, vdi.uuid)
    obstacles = {
        "it is excluded": any(fnmatchcase(n, pattern) for n in names for pattern in exclude),
        "it is missing from its SR": vdi.missing,
        f"VDIs of type {vdi.type!r} have no contents": not vdi.is_readable,
        "it is itself a snapshot": vdi.is_a_snapshot,
        "no host has its SR attached": sr is None or not sr.host_refs,
        "xapi takes no snapshot of a disk that is reset at every boot": vdi.on_boot == "reset",
        "xapi takes no snapshot of a disk shared between VMs": vdi.sharable,
    }
    return next((text for text, applies in obstacles.items() if applies), "")


def _plan_disk(
    inventory: Inventory,
    disk: Disk,
    history: VMHistory | None,
    *,
    store: str,
    full: bool,
) -> DiskPlan:
    vdi = disk.vdi
    sr = inventory.srs.get(vdi.sr_ref)
    base, flaw = _find_base(inventory, vdi, history, store=store)
    obstacle = tracking_obstacle(inventory, vdi)
    plan = DiskPlan(
        device=disk.device,
        vdi_uuid=vdi.uuid,
        vdi_ref=vdi.ref,
        vdi_name=vdi.name,
        sr_uuid=sr.uuid if sr else "",
        size=vdi.size,
        method="full",
        reason=Reason.CHANGED,
        detail="",
        enable_cbt=not vdi.cbt_enabled and not obstacle,
    )
    for applies, reason, detail in (
        (full, Reason.REQUESTED, "a full copy was asked for"),
        _novelty(disk, history),
        (bool(obstacle), Reason.CBT_UNSUPPORTED, obstacle),
        (not vdi.cbt_enabled, Reason.CBT_OFF, "change tracking was off, and is turned on now"),
    ):
        if applies:
            return replace(plan, reason=reason, detail=detail)
    if base is None:
        return replace(plan, reason=flaw[0], detail=flaw[1])
    if vdi.size < base.disk.size:
        return replace(plan, reason=Reason.RESIZED, detail=_shrunk(base, vdi))
    return replace(plan, method="incremental", base=base, detail=f"changes since {base.time}")


def _novelty(disk: Disk, history: VMHistory | None) -> tuple[bool, Reason, str]:
    """Tell whether no restore point has this VDI, and what to say about it."""
    points = history.points if history else ()
    others: list[str] = []
    for point in points:
        for known in point.disks:
            if known.vdi_uuid == disk.vdi.uuid:
                return (False, Reason.FIRST, "")
            if known.device == disk.device:
                others.append(point.time)
    if others:
        detail = f"{disk.device} is another VDI than in {others[-1]} (restored, reverted or moved)"
        return (True, Reason.REPLACED, detail)
    return (True, Reason.FIRST, "no restore point has this disk yet")


def tracking_obstacle(inventory: Inventory, vdi: VDI) -> str:
    """Return why changes of ``vdi`` cannot be tracked, "" if they can."""
    sr = inventory.srs.get(vdi.sr_ref)
    if sr is None or not sr.cbt_capable:
        kind = sr.type if sr else "unknown"
        return f"its SR of type {kind!r} cannot track changed blocks"
    if vdi.sm_config.get("type") == RAW_SM_TYPE:
        return "changes of a raw image cannot be tracked"
    if not vdi.cbt_enabled and inventory.pool.restrictions.get("restrict_cbt") == "true":
        return "the pool's licence does not cover changed block tracking"
    return ""


def _find_base(
    inventory: Inventory, vdi: VDI, history: VMHistory | None, *, store: str
) -> tuple[Base | None, tuple[Reason, str]]:
    """Return the newest usable base of ``vdi``; without any, what is wrong with the newest."""
    flaws: list[tuple[Reason, str]] = []
    for point in reversed(history.points if history else ()):
        for disk in point.disks:
            if disk.vdi_uuid != vdi.uuid:
                continue
            snapshot = inventory.find_vdi(disk.snapshot_uuid)
            if snapshot is None:
                detail = f"the pool no longer has the snapshot of {point.time}"
                flaws.append((Reason.BASE_LOST, detail))
                continue
            flaw = _flaw(snapshot, vdi, time=point.time, store=store)
            if flaw is None:
                base = Base(
                    time=point.time,
                    snapshot_ref=snapshot.ref,
                    snapshot_uuid=snapshot.uuid,
                    disk=disk,
                )
                return base, (Reason.CHANGED, "")
            flaws.append(flaw)
    return None, flaws[0] if flaws else (Reason.FIRST, "no restore point has this disk yet")


def _flaw(snapshot: VDI, vdi: VDI, *, time: str, store: str) -> tuple[Reason, str] | None:
    """Return why changes of ``vdi`` since ``snapshot`` cannot be asked for, None if they can."""
    owned = inventories.read_owner(snapshot.other_config, snapshot.uuid)
    if not snapshot.is_a_snapshot or snapshot.snapshot_of != vdi.ref:
        return Reason.BASE_LOST, f"the snapshot of {time} belongs to another disk now"
    if snapshot.sr_ref != vdi.sr_ref:
        return Reason.BASE_LOST, f"the snapshot of {time} is in another SR"
    if owned is None or owned.role != "base" or owned.store != store:
        return Reason.BASE_LOST, f"the snapshot of {time} is not tagged as this store's"
    if not snapshot.cbt_enabled:
        return Reason.CBT_OFF, f"changes were not tracked yet when {time} was taken"
    return None


def _shrunk(base: Base, vdi: VDI) -> str:
    before, now = units.format_size(base.disk.size), units.format_size(vdi.size)
    return f"the disk shrank from {before} to {now} since {base.time}"


# ── Selecting ────────────────────────────────────────────────────────────────────────────────


def select_vms(inventory: Inventory, patterns: Sequence[str]) -> list[VM]:
    """Return the live VMs that any of ``patterns`` selects, by name and uuid.

    A pattern is a uuid, a name or a glob of names, ``tag:GLOB``, or ``sr:GLOB`` (name or uuid of an
    SR that holds one of the VM's disks).

    Raises:
        NotFound: a plain name or uuid selects nothing, or all patterns together do.
    """
    vms = inventory.live_vms()
    chosen: set[str] = set()
    for pattern in patterns:
        found = {vm.ref for vm in vms if _selects(inventory, pattern, vm)}
        if not found and not is_open(pattern):
            raise errors.NotFound(f"pool {inventory.pool.name!r} has no VM called {pattern!r}")
        chosen |= found
    if not chosen:
        told = ", ".join(map(repr, patterns))
        raise errors.NotFound(f"no VM of pool {inventory.pool.name!r} matches {told or 'nothing'}")
    return [vm for vm in vms if vm.ref in chosen]


def is_open(pattern: str) -> bool:
    """Tell whether it is in order that ``pattern``, of ``select_vms``, selects nothing."""
    return pattern.startswith(("tag:", "sr:")) or any(c in pattern for c in "*?[")


def _selects(inventory: Inventory, pattern: str, vm: VM) -> bool:
    if pattern.startswith("tag:"):
        return any(fnmatchcase(tag, pattern[4:]) for tag in vm.tags)
    if pattern.startswith("sr:"):
        srs = [inventory.srs.get(disk.vdi.sr_ref) for disk in inventory.disks_of(vm)]
        return any(fnmatchcase(n, pattern[3:]) for sr in srs if sr for n in (sr.name, sr.uuid))
    return pattern in {vm.name, vm.uuid} or fnmatchcase(vm.name, pattern)
