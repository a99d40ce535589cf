"""What sync will do with each disk, and why: decided from records, before anything is touched.

=============  ====================================================================================
full           an empty image; everything that may hold data is read and written
incremental    a clone of a base, into which the changed blocks are copied
compare        a clone of the newest image; everything that may hold data is read, and what differs
               is written: it costs a read, not space
resume         what an interrupted run had begun goes on; only the caller knows of it, not this file
=============  ====================================================================================

An increment needs a base: the newest restore point of the very same VDI whose snapshot the pool
still knows and has tagged as this store's. A comparison needs no more than an image, and any image
that was not found damaged is good enough for it: what it holds decides how much is written, not
what the new image will hold.

Whatever is asked of the pool later (above all ``list_changed_blocks``) can still fail: then
``fall_back`` makes a comparison or a full copy of an increment, with a reason of its own.

Rules of this file:

1. The size of a base is what its restore point says. The pool's size of a snapshot whose data was
   destroyed is nonsense (SR.scan sets it to the size of the log).
2. ``cbt_enabled`` on both ends does not prove a chain, but its absence on one end disproves it.
3. Nothing here reads a clock.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from . import errors, inventory as inventories, owner, units
from .catalogue import DiskFailure, DiskPoint, VMHistory
from .inventory import VBD, VDI, VM, Disk, Inventory

RAW_SM_TYPE = "raw"
"""``sm_config["type"]`` of an image without VHD or qcow2 header, which cannot be tracked."""


class Reason(StrEnum):
    """Why a disk is copied as it is; the words are part of the store's format."""

    CHANGED = "changed"
    FIRST = "first"
    REQUESTED = "requested"
    REPLACED = "replaced"
    MOVED = "moved"
    RESIZED = "resized"
    BASE_LOST = "base-lost"
    BASE_DAMAGED = "base-damaged"
    CBT_OFF = "cbt-off"
    CBT_UNSUPPORTED = "cbt-unsupported"
    CBT_MISMATCH = "cbt-mismatch"


