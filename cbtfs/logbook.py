"""Logbook: how far one disk is, kept in the stage's journal while it is being copied.

::

    copier     |####|####|####|  ##| ## |              written, some of it out of order
                              ▲
                              position: 1. taken   2. the image is brought to disk   3. written down

Rules of this file:

1. The journal never says more than is on disk: the three steps come in this order.
2. What counts is the whole way of the disk, also what an interrupted run had done before.
"""

from dataclasses import replace
from time import monotonic

import msgspec
import trio

from . import errors, units
from .catalogue import DiskPoint
from .copier import Copier
from .image import Image
from .inventory import VDI
from .journal import DiskJournal
from .store import Stage
from .work import Work

FLUSH_BYTES = 256 * units.MiB
"""Bytes read between two entries, so after a crash at most about twice that are read again: what
came since the last entry, and what came while the next one was being written."""

FLUSH_SECONDS = 10.0
"""Seconds between two entries, for slow links."""


class Logbook:
    """How far one disk is.

    Args:
        stage: whose journal it writes.
        vdi: the snapshot that is being copied.
        before: what an interrupted run had written down last, if this one goes on with it.

    Attributes:
        before: the same; None once it turned out that it cannot be gone on with.
        failure: why no entry could be written.
        distrusted: whether the pool's list of allocated blocks was wrong.
        read: bytes read by this run.
        written: bytes stored by this run.
    """

    def __init__(self, stage: Stage, vdi: VDI, before: DiskJournal | None) -> None:
        self.before = before
        self.failure: errors.StoreError | None = None
        self.distrusted = before is not None and before.distrusted
        self.read = self.written = 0
        self._stage = stage
        self._vdi = vdi
        self._begun = monotonic()
        self._unnoted = 0  # bytes read since the last entry
        self._due = trio.Event()

    @property
    def offset(self) -> int:
        """Where to begin."""
        return self.before.offset if self.before is not None else 0

    @property
    def totals(self) -> tuple[int, int, float]:
        """Bytes read, bytes stored and seconds spent, by all runs."""
        seconds = monotonic() - self._begun
        if self.before is None:
            return self.read, self.written, round(seconds, 3)
        return (
            self.read + self.before.bytes_read,
            self.written + self.before.bytes_written,
            round(seconds + self.before.seconds, 3),
        )

    def advanced(self, read: int, written: int) -> None:
        """Note what one more piece added, in bytes."""
        self.read += read
        self.written += written
        self._unnoted += read
        if self._unnoted >= FLUSH_BYTES:
            self._due.set()

    def begin_anew(self) -> None:
        """Forget that the disk was begun before: what was left to do is not known any more."""
        self.before = None

    async def keep(
        self, copier: Copier, work: Work, image: Image, everything: trio.CancelScope
    ) -> None:
        """Write entries until cancelled; if one cannot be written, end ``everything``."""
        try:
            while True:
                with trio.move_on_after(FLUSH_SECONDS):
                    await self._due.wait()
                self._due, self._unnoted = trio.Event(), 0
                await self.note(copier, work, image)
        except errors.StoreError as exc:
            self.failure = exc
            everything.cancel()

    async def note(self, copier: Copier, work: Work, image: Image) -> None:
        """Bring to disk what was copied so far, and write down how far that is.

        Raises:
            StoreError: it could not be done; the older entry stays.
        """
        position = copier.position
        entry = self._entry(work, work.size if position is None else position)
        if not copier.tally.read or entry.offset <= work.offset:
            return

        def store() -> None:
            image.flush()
            self._stage.journal(entry)

        await trio.to_thread.run_sync(store)

    async def start_over(self, work: Work) -> None:
        """Write down that ``work`` is done from the beginning, over the same image.

        A later run must not begin behind blocks that the list before had left out.

        Raises:
            StoreError: it could not be written.
        """
        if self.before is not None:
            self.before = msgspec.structs.replace(self.before, offset=0)
        entry = self._entry(replace(work, offset=0), 0)
        await trio.to_thread.run_sync(self._stage.journal, entry)

    async def finish(self, work: Work, point: DiskPoint) -> None:
        """Write down that the disk is finished; its image is on disk.

        Raises:
            StoreError: it could not be written.
        """
        entry = msgspec.structs.replace(self._entry(work, work.size), finished=point)
        await trio.to_thread.run_sync(self._stage.journal, entry)

    def _entry(self, work: Work, offset: int) -> DiskJournal:
        disk = work.disk
        read, written, seconds = self.totals
        return DiskJournal(
            device=disk.device,
            vdi_uuid=disk.vdi_uuid,
            snapshot_uuid=self._vdi.uuid,
            size=work.size,
            method=disk.method,
            reason=disk.reason,
            detail=disk.detail,
            base=disk.base.time if disk.base else "",
            base_snapshot_uuid=disk.base.snapshot_uuid if disk.base else "",
            offset=offset,
            distrusted=self.distrusted,
            bytes_read=read,
            bytes_written=written,
            seconds=seconds,
        )
