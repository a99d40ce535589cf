"""Draft: a restore point in the making, from the snapshot to the commit.

::

    stage                          .partial-TIME, with the snapshot's name on disk
    snapshot, tag                  all disks, one after another (VM.snapshot)
    disks                          several at once, see diskcopy; metadata of the VM
    commit                         one rename: now it is a restore point
    retire the snapshot            older bases destroyed, the new one keeps metadata only

A run that ends early leaves one of two things, never something in between. Either everything is
taken back, snapshot and files; or, if its journal says that something was copied, both stay, and
the next run goes on with them. After what goes wrong in the store itself all is taken back: a file
system that is full must not stay full for the sake of a point that may never come. So it is, too,
when several runs in a row got no further.
"""

import secrets
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import msgspec
import trio

from . import __version__, catalogue, diskcopy, doubt, errors, plan as plans, snapshot as snapshots
from .catalogue import DiskFailure, DiskPoint, Point, VMHistory
from .diskcopy import CopyOptions, Told
from .inventory import VDI, VM, Inventory
from .owner import Owned, run_name, time_of_run
from .plan import DiskPlan, VMPlan
from .pool import Pool
from .process import this_process
from .progress import Progress
from .resume import Resumption
from .snapshot import Naming, Snapshot
from .space import Space
from .store import Intent, Stage, Store
from .target import Target, key_of

CLEANUP = 60.0
"""Seconds that tidying up the pool may take after an interruption."""

FRUITLESS = 3
"""Runs in a row that may fail without getting any further before a draft is given up: what cannot
be read today may be read tomorrow, but perhaps it is the snapshot that is broken."""

_TOO_LARGE = (1 << 63) - 1
"""Bytes that no disk has: what xapi says is more than a file can have is read as this."""

_THICK = frozenset({"lvm", "lvmoiscsi", "lvmohba", "lvmofcoe"})
"""Types of SR where a disk takes its whole size however much data it holds (sm, LVMSR.py,
``utilisation``)."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run is about, and all it needs.

    Attributes:
        label: what the target is called while it is under way.
        copying: how its disks are copied.
        disks: a place in it for each disk being copied, of this target or another.
        space: what it and others need in the store.
        job: name of the job of the configuration, "" for none.
    """

    pool: Pool
    store: Store
    target: Target
    label: str
    progress: Progress
    copying: CopyOptions
    disks: trio.CapacityLimiter
    space: Space
    job: str = ""

    @property
    def key(self) -> str:
        """Name of the target's directory in the store."""
        return key_of(self.target)

    def owner(self, time: str) -> Owned:
        """Return the tag for what this run makes in the pool for the point ``time``."""
        me = this_process()
        return Owned(
            self_uuid="",  # filled in with what is tagged
            role="base",
            store=self.store.uuid,
            vm=self.key,
            point=time,
            host=me.host,
            pid=me.pid,
            boot=me.boot,
            starttime=me.starttime,
        )

    async def destroy_snapshot(self, name: str) -> None:
        """Destroy the snapshot called ``name``; its disks are tagged first, lest we die between."""
        owner = self.owner(time_of_run(name))
        await self.pool.destroy_run_leftovers(self.target.ref, name, owner=owner)

    async def abandon_leftovers(self) -> None:
        """Remove the partial points that nobody works on."""
        for leftover in self.store.leftovers(self.key):
            await trio.to_thread.run_sync(self.store.abandon, leftover)


