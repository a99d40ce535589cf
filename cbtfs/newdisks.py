"""New disks: the disks of a restore point as new VDIs of a pool.

::

    open        every image, its digests compared with the point's record; nothing made yet
    make        a tagged VDI, its data sent, some or all of it read back     a few at a time
    use         whoever asked for them does with all of them what is wanted  (a VM)
    name        all of them
    finish      tags taken away: from now on they are the user's; those of a VM after its own

Rules of this file:

1. If anything fails or is cancelled before the end, all of the VDIs are destroyed again.
2. A stream of chunks cannot be gone on with, so there is nothing to resume. After a SIGKILL the
   tagged VDIs stay, and ``clean`` finds them.
"""

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import trio

from . import chunks, committed, errors, process, readback, units
from .catalogue import DiskPoint, Reference
from .chunks import Chunks
from .committed import Committed
from .inventory import SR, Owned
from .owner import RESTORED
from .pool import Pool
from .progress import Progress
from .readback import Written
from .store import Store
from .vdis import NewDisk

logger = logging.getLogger(__name__)

DISKS_AT_ONCE = 4
"""Disks under way at a time; each takes a handler of a host, and a few MiB of memory."""

CLEANUP = 90.0
"""Seconds that the pool gets to let go of what was begun, and to destroy it."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What is to be restored, and how.

    Attributes:
        point: the point, or one disk of it.
        run: what the disks are called until they are whole.
        whole: whether all of a disk is read back, not only some of it.
    """

    point: Reference
    run: str
    whole: bool = False

    @property
    def label(self) -> str:
        """What people call the point."""
        return f"{self.point.history.name}/{self.point.point.time}"

    @property
    def disks(self) -> Sequence[DiskPoint]:
        """The disks that are restored."""
        return (self.point.disk,) if self.point.disk is not None else self.point.point.disks

    @property
    def owner(self) -> Owned:
        """The tag on what is not whole yet, bound to the name that it has until then."""
        this = process.this_process()
        return Owned(
            self_uuid=self.run,
            role=RESTORED,
            point=self.point.point.time,
            host=this.host,
            pid=this.pid,
            boot=this.boot,
            starttime=this.starttime,
        )


@dataclass(frozen=True, slots=True)
class Restored:
    """One disk that was written.

    Attributes:
        disk: what it was restored from.
        written: the disk of the pool.
        sent: bytes of data that were sent.
        verified: bytes that were read back and compared.
        seconds: that all of it took.
    """

    disk: DiskPoint
    written: Written
    sent: int
    verified: int
    seconds: float


@dataclass(slots=True)
class Images:
    """The images of a point, opened before anything is done with the pool.

    Attributes:
        disks: each with its image and the bytes in blocks that are not zero.
    """

    disks: list[tuple[DiskPoint, Committed, int]] = field(
        default_factory=list[tuple[DiskPoint, Committed, int]]
    )

    @property
    def data(self) -> int:
        """Bytes to be sent."""
        return sum(length for _, _, length in self.disks)


@asynccontextmanager
async def opened(store: Store, goal: Goal) -> AsyncGenerator[Images]:
    """Open all images of ``goal``.

    Raises:
        ImageDamaged: one is not as committed, as far as its digests' root and its length tell.
        StoreError: one cannot be opened.
    """
    images = Images()
    with ExitStack() as stack:
        for disk in goal.disks:

            def enter(disk: DiskPoint = disk) -> tuple[DiskPoint, Committed, int]:
                files = stack.enter_context(store.image_files(goal.point, disk))
                opening = committed.opened(files, size=disk.size, root=disk.digest_root)
                image = stack.enter_context(opening)
                return disk, image, image.data_length()

            images.disks.append(await trio.to_thread.run_sync(enter))
        yield images


def check(sr: SR, images: Images) -> None:
    """Refuse early what cannot work on this SR.

    Raises:
        PoolError: it is attached nowhere, holds no disks, or has too little space.
    """
    if not sr.host_refs:
        raise errors.PoolError(
            f"no host has the SR {sr.name!r} attached; plug one of its PBDs: xe pbd-plug"
        )
    if sr.content_type == "iso":
        raise errors.PoolError(f"the SR {sr.name!r} holds images for CD drives only; name another")
    free = sr.physical_size - sr.physical_utilisation
    if sr.physical_size and images.data > free:
        raise errors.PoolError(
            f"{units.format_size(images.data)} are to be written and the SR {sr.name!r} has"
            f" {units.format_size(max(free, 0))} free; remove disks from it or name another"
        )


