"""``restore --to-sr`` and ``--in-place``: a restore point into new disks, or over the old ones."""

import secrets
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from cbtfs import errors, inplace, newdisks, newvm, owner, progress, units
from cbtfs.catalogue import DiskPoint
from cbtfs.inplace import InPlace, Safety
from cbtfs.inventory import SR, Inventory
from cbtfs.newdisks import Goal, Images, NewDisks, Restored
from cbtfs.newvm import NewVM
from cbtfs.ovaxml import Metadata
from cbtfs.pool import Pool
from cbtfs.store import Store

from . import context as contexts, output, running
from .context import Globals

_Done = tuple[Sequence[Restored], NewVM | None]
_Over = tuple[Sequence[Restored], Safety]
_T = TypeVar("_T")

_THEN = "nothing of it is left in the pool; run the command again"

_UNFINISHED = "run the command again to finish it, or go back to the snapshot it took"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options say.

    Attributes:
        forced: damage on record does not matter.
        whole: all of what was written is read back, not only some.
    """

    point: str
    to_sr: str = ""
    vm_name: str = ""
    forced: bool = False
    whole: bool = False
    dry_run: bool = False
    json_progress: bool = False


# ── --to-sr ──────────────────────────────────────────────────────────────────────────────────


def to_sr(options: Globals, wish: Wish) -> None:
    """Make new disks on an SR, and a VM of them if wanted."""
    with contexts.opened_store(options) as store:
        goal = _goal(store, wish)
        # before anything is done with the pool: it may not be there
        metadata = newvm.read(store, goal) if wish.vm_name else None
        run = _Run(options, wish, store, goal, metadata)
        done = _ran(run.to_sr, run.made, then=_THEN)
    if done is not None:
        _show(options, goal, *done)


def _ran(work: Callable[[], Awaitable[_T | None]], done: Sequence[_T], *, then: str) -> _T | None:
    """Return what ``work`` returns, or what it had done when a signal came too late to matter."""
    try:
        return running.run(work, then=then)
    except errors.Interrupted:
        if not done:
            raise
        return done[0]


def _goal(store: Store, wish: Wish) -> Goal:
    """Return what is to be restored, and tell what of the point cannot be.

    Raises:
        NotFound: it has no disks.
        ImageDamaged: a disk is on record as damaged.
    """
    point = contexts.point_of(store, wish.point)
    run = owner.run_name(point.point.time, secrets.token_hex(8))
    goal = Goal(point, run, whole=wish.whole)
    if not goal.disks:
        raise errors.NotFound(f"{goal.label} has no disks")
    for failure in () if point.disk else point.point.failures:
        contexts.warn(f"{goal.label}/{failure.device} is not in this point: {failure.error}")
    # image and digests may agree, and both be otherwise than the disk was
    damaged = store.damaged(point.history.uuid, point.point.time)
    for disk in (disk for disk in goal.disks if disk.device in damaged):
        on_record = f"{goal.label}/{disk.device} is on record as damaged"
        if not wish.forced:
            raise errors.ImageDamaged(
                f"{on_record}; cbtfs verify says where; restore another point, or this one all the"
                " same with --force"
            )
        output.note(f"{on_record}, and restored all the same")  # whoever uses it must know
    return goal


@dataclass(frozen=True, slots=True)
class _Run:
    """One restore.

    Attributes:
        metadata: of the VM that is wanted, if one is.
        made: what was made, once it is the user's.
        written: what was written, once all of it is.
        left: how the VM was left, if not all is.
    """

    options: Globals
    wish: Wish
    store: Store
    goal: Goal
    metadata: Metadata | None
    made: list[_Done] = field(default_factory=list[_Done])
    written: list[_Over] = field(default_factory=list[_Over])
    left: list[str] = field(default_factory=list[str])

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keep the store's syncs of the VM away from disks that are being written over.

        In the end it is told how the VM was left, also with ``-q``.

        Raises:
            StoreLocked: one is at work.
        """
        with ExitStack() as stack:
            if not self.wish.dry_run:
                try:
                    stack.enter_context(self.store.lock(self.goal.point.history.uuid))
                except errors.StoreLocked:
                    raise
                except errors.StoreError:  # it can only be read: no sync writes there either
                    pass
            try:
                yield
            finally:
                for text in self.left:
                    output.note(text)

    async def to_sr(self) -> _Done | None:
        """Return what was made; None after a dry run."""
        opening = newdisks.opened(self.store, self.goal)
        async with opening as images, contexts.opened_pool(self.options) as pool:
            sr = _find_sr(await pool.inventory(), self.wish.to_sr)
            newdisks.check(sr, images)
            await pool.check_nbd()
            if self.wish.dry_run:
                _show_plan(self.options, self.goal, sr, images)
                return None
            kind = contexts.progress_kind(self.options, as_json=self.wish.json_progress)
            with progress.open_progress(kind, sys.stderr) as view:
                new = NewDisks(pool, self.goal, view)
                async with new.made(images, sr) as disks:
                    await self._use(pool, new, disks)
        return self.made[0]

    async def in_place(self) -> _Over | None:
        """Return what was written, and the snapshot of before; None after a dry run."""
        opening = newdisks.opened(self.store, self.goal)
        async with opening as images, contexts.opened_pool(self.options) as pool:
            inventory, vm = await inplace.found(pool, self.goal)
            await pool.check_nbd()
            kind = contexts.progress_kind(self.options, as_json=self.wish.json_progress)
            with progress.open_progress(kind, sys.stderr) as view:
                run = InPlace(pool, self.store, self.goal, inventory, view)
                if self.wish.dry_run:
                    _show_differences(self.options, self.goal, await run.differences(images))
                    return None
                run.left = self.left
                async with run.held(vm) as held:
                    disks = await run.run(images)
                self.written.append((disks, held))
        return self.written[0]

    async def _use(self, pool: Pool, new: NewDisks, disks: Sequence[Restored]) -> None:
        """Give the disks away, to a new VM if one is wanted."""
        if self.metadata is None:
            await new.give_away()
            self.made.append((disks, None))
            return
        making = newvm.made(pool, self.metadata, new, self.goal, name=self.wish.vm_name)
        async with making as (vm, problems):
            for problem in problems:
                contexts.warn(problem)
        self.made.append((disks, vm))


