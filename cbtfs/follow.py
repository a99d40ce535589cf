"""Follow: a mount shows what the pool has now, by its events, without ever stopping for that.

::

    the pool's events ──> Replica ─┐
                                   ├─> inventory, tree ──> Filesystem ──> the kernel forgets
    the store's folders ─> points ─┘   (a thread)          (at once)      (a thread)

Rules of this file:

1. Whatever goes wrong, the mount goes on with the names it has: an outage is told once, when it
   begins and when it is over, and tried again for ever.
2. Building takes a thread, and at most a fifth of the time.
3. The kernel is made to forget in a thread that is waited for, because it takes locks of folders
   that others hold while they wait for us: so the kernel must be answered until ``follow`` ends.
   Trees go on meanwhile: a ``mkdir`` that holds such a lock waits for the next one.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from . import errors, fuse, tree as trees
from .catalogue import Catalogue
from .fuse import Filesystem
from .inventory import Inventory
from .replica import Batch, Replica
from .tree import Changes, Tree

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSE = 1.0
"""Seconds at least between two trees; the first change after a quiet time shows at once."""

SHARE = 0.2
"""How much of the time building may take."""

GATHER = 0.2
"""Seconds in which events gather while many come: a snapshot is a dozen."""

RETRIES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the next attempt at a pool that does not answer; the last one again and again."""

RECOUNT = 600.0
"""Seconds between two complete batches that are asked for because events seem to be missing."""

STORE_INTERVAL = 3.0
"""Seconds between two looks at whether a store has changed."""


class Feed(Protocol):
    """Where events come from."""

    def start_over(self) -> None:
        """Make the next batch a complete one."""
        ...

    async def next(self) -> Batch:
        """Wait for something to happen, and return it; the first batch is complete."""
        ...


@dataclass(frozen=True, slots=True)
class Backups:
    """The restore points that a mount shows, and the absolute path of their store.

    ``read`` reads them anew in a thread, if they are to be followed.
    """

    catalogue: Catalogue
    store_path: str
    read: Callable[[], Catalogue] | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """The events of a pool, and its records up to the last of them."""

    feed: Feed
    replica: Replica


class View:
    """What a mount shows: one inventory and one catalogue after the other, as trees.

    Args:
        inventory: what it shows first.
        backups: what ``backups/`` shows; None leaves it out.
        source: where the next inventory comes from; None if there is none.
    """

    def __init__(
        self, inventory: Inventory, *, backups: Backups | None = None, source: Source | None = None
    ) -> None:
        self.inventory = inventory
        self.catalogue = backups.catalogue if backups else None
        self.source = source
        self.backups = backups
        self._store_path = backups.store_path if backups else ""
        self.tree = self._build(inventory, self.catalogue, None)

    def __repr__(self) -> str:
        return f"<View {self.tree!r}>"

    def renew(
        self, inventory: Inventory, catalogue: Catalogue | None, *, hidden: frozenset[str]
    ) -> Changes:
        """Build the next tree without ``hidden``; return what is different; for a thread."""
        before = self.tree
        tree = self._build(inventory, catalogue, before, hidden)
        self.inventory, self.catalogue, self.tree = inventory, catalogue, tree
        return trees.changes(before, tree)

    def _build(
        self,
        inventory: Inventory,
        catalogue: Catalogue | None,
        earlier: Tree | None,
        hidden: frozenset[str] = frozenset(),
    ) -> Tree:
        return trees.build(
            inventory,
            backups=catalogue,
            store_path=self._store_path,
            now=datetime.now(UTC),
            earlier=earlier,
            hidden=hidden,
        )


async def open_view(feed: Feed, *, backups: Backups | None) -> View:
    """Return the view of a pool as it is now, to be followed by ``feed``.

    Raises:
        PoolError: the pool does not answer, or not what a pool answers.
    """
    replica = Replica()
    batch = await feed.next()

    def work() -> View:
        replica.apply(batch)
        return View(replica.inventory(), backups=backups, source=Source(feed, replica))

    return await trio.to_thread.run_sync(work)


async def follow(filesystem: Filesystem, view: View) -> None:
    """Keep ``filesystem``, which shows ``view`` so far, up to date until cancelled.

    The kernel must be answered until this has ended.
    """
    follower = _Follower(filesystem, view)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.renew)
        nursery.start_soon(follower.forget)
        if view.source is not None:
            nursery.start_soon(follower.listen, view.source)
        if view.backups is not None and view.backups.read is not None:
            path = Path(view.backups.store_path)
            nursery.start_soon(follower.watch, path, view.backups.read)


