"""VM run: one VM, or one disk without VM, on its way to a restore point.

In the order that makes a kill at any instant harmless::

    lock the VM in the store, look at the pool anew
    clear what dead runs left             pool: their snapshots; store: their partial points
    plan                                  full or incremental, with a reason per disk
    stage                                 .partial-TIME, with the snapshot's name on disk
    snapshot, tag                         all disks, one after another (VM.snapshot)
    per disk: changed blocks, clone, copy, digest        several disks at once
    metadata, commit                      one rename: now it is a restore point
    retire the snapshot                   older bases destroyed, the new one keeps metadata only

``list_changed_blocks`` comes before any NBD connection to the same snapshot: xapi refuses it while
a VBD is attached, and ours in dom0 counts (xen-api, xapi_vdi.ml).
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import trio

from . import (
    __version__,
    catalogue,
    diskcopy,
    errors,
    snapshot as snapshots,
    target as targets,
    units,
)
from .catalogue import DiskFailure, DiskPoint, Point, VMHistory
from .diskcopy import Told
from .inventory import VDI, VM, Inventory
from .owner import Owned, run_name, time_of_run
from .plan import DiskPlan, VMPlan
from .pool import Pool
from .process import this_process
from .progress import Progress
from .snapshot import Naming, Snapshot
from .store import Intent, Leftover, Stage, Store
from .target import SyncOptions, Target

CLEANUP = 60.0
"""Seconds that tidying up the pool may take after an interruption."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the VMs of one sync share.

    Attributes:
        disks: a place in it for each disk being copied; a buffer per request is what each costs.
        labels: what each target is called while it is under way, by its key, if not by its name.
    """

    disks: trio.CapacityLimiter
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one VM; ``point`` is None if nothing was committed.

    Without ``error`` nothing had to be: the VM has no disk that can be synced.

    ``plan`` is None if the run failed before it could plan; ``problems`` are sentences about what
    was left behind in the pool. ``label`` tells it from another VM of the same name.
    """

    vm_uuid: str
    vm_name: str
    plan: VMPlan | None = None
    point: Point | None = None
    error: errors.CbtfsError | None = None
    problems: tuple[str, ...] = ()
    label: str = ""