class Draft:
    """The restore point of one run; made for one ``make`` or ``go_on``.

    Attributes:
        problems: sentences about what was left behind.
    """

    def __init__(self, run: Run, history: VMHistory | None, *, earlier: Sequence[str]) -> None:
        self.problems: list[str] = []
        self._run = run
        self._history = history
        self._earlier = tuple(earlier)  # names of snapshots that dead runs asked for
        self._may_appear = False  # a snapshot that was asked for, without an answer

    async def make(self, plan: VMPlan, inventory: Inventory) -> Point:
        """Take a snapshot, copy it, commit; return the point.

        Raises:
            CbtfsError: there is no point.
        """
        started = datetime.now(UTC)
        run = self._run
        time = _next_time(self._history, started, taken=run.store.times(run.key))
        naming = Naming(run_name(time, secrets.token_hex(8)), run.owner(time))
        intent = _intent(plan, naming, self._earlier, pool_uuid=inventory.pool.uuid)
        with run.store.stage(run.key, time=time) as stage:
            async with self._kept_or_taken_back(stage, intent):
                stage.record(intent)
                # not before their names are on record again
                await run.abandon_leftovers()
                async with self._room(inventory, plan):
                    snapshot = await self._take(plan, naming)
                    # a restore may have begun since all was planned
                    plan = plans.without_half_restored(plan, snapshot.inventory)
                    point = await self._fill(plan, snapshot, stage, started=started)
                    self.problems += stage.commit(point)
        await self._retire(snapshot, point, naming.owner)
        return point

    async def go_on(self, resumption: Resumption, intent: Intent) -> Point:
        """Copy what the interrupted run behind ``resumption`` did not, commit; as ``make``."""
        run, snapshot, time = self._run, resumption.snapshot, resumption.leftover.time
        owner = run.owner(time)
        intent = msgspec.structs.replace(
            intent,
            earlier=tuple(dict.fromkeys((*intent.earlier, *self._earlier))),
            host=owner.host,
            boot=owner.boot,
            pid=owner.pid,
            starttime=owner.starttime,
        )
        with run.store.resume(resumption.leftover) as stage:
            async with self._kept_or_taken_back(stage, intent):
                stage.record(intent)
                await run.abandon_leftovers()
                started = catalogue.parse_time(time)
                point = await self._fill(resumption.plan, snapshot, stage, started=started)
                self.problems += stage.commit(point)
        await self._retire(snapshot, point, owner)
        return point

    async def _retire(self, snapshot: Snapshot, point: Point, owner: Owned) -> None:
        """Make bases of what was committed; cancelled, it still has ``CLEANUP`` seconds to."""
        async with trio.open_nursery() as nursery:
            with trio.CancelScope(shield=True) as finishing:
                nursery.start_soon(_end_soon, finishing)
                self.problems += await snapshots.retire(
                    self._run.pool,
                    snapshot,
                    committed=[disk.device for disk in point.disks],
                    history=self._history,
                    owner=owner,
                )
            nursery.cancel_scope.cancel()

    # ── when it fails ────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _kept_or_taken_back(self, stage: Stage, intent: Intent) -> AsyncGenerator[None]:
        """Leave an unfinished point as the next run wants it."""
        before = _reached(stage)
        try:
            yield
        except BaseException as exc:
            reached = _reached(stage)
            fruitless = 0 if reached > before else intent.fruitless + isinstance(exc, Exception)
            worth = reached and fruitless < FRUITLESS and not isinstance(exc, errors.StoreError)
            if worth:
                self._keep(stage, msgspec.structs.replace(intent, fruitless=fruitless))
            else:
                await self._take_back(stage, intent.snapshot_name)
            raise

    def _keep(self, stage: Stage, intent: Intent) -> None:
        try:
            stage.record(intent)
        except errors.StoreError as exc:
            self.problems.append(str(exc))
        self.problems.append(
            f"what was copied is kept, and the snapshot {intent.snapshot_name!r} in the pool: the"
            " next sync goes on from there"
        )

    async def _take_back(self, stage: Stage, name: str) -> None:
        """Remove the snapshots in the pool, then the files."""
        with trio.move_on_after(CLEANUP, shield=True):
            try:
                for one in (name, *self._earlier):
                    await self._run.destroy_snapshot(one)
            except errors.CbtfsError as exc:
                # the partial point stays, and with it the names: the next run tries again
                self.problems.append(f"{exc}; the next sync of this VM tries again")
                return
            if self._may_appear:
                return  # when the pool gets to it; the next run finds its name here
            stage.close()
            await self._run.abandon_leftovers()

    # ── making ───────────────────────────────────────────────────────────────────────────────

    def _room(self, inventory: Inventory, plan: VMPlan) -> AbstractAsyncContextManager[None]:
        """Hold the room in the store that the full copies need, and clones that share nothing.

        What a disk of a thick SR needs is not known: it is not refused for a guess.

        Raises:
            StoreFull: it is not there.
        """
        run = self._run
        found = [inventory.find_vdi(d.vdi_uuid) for d in plan.disks if d.method == "full"]
        known = (vdi for vdi in found if vdi is not None and _sr_type(inventory, vdi) not in _THICK)
        needed = sum(min(vdi.used, vdi.size) for vdi in known)
        bases = (d.base for d in plan.disks if d.base is not None)
        needed += run.store.clone_size(run.key, ((base.time, base.disk) for base in bases))
        text = f"{run.label}: waiting: what others need may leave too little in {run.store.path}"
        return run.space.held(needed, name=plan.vm_name, waits=lambda: run.progress.message(text))

    async def _take(self, plan: VMPlan, naming: Naming) -> Snapshot:
        try:
            snapshot = await snapshots.take(self._run.pool, plan, naming)
        except errors.XapiFailure:
            raise  # refused, or taken: the pool has done all that it will do
        except BaseException:
            self._may_appear = True
            raise
        for name in self._earlier:
            # a run killed within VM.snapshot: the pool finished it only before ours
            await self._run.destroy_snapshot(name)
        return snapshot

    async def _fill(
        self, plan: VMPlan, snapshot: Snapshot, stage: Stage, *, started: datetime
    ) -> Point:
        """Copy all disks into ``stage``; return the point that they make.

        Raises:
            CbtfsError: the only disk failed, or all did.
        """
        done: dict[str, DiskPoint] = {}
        failed: dict[str, errors.CbtfsError] = {}

        at_once = self._run.disks

        async def one(disk: DiskPlan, place: object) -> None:
            key = f"{self._run.label}/{disk.device}"
            try:
                vdi = _vdi_of(snapshot, disk)
                done[disk.device] = await diskcopy.copy_disk(
                    self._run.pool,
                    stage,
                    disk,
                    vdi,
                    options=self._run.copying,
                    told=Told(self._run.progress, key),
                )
                self._run.progress.disk_finished(key, done[disk.device])
            except errors.CbtfsError as exc:
                failed[disk.device] = exc
                self._run.progress.disk_finished(key, None, str(exc))
            finally:
                at_once.release_on_behalf_of(place)

        async with trio.open_nursery() as nursery:
            for disk in plan.disks:
                place = object()  # another VM may have an equal disk: the same one
                await at_once.acquire_on_behalf_of(place)
                nursery.start_soon(one, disk, place)
        if not done:
            raise next(iter(failed.values()))
        newcomers = [*plan.refused, *_newcomers(plan, snapshot)]
        for new in newcomers:
            self._run.progress.disk_finished(f"{self._run.label}/{new.device}", None, new.error)
        warnings = await self._metadata(stage)
        return Point(
            tool=__version__,
            time=stage.time,
            vm_uuid=self._run.key,
            vm_name=plan.vm_name,
            pool_uuid=snapshot.inventory.pool.uuid,
            job=self._run.job,
            snapshot_vm_uuid=snapshot.vm.uuid if snapshot.vm else "",
            disks=tuple(done[d.device] for d in plan.disks if d.device in done),
            started=started.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            state="partial" if failed or newcomers else "complete",
            failures=(
                *(
                    DiskFailure(device=d.device, vdi_uuid=d.vdi_uuid, error=str(failed[d.device]))
                    for d in plan.disks
                    if d.device in failed
                ),
                *newcomers,
            ),
            warnings=(*doubt.warnings(done.values(), self._history), *warnings),
        )

    async def _metadata(self, stage: Stage) -> list[str]:
        """Add what xapi needs to recreate the VM; without it the images are still good."""
        if not isinstance(self._run.target, VM):
            return []
        try:
            stage.write_metadata(
                "vm.xml", await self._run.pool.export_metadata(self._run.target.uuid)
            )
        except errors.PoolError as exc:
            return [f"the VM's metadata could not be saved: {exc}"]
        return []


