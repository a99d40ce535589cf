"""A sync in a history: how it may be disturbed, and all that must be true afterwards."""

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cbtfs import sync as syncs
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.pool import Pool
from cbtfs.progress import SilentProgress
from cbtfs.sync import Outcome, SyncOptions

from .commands import Shell
from .history_lab import Interrupter, Record
from .history_model import Allowed, Instant, ModelDisk, PointDisk, allowed, new_epoch
from .history_world import World

FAILING = (
    "VM.snapshot", "VM.get_record", "VM.add_to_other_config", "VDI.add_to_other_config",
    "VDI.list_changed_blocks", "VDI.get_nbd_info", "VM.destroy", "VDI.data_destroy", "VDI.destroy",
)  # fmt: skip
"""Calls of the pool that fail once, when a sync is to be disturbed so."""

ways: Counter[str] = Counter()
"""How disks were copied, and what disturbed syncs; for people to look at."""


@dataclass(frozen=True)
class Trouble:
    """What disturbs a sync.

    Kinds are ``cancel`` before step number ``at`` of its tasks, ``break off`` at that step once a
    disk is being copied, ``kill`` after ``at`` per mille of the usual time, and ``refuse``: the
    pool fails a call, number ``at`` of `FAILING`, once.
    """

    kind: str
    at: int


