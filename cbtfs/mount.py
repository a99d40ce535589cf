"""Mount: the life of a mount, from the empty directory back to it.

::

    check the directory ─ mount ─ answer the kernel ─ ready ─ … ─ unmounted, or told to stop
                                  follow the pool
                                                                      │
                              process ends ─ snapshots destroyed ─ connections closed

The process never unmounts what it does not serve, and if it is killed the mount point stays behind,
answering ENOTCONN to everybody: better than an empty directory where files were.
"""

import difflib
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from . import cache, disks, errors, follow, fuse, mountpoint as mountpoints, units
from .background import announce_end, announce_ready, start_background
from .disks import DiskOptions, Pool
from .follow import Backups, View, open_view
from .fuse import Filesystem
from .inventory import Inventory
from .maker import Maker
from .mountpoint import umount

__all__ = [
    "Backups",
    "MountOptions",
    "View",
    "open_view",
    "serve",
    "start_background",
    "umount",
]

log = logging.getLogger(__name__)

TASKS = 2048
"""Requests that are answered at the same time; those of a stuck disk must not hold up ``ls``."""

LEFTOVERS_LIMIT = 30.0
"""Seconds that removing what dead mounts left may hold up the start; the next one goes on."""

NAME_MAX = 64
"""Characters of the pool's name that the kernel's list of mounts shows."""

_GENERIC = re.compile(
    r"(no)?(auto|atime|dev|diratime|exec|intr|lazytime|relatime|strictatime|suid|user|fail)"
    r"|r[ow]|a?sync|defaults|group|owner|users|_netdev|x-.*"
)
"""Options that mount(8) and fstab(5) pass on, and that say nothing to a mount of ours."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount; ``parse`` reads what follows ``-o``.

    Attributes:
        allow_other: let other users than the owner in, as far as modes permit. The kernel allows
            it to root; to others only if ``user_allow_other`` is in ``/etc/fuse.conf``.
        timeout: seconds until a read fails.
        cache: bytes of disks to keep in memory.
        tune: whether the kernel is to read further ahead, where it lets us say so.
        snapshots: whether ``mkdir`` and ``rmdir`` take and remove snapshots of VMs.
        disks: how disks are read: ``live``, ``linger``, ``connections``.
    """

    allow_other: bool = field(default_factory=lambda: os.geteuid() == 0)
    timeout: float = fuse.TIMEOUT
    cache: int = cache.LIMIT
    tune: bool = True
    snapshots: bool = False
    disks: DiskOptions = field(default_factory=DiskOptions)

    @classmethod
    def parse(cls, text: str) -> "MountOptions":
        """Return the options that ``text``, such as ``live=off,linger=10s``, asks for.

        Raises:
            UsageError: an option is unknown, or its value wrong.
        """
        options = cls()
        for word in filter(None, text.split(",")):
            key, _, value = word.partition("=")
            if _GENERIC.fullmatch(key):
                continue
            change = _OPTIONS.get(key)
            if change is None:
                near = difflib.get_close_matches(key, _OPTIONS, n=1) or sorted(_OPTIONS)
                raise errors.UsageError(
                    f"-o {key} is no option of mount; did you mean {' or '.join(near)}?"
                )
            options = change(options, value)
        return options


def _with_live(options: MountOptions, value: str) -> MountOptions:
    live = _is_on("live", value, on="snapshot")
    return replace(options, disks=replace(options.disks, live=live))


def _is_on(key: str, value: str, *, on: str = "on") -> bool:
    if value not in {on, "off"}:
        raise errors.UsageError(f"-o {key}={value} is unknown; write {key}={on} or {key}=off")
    return value == on


def _with_linger(options: MountOptions, value: str) -> MountOptions:
    linger = units.parse_duration(value)
    return replace(options, disks=replace(options.disks, linger=linger))


def _with_connections(options: MountOptions, value: str) -> MountOptions:
    if not value.isdecimal() or not int(value):
        raise errors.UsageError(f"-o connections={value} is no number from 1 on")
    return replace(options, disks=replace(options.disks, connections=int(value)))


_OPTIONS: dict[str, Callable[[MountOptions, str], MountOptions]] = {
    "allow_other": lambda options, _: replace(options, allow_other=True),
    "timeout": lambda options, value: replace(options, timeout=units.parse_duration(value)),
    "snapshots": lambda options, _: replace(options, snapshots=True),
    "cache": lambda options, value: replace(options, cache=units.parse_size(value)),
    "live": _with_live,
    "tune": lambda options, value: replace(options, tune=_is_on("tune", value)),
    "linger": _with_linger,
    "connections": _with_connections,
}