class VMRun:
    """One VM on its way to a restore point."""

    def __init__(
        self,
        pool: Pool,
        store: Store,
        target: Target,
        progress: Progress,
        options: SyncOptions,
        shared: Shared,
    ) -> None:
        self._pool = pool
        self._store = store
        self._target = target
        self._key = targets.key_of(target)
        self._progress = progress
        self._options = options
        self._shared = shared
        self._label = shared.labels.get(self._key, target.name)
        self._problems: list[str] = []
        self._may_appear = False  # a snapshot that was asked for, without an answer

    async def run(self) -> Outcome:
        """Return the outcome; only a cancellation leaves as an exception."""
        outcome = Outcome(self._key, self._target.name, label=self._label)
        try:
            with self._store.lock(self._key):
                return await self._locked(outcome)
        except errors.CbtfsError as exc:
            return replace(outcome, error=exc, problems=tuple(self._problems))

    async def _locked(self, outcome: Outcome) -> Outcome:
        # hours after the targets were chosen, perhaps; another run may have synced this one since
        inventory = await self._pool.inventory()
        self._target = targets.still_there(inventory, self._target)
        earlier = _snapshot_names(self._store.leftovers(self._key))
        await self._clear_pool(inventory, earlier)
        history = self._store.history(self._key)
        plan = targets.plan_one(
            inventory, self._store, self._target, history=history, options=self._options
        )
        outcome = replace(outcome, plan=plan)
        if not plan.disks:  # what was skipped, and why, is in the plan
            return replace(outcome, problems=tuple(self._problems))
        await self._pool.check_nbd()
        for disk in plan.disks:
            if disk.enable_cbt:
                await self._track(disk)
        point = await self._make(inventory, plan, history, earlier=earlier)
        return replace(outcome, point=point, problems=tuple(self._problems))

    async def _track(self, disk: DiskPlan) -> None:
        """Switch change tracking on; where the pool refuses, a full copy is still worth it."""
        try:
            await self._pool.enable_cbt(disk.vdi_ref)
        except errors.XapiFailure as exc:
            self._problems.append(
                f"changes of {disk.device} are not tracked, so each sync copies all of it: {exc}"
            )

    async def _clear_pool(self, inventory: Inventory, names: Sequence[str]) -> None:
        """Remove what dead runs of this VM left; we hold its lock, so none of them is alive."""
        for name in names:
            await self._destroy_run(name)
        if isinstance(self._target, VM):
            self._problems += await snapshots.clear_vms(
                self._pool, inventory, self._target, self._owner("")
            )

    async def _destroy_run(self, name: str) -> None:
        """Destroy the snapshot called ``name``; its disks are tagged first, lest we die between."""
        owner = self._owner(time_of_run(name))
        await self._pool.destroy_run_leftovers(self._target.ref, name, owner=owner)

    def _owner(self, time: str) -> Owned:
        """Return the tag for what this run makes in the pool for the point ``time``."""
        me = this_process()
        return Owned(
            self_uuid="",  # filled in with what is tagged
            role="base",
            store=self._store.uuid,
            vm=self._key,
            point=time,
            host=me.host,
            pid=me.pid,
            boot=me.boot,
            starttime=me.starttime,
        )

    def _check_space(self, inventory: Inventory, plan: VMPlan) -> None:
        """Refuse early what cannot fit.

        Raises:
            StoreFull: the full copies need more than is free.
        """
        found = [inventory.find_vdi(d.vdi_uuid) for d in plan.disks if d.method == "full"]
        needed = sum(min(vdi.used, vdi.size) for vdi in found if vdi is not None)
        free = self._store.free_space()
        if needed > free:
            raise errors.StoreFull(
                f"{plan.vm_name} needs about {units.format_size(needed)} and {self._store.path}"
                f" has {units.format_size(free)} free; remove restore points or enlarge it"
            )

    # ── From snapshot to commit ──────────────────────────────────────────────────────────────

    async def _make(
        self,
        inventory: Inventory,
        plan: VMPlan,
        history: VMHistory | None,
        *,
        earlier: Sequence[str],
    ) -> Point:
        started = datetime.now(UTC)
        time = _next_time(history, started, taken=self._store.times(self._key))
        naming = Naming(run_name(time, secrets.token_hex(8)), self._owner(time))
        with self._store.stage(self._key, time=naming.owner.point) as stage:
            try:
                stage.record(_intent(plan, naming, earlier))
                # not before their names are on record again
                await self._abandon_leftovers()
                self._check_space(inventory, plan)
                snapshot = await self._take(plan, naming)
                for name in earlier:
                    # a run killed within VM.snapshot: the pool finished it only before ours
                    await self._destroy_run(name)
                point = await self._fill(plan, snapshot, stage, started=started)
                self._problems += stage.commit(point)
            except BaseException:
                await self._tidy(stage, (naming.name, *earlier))
                raise
        self._problems += await snapshots.retire(
            self._pool,
            snapshot,
            committed=[disk.device for disk in point.disks],
            history=history,
            owner=naming.owner,
        )
        return point

    async def _take(self, plan: VMPlan, naming: Naming) -> Snapshot:
        try:
            return await snapshots.take(self._pool, plan, naming)
        except errors.XapiFailure:
            raise  # refused, or taken: the pool has done all that it will do
        except BaseException:
            self._may_appear = True
            raise

    async def _abandon_leftovers(self) -> None:
        for leftover in self._store.leftovers(self._key):
            await trio.to_thread.run_sync(self._store.abandon, leftover)

    async def _fill(
        self, plan: VMPlan, snapshot: Snapshot, stage: Stage, *, started: datetime
    ) -> Point:
        """Copy all disks into ``stage``; return the point that they make.

        Raises:
            CbtfsError: the only disk failed, or all did.
        """
        done: dict[str, DiskPoint] = {}
        failed: dict[str, errors.CbtfsError] = {}

        at_once = self._shared.disks

        async def one(disk: DiskPlan, place: object) -> None:
            key = f"{self._label}/{disk.device}"
            try:
                vdi = _vdi_of(snapshot, disk)
                done[disk.device] = await diskcopy.copy_disk(
                    self._pool,
                    stage,
                    disk,
                    vdi,
                    connections=self._options.connections_per_disk,
                    told=Told(self._progress, key),
                )
                self._progress.disk_finished(key, done[disk.device])
            except errors.CbtfsError as exc:
                failed[disk.device] = exc
                self._progress.disk_finished(key, None, str(exc))
            finally:
                at_once.release_on_behalf_of(place)

        async with trio.open_nursery() as nursery:
            for disk in plan.disks:
                place = object()  # another VM may have an equal disk: the same one
                await at_once.acquire_on_behalf_of(place)
                nursery.start_soon(one, disk, place)
        if not done:
            raise next(iter(failed.values()))
        newcomers = _newcomers(plan, snapshot)
        for new in newcomers:
            self._progress.disk_finished(f"{self._label}/{new.device}", None, new.error)
        warnings = await self._metadata(stage)
        return Point(
            tool=__version__,
            time=stage.time,
            vm_uuid=self._key,
            vm_name=plan.vm_name,
            pool_uuid=snapshot.inventory.pool.uuid,
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
            warnings=tuple(warnings),
        )

    async def _metadata(self, stage: Stage) -> list[str]:
        """Add what xapi needs to recreate the VM; without it the images are still good."""
        if not isinstance(self._target, VM):
            return []
        try:
            stage.write_metadata("vm.xml", await self._pool.export_metadata(self._target.uuid))
        except errors.PoolError as exc:
            return [f"the VM's metadata could not be saved: {exc}"]
        return []

    async def _tidy(self, stage: Stage, names: Sequence[str]) -> None:
        """Take back an unfinished point: the snapshots in the pool, then the files."""
        with trio.move_on_after(CLEANUP, shield=True):
            try:
                for name in names:
                    await self._destroy_run(name)
            except errors.CbtfsError as exc:
                # the partial point stays, and with it the names: the next run tries again
                self._problems.append(f"{exc}; the next sync of this VM tries again")
                return
            if self._may_appear:
                return  # when the pool gets to it; the next run finds its name here
            stage.close()
            await self._abandon_leftovers()