async def _end_soon(finishing: trio.CancelScope) -> None:
    """Wait until cancelled, then give ``finishing`` so long and no longer."""
    try:
        await trio.sleep_forever()
    finally:
        finishing.deadline = min(finishing.deadline, trio.current_time() + CLEANUP)


def _reached(stage: Stage) -> int:
    """Return the bytes that the journal says need not be copied again."""
    return sum(e.size if e.finished else e.offset for e in stage.journaled.values())


def _newcomers(plan: VMPlan, snapshot: Snapshot) -> list[DiskFailure]:
    """Return the disks that were attached between plan and snapshot: they belong into the point."""
    vm = snapshot.inventory.vms.get(plan.vm_ref)
    planned = {disk.device for disk in plan.disks} | {disk.device for disk in plan.refused}
    planned |= {device for device, _ in plan.skipped}
    snapshot_of = {vdi.snapshot_of for vdi in snapshot.others}
    return [
        DiskFailure(
            device=disk.device,
            vdi_uuid=disk.vdi.uuid,
            error=f"disk {disk.device} was attached as the snapshot was taken; run sync again",
        )
        for disk in (snapshot.inventory.disks_of(vm) if vm else ())
        if disk.device not in planned and disk.vdi.ref in snapshot_of
    ]


def _sr_type(inventory: Inventory, vdi: VDI) -> str:
    sr = inventory.srs.get(vdi.sr_ref)
    return sr.type if sr is not None else ""


