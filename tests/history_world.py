"""A VM with its store and its model: everything that can happen to them, done to both.

The VM runs on one host, so that guests can write. Whatever is chosen by a number is chosen modulo
what there is, and what is not possible now does not happen: so that the same numbers always mean
the same, whatever cbtfs did meanwhile.

Two things never happen here, since the pool itself then says wrongly what changed: a guest's
discards (a trimmed block reads as zeros, and no bit is set; blktap, drivers/block-log.c), and a
snapshot between the crash of a host and the next start of the VM (the log counts as consistent;
sm, drivers/VDI.py). Only a sample or a full read finds these.
"""

import json
import random
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

from cbtfs import store as stores

from .history_lab import HOST, Lab, Record
from .history_model import BLOCK, Allowed, Content, Instant, ModelDisk, PointDisk, new_epoch
from .simulated import Failure

TRACKING = ("Shared NFS", "ZFS")
"""SRs that track changes; sizes on the second are multiples of 4 KiB only."""
SRS = (*TRACKING, "Linstor")
LARGEST = 8 << 20
MOST_DISKS = 4
MOST_SNAPSHOTS = 4
OWNER = "cbtfs:owner"
FOREIGN = "xo:backup:job"


@dataclass(frozen=True)
class ForeignSnapshot:
    """A snapshot of the VM that somebody else took; disks by number of their device."""

    vm_ref: str
    disks: dict[int, str]
    contents: dict[int, Content]