def _newcomers(plan: VMPlan, snapshot: Snapshot) -> list[DiskFailure]:
    """Return the disks that were attached between plan and snapshot: they belong into the point."""
    vm = snapshot.inventory.vms.get(plan.vm_ref)
    planned = {disk.device for disk in plan.disks} | {device for device, _ in plan.skipped}
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


def _vdi_of(snapshot: Snapshot, disk: DiskPlan) -> VDI:
    vdi = snapshot.disks.get(disk.device)
    if vdi is None:
        raise errors.PoolError(
            f"disk {disk.device} was detached as the snapshot was taken; run sync again"
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


def _snapshot_names(leftovers: Sequence[Leftover]) -> list[str]:
    """Return what dead runs may have made in the pool; what a run cannot have named is ignored."""
    intents = [leftover.intent for leftover in leftovers if leftover.intent is not None]
    names = (name for intent in intents for name in (intent.snapshot_name, *intent.earlier))
    return [name for name in dict.fromkeys(names) if time_of_run(name)]


def _intent(plan: VMPlan, naming: Naming, earlier: Sequence[str]) -> Intent:
    owner = naming.owner
    return Intent(
        time=owner.point,
        run=naming.name.rpartition(" ")[2],
        snapshot_name=naming.name,
        vm_uuid=plan.vm_uuid,
        pid=owner.pid,
        host=owner.host,
        boot=owner.boot,
        starttime=owner.starttime,
        earlier=tuple(earlier),
    )
