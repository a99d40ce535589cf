"""Pages: what the kernel is given of files without having asked for it.

Who reads a few KiB somewhere makes us fetch a whole grain of 64 KiB, for hosts take about as long
for the one as for the other. What lies around is often wanted next: a folder, a table, a database.
Given to the kernel it is read from its pages then, at a hundredth of the cost of asking us again.

::

    read          4 KiB              answered at once
    fetched   ┌───────────────┐      one grain
    given     ▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓      a moment later, by a thread

Rules of this file:

1. Only of files whose contents never change: the kernel may be given them at any later time.
2. In a thread: the kernel waits for pages that it has asked us for, so that we must be answering
   meanwhile. Where more is to be given than it takes, the rest is left out.
"""

import errno
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

import trio

log = logging.getLogger(__name__)

PENDING = 64
"""Grains that wait to be given; each is a copy of 64 KiB."""

GRACE = 2.0
"""Seconds that the kernel may take for the last one."""


class _Piece(NamedTuple):
    inode: int
    offset: int
    data: bytes


class Pages:
    """Gives the kernel pages of files.

    Args:
        store: hands ``data`` at ``offset`` of an inode to the kernel, as pyfuse3.notify_store does.
    """

    def __init__(self, store: Callable[[int, int, bytes], None]) -> None:
        self._store = store
        self._pieces: SimpleQueue[_Piece | None] = SimpleQueue()
        self._ended = threading.Event()

    def give(self, inode: int, offset: int, data: memoryview) -> None:
        """Give ``data`` at ``offset`` of a file, soon or not at all; it is copied now.

        Args:
            inode: of a file whose contents never change.
            offset: in bytes, a multiple of the size of a page.
            data: whole pages, or up to the end of the file.
        """
        if self._pieces.qsize() < PENDING and not self._ended.is_set():
            self._pieces.put(_Piece(inode, offset, bytes(data)))

    async def run(self) -> None:
        """Give what is to be given, until cancelled."""
        try:
            await trio.to_thread.run_sync(self._work, abandon_on_cancel=True)
            await trio.sleep_forever()
        finally:
            self._pieces.put(None)
            with trio.CancelScope(shield=True):
                # who unmounts next takes away what the thread calls
                await trio.to_thread.run_sync(self._ended.wait, GRACE)

    def _work(self) -> None:
        try:
            while (piece := self._pieces.get()) is not None:
                self._store_one(piece)
        except OSError as error:
            log.info("the kernel takes no pages any more: %s", error)
        finally:
            self._ended.set()

    def _store_one(self, piece: _Piece) -> None:
        try:
            self._store(*piece)
        except OSError as error:
            if error.errno != errno.ENOENT:  # it has forgotten the file
                raise
