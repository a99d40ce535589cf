"""Clean: what dead runs left, in pool and store, is looked for and removed, one thing at a time.

::

    look at pool and store ──> leftovers.decide ──> of no VM:          remove
                                                └─> of VM A, VM B, …:  lock it, look and decide
                                                                       again, remove, unlock

What belongs to a VM's directory of the store goes only under the lock of that, by what is true
then: a run may have gone on with it meanwhile. The pool is asked for the tag again before each
object goes (``pool``, rule 1). A clean that is killed has removed less, and nothing else: in the
pool each step leaves what is still tagged, in the store what is still a partial point.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache

import msgspec
import trio

from . import errors, instant, leftovers, process, target as targets, tasks
from .inventory import Inventory
from .leftovers import Findings, Folder, Judge, Kind, Partial, PoolTask, Shelf, Thing, Wish
from .owner import Owned, read_task, time_of_run
from .pool import Pool
from .process import Process
from .stage import Intent, Leftover
from .store import Store
from .target import SyncOptions, Target


@dataclass(frozen=True, slots=True)
class CleanOptions:
    """What counts as left over.

    Attributes:
        wish: what may go beside that.
        gone_hosts: machines that will never come back, with all their processes.
    """

    wish: Wish = field(default_factory=Wish)
    gone_hosts: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Done:
    """A thing that was to go; ``error`` says why it did not."""

    thing: Thing
    error: errors.CbtfsError | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What became of all that was found; ``left`` was not to go, or is being worked on."""

    done: tuple[Done, ...] = ()
    left: tuple[Thing, ...] = ()


async def find(pool: Pool | None, store: Store | None, *, options: CleanOptions) -> Findings:
    """Return what is left over, and change nothing.

    Args:
        pool: where to look; None if it does not answer.
        store: where to look; None for none.
        options: what counts.

    Raises:
        PoolError: the pool does not answer, or not as it should.
        StoreError: the store cannot be read.
    """
    return await _Cleaner(pool, store, options).find()


async def run(pool: Pool | None, store: Store | None, *, options: CleanOptions) -> Report:
    """Remove what is left over; raises as ``find``, before anything is changed."""
    return await _Cleaner(pool, store, options).run()