class _Telling(SilentProgress):
    """Has something done when the first disk is copied: its snapshot is taken by then."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()


class Attempt:
    """One sync of a world's VM, from what is known before it to what must be true after it.

    Args:
        world: with the VM.
        full: everything is to be copied.
        excluded: disks to be left out.
    """

    usual = 0.0
    """Seconds that the command takes here, once it is known."""

    def __init__(
        self, world: World, *, full: bool = False, excluded: Sequence[ModelDisk] = ()
    ) -> None:
        self.world = world
        self._full = full
        self._excluded = excluded
        self._chosen = [disk for disk in world.attached if disk not in excluded]
        self._before = world.ours()
        self._partials = world.partials()
        self._present = {str(vdi["uuid"]) for vdi in world.lab.records("VDI").values()}
        self._allowed = {disk.uuid: allowed_ for disk, allowed_ in self._allow()}
        self._refused = ""
        world.moment += 1
        self._frozen = {
            d.ref: Instant(d.uuid, d.content.copy(), 0, world.moment) for d in world.disks
        }

    def _allow(self) -> list[tuple[ModelDisk, Allowed]]:
        world = self.world
        points = [world.points[when] for when in sorted(world.points)]
        tracked = {str(vdi["uuid"]) for vdi in self._before.values() if vdi["cbt_enabled"]}
        bases = {uuid: instant for uuid, instant in world.instants.items() if uuid in tracked}
        found: list[tuple[ModelDisk, Allowed]] = []
        for disk in self._chosen:
            assert world.lab.call("VDI.get_cbt_enabled", disk.ref) is (disk.epoch != 0)
            known = allowed(
                disk, points=points, bases=bases, present=self._present, full=self._full
            )
            found.append((disk, known))
        return found

    # ── running it ───────────────────────────────────────────────────────────────────────────

    def run(
        self, *, trouble: Trouble | None = None, during: Callable[[], None] | None = None
    ) -> None:
        """Sync, disturbed by ``trouble``, and check everything.

        Args:
            trouble: what disturbs it.
            during: done as soon as the snapshot is taken; it must not show in the point.
        """
        lab = self.world.lab
        kind = trouble.kind if trouble is not None else ""
        outcome = None
        if trouble is not None and kind == "kill":
            self._kill(trouble.at)
        else:
            if trouble is not None and kind == "refuse":
                self._refused = FAILING[trouble.at % len(FAILING)]
                lab.pool.set("xapi.fail", f"{self._refused}*1:INTERNAL_ERROR")
            steps = trouble.at if trouble is not None and kind in {"cancel", "break off"} else -1
            interrupter = Interrupter(steps=steps, armed=kind == "cancel")
            outcome = lab.loop.run(lambda pool: self._sync(pool, interrupter, during))
            lab.pool.set("xapi.fail", "")
        lab.settle()
        new = self._look(outcome, disturbed=trouble is not None)
        left = "point" if new else "draft" if self.world.partials() else "nothing"
        ways[f"{kind}, {left}" if kind else "undisturbed"] += 1

    async def _sync(
        self, pool: Pool, interrupter: Interrupter, during: Callable[[], None] | None
    ) -> Outcome | None:
        options = SyncOptions(
            full=self._full,
            exclude_disks=tuple(disk.uuid for disk in self._excluded),
            connections_per_disk=1,
        )

        def copying() -> None:
            interrupter.armed = True
            if during is not None:
                during()

        async def work() -> Outcome:
            vm = (await pool.inventory()).find_vm(self.world.name)
            (outcome,) = await syncs.run(
                pool, self.world.store, [vm], progress=_Telling(copying), options=options
            )
            return outcome

        return await interrupter.run(work)

    def _kill(self, permille: int) -> None:
        shell = Shell(self.world.lab.pool, self.world.store.path)
        command = shell.command("sync", "--vm", self.world.name, *(["--full"] * self._full))
        begun = time.monotonic()
        with subprocess.Popen(
            command, env=shell.env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(Attempt.usual * permille / 1000 if Attempt.usual else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        if not Attempt.usual:
            Attempt.usual = time.monotonic() - begun
        # nobody is there to remove them; xapi does, an hour later (xen-api, db_gc_util.ml)
        self.world.dead_tasks |= self.world.lab.records("task").keys()

    # ── looking at it ────────────────────────────────────────────────────────────────────────

    def _look(self, outcome: Outcome | None, *, disturbed: bool) -> Point | None:
        """Check everything; return the point that was made."""
        world = self.world
        self._learn_snapshots()
        history = world.store.catalogue().vms.get(world.vm_uuid)
        assert world.store.problems == ()
        listed = history.points if history else ()
        new = [point for point in listed if point.time not in world.points]
        assert len(new) <= 1
        assert {point.time for point in listed} == {*world.points, *(p.time for p in new)}
        for point in new:
            assert point.time == listed[-1].time
            self._check_point(point, disturbed=disturbed)
        self._learn_partials()
        assert world.foreign_records() == world.foreign
        if not disturbed:
            assert outcome is not None
            assert outcome.error is None, outcome.error
            assert outcome.problems == ()
            assert [outcome.point] == new
            self._check_nothing_is_left(new[0])
        elif not new:
            # a failed run never costs the base
            bases = {r for r, vdi in self._before.items() if vdi["type"] == "cbt_metadata"}
            assert bases <= world.ours().keys()
        return new[0] if new else None

    def _learn_snapshots(self) -> None:
        """Learn what snapshots show that were made just now, and which disks are tracked.

        One that a killed process asked for may come later than that: what it shows is not known.
        """
        world = self.world
        for disk in world.disks:
            if world.lab.call("VDI.get_cbt_enabled", disk.ref):
                disk.epoch = disk.epoch or new_epoch()
        epochs = {disk.uuid: disk.epoch for disk in world.disks}
        for vdi in world.lab.records("VDI").values():
            frozen, uuid = self._frozen.get(str(vdi["snapshot_of"])), str(vdi["uuid"])
            if frozen is not None and vdi["is_a_snapshot"] and uuid not in self._present:
                world.instants[uuid] = replace(frozen, epoch=epochs[frozen.vdi_uuid])

    def _learn_partials(self) -> None:
        """Learn what a run that was disturbed now has left in the store."""
        world = self.world
        partials = world.partials()
        for name in world.begun.keys() - set(partials):  # a later point may have the same time
            del world.begun[name], world.planned[name]
        for name in partials:
            world.begun.setdefault(name, frozenset(disk.uuid for disk in world.attached))
            world.planned.setdefault(name, []).append(self._allowed)

    def _check_point(self, point: Point, *, disturbed: bool) -> None:
        world = self.world
        if not disturbed:
            assert point.state == "complete"
            there = world.begun.get(f".partial-{point.time}", frozenset(self._allowed))
            wanted = [d.uuid for d in self._chosen if not there.isdisjoint(world.uuids_of(d.uuid))]
            assert [disk.vdi_uuid for disk in point.disks] == wanted
        world.points[point.time] = tuple(self._check_disk(point, disk) for disk in point.disks)
        # a disk that an interrupted run had finished is taken as it is
        earlier = world.planned.get(f".partial-{point.time}", [])
        for record in point.disks:
            ways[f"{record.method}, {record.resumed or record.reason}"] += 1
            assert record.blocks_mismatched == 0
            if record.method == "resume":
                assert self._partials
                assert not self._full
            elif earlier or not disturbed:
                self._check_way(record, [*earlier, self._allowed])
        named = world.store.catalogue().resolve(f"{world.vm_uuid}/{point.time}")
        assert not world.store.verify(named).damaged

    def _check_disk(self, point: Point, record: DiskPoint) -> PointDisk:
        """Compare an image with the disk as it was when its snapshot was taken."""
        world = self.world
        frozen = {instant.vdi_uuid: instant for instant in self._frozen.values()}
        instant = world.instants.get(record.snapshot_uuid) or frozen[record.vdi_uuid]
        assert instant.vdi_uuid in world.uuids_of(record.vdi_uuid)
        assert record.size == instant.content.size
        image = world.store.point_path(world.vm_uuid, point.time) / record.file
        assert instant.content.differs_at(image) == "", record
        return PointDisk(
            device=record.device,
            file=record.file,
            vdi_uuid=record.vdi_uuid,
            snapshot_uuid=record.snapshot_uuid,
            content=instant.content,
        )

    def _check_way(self, record: DiskPoint, plans: Sequence[dict[str, Allowed]]) -> None:
        """Hold how a disk was copied against what is allowed in one of the runs that did it."""
        right = [plan[record.vdi_uuid] for plan in plans if record.vdi_uuid in plan]
        way = (record.method, record.reason)
        if self._refused == "VDI.list_changed_blocks" and way == ("compare", "base-lost"):
            return
        # a text, because pytest cuts other things short
        assert any(way in allowed_.ways for allowed_ in right), f"{right} {record}"
        if record.method == "incremental" and len(plans) == 1:
            assert record.bytes_changed == right[0].changed, f"{right} {record}"

    def _check_nothing_is_left(self, point: Point) -> None:
        """Nobody disturbed it: what is left of it in the pool are bases, one for a disk."""
        world = self.world
        assert world.partials() == []
        left = world.ours()
        bases = {record.snapshot_uuid for record in point.disks if record.cbt}
        copied = {record.vdi_uuid for record in point.disks}
        others = {disk.ref for disk in world.disks if disk.uuid not in copied}
        older = {r for r, v in self._before.items() if v["snapshot_of"] in others}
        superfluous = {
            r: v for r, v in left.items() if str(v["uuid"]) not in bases and r not in older
        }
        assert not superfluous
        _check_needed(world, {self._before[ref]["uuid"] for ref in older}, left)
        assert bases <= {str(vdi["uuid"]) for vdi in left.values()}
        assert {v["type"] for v in left.values() if v["uuid"] in bases} <= {"cbt_metadata"}
        _check_unique(left)
        assert world.our_vms() == []
        dom0 = {ref for ref, vm in world.lab.records("VM").items() if vm["is_control_domain"]}
        assert not [v for v in world.lab.records("VBD").values() if v["VM"] in dom0]
        tasks = world.lab.records("task")
        assert tasks.keys() <= world.dead_tasks, tasks


def _check_needed(world: World, older: set[object], left: dict[str, Record]) -> None:
    """Check that the bases of disks that are there, but were left out this time, are kept."""
    there = {disk.uuid for disk in world.disks}
    known = [disk for disks in world.points.values() for disk in disks]
    needed = {d.snapshot_uuid for d in known if d.vdi_uuid in there} & older
    assert needed <= {vdi["uuid"] for vdi in left.values()}


def _check_unique(bases: dict[str, Record]) -> None:
    disks = [vdi["snapshot_of"] for vdi in bases.values()]
    assert len(disks) == len(set(disks)), bases


def check_all(world: World) -> None:
    """Every listed point is as it was committed, to the last byte."""
    for when, disks in world.points.items():
        for disk in disks:
            image = world.store.point_path(world.vm_uuid, when) / disk.file
            assert disk.content.differs_at(image) == "", (when, disk)