class _Follower:
    """The tasks of ``follow``.

    The replica is used by the one who holds ``_lock``; the view by ``renew`` only. ``_catalogue``
    changes between awaits, before ``_changed`` is set.
    """

    def __init__(self, filesystem: Filesystem, view: View) -> None:
        self._filesystem = filesystem
        self._view = view
        self._lock = trio.Lock()
        self._catalogue = view.catalogue
        self._changed = trio.Event()
        self._stale: list[Changes] = []
        self._outdated = trio.Event()

    async def listen(self, source: Source) -> None:
        """Take in the pool's events, for ever."""
        outage = _Outage(
            "the pool cannot be followed, and its names stay as they are",
            over="the pool is followed again",
        )
        recounted = float("-inf")
        while True:
            try:
                batch = await source.feed.next()
                missed = await self._take(batch, source.replica)
            except Exception as error:  # whatever a pool sends must not end the mount
                source.feed.start_over()
                await outage.wait(error)
                continue
            outage.end()
            if missed and trio.current_time() > recounted + RECOUNT:
                recounted = trio.current_time()
                source.feed.start_over()
            await trio.sleep(GATHER)

    async def _take(self, batch: Batch, replica: Replica) -> bool:
        """Take in a batch; return whether an event before it was missed."""
        if not batch.events and batch.tables is None:
            return replica.lacks(batch)
        async with self._lock:
            changed = await trio.to_thread.run_sync(replica.apply, batch)
        if changed:
            self._changed.set()
        return replica.lacks(batch)

    async def watch(self, path: Path, read: Callable[[], Catalogue]) -> None:
        """Read the restore points whenever the folders of the store have changed, for ever."""
        outage = _Outage(
            f"the restore points in {path} cannot be read, and stay as they are",
            over=f"the restore points in {path} can be read again",
        )
        known: frozenset[tuple[str, int]] | None = None
        while True:
            busy = 0.0
            try:
                look = partial(_signature, path, may_lack=not known)
                seen = await trio.to_thread.run_sync(look, abandon_on_cancel=True)
                if seen != known:
                    # a store on a server that hangs must not hold up the end of the mount
                    found, busy = await _timed(read, abandoned=True)
                    known = seen
                    self._has(found)
            except Exception as error:  # as in listen
                await outage.wait(error)
                continue
            outage.end()
            await trio.sleep(max(STORE_INTERVAL, busy / SHARE - busy))

    def _has(self, catalogue: Catalogue) -> None:
        if catalogue != self._catalogue:
            self._catalogue = catalogue
            self._changed.set()

    async def renew(self) -> None:
        """Show what has changed, for ever."""
        outage = _Outage(
            "what has changed in the pool cannot be shown, and names stay as they are",
            over="what has changed in the pool is shown again",
        )
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            try:
                busy = await self._show()
            except Exception as error:  # as in listen
                self._changed.set()
                await outage.wait(error)
                continue
            outage.end()
            await trio.sleep(max(PAUSE, busy / SHARE - busy))

    async def _show(self) -> float:
        """Build what is to be shown, and show it; return for how many seconds it was worked."""
        view, known = self._view, self._view.inventory
        inventory, assembling = known, 0.0
        if view.source is not None:
            async with self._lock:
                inventory, assembling = await _timed(view.source.replica.inventory)
        for problem in sorted(set(inventory.problems) - set(known.problems)):
            log.warning("%s", problem)
        hidden = self._filesystem.temporary(inventory)
        build = partial(view.renew, inventory, self._catalogue, hidden=hidden)
        changes, building = await _timed(build)
        self._filesystem.switch(view.tree, view.inventory)
        if changes:
            self._stale.append(changes)
            self._outdated.set()
        return assembling + building

    async def forget(self) -> None:
        """Make the kernel forget what it knows of earlier trees, for ever."""
        while True:
            await self._outdated.wait()
            self._outdated = trio.Event()
            while self._stale:
                await trio.to_thread.run_sync(fuse.invalidate, self._stale.pop(0))


class _Outage:
    """Tells once that something does not work, and once that it does again."""

    def __init__(self, what: str, *, over: str) -> None:
        self._what = what
        self._over = over
        self._failures = 0

    async def wait(self, error: Exception) -> None:
        """Tell of ``error`` if it is the first, and wait before the next attempt."""
        if not self._failures:
            foreseen = isinstance(error, errors.CbtfsError | OSError)
            log.warning("%s: %s", self._what, error, exc_info=None if foreseen else error)
        pause = RETRIES[min(self._failures, len(RETRIES) - 1)]
        self._failures += 1
        await trio.sleep(pause)

    def end(self) -> None:
        """Note that it works."""
        if self._failures:
            log.warning("%s", self._over)
        self._failures = 0


async def _timed(work: Callable[[], T], *, abandoned: bool = False) -> tuple[T, float]:
    """Run ``work`` in a thread, and return its result and the seconds of the processor it took.

    If cancelled, it is waited for, or ``abandoned``.
    """

    def measured() -> tuple[T, float]:
        begun = time.thread_time()
        return work(), time.thread_time() - begun

    return await trio.to_thread.run_sync(measured, abandon_on_cancel=abandoned)


def _signature(path: Path, *, may_lack: bool) -> frozenset[tuple[str, int]]:
    """Return what changes when a restore point comes or goes: it is a name in its VM's folder.

    A store that ``may_lack`` has not been made yet, perhaps.
    """
    if may_lack and not path.exists():
        return frozenset()
    with os.scandir(path) as entries:
        folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    found = {(folder.name, folder.stat(follow_symlinks=False).st_mtime_ns) for folder in folders}
    return frozenset(found)