def _find_sr(inventory: Inventory, name_or_uuid: str) -> SR:
    srs = inventory.srs.values()
    found = [sr for sr in srs if sr.uuid == name_or_uuid.lower()]
    found = found or [sr for sr in srs if sr.name == name_or_uuid]
    if not found:
        known = ", ".join(sorted({repr(sr.name) for sr in srs if sr.content_type != "iso"}))
        raise errors.NotFound(f"the pool has no SR called {name_or_uuid!r}; it has: {known}")
    if len(found) > 1:
        uuids = ", ".join(sr.uuid for sr in found)
        raise errors.UsageError(
            f"{len(found)} SRs are called {name_or_uuid!r}; use a uuid: {uuids}"
        )
    return found[0]


# ── what is told ─────────────────────────────────────────────────────────────────────────────


def _show_plan(options: Globals, goal: Goal, sr: SR, images: Images) -> None:
    if options.json:
        disks = [
            {"device": disk.device, "size": disk.size, "bytes": length}
            for disk, _, length in images.disks
        ]
        output.document({"dry_run": True, "point": goal.label, "sr": sr.uuid, "disks": disks})
        return
    for disk, _, length in images.disks:
        sent, size = units.format_size(length), units.format_size(disk.size)
        where = f"{goal.label}/{disk.device}"
        output.line(output.safe(f"{where}  {sent} of {size} into a new disk on {sr.name}"))


def _show(options: Globals, goal: Goal, done: Sequence[Restored], vm: NewVM | None) -> None:
    if options.json:
        made = {"uuid": vm.uuid, "name": vm.name} if vm is not None else None
        disks = [_document(disk) for disk in done]
        output.document({"vm": made, "disks": disks, "safety_snapshot": None})
        return
    for disk in done:
        output.line(output.safe(_line(goal, disk)))
    if vm is not None:
        output.line(output.safe(f"{vm.name}  is the new VM {vm.uuid}, halted"))


def _line(goal: Goal, done: Restored) -> str:
    sent, size = units.format_size(done.sent), units.format_size(done.disk.size)
    return (
        f"{goal.label}/{done.disk.device}  {sent} of {size} in"
        f" {units.format_duration(done.seconds)} into VDI {done.written.uuid}"
        f"  ({units.format_size(done.verified)} read back)"
    )


def _document(done: Restored) -> dict[str, object]:
    return {
        "device": done.disk.device,
        "vdi_uuid": done.written.uuid,
        "size": done.written.size,
        "bytes_sent": done.sent,
        "verified_bytes": done.verified,
        "seconds": round(done.seconds, 3),
    }


# ── --in-place ───────────────────────────────────────────────────────────────────────────────


def in_place(options: Globals, wish: Wish) -> None:
    """Write what differs over the disks that the point is of."""
    with contexts.opened_store(options) as store:
        goal = _goal(store, wish)
        run = _Run(options, wish, store, goal, None)
        with run.locked():
            done = _ran(run.in_place, run.written, then=_UNFINISHED)
    if done is None:
        return
    disks, safety = done
    if options.json:
        told = [_document(disk) for disk in disks]
        way_back = None if safety.is_lost else safety.uuid
        output.document({"vm": None, "disks": told, "safety_snapshot": way_back})
        return
    for disk in disks:
        output.line(output.safe(_line(goal, disk)))
    output.line(f"to go back to what was there before: {safety.way_back}")


def _show_differences(
    options: Globals, goal: Goal, found: Sequence[tuple[DiskPoint, int, str]]
) -> None:
    if options.json:
        disks = [
            {"device": disk.device, "size": disk.size, "bytes": count, "compared": how}
            for disk, count, how in found
        ]
        output.document({"dry_run": True, "point": goal.label, "disks": disks})
        return
    for disk, count, how in found:
        differs, size = units.format_size(count), units.format_size(disk.size)
        where = f"{goal.label}/{disk.device}"
        output.line(output.safe(f"{where}  {differs} of {size} to be written; compared: {how}"))
