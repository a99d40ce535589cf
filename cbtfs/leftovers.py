"""Leftovers: what dead runs left in pool and store, and what only looks as if they had.

::

    tag, bound to the object?   no ──> not ours: not even mentioned
        │ yes
    role ``made``?              yes ─> a user's: not mentioned
        │ no
    of a disk that is whole     yes ─> only the tag goes
    and in a user's VM?
        │ no
    needed by a point?          yes ─> in use: not mentioned
        │ no
    its store is this one?      no ──> left, and said: only that store knows
        │ yes, or it needs none
    its maker certainly dead?   no ──> left, and said
        │ yes
    of a partial point that     yes ─> left, and said: the next sync goes on from there
    can be gone on with?
        │ no
    leftover

Nothing here looks at the world: who is dead, and what can be gone on with, is told by the caller.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum

from . import catalogue
from .inventory import VBD, VDI, VM, Inventory
from .owner import (
    RESTORED,
    Block,
    Owned,
    is_finished,
    may_start,
    read_block,
    read_owner,
    read_unfinished,
    time_of_run,
)

LIVE, BASE = "live", "base"
"""Roles of tags, beside ``RESTORED``, whose objects do not outlive their makers' work."""


class Kind(StrEnum):
    """What a leftover is; in the order in which they have to go."""

    TASK = "task"
    VBD = "dom0 VBD"
    PARTIAL = "partial point"
    VM = "VM snapshot"
    DATA = "data of a base"
    VDI = "snapshot"
    BASE = "base"
    NEW_VM = "unfinished VM"
    DISK = "unfinished disk"
    TAG = "tag of a restored disk"
    BLOCK = "block on starting"
    REMOVED = "removed point"


@dataclass(frozen=True, slots=True)
class Thing:
    """Something that is to go, or that stays, and why.

    Attributes:
        name: what to call it: a uuid, or VM/TIME of a point.
        ref: reference in the pool; of a partial point that of its VM or disk. "" if it has none.
        key: name of the directory of the store whose lock is to be held; "" for none.
        time: of the point, in the store.
        snapshots: names of snapshots in the pool that a partial point speaks of.
    """

    kind: Kind
    name: str
    why: str
    ref: str = ""
    key: str = ""
    time: str = ""
    snapshots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Findings:
    """What is to go, in that order, and what stays though it is ours."""

    remove: tuple[Thing, ...] = ()
    left: tuple[Thing, ...] = ()


@dataclass(frozen=True, slots=True)
class Partial:
    """A partial point of the store.

    Attributes:
        time: of the point.
        maker: the run that worked on it last; None if it did not get as far as the pool.
        pool_uuid: where its disks are; "" if that is not on record.
        snapshots: names of what it asked the pool for.
        resumable: whether the next sync goes on from there; None if the pool could not be asked.
    """

    time: str
    maker: Owned | None = None
    pool_uuid: str = ""
    snapshots: tuple[str, ...] = ()
    resumable: bool | None = False


@dataclass(frozen=True, slots=True)
class Folder:
    """What the store has of one VM, or of one disk.

    Attributes:
        label: what people call it.
        target_ref: the VM or disk in the pool; "" if it is not there.
        bases: uuids of the snapshots that its points were copied from.
        partials: its partial points, oldest first.
        removed: times of points on their way out.
        problem: why not all of it could be read; "" if all was.
    """

    label: str
    target_ref: str = ""
    bases: frozenset[str] = frozenset()
    partials: tuple[Partial, ...] = ()
    removed: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Shelf:
    """What the store has, by directory."""

    uuid: str
    folders: Mapping[str, Folder] = field(default_factory=dict[str, Folder])


@dataclass(frozen=True, slots=True)
class PoolTask:
    """A task of the pool that cbtfs made."""

    ref: str
    uuid: str
    label: str
    maker: Owned


@dataclass(frozen=True, slots=True)
class Judge:
    """Who knows which processes are dead.

    Attributes:
        host: name of this machine.
        is_dead: whether what made something certainly runs no more.
    """

    host: str
    is_dead: Callable[[Owned], bool]

    def reprieve(self, maker: Owned) -> str:
        """Return why what ``maker`` made has to stay; "" if nothing speaks for it."""
        if self.is_dead(maker):
            return ""
        if maker.host == self.host:
            return f"process {maker.pid} is at work"
        return (
            f"made on {maker.host or 'an unknown machine'}: clean up there"
            f"{f', or say --host {maker.host} if it is gone for good' if maker.host else ''}"
        )