class World:
    """One VM ``name`` in the lab's pool, its store, and how both must look.

    Attributes:
        moment: counts writes and snapshots, so that it is known which came first.
        points: the restore points that are listed, by their times.
        instants: what the snapshots show that cbtfs took, by their uuids, as far as known.
        snapshots: of others, with their data.
        metadata: snapshots of others without their data, which are bases of theirs.
        foreign: what of others must be left as it is, as the pool had it when it was made.
        begun: the disks that a partial point's snapshot has, by its name.
        planned: how its disks might be copied in each run that worked on it, by its name.
        dead_tasks: what killed processes left in the pool.
    """

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.moment = 0
        self.disks: list[ModelDisk] = []
        self.points: dict[str, tuple[PointDisk, ...]] = {}
        self.instants: dict[str, Instant] = {}
        self.snapshots: list[ForeignSnapshot] = []
        self.metadata: list[str] = []
        self.former: dict[str, str] = {}
        self.begun: dict[str, frozenset[str]] = {}
        self.planned: dict[str, list[dict[str, Allowed]]] = {}
        self.dead_tasks = set(lab.records("task"))
        self.foreign: dict[str, Record] = {}
        self._srs = {str(sr["name_label"]): ref for ref, sr in lab.records("SR").items()}
        self._host = next(r for r, h in lab.records("host").items() if h["name_label"] == HOST)
        self._closing = ExitStack()
        self.vm = lab.text("VM.create", {"name_label": name, "name_description": ""})
        self.vm_uuid = lab.text("VM.get_uuid", self.vm)
        self.store = self._closing.enter_context(stores.open_store(lab.directory / name))
        self._plug(self._create("Shared NFS", 4 << 20), 0)
        self._plug(self._create("ZFS", (2 << 20) + 3 * 4096), 1)
        self.start()

    def close(self) -> None:
        """Remove the VM with all that belongs to it from the pool, and the store."""
        self.lab.settle()
        if self.lab.text("VM.get_power_state", self.vm) == "Running":
            self.lab.call("VM.hard_shutdown", self.vm)
        for ref, vm in self.lab.records("VM").items():
            if ref == self.vm or vm["snapshot_of"] == self.vm:
                self.lab.call("VM.destroy", ref)
        for ref, vdi in self.lab.records("VDI").items():
            if vdi["managed"]:
                self.lab.call("VDI.destroy", ref)
        self._closing.close()
        shutil.rmtree(self.lab.directory / self.name)

    # ── what is there ────────────────────────────────────────────────────────────────────────

    @property
    def attached(self) -> list[ModelDisk]:
        """The disks that the VM has, in the order of their devices."""
        return sorted((d for d in self.disks if d.number >= 0), key=lambda disk: disk.number)

    @property
    def detached(self) -> list[ModelDisk]:
        """The disks that no VM has."""
        return [disk for disk in self.disks if disk.number < 0]

    def uuids_of(self, uuid: str) -> list[str]:
        """Return the uuid of a disk, and those it had before it was moved: its snapshots go along.

        They are of the new VDI then, also the one that an interrupted run took of the old.
        """
        found = [uuid]
        while found[-1] in self.former:
            found.append(self.former[found[-1]])
        return found

    def ours(self) -> dict[str, Record]:
        """Return the VDIs of the pool that are tagged as cbtfs's.

        A disk that was reverted to a snapshot of cbtfs's has a copy of its tag, which names the
        snapshot.
        """
        vdis = self.lab.records("VDI").items()
        return {ref: vdi for ref, vdi in vdis if _owner(vdi) == vdi["uuid"]}

    def our_vms(self) -> list[str]:
        """Return the snapshot VMs that cbtfs took and has not removed."""
        return [
            ref
            for ref, vm in self.lab.records("VM").items()
            if vm["snapshot_of"] == self.vm and str(vm["name_label"]).startswith("cbtfs ")
        ]

    def partials(self) -> list[str]:
        """Return the names of the partial points in the store."""
        return [path.name for path in (self.store.path / self.vm_uuid).glob(".partial*")]

    # ── the guest ────────────────────────────────────────────────────────────────────────────

    def write(self, which: int, kind: str, seed: int) -> None:
        """Let the guest write some pieces to a disk.

        Kinds are ``scattered`` pieces of any length, whole ``blocks``, the ``end`` of the disk,
        ``zeros``, and the ``same`` bytes as before.
        """
        disk = self.attached[which % len(self.attached)]
        pieces = list(_pieces(disk.content, kind, random.Random(seed)))
        self.lab.write(self.name, disk.device, pieces)
        self.moment += 1
        touched = {n for offset, data in pieces for n in disk.content.write(offset, data)}
        disk.written.append((self.moment, frozenset(touched)))

    # ── the pool's administrator ─────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the VM on its host; where a log is inconsistent tracking goes off."""
        self.lab.call("VM.start_on", self.vm, self._host)

    def resize(self, which: int, more: int) -> None:
        """Grow a disk by up to so many times 4 KiB; to shrink it is refused."""
        disk = self.disks[which % len(self.disks)]
        size = min(disk.content.size + more * 4096, LARGEST)  # an SR rounds it up
        online = "VDI.resize_online" if disk.number >= 0 else "VDI.resize"
        try:
            self.lab.call(online, disk.ref, size)
        except Failure as failure:
            if failure.code != "SR_BACKEND_FAILURE_79" or size >= disk.content.size:
                raise
        now = int(str(self.lab.call("VDI.get_virtual_size", disk.ref)))
        assert now >= max(size, disk.content.size)
        self.moment += 1
        disk.grow(now, self.moment)

    def track(self, which: int, *, off: bool, on: bool) -> None:
        """Switch change tracking of a disk off, on, or off and on."""
        disk = self.disks[which % len(self.disks)]
        if not disk.trackable:
            return
        if off:
            self.lab.call("VDI.disable_cbt", disk.ref)
            disk.epoch = 0
        if on:
            self.lab.call("VDI.enable_cbt", disk.ref)
            disk.epoch = disk.epoch or new_epoch()

    def crash(self) -> None:
        """Let the host die, and start the VM again: what it had open is not tracked any more."""
        self.lab.pool.control("crash-host", HOST)
        for disk in self.attached:
            disk.epoch = 0
        self.start()

    def leave_be(self, kind: int) -> None:
        """Do what changes nothing: a reboot, a scan of all SRs, a coalesce."""
        if kind % 3 == 0:
            self.lab.call("VM.hard_reboot", self.vm)
        elif kind % 3 == 1:
            for name in SRS:
                self.lab.call("SR.scan", self._srs[name])
        else:
            self.lab.pool.control("collect")

    def detach(self, which: int) -> None:
        """Take a disk from the VM; rather give it one if it is the last."""
        if len(self.attached) > 1:
            self._unplug(self.attached[which % len(self.attached)])
        else:
            self.attach(which, which)

    def attach(self, which: int, number: int) -> None:
        """Give a detached disk to the VM, or else a new one; rather take one if there are many."""
        taken = {disk.number for disk in self.attached}
        free = [n for n in range(MOST_DISKS) if n not in taken]
        if self.detached and free:
            self._plug(self.detached[which % len(self.detached)], free[number % len(free)])
        elif free:
            size = (1 << 20) + number % 7 * 300_000
            self._plug(self._create(SRS[which % len(SRS)], size), free[number % len(free)])
        else:
            self.detach(which)

    def discard_disk(self, which: int) -> None:
        """Destroy a detached disk, or else detach one."""
        if self.detached:
            disk = self.detached[which % len(self.detached)]
            self.lab.call("VDI.destroy", disk.ref)
            self.disks.remove(disk)
        else:
            self.detach(which)

    def migrate(self, which: int, to: int) -> None:
        """Move a disk to another SR, without tracking, as xapi demands: it is another VDI then."""
        disk = self.attached[which % len(self.attached)]
        here = self.lab.text("VDI.get_SR", disk.ref)
        there = [self._srs[name] for name in SRS if self._srs[name] != here]
        sr = there[to % len(there)]
        self.lab.call("VM.hard_shutdown", self.vm)
        if disk.trackable:
            self.lab.call("VDI.disable_cbt", disk.ref)
        moved = self.lab.text("VDI.pool_migrate", disk.ref, sr, {})
        self.disks.remove(disk)
        self.disks.append(self._known(moved, disk.content, disk.number))
        self.former[self.disks[-1].uuid] = disk.uuid
        self.start()

    # ── other tools ──────────────────────────────────────────────────────────────────────────

    def snapshot(self) -> None:
        """Take a snapshot of the VM, as somebody else; the oldest goes if there are many."""
        if len(self.snapshots) == MOST_SNAPSHOTS:
            self.destroy_snapshot(0)
        taken = self.lab.text("VM.snapshot", self.vm, f"before the update of {self.name}")
        disks = self._disks_of(taken)
        for ref in disks.values():
            # it may be there already: a disk that was reverted has its snapshot's
            self.lab.call("VDI.remove_from_other_config", ref, FOREIGN)
            self.lab.call("VDI.add_to_other_config", ref, FOREIGN, taken)
        contents = {disk.number: disk.content.copy() for disk in self.attached}
        assert disks.keys() == contents.keys()
        self.snapshots.append(ForeignSnapshot(taken, disks, contents))
        self._remember_foreign()

    def destroy_snapshot(self, which: int) -> None:
        """Destroy a snapshot that somebody else took, or else take one."""
        if not self.snapshots:
            self.snapshot()
        else:
            gone = self.snapshots.pop(which % len(self.snapshots))
            self.lab.call("VM.destroy", gone.vm_ref)
            for ref in gone.disks.values():
                self.lab.call("VDI.destroy", ref)
            self._remember_foreign()

    def backup(self) -> None:
        """Do what another tool that uses change tracking does: a base of its own, metadata only."""
        self.snapshot()
        taken = self.snapshots.pop()
        self.lab.call("VM.destroy", taken.vm_ref)
        for ref in taken.disks.values():
            if self.lab.call("VDI.get_cbt_enabled", ref):
                self.lab.call("VDI.data_destroy", ref)
                self.metadata.append(ref)
            else:
                self.lab.call("VDI.destroy", ref)
        while len(self.metadata) > MOST_SNAPSHOTS * MOST_DISKS:
            self.lab.call("VDI.destroy", self.metadata.pop(0))
        self._remember_foreign()

    def forget_backup(self) -> None:
        """Destroy all bases of that other tool, or else make some."""
        if not self.metadata:
            self.backup()
            return
        for ref in self.metadata:
            self.lab.call("VDI.destroy", ref)
        self.metadata.clear()
        self._remember_foreign()

    def revert(self, which: int) -> None:
        """Go back to a snapshot: all disks of the VM are other VDIs then, not tracked.

        It may be one of cbtfs's, which an interrupted run left. If there is none, one is taken.
        """
        found = {snapshot.vm_ref: snapshot.contents for snapshot in self.snapshots}
        found |= {vm: contents for vm in self.our_vms() if (contents := self._contents_of(vm))}
        if not found:
            self.snapshot()
            return
        vm, contents = list(found.items())[which % len(found)]
        self.lab.call("VM.revert", vm)
        self.disks = self.detached
        for number, ref in self._disks_of(self.vm).items():
            self.disks.append(self._known(ref, contents[number].copy(), number))
        assert {disk.number for disk in self.attached} == contents.keys()
        self.start()

    def lose(self, which: int, *, data_only: bool) -> None:
        """Destroy a snapshot of cbtfs's, or its data, as no administrator should."""
        ours = sorted(self.ours().items(), key=lambda item: str(item[1]["snapshot_time"]))
        if not ours:
            return
        ref, vdi = ours[which % len(ours)]
        for vbd in cast(list[str], vdi["VBDs"]):
            self.lab.call("VBD.destroy", vbd)
        if not data_only:
            self.lab.call("VDI.destroy", ref)
        elif vdi["cbt_enabled"]:
            self.lab.call("VDI.data_destroy", ref)

    # ── the store's administrator ────────────────────────────────────────────────────────────

    def remove_point(self, which: int) -> None:
        """Remove a restore point by hand."""
        if self.points:
            time = sorted(self.points)[which % len(self.points)]
            shutil.rmtree(self.store.point_path(self.vm_uuid, time))
            del self.points[time]

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _create(self, sr: str, size: int) -> ModelDisk:
        record = {
            "name_label": f"disk of {self.name}", "SR": self._srs[sr], "virtual_size": size,
            "type": "user", "sharable": False, "read_only": False, "other_config": {},
        }  # fmt: skip
        disk = self._known(self.lab.text("VDI.create", record), Content(0), -1)
        self.disks.append(disk)
        return disk

    def _known(self, ref: str, content: Content, number: int) -> ModelDisk:
        vdi = cast(Record, self.lab.call("VDI.get_record", ref))
        size = int(str(vdi["virtual_size"]))
        assert size >= content.size
        assert not vdi["cbt_enabled"]
        content.size = size
        trackable = vdi["SR"] in {self._srs[name] for name in TRACKING}
        return ModelDisk(ref, str(vdi["uuid"]), content, number, trackable)

    def _plug(self, disk: ModelDisk, number: int) -> None:
        record = {
            "VM": self.vm, "VDI": disk.ref, "userdevice": str(number), "mode": "RW",
            "type": "Disk", "bootable": False, "empty": False, "other_config": {},
            "qos_algorithm_type": "", "qos_algorithm_params": {}, "unpluggable": True,
        }  # fmt: skip
        vbd = self.lab.text("VBD.create", record)
        if self.lab.text("VM.get_power_state", self.vm) == "Running":
            self.lab.call("VBD.plug", vbd)
        disk.number = number

    def _unplug(self, disk: ModelDisk) -> None:
        for vbd in cast(list[str], self.lab.call("VM.get_VBDs", self.vm)):
            if self.lab.call("VBD.get_VDI", vbd) == disk.ref:
                self.lab.call("VBD.unplug", vbd)
                self.lab.call("VBD.destroy", vbd)
        disk.number = -1

    def _disks_of(self, vm: str) -> dict[int, str]:
        vbds = self.lab.records("VBD").values()
        return {int(str(v["userdevice"])): str(v["VDI"]) for v in vbds if v["VM"] == vm}

    def _contents_of(self, vm: str) -> dict[int, Content]:
        """Return what a snapshot of cbtfs's shows; nothing if somebody destroyed a part of it.

        Nor if nobody knows when it was taken: a killed process had asked for it.
        """
        disks = self._disks_of(vm)
        if {self.lab.call("VDI.get_type", ref) for ref in disks.values()} != {"user"}:
            return {}
        uuids = {number: self.lab.text("VDI.get_uuid", ref) for number, ref in disks.items()}
        if not self.instants.keys() >= set(uuids.values()):
            return {}
        return {number: self.instants[uuid].content for number, uuid in uuids.items()}

    def _remember_foreign(self) -> None:
        self.foreign = self.foreign_records()

    def foreign_records(self) -> dict[str, Record]:
        """Return what others made, as the pool has it, without what changes by itself."""
        vms = {snapshot.vm_ref for snapshot in self.snapshots}
        vdis = {ref for snapshot in self.snapshots for ref in snapshot.disks.values()}
        return {
            **_lasting(self.lab.records("VM"), vms),
            **_lasting(self.lab.records("VDI"), vdis | set(self.metadata)),
        }