def _vdi_of(snapshot: Snapshot, disk: DiskPlan) -> VDI:
    vdi = snapshot.disks.get(disk.device)
    if vdi is None:
        raise errors.PoolError(
            f"disk {disk.device} was detached as the snapshot was taken; run sync again"
        )
    if not 0 < vdi.size < _TOO_LARGE:
        # a point without any of it would be complete, and older ones might go for it
        raise errors.PoolError(
            f"xapi says that the snapshot of disk {disk.device} has {vdi.size} bytes, which no disk"
            " has; scan its SR and run sync again"
        )
    return vdi


def _next_time(history: VMHistory | None, now: datetime, *, taken: Collection[str]) -> str:
    """Return the name of a new point: now, but later than every point there is, and not ``taken``.

    A clock that was set back, or two runs in one second, must not break the order of points.

    Raises:
        StoreError: there is no later time.
    """
    latest = history.latest if history else None
    second = timedelta(seconds=1)
    try:
        if latest is not None:
            now = max(now, catalogue.parse_time(latest.time) + second)
        while catalogue.format_time(now) in taken:
            now += second
    except OverflowError:
        raise errors.StoreError(
            f"no restore point can be later than {max(taken)}; remove that one"
        ) from None
    return catalogue.format_time(now)


def _intent(plan: VMPlan, naming: Naming, earlier: Sequence[str], *, pool_uuid: str) -> Intent:
    owner = naming.owner
    return Intent(
        time=owner.point,
        run=naming.name.rpartition(" ")[2],
        snapshot_name=naming.name,
        vm_uuid=plan.vm_uuid,
        pool_uuid=pool_uuid,
        pid=owner.pid,
        host=owner.host,
        boot=owner.boot,
        starttime=owner.starttime,
        earlier=tuple(earlier),
        vdis=tuple(disk.vdi_uuid for disk in plan.disks),
    )