@dataclass(frozen=True, slots=True)
class Wish:
    """What else is to go: what could be gone on with.

    Attributes:
        unblock: whether half restored VMs may start as they are.
        partial: whether they go at all.
        older_than: only those whose instant is so many seconds ago.
        now: the time.
    """

    partial: bool = False
    older_than: float = 0.0
    unblock: bool = False
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def covers(self, partial: Partial) -> bool:
        """Tell whether a partial point is to go although it could be gone on with."""
        age = (self.now - catalogue.parse_time(partial.time)).total_seconds()
        return self.partial and age >= self.older_than


def decide(
    inventory: Inventory | None,
    shelf: Shelf | None,
    tasks: tuple[PoolTask, ...] = (),
    *,
    judge: Judge,
    wish: Wish,
) -> Findings:
    """Return what is left over.

    Args:
        inventory: the pool now; None if it does not answer.
        shelf: the store now; None if there is none.
        tasks: of the pool, those that cbtfs made.
        judge: knows which processes are dead.
        wish: what may go beside that.
    """
    decision = _Decision(inventory, shelf, judge, wish)
    for key, folder in shelf.folders.items() if shelf else ():
        decision.take_folder(key, folder)
    for task in tasks:
        decision.take_task(task)
    if inventory is not None:
        for vm in inventory.vms.values():
            decision.take_vm(vm)
        for vdi in inventory.vdis.values():
            decision.take_vdi(vdi)
    order = list(Kind)
    remove = sorted(decision.remove, key=lambda thing: (order.index(thing.kind), thing.name))
    return Findings(tuple(remove), tuple(decision.left))


