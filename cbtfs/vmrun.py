"""VM run: one VM, or one disk without VM, on its way to a restore point.

In the order that makes a kill at any instant harmless::

    lock the VM in the store, look at the pool anew
    plan                         a method and a reason per disk; or to go on with what was begun
    clear what dead runs left    pool: their snapshots; store: their partial points
    switch change tracking on
    draft                        snapshot, copy, commit, retire: see there
    prune                        what the job's rules do not keep goes
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from . import (
    errors,
    plan as plans,
    prune as prunes,
    retention,
    snapshot as snapshots,
    target as targets,
)
from .catalogue import Point, VMHistory
from .copier import Buffers
from .diskcopy import CopyOptions
from .draft import Draft, Run
from .inventory import VM, Inventory
from .owner import time_of_run
from .plan import DiskPlan, VMPlan
from .pool import Pool
from .progress import Progress
from .rate import Rate
from .space import Space
from .store import Leftover, Store
from .target import SyncOptions, Target

_LOCK_PAUSE = 1.0
"""Seconds between two tries of a lock that another run holds."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the VMs of one sync share.

    Attributes:
        disks: a place in it for each disk being copied.
        space: what they need in the store.
        labels: what each target is called while it is under way, by its key, if not by its name.
        rate: of reading, for all of them together; None for no limit.
        buffers: what is under way between a host and the store.
    """

    disks: trio.CapacityLimiter
    space: Space
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    rate: Rate | None = None
    buffers: Buffers = field(default_factory=Buffers)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one VM; ``point`` is None if nothing was committed.

    Without ``error`` nothing had to be: the VM has no disk that can be synced.

    ``plan`` is None if the run failed before it could plan; ``problems`` are sentences about what
    was left behind. ``removed`` are the times of points that the rules of the job did not keep.
    ``label`` tells it from another VM of the same name.
    """

    vm_uuid: str
    vm_name: str
    plan: VMPlan | None = None
    point: Point | None = None
    error: errors.CbtfsError | None = None
    problems: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
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
        self._run = Run(
            pool=pool,
            store=store,
            target=target,
            label=shared.labels.get(targets.key_of(target), target.name),
            progress=progress,
            copying=CopyOptions(
                connections=options.connections_per_disk,
                sample=options.sample,
                rate=shared.rate,
                buffers=shared.buffers,
            ),
            disks=shared.disks,
            space=shared.space,
            job=options.job,
        )
        self._options = options
        self._problems: list[str] = []

    async def run(self) -> Outcome:
        """Return the outcome; only a cancellation leaves as an exception."""
        run = self._run
        outcome = Outcome(run.key, run.target.name, label=run.label)
        try:
            async with self._locked():
                return await self._synced(outcome)
        except errors.CbtfsError as exc:
            return replace(outcome, error=exc, problems=tuple(self._problems))

    @asynccontextmanager
    async def _locked(self) -> AsyncGenerator[None]:
        """Hold the lock of the VM, for which the options may say to wait."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._lock())
            except errors.StoreLocked as exc:
                if not self._options.lock_wait:
                    raise
                self._run.progress.message(f"{self._run.label}: waiting: {exc}")
                stack.enter_context(await self._free_lock())
            yield

    def _lock(self) -> AbstractContextManager[object]:
        return self._run.store.lock(self._run.key)

    async def _free_lock(self) -> AbstractContextManager[object]:
        """Return the lock, held, once it is free; raise StoreLocked if that takes too long."""
        give_up = trio.current_time() + self._options.lock_wait
        while True:
            await trio.sleep(_LOCK_PAUSE)
            with ExitStack() as stack, suppress(errors.StoreLocked):
                stack.enter_context(self._lock())
                return stack.pop_all()
            if trio.current_time() >= give_up:
                return self._lock()

    async def _synced(self, outcome: Outcome) -> Outcome:
        # hours after the targets were chosen, perhaps; another run may have synced this one since
        pool, store, key = self._run.pool, self._run.store, self._run.key
        inventory = await pool.inventory()
        self._run = replace(self._run, target=targets.still_there(inventory, self._run.target))
        history = store.history(key)
        leftovers = store.leftovers(key)
        plan, resumption = targets.decide(
            inventory,
            store,
            self._run.target,
            leftovers=leftovers,
            history=history,
            options=self._options,
        )
        if resumption is not None:
            plan = resumption.plan
            leftovers.remove(resumption.leftover)
        earlier = _snapshot_names(leftovers)
        resumed = resumption.snapshot.vm if resumption is not None else None
        await self._clear_pool(inventory, earlier, kept=resumed)
        outcome = replace(outcome, plan=plan)
        plans.check_refused(plan)
        if not plan.disks:  # what was skipped, and why, is in the plan
            return replace(outcome, problems=tuple(self._problems))
        await pool.check_nbd()
        for disk in plan.disks:
            if disk.enable_cbt:
                await self._track(disk)
        draft = Draft(self._run, history, earlier=earlier)
        try:
            if resumption is not None and resumption.leftover.intent is not None:
                point = await draft.go_on(resumption, resumption.leftover.intent)
            else:
                point = await draft.make(plan, inventory)
        finally:
            self._problems += draft.problems
        removed = await self._prune(history)
        return replace(outcome, point=point, removed=removed, problems=tuple(self._problems))

    async def _prune(self, history: VMHistory | None) -> tuple[str, ...]:
        """Remove what the rules do not keep; return the times of the points gone.

        The rules are the job's, and those of other jobs that made points of the VM; one without
        keeps all.
        """
        jobs = {point.job for point in (history.points if history else ())}
        others = [keep for job, keep in self._options.keeps.items() if job in jobs]
        keep = retention.most([self._options.keep, *others])
        if keep is None:
            return ()
        prune = partial(prunes.prune, self._run.store, self._run.key, keep, locked=True)
        try:
            verdicts = await trio.to_thread.run_sync(prune)
        except errors.StoreError as exc:
            self._problems.append(f"older restore points stay for now: {exc}")
            return ()
        return tuple(verdict.point.time for verdict in verdicts if not verdict.kept)

    async def _track(self, disk: DiskPlan) -> None:
        """Switch change tracking on; where the pool refuses, a copy of it all is still worth it."""
        try:
            await self._run.pool.enable_cbt(disk.vdi_ref)
        except errors.XapiFailure as exc:
            self._problems.append(
                f"changes of {disk.device} are not tracked, so each sync reads all of it: {exc}"
            )

    async def _clear_pool(
        self, inventory: Inventory, names: Sequence[str], *, kept: VM | None
    ) -> None:
        """Remove what dead runs of this VM left; we hold its lock, so none of them is alive."""
        for name in names:
            await self._run.destroy_snapshot(name)
        if isinstance(self._run.target, VM):
            self._problems += await snapshots.clear_vms(
                self._run.pool, inventory, self._run.target, self._run.owner(""), kept=kept
            )


def _snapshot_names(leftovers: Sequence[Leftover]) -> list[str]:
    """Return what dead runs may have made in the pool; what a run cannot have named is ignored."""
    intents = [leftover.intent for leftover in leftovers if leftover.intent is not None]
    names = (name for intent in intents for name in (intent.snapshot_name, *intent.earlier))
    return [name for name in dict.fromkeys(names) if time_of_run(name)]