class NewDisks:
    """One restore into new VDIs.

    Args:
        pool: where to.
        goal: what.
        progress: told of each disk.
    """

    def __init__(self, pool: Pool, goal: Goal, progress: Progress) -> None:
        self._pool = pool
        self._goal = goal
        self._progress = progress
        self._made: list[str] = []
        self._done: dict[str, Restored] = {}
        self._error: errors.CbtfsError | None = None

    @asynccontextmanager
    async def made(self, images: Images, sr: SR) -> AsyncGenerator[list[Restored]]:
        """Make the disks; they are destroyed again unless they were given away in the block.

        Raises:
            ImageDamaged: a block of an image is not what its digest says.
            PoolError: the pool refused, or holds something else than it was sent.
            ExportError: a disk cannot be read back.
        """
        try:
            await self._make(images, sr)
            yield [self._done[disk.device] for disk, _, _ in images.disks]
        finally:
            await self._take_back()

    async def _make(self, images: Images, sr: SR) -> None:
        at_once = trio.CapacityLimiter(DISKS_AT_ONCE)
        async with trio.open_nursery() as nursery:

            async def one(disk: DiskPoint, image: Committed, length: int) -> None:
                async with at_once:
                    try:
                        self._done[disk.device] = await self._one(disk, image, length, sr)
                    except errors.CbtfsError as exc:
                        self._progress.disk_finished(self._key(disk), None, str(exc))
                        self._error = self._error or exc
                        nursery.cancel_scope.cancel()

            for disk, image, length in images.disks:
                nursery.start_soon(one, disk, image, length)
        if self._error is not None:
            raise self._error

    async def _one(self, disk: DiskPoint, image: Committed, length: int, sr: SR) -> Restored:
        key, begun = self._key(disk), time.monotonic()
        self._progress.disk_started(key, method="restore", reason="new disk", total=length)
        wanted = NewDisk(sr.ref, disk.size, self._goal.run, self._goal.owner)
        ref, uuid, size = await self._pool.disks.create(wanted)
        self._made.append(ref)
        if size < disk.size:
            raise errors.PoolError(
                f"the SR {sr.name!r} made a disk of {size} bytes where {disk.size} were asked for"
            )

        def advanced(count: int) -> None:
            self._progress.advanced(key, read=count, written=count)

        source = await trio.to_thread.run_sync(
            lambda: Chunks(image, lambda: chunks.everything(image), advanced=advanced)
        )
        if source.data:
            await self._pool.disks.write(ref, source)
        written = Written(ref, uuid, size)
        verified = await readback.compare(self._pool, written, image, whole=self._goal.whole)
        seconds = time.monotonic() - begun
        told = msgspec.structs.replace(
            disk, method="restore", reason="", base="", resumed="", bytes_read=source.data,
            bytes_written=source.data, seconds=seconds,
        )  # fmt: skip
        self._progress.disk_finished(key, told)
        return Restored(disk, written, source.data, verified, seconds)

    def _key(self, disk: DiskPoint) -> str:
        return f"{self._goal.point.history.name}/{disk.device}"

    async def give_away(self, to: Callable[[], Awaitable[None]] | None = None) -> None:
        """Give all disks their names, and take their tags away; not to be interrupted.

        Args:
            to: gives away the VM that has them. Until it returns all of it can be destroyed; from
                then on they are of a user's VM, and nothing destroys them.

        Raises:
            PoolError: the pool does not answer; what is not given away yet is destroyed.
        """
        with trio.CancelScope(shield=True):
            for done in self._done.values():
                await self._pool.disks.name(
                    done.written.ref,
                    name=done.disk.vdi_name or done.disk.vdi_uuid,
                    description=f"{self._goal.label}/{done.disk.device}, restored by cbtfs",
                )
            if to is not None:
                await to()
                self._made.clear()
            for done in self._done.values():
                await self._release(done.written.ref, is_of_vm=to is not None)

    async def _release(self, ref: str, *, is_of_vm: bool) -> None:
        try:
            await self._pool.disks.release(ref)
        except errors.CbtfsError as exc:
            if not is_of_vm:
                raise
            logger.warning("a disk of the new VM keeps its tag until cbtfs clean: %s", exc)
        else:
            if not is_of_vm:
                self._made.remove(ref)

    def leave(self) -> None:
        """Destroy none of them: a VM has them that stays; ``clean`` knows what is whole."""
        self._made.clear()

    @property
    def done(self) -> Sequence[Restored]:
        """The disks that are whole."""
        return tuple(self._done.values())

    async def _take_back(self) -> None:
        with trio.move_on_after(CLEANUP, shield=True):
            async with trio.open_nursery() as nursery:
                for ref in self._made:
                    nursery.start_soon(self._destroy, ref)
            return
        logger.warning("the pool did not let go of unfinished disks in time; run cbtfs clean")

    async def _destroy(self, ref: str) -> None:
        try:
            await self._pool.disks.destroy(ref)
        except errors.CbtfsError as exc:
            logger.warning("an unfinished disk stays until cbtfs clean: %s", exc)