class _Decision:
    """Takes one object after the other; folders of the store come first."""

    def __init__(
        self, inventory: Inventory | None, shelf: Shelf | None, judge: Judge, wish: Wish
    ) -> None:
        self.remove: list[Thing] = []
        self.left: list[Thing] = []
        self._inventory = inventory
        self._shelf = shelf
        self._judge = judge
        self._wish = wish
        self._kept: set[tuple[str, str]] = set()  # partial points that stay
        self._new_vms: set[str] = set()  # half restored, and to go
        self._at_work: set[tuple[str, str]] = set()  # among them those that somebody may work on
        folders = shelf.folders.values() if shelf else ()
        self._needed = {uuid for folder in folders for uuid in folder.bases}

    # ── the store ────────────────────────────────────────────────────────────────────────────────

    def take_folder(self, key: str, folder: Folder) -> None:
        gone: list[Thing] = []
        kept: set[str] = set()
        for partial in folder.partials:
            name = f"{folder.label}/{partial.time}"
            thing = Thing(Kind.PARTIAL, name, "", folder.target_ref, key, partial.time)
            reprieve = self._reprieve(key, folder, partial)
            if reprieve:
                kept.update(partial.snapshots)
                self._kept.add((key, partial.time))
                self.left.append(replace(thing, why=reprieve))
            else:
                gone.append(replace(thing, why=_why_gone(partial), snapshots=partial.snapshots))
        for thing in gone:
            # a partial point also names what runs before it had asked for
            names = tuple(name for name in thing.snapshots if name not in kept)
            self.remove.append(replace(thing, snapshots=names))
        for time in folder.removed:
            why = "somebody removed it, and was killed at it"
            self.remove.append(Thing(Kind.REMOVED, f"{folder.label}/{time}", why, "", key, time))

    def _reprieve(self, key: str, folder: Folder, partial: Partial) -> str:
        """Return why a partial point stays; "" if it is to go."""
        if partial.maker is None:
            return ""
        alive = self._judge.reprieve(partial.maker)
        if alive:
            self._at_work.add((key, partial.time))
            return alive
        if self._inventory is None or partial.resumable is None:
            return "the pool has to be asked first"
        if partial.pool_uuid and partial.pool_uuid != self._inventory.pool.uuid:
            return f"of another pool, {partial.pool_uuid}"
        return self._reprieve_dead(folder, partial)

    def _reprieve_dead(self, folder: Folder, partial: Partial) -> str:
        """Return why a partial point stays though its run is dead; "" if it is to go."""
        if not folder.target_ref:
            return self._reprieve_lost(partial)
        if partial.resumable and not self._wish.covers(partial):
            return "the next sync goes on from there (--partial removes it)"
        return ""

    def _reprieve_lost(self, partial: Partial) -> str:
        """Return why a partial point stays whose VM or disk is not in this pool."""
        if not partial.pool_uuid:
            return "what it is of is not in this pool, and which pool has it is not on record"
        vms = self._inventory.vms.values() if self._inventory else ()
        for vm in vms:
            if vm.is_a_snapshot and vm.name in partial.snapshots and _tag(vm) is None:
                return f"its VM is gone, but not its snapshot, which has no tag: remove {vm.uuid}"
        return ""

    # ── the pool ─────────────────────────────────────────────────────────────────────────────────

    def take_task(self, task: PoolTask) -> None:
        reprieve = self._judge.reprieve(task.maker)
        thing = Thing(Kind.TASK, task.uuid, "", task.ref)
        why = f"{task.label}, for {_dead(task.maker)}"
        self._sort(thing, reprieve, why)

    def take_block(self, vm: VM) -> None:
        """Take what keeps a VM from starting, whose disks a dead run was writing over."""
        block = read_block(vm.blocked_operations, vm.uuid)
        if block is None:
            return
        why = f"{vm.name!r} may be half restored (to {block.point}) by {_dead(block)}"
        reprieve = self._judge.reprieve(block)
        if self._is_restored(block):
            why = f"{vm.name!r} is restored (to {block.point}) by {_dead(block)}"
        elif vm.power_state != "Halted" or may_start(vm.blocked_operations):
            why = f"{vm.name!r} was let start, half restored (to {block.point}) by {_dead(block)}"
        elif not reprieve and not self._wish.unblock:
            reprieve = f"{why}; restore it again, or let it start as it is with --unblock"
        self._sort(Thing(Kind.BLOCK, vm.uuid, "", vm.ref), reprieve, why)

    def _is_restored(self, block: Block) -> bool:
        vms = self._inventory.vms.values() if self._inventory else ()
        return any(vm.uuid == block.snapshot and is_finished(vm.name) for vm in vms)

    def take_vm(self, vm: VM) -> None:
        self.take_block(vm)
        tag = _tag(vm)
        if tag is not None and tag.role == RESTORED and not vm.is_a_snapshot:
            self._take_new_vm(vm, tag)
        if tag is None or tag.role != BASE or not vm.is_a_snapshot or self._is_kept(tag):
            return
        thing = Thing(Kind.VM, vm.uuid, "", vm.ref, tag.vm)
        why = f"taken for {self._label(tag)}/{tag.point} by {_dead(tag)}"
        reprieve = self._foreign(tag) or self._unknown(vm, tag) or self._judge.reprieve(tag)
        self._sort(thing, reprieve, why)

    def _take_new_vm(self, vm: VM, tag: Owned) -> None:
        reprieve = self._judge.reprieve(tag)
        if not reprieve and vm.power_state != "Halted":
            reprieve = "not finished, but started"
        thing = Thing(Kind.NEW_VM, vm.uuid, "", vm.ref)
        if self._sort(thing, reprieve, f"{vm.name!r}, half restored by {_dead(tag)}"):
            self._new_vms.add(vm.ref)

    def take_vdi(self, vdi: VDI) -> None:
        tag = _tag(vdi)
        if tag is None:
            return
        if tag.role == RESTORED and not vdi.is_a_snapshot:
            self._take_unfinished(vdi, tag)
        elif tag.role == LIVE and vdi.is_a_snapshot:
            thing = Thing(Kind.VDI, vdi.uuid, "", vdi.ref)
            why = f"for reading {self._origin(vdi)}, by {_dead(tag)}"
            if self._sort(thing, self._judge.reprieve(tag), why):
                self._take_vbds(vdi, tag)
        elif tag.role == BASE and vdi.is_a_snapshot:
            self._take_base(vdi, tag)

    def _take_unfinished(self, vdi: VDI, tag: Owned) -> None:
        reprieve = self._judge.reprieve(tag)
        if not reprieve and any(self._is_of_user(ref) for ref in vdi.vbd_refs):
            # it gets its name when all of it is there, and loses its tag after its VM
            if not time_of_run(vdi.name):
                why = f"{vdi.name!r} is whole; {_dead(tag)} had yet to say so"
                self._sort(Thing(Kind.TAG, vdi.uuid, "", vdi.ref), "", why)
                return
            reprieve = "not finished, but attached to a VM"
        thing = Thing(Kind.DISK, vdi.uuid, "", vdi.ref)
        self._sort(thing, reprieve, f"{vdi.name!r}, half restored by {_dead(tag)}")

    def _take_base(self, vdi: VDI, tag: Owned) -> None:
        if vdi.uuid in self._needed and vdi.type == "cbt_metadata":
            return
        if self._is_kept(tag):
            if not self._judge.reprieve(tag) and (tag.vm, tag.point) not in self._at_work:
                self._take_vbds(vdi, tag)
            return
        thing = Thing(self._kind(vdi), vdi.uuid, "", vdi.ref, tag.vm)
        reprieve = self._foreign(tag) or self._unknown(vdi, tag) or self._judge.reprieve(tag)
        if self._sort(thing, reprieve, self._why_base(vdi, tag)):
            self._take_vbds(vdi, tag)

    def _kind(self, vdi: VDI) -> Kind:
        if vdi.type == "cbt_metadata":
            return Kind.BASE
        return Kind.DATA if vdi.uuid in self._needed and vdi.cbt_enabled else Kind.VDI

    def _why_base(self, vdi: VDI, tag: Owned) -> str:
        of = f"of {self._origin(vdi)}"
        if vdi.uuid in self._needed:
            if vdi.cbt_enabled:
                return f"{of}: {self._label(tag)}/{tag.point} is complete and needs no more of it"
            return f"{of}: without change tracking it can be no base"
        if vdi.type == "cbt_metadata":
            return f"{of}: a base for {self._label(tag)}, but no point there refers to it"
        return f"{of}, taken for {self._label(tag)}/{tag.point} by {_dead(tag)}"

    def _take_vbds(self, vdi: VDI, tag: Owned) -> None:
        """Take what attaches ``vdi``, which is ours and of a dead run, to a control domain."""
        for vbd in map(self._vbd, vdi.vbd_refs):
            if vbd is None or vbd.vdi_ref != vdi.ref or vbd.mode != "RO":
                continue
            if self._is_of_dom0(vbd.ref):
                why = f"attaches snapshot {vdi.uuid} for {_dead(tag)}"
                key = tag.vm if tag.role == BASE else ""
                self.remove.append(Thing(Kind.VBD, vbd.uuid or vbd.ref, why, vbd.ref, key))

    # ── what is known ────────────────────────────────────────────────────────────────────────────

    def _sort(self, thing: Thing, reprieve: str, why: str) -> bool:
        """Put ``thing`` where it belongs; tell whether it is to go."""
        chosen = self.left if reprieve else self.remove
        chosen.append(replace(thing, why=reprieve or why))
        return not reprieve

    def _is_kept(self, tag: Owned) -> bool:
        """Tell whether what has this tag belongs to a partial point that stays, and is told."""
        is_here = self._shelf is not None and tag.store == self._shelf.uuid
        return is_here and (tag.vm, tag.point) in self._kept

    def _foreign(self, tag: Owned) -> str:
        """Return why only another store knows about this; "" if this one does."""
        if self._shelf is None:
            return f"of store {tag.store}; name that with --store"
        if tag.store != self._shelf.uuid:
            return f"of another store, {tag.store}"
        return "" if tag.vm else "its tag names no VM"

    def _unknown(self, record: VDI | VM, tag: Owned) -> str:
        """Return why the store does not know whether a point needs this; "" if it does."""
        folder = self._shelf.folders.get(tag.vm) if self._shelf else None
        if folder is None or record.uuid in self._needed or not folder.problem:
            return ""
        return f"perhaps needed by a point that cannot be read: {folder.problem}"

    def _vbd(self, ref: str) -> VBD | None:
        return self._inventory.vbds.get(ref) if self._inventory else None

    def _is_of_user(self, vbd_ref: str) -> bool:
        """Tell whether a VBD is of a VM that is neither a control domain nor to go."""
        vbd = self._vbd(vbd_ref)
        is_going = vbd is not None and vbd.vm_ref in self._new_vms
        return not is_going and not self._is_of_dom0(vbd_ref)

    def _is_of_dom0(self, vbd_ref: str) -> bool:
        vbd = self._vbd(vbd_ref)
        vm = self._inventory.vms.get(vbd.vm_ref) if self._inventory and vbd else None
        return vm is not None and vm.is_control_domain

    def _label(self, tag: Owned) -> str:
        folder = self._shelf.folders.get(tag.vm) if self._shelf else None
        return folder.label if folder else tag.vm

    def _origin(self, vdi: VDI) -> str:
        origin = self._inventory.vdis.get(vdi.snapshot_of) if self._inventory else None
        return repr(origin.name) if origin else "a disk that is gone"


def _tag(record: VM | VDI) -> Owned | None:
    tag = read_owner(record.other_config, record.uuid)
    return tag or read_unfinished(record.other_config, uuid=record.uuid, name=record.name)


def _dead(maker: Owned) -> str:
    return f"process {maker.pid} on {maker.host}, which is dead"


def _why_gone(partial: Partial) -> str:
    if partial.maker is None:
        return "killed before it had begun"
    if partial.resumable:
        return "it could be gone on with, but is to be removed"
    return f"it cannot be gone on with; made by {_dead(partial.maker)}"