async def serve(
    pool: Pool,
    *,
    view: View,
    mountpoint: Path,
    options: MountOptions | None = None,
    maker: Maker | None = None,
    ready: Callable[[], None] = announce_ready,
) -> None:
    """Show a pool under ``mountpoint`` until it is unmounted, or SIGTERM or SIGINT comes.

    When it returns nothing is mounted and nothing of ours is left in the pool, also if it was
    cancelled. Runs in the main thread; a process serves one mount.

    Args:
        pool: where the disks are read.
        view: what is shown, and how it is followed.
        mountpoint: an empty directory.
        options: how to mount.
        maker: takes and removes snapshots if the options want that.
        ready: called when the mount can be used.

    Raises:
        MountError: the directory or the kernel refused.
    """
    options = options or MountOptions()
    maker = maker if options.snapshots else None
    path = mountpoints.check(mountpoint)
    mountpoints.check_fuse()
    with trio.move_on_after(LEFTOVERS_LIMIT):
        await disks.remove_leftovers(pool, view.inventory)
    async with (
        disks.open_disks(pool, options=options.disks) as opened,
        cache.open_cache(limit=options.cache) as kept,
    ):
        filesystem = Filesystem(
            view.tree,
            inventory=view.inventory,
            disks=opened,
            cache=kept,
            timeout=options.timeout,
            maker=maker,
        )
        with _mounted(filesystem, path, options=_kernel_options(view.inventory, options)):
            following = partial(follow.follow, filesystem, view)
            await _answer(filesystem, path, tuned=options.tune, ready=ready, following=following)
        announce_end()


async def _answer(
    filesystem: Filesystem,
    path: Path,
    *,
    tuned: bool,
    ready: Callable[[], None],
    following: Callable[[], Awaitable[None]],
) -> None:
    """Answer the kernel until the file system is unmounted or a signal comes.

    It is answered until all else has ended, also if this is cancelled: see rule 3 of ``follow``.
    """
    loop = trio.CancelScope(shield=True)
    async with trio.open_nursery() as answering:
        try:
            async with trio.open_nursery() as nursery:
                stop = nursery.cancel_scope.cancel
                answering.start_soon(_run_loop, loop, stop)
                nursery.start_soon(_await_signal, stop)
                nursery.start_soon(filesystem.patience.watch)
                nursery.start_soon(filesystem.pages.run)
                await _try_out(path, tuned=tuned)
                nursery.start_soon(following)
                ready()
        finally:
            loop.cancel()


async def _try_out(path: Path, *, tuned: bool) -> None:
    # the kernel's first question has been answered when this returns
    await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
    if tuned and await trio.to_thread.run_sync(mountpoints.tune, path, abandon_on_cancel=True):
        log.debug("the kernel reads ahead by %s", units.format_size(mountpoints.READ_AHEAD))


async def _run_loop(scope: trio.CancelScope, stop: Callable[[], None]) -> None:
    with scope:
        await pyfuse3.main(max_tasks=TASKS)
        log.info("unmounted")
    stop()


async def _await_signal(stop: Callable[[], None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for signum in signals:
            log.info("unmounting because of %s", signal.Signals(signum).name)
            stop()


@contextmanager
def _mounted(
    filesystem: Filesystem, path: Path, *, options: set[str]
) -> Generator[None, None, None]:
    """Mount ``filesystem``; on exit it is unmounted, if need be from under those who use it."""
    with _said_to_stderr() as said:
        try:
            pyfuse3.init(filesystem, str(path), options)
        except RuntimeError as error:
            raise errors.MountError(f"{path} cannot be mounted: {said() or error}") from error
    try:
        yield
    finally:
        pyfuse3.close(unmount=True)


@contextmanager
def _said_to_stderr() -> Generator[Callable[[], str], None, None]:
    """Catch what libfuse and fusermount3 print meanwhile, for it is the only reason they give."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield lambda: " ".join(
                os.pread(caught.fileno(), units.KiB, 0).decode(errors="replace").split()
            )
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _kernel_options(inventory: Inventory, options: MountOptions) -> set[str]:
    # a comma would end the option, the name is the pool's, and mount(2) takes a page of options
    name = re.sub(r"[^A-Za-z0-9._-]", "_", inventory.pool.name or inventory.pool.uuid)[:NAME_MAX]
    kernel = {f"fsname=cbtfs#{name}", "subtype=cbtfs", "default_permissions"}
    kernel |= {"rw" if options.snapshots else "ro", "nosuid", "nodev", "noexec"}
    return kernel | {"allow_other"} if options.allow_other else kernel