def _owner(vdi: Record) -> str:
    """Return the uuid that cbtfs's tag on a VDI is bound to, "" without a tag."""
    tag = cast(dict[str, str], vdi["other_config"]).get(OWNER)
    return str(json.loads(tag)["self"]) if tag else ""


def _lasting(records: dict[str, Record], wanted: Iterable[str]) -> dict[str, Record]:
    names = ("uuid", "name_label", "other_config", "type", "is_a_snapshot", "cbt_enabled")
    return {
        ref: {name: records[ref].get(name) for name in names} for ref in wanted if ref in records
    }


def _pieces(content: Content, kind: str, rng: random.Random) -> Iterable[tuple[int, bytes]]:
    sectors = content.size // 512
    for _ in range(rng.randint(1, 5)):
        length = rng.choice((512, 4096, BLOCK, rng.randint(1, 400) * 512))
        length = min(length, content.size)
        offset = rng.randint(0, sectors - length // 512) * 512
        if kind == "end":
            offset = content.size - length
        elif kind == "blocks":
            offset = offset // BLOCK * BLOCK
            length = min(BLOCK, content.size - offset)
        if kind == "zeros":
            yield offset, bytes(length)
        elif kind == "same":
            yield offset, content.read(offset, length)
        else:
            yield offset, rng.randbytes(length)