class _Cleaner:
    def __init__(self, pool: Pool | None, store: Store | None, options: CleanOptions) -> None:
        self._pool = pool
        self._store = store
        self._options = options
        self._judge = Judge(process.this_process().host, _is_dead(options.gone_hosts))
        self._shelf: Shelf | None = None
        self._done: list[Done] = []
        self._left: list[Thing] = []
        self._unreachable: errors.CbtfsError | None = None

    async def find(self) -> Findings:
        """Look at everything."""
        inventory = await self._pool.inventory() if self._pool else None
        tasks = _tasks(await self._pool.tasks()) if self._pool else ()
        if self._store is not None:
            keys = await trio.to_thread.run_sync(self._store.keys)
            self._shelf = await self._look(self._store, inventory, keys)
        return self._decide(inventory, tasks)

    async def run(self) -> Report:
        findings = await self.find()
        self._left += findings.left
        by_key: dict[str, list[Thing]] = {}
        for thing in findings.remove:
            by_key.setdefault(thing.key, []).append(thing)
        for key, things in by_key.items():
            await self._clean(key, things)
        return Report(tuple(self._done), tuple(self._left))

    async def _clean(self, key: str, things: Sequence[Thing]) -> None:
        """Remove what there is of one directory of the store; "" is for what belongs to none."""
        store, shelf = self._store, self._shelf
        with ExitStack() as stack:
            # without its directory there is nothing to be locked, nor anybody who needs it
            if store is not None and shelf is not None and key in shelf.folders:
                try:
                    stack.enter_context(store.lock(key))
                    things = await self._still(store, shelf, key)
                except errors.StoreLocked as exc:
                    self._left += [replace(thing, why=str(exc)) for thing in things]
                    return
                except errors.CbtfsError as exc:
                    self._note(exc)
                    self._done += [Done(thing, exc) for thing in things]
                    return
            for thing in things:
                self._done.append(await self._attempt(thing))

    async def _still(self, store: Store, shelf: Shelf, key: str) -> Sequence[Thing]:
        """Return what is left over of a directory, now that it is locked."""
        if self._unreachable is not None:
            raise self._unreachable
        inventory = await self._pool.inventory() if self._pool else None
        fresh = await self._look(store, inventory, [key])
        self._shelf = replace(shelf, folders={**shelf.folders, **fresh.folders})
        return [thing for thing in self._decide(inventory, ()).remove if thing.key == key]

    # ── looking ──────────────────────────────────────────────────────────────────────────────────

    def _decide(self, inventory: Inventory | None, tasks: tuple[PoolTask, ...]) -> Findings:
        return leftovers.decide(
            inventory, self._shelf, tasks, judge=self._judge, wish=self._options.wish
        )

    async def _look(self, store: Store, inventory: Inventory | None, keys: Sequence[str]) -> Shelf:
        def look() -> Shelf:
            known = _targets(inventory) if inventory is not None else {}
            return Shelf(
                store.uuid, {key: self._folder(store, inventory, key, known) for key in keys}
            )

        return await trio.to_thread.run_sync(look)

    def _folder(
        self, store: Store, inventory: Inventory | None, key: str, known: Mapping[str, Target]
    ) -> Folder:
        """Return what ``store`` has of one VM or disk; ``known`` are those of the pool."""
        target = known.get(key)
        history, problems = store.inspect(key)
        label = (target.name if target else "") or (history.name if history else "") or key
        latest = history.latest if history else None
        folder = Folder(
            label,
            target.ref if target else "",
            bases=frozenset(d.snapshot_uuid for p in (history.points if history else ())
                            for d in p.disks),
            problem=problems[0] if problems else "",
        )  # fmt: skip
        try:
            found = store.leftovers(key)
            removed = store.removed(key)
            dead = [
                left for left in found if left.intent and self._judge.is_dead(_maker(left.intent))
            ]
            resumed = ""
            if target is not None and inventory is not None and dead:
                _, resumption = targets.decide(
                    inventory, store, target, leftovers=dead, history=history, options=SyncOptions()
                )
                resumed = resumption.leftover.time if resumption else ""
        except errors.StoreError as exc:
            return replace(folder, problem=str(exc))
        asked = inventory is not None
        return replace(
            folder,
            removed=removed,
            partials=tuple(
                replace(
                    _partial(left, pool_uuid=latest.pool_uuid if latest else ""),
                    resumable=left.time == resumed if asked else None,
                )
                for left in found
            ),
        )

    # ── removing ─────────────────────────────────────────────────────────────────────────────────

    async def _attempt(self, thing: Thing) -> Done:
        if self._unreachable is not None and thing.kind is not Kind.REMOVED:
            return Done(thing, self._unreachable)  # it would be waited for as long, each time
        try:
            await self._remove(thing)
        except errors.CbtfsError as exc:
            self._note(exc)
            return Done(thing, exc)
        return Done(thing)

    def _note(self, exc: errors.CbtfsError) -> None:
        if isinstance(exc, errors.PoolUnreachable | errors.AuthenticationFailed):
            self._unreachable = exc

    async def _remove(self, thing: Thing) -> None:
        pool, store = self._pool, self._store
        if store is not None and thing.kind is Kind.PARTIAL:
            await self._abandon(store, thing)
        elif store is not None and thing.kind is Kind.REMOVED:
            await trio.to_thread.run_sync(store.sweep, thing.key)
        elif pool is not None:
            how: Mapping[Kind, Callable[[str], Awaitable[None]]] = {
                Kind.TASK: pool.remove_task,
                Kind.VBD: pool.detach,
                Kind.VM: pool.destroy_snapshot_vm,
                Kind.DATA: pool.data_destroy,
                Kind.VDI: pool.destroy_vdi,
                Kind.BASE: pool.destroy_vdi,
                Kind.NEW_VM: pool.destroy_unfinished_vm,
                Kind.DISK: pool.destroy_unfinished_disk,
                Kind.TAG: pool.release_disk,
                Kind.BLOCK: lambda ref: pool.vms.unblock(ref, is_dead=self._judge.is_dead),
            }
            await how[thing.kind](thing.ref)

    async def _abandon(self, store: Store, thing: Thing) -> None:
        """Remove a partial point, after what it asked the pool for, tagged or not."""
        owner = msgspec.structs.replace(
            instant.owned(leftovers.BASE), store=store.uuid, vm=thing.key, point=thing.time
        )
        if self._pool is not None and thing.ref:
            for name in thing.snapshots:
                await self._pool.destroy_run_leftovers(thing.ref, name, owner=owner)
        for leftover in store.leftovers(thing.key):
            if leftover.time == thing.time:
                await trio.to_thread.run_sync(store.abandon, leftover)


def _is_dead(gone_hosts: frozenset[str]) -> Callable[[Owned], bool]:
    @cache
    def is_dead(maker: Process) -> bool:
        return maker.host in gone_hosts or maker.is_dead()

    return lambda tag: is_dead(Process(tag.host, tag.boot, tag.pid, tag.starttime))


def _tasks(records: dict[str, tasks.Record]) -> tuple[PoolTask, ...]:
    found: list[PoolTask] = []
    for ref, record in records.items():
        maker = read_task(record.name_description)
        if maker is not None:
            found.append(PoolTask(ref, record.uuid, record.name_label, maker))
    return tuple(found)


def _targets(inventory: Inventory) -> dict[str, Target]:
    """Return what a sync can be of, by the name of its directory in a store."""
    found: list[Target] = [*inventory.live_vms(), *inventory.vdis.values()]
    return {targets.key_of(target): target for target in found}


def _maker(intent: Intent) -> Owned:
    return Owned(
        self_uuid="",
        role=leftovers.BASE,
        host=intent.host,
        pid=intent.pid,
        boot=intent.boot,
        starttime=intent.starttime,
    )


def _partial(leftover: Leftover, *, pool_uuid: str) -> Partial:
    intent = leftover.intent
    if intent is None:
        return Partial(leftover.time)
    names = dict.fromkeys((intent.snapshot_name, *intent.earlier))
    return Partial(
        leftover.time,
        maker=_maker(intent),
        pool_uuid=intent.pool_uuid or pool_uuid,
        snapshots=tuple(name for name in names if time_of_run(name)),
    )