Damaged = Callable[[str, str], bool]
"""Tells of the time of a restore point and a device whether that image was found damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a disk is cloned from: a disk of a restore point and, for an increment, its snapshot.

    Attributes:
        snapshot_ref: the snapshot in the pool; "" for a comparison, which needs none.
        snapshot_uuid: its uuid, or "" as well.
    """

    time: str
    snapshot_ref: str = ""
    snapshot_uuid: str = ""
    disk: DiskPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What will be done with one disk.

    Attributes:
        size: virtual size in bytes now; the snapshot may turn out larger.
        method: ``full``, ``incremental``, ``compare`` or ``resume``.
        detail: a sentence for people that explains ``reason``.
        base: what is cloned, for an increment and a comparison, else None.
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
        refused: the disks that should get one, and cannot now: failures before anything is done.
        resumes: time of the partial point that is gone on with, "" for a new one.
    """

    vm_uuid: str
    vm_ref: str
    vm_name: str
    disks: tuple[DiskPlan, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    refused: tuple[DiskFailure, ...] = ()
    resumes: str = ""


# ── Deciding ─────────────────────────────────────────────────────────────────────────────────


def _whole(_time: str, _device: str) -> bool:
    return False


def plan_vm(  # noqa: PLR0913  # one keyword per fact that decides
    inventory: Inventory,
    vm: VM,
    history: VMHistory | None,
    *,
    store: str,
    full: bool = False,
    exclude: Sequence[str] = (),
    damaged: Damaged = _whole,
) -> VMPlan:
    """Return what to do with each disk of ``vm``.

    Args:
        inventory: the pool now.
        vm: a live VM.
        history: the VM's restore points, None if it has none.
        store: uuid of the store, which the owner tags of its bases name.
        full: copy everything, whatever could be spared.
        exclude: globs; a disk whose device, name or uuid matches one is left out.
        damaged: tells which images cannot be built on; asked of as few as possible.
    """
    planner = _Planner(inventory, history, store, full, damaged)
    plans: list[DiskPlan] = []
    refused: list[DiskFailure] = []
    skipped: list[tuple[str, str]] = []
    for disk in inventory.disks_of(vm):
        obstacle = _obstacle(inventory, disk, exclude)
        half = half_restored(inventory, disk.vdi)
        if obstacle:
            skipped.append((disk.device, obstacle))
        elif half:
            refused.append(_failure(disk, half))
        else:
            plans.append(planner.plan(disk))
    return VMPlan(
        vm_uuid=vm.uuid,
        vm_ref=vm.ref,
        vm_name=vm.name,
        disks=tuple(plans),
        skipped=tuple(skipped),
        refused=tuple(refused),
    )


def plan_vdi(
    inventory: Inventory,
    vdi: VDI,
    history: VMHistory | None,
    *,
    store: str,
    full: bool = False,
    damaged: Damaged = _whole,
) -> VMPlan:
    """Return what to do with ``vdi`` by itself, as a VM of the one disk ``disk``.

    Args:
        inventory: the pool now.
        vdi: a disk that no VM has.
        history: the disk's restore points, None if it has none.
        store: uuid of the store, which the owner tags of its bases name.
        full: copy everything, whatever could be spared.
        damaged: tells which images cannot be built on; asked of as few as possible.
    """
    disk = Disk("disk", VBD(ref=""), vdi)
    obstacle = _obstacle(inventory, disk, ())
    half = "" if obstacle else half_restored(inventory, vdi)
    planner = _Planner(inventory, history, store, full, damaged)
    return VMPlan(
        vm_uuid=f"vdi-{vdi.uuid}",
        vm_ref="",
        vm_name=vdi.name,
        disks=() if obstacle or half else (planner.plan(disk),),
        skipped=((disk.device, obstacle),) if obstacle else (),
        refused=(_failure(disk, half),) if half else (),
    )


def fall_back(disk: DiskPlan, *, reason: Reason, detail: str) -> DiskPlan:
    """Return ``disk`` without an increment, because of something learned after it was planned.

    It is compared with the image that was to be its base, or copied in full: if it has none, or if
    the reason is that this image cannot be built on.
    """
    plan = replace(disk, reason=reason, detail=detail)
    if disk.base is None or reason in _NO_IMAGE:
        return replace(plan, method="full", base=None)
    return replace(plan, method="compare", base=_image(disk.base.time, disk.base.disk))


_NO_IMAGE = frozenset({Reason.BASE_DAMAGED, Reason.RESIZED, Reason.REQUESTED})
"""Reasons for which the image that was to be the base is no good for a comparison either."""


def _image(time: str, disk: DiskPoint) -> Base:
    """Return ``disk`` of a point as what a comparison begins with."""
    return Base(time=time, disk=disk)


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


def half_restored(inventory: Inventory, vdi: VDI) -> str:
    """Return why there is nothing in ``vdi`` that anybody would want back, "" if there is.

    So it is while a restore writes over it, and after one that was killed, until somebody lets the
    VM start as it is.
    """
    for vbd in map(inventory.vbds.get, vdi.vbd_refs):
        vm = inventory.vms.get(vbd.vm_ref) if vbd is not None else None
        if vm is None or vm.power_state != "Halted":
            continue
        block = owner.read_standing_block(vm.blocked_operations, vm.uuid)
        if block is not None and vdi.uuid in block.disks:
            return (
                f"it is half restored, to {block.point}; finish that first (cbtfs restore"
                " --in-place), go back to the snapshot taken before, or keep it as it is (cbtfs"
                " clean --unblock)"
            )
    return ""


def without_half_restored(plan: VMPlan, inventory: Inventory) -> VMPlan:
    """Return ``plan`` with the disks refused that are half restored by now.

    Raises:
        PoolError: none is left.
    """
    disks: list[DiskPlan] = []
    refused = list(plan.refused)
    for disk in plan.disks:
        vdi = inventory.vdis.get(disk.vdi_ref)
        why = half_restored(inventory, vdi) if vdi is not None else ""
        if why:
            refused.append(DiskFailure(device=disk.device, vdi_uuid=disk.vdi_uuid, error=why))
        else:
            disks.append(disk)
    plan = replace(plan, disks=tuple(disks), refused=tuple(refused))
    check_refused(plan)
    return plan


def check_refused(plan: VMPlan) -> None:
    """Raise PoolError if all that should be copied is refused."""
    if plan.refused and not plan.disks:
        first = plan.refused[0]
        raise errors.PoolError(f"{first.device}: {first.error}")


def _failure(disk: Disk, why: str) -> DiskFailure:
    return DiskFailure(device=disk.device, vdi_uuid=disk.vdi.uuid, error=why)


class _Planner:
    """Decides for the disks of one directory of the store."""

    def __init__(
        self,
        inventory: Inventory,
        history: VMHistory | None,
        store: str,
        full: bool,
        damaged: Damaged,
    ) -> None:
        self._inventory = inventory
        self._points = history.points if history else ()
        self._movable = not (history and history.uuid.startswith("vdi-"))
        self._store = store
        self._full = full
        self._damaged = damaged

    def plan(self, disk: Disk) -> DiskPlan:
        """Return what to do with ``disk``."""
        vdi = disk.vdi
        sr = self._inventory.srs.get(vdi.sr_ref)
        obstacle = tracking_obstacle(self._inventory, vdi)
        plan = DiskPlan(
            device=disk.device,
            vdi_uuid=vdi.uuid,
            vdi_ref=vdi.ref,
            vdi_name=vdi.name,
            sr_uuid=sr.uuid if sr else "",
            size=vdi.size,
            method="full",
            reason=Reason.REQUESTED,
            detail="a full copy was asked for",
            enable_cbt=not vdi.cbt_enabled and not obstacle,
        )
        if self._full:
            return plan
        images = self._images(lambda known: known.vdi_uuid == vdi.uuid)
        if not images:
            return self._newcomer(plan)
        return self._built_on(plan, vdi, images, obstacle=obstacle)

    def _images(self, wanted: Callable[[DiskPoint], bool]) -> list[Base]:
        """Return the images of the disks that are ``wanted``, newest first."""
        return [
            _image(point.time, disk)
            for point in reversed(self._points)
            for disk in point.disks
            if wanted(disk)
        ]

    def _newcomer(self, plan: DiskPlan) -> DiskPlan:
        """Return what to do with a VDI that no restore point has.

        A disk that was moved to another SR, restored or reverted is a new VDI in the old one's
        place, with much the same in it. While the pool still has the old one, it is none of these.
        """
        images = self._images(lambda known: known.device == plan.device) if self._movable else []
        if not images:
            return _in_full(plan, Reason.FIRST, "no restore point has this disk yet")
        newest = images[0]
        told = f"{plan.device} is another VDI than in {newest.time}"
        if self._inventory.find_vdi(newest.disk.vdi_uuid) is not None:
            return _in_full(plan, Reason.REPLACED, f"{told}; that one is still in the pool")
        same = [image for image in images if image.disk.vdi_uuid == newest.disk.vdi_uuid]
        image = self._whole_one(same)
        if image is None:
            return _in_full(plan, Reason.BASE_DAMAGED, f"{told}, and {_damage(same)}")
        if plan.size < image.disk.size:
            return _in_full(plan, Reason.REPLACED, f"{told}, and smaller")
        told += "; that one is gone from the pool (moved, restored or reverted)"
        return replace(plan, method="compare", reason=Reason.MOVED, detail=told, base=image)

    def _built_on(
        self, plan: DiskPlan, vdi: VDI, images: Sequence[Base], *, obstacle: str
    ) -> DiskPlan:
        """Return what to do with a VDI of which there are ``images``, newest first."""
        image = self._whole_one(images)
        if image is None:
            return _in_full(plan, Reason.BASE_DAMAGED, _damage(images))
        if vdi.size < image.disk.size:
            return _in_full(plan, Reason.RESIZED, _shrunk(image, vdi))
        base = None
        if obstacle:
            reason, detail = Reason.CBT_UNSUPPORTED, obstacle
        elif not vdi.cbt_enabled:
            reason, detail = Reason.CBT_OFF, "change tracking was off, and is turned on now"
        else:
            base, (reason, detail) = self._find_base(vdi, images)
        method = "incremental" if base else "compare"
        return replace(plan, method=method, reason=reason, detail=detail, base=base or image)

    def _whole_one(self, images: Iterable[Base]) -> Base | None:
        """Return the first of ``images`` that was not found damaged."""
        return next((image for image in images if not self._is_damaged(image)), None)

    def _is_damaged(self, image: Base) -> bool:
        return self._damaged(image.time, image.disk.device)

    def _find_base(
        self, vdi: VDI, images: Sequence[Base]
    ) -> tuple[Base | None, tuple[Reason, str]]:
        """Return the newest usable base of ``vdi`` and why it is one, or what the newest lacks."""
        flaws: list[tuple[Reason, str]] = []
        for image in images:
            snapshot = self._inventory.find_vdi(image.disk.snapshot_uuid)
            if snapshot is None:
                detail = f"the pool no longer has the snapshot of {image.time}"
                flaws.append((Reason.BASE_LOST, detail))
                continue
            flaw = _flaw(snapshot, vdi, time=image.time, store=self._store)
            if flaw is None and self._is_damaged(image):
                flaw = Reason.BASE_DAMAGED, f"verify found damage in {image.time}"
            if flaw is None and vdi.size < image.disk.size:
                flaw = Reason.RESIZED, _shrunk(image, vdi)
            if flaw is not None:
                flaws.append(flaw)
                continue
            base = replace(image, snapshot_ref=snapshot.ref, snapshot_uuid=snapshot.uuid)
            return base, (Reason.CHANGED, _since(image, [detail for _, detail in flaws]))
        return None, flaws[0]


def _in_full(plan: DiskPlan, reason: Reason, detail: str) -> DiskPlan:
    return replace(plan, method="full", reason=reason, detail=detail)


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


def _since(base: Base, flaws: Sequence[str]) -> str:
    """Return what an increment is, and why it is not since a later point."""
    return f"changes since {base.time}" + (f": {flaws[0]}" if flaws else "")


def _damage(images: Sequence[Base]) -> str:
    times = [image.time for image in images]
    return f"verify found damage in {times[0]}" + (" and all before" if len(times) > 1 else "")


def _shrunk(base: Base, vdi: VDI) -> str:
    before, now = units.format_size(base.disk.size), units.format_size(vdi.size)
    return f"the disk shrank from {before} to {now} since {base.time}"
