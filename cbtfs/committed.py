"""Committed: an image of a restore point as it is read to be restored, checked as it passes.

::

    image data     |####|    |##########|              |
    digest data    |######|      |##|         |##|     |     in bytes of the disk
    pieces         |######|  |##########|     |##|     |     read, compared; elsewhere all is zero
    chunks            |##|    |##| |####|                    of them, what is not zero

Whatever differs from its digest never leaves here. Everything blocks.
"""

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from . import digests, errors, extents, imagefiles, sparse, units
from .extents import Extent
from .folder import told
from .imagefiles import ImageFiles

PIECE = units.MiB
"""Bytes that are read and compared at a time."""


@dataclass(frozen=True, slots=True)
class Committed:
    """An open image and its digests; opened by ``opened``.

    Attributes:
        size: of the disk in bytes.
    """

    files: ImageFiles
    size: int
    fd: int
    digest_fd: int

    def pieces(self) -> Iterator[Extent]:
        """Yield what may not be zero, in order, block-aligned, at most ``PIECE`` bytes each."""
        whole = imagefiles.suspects(self.fd, self.digest_fd, Extent(0, self.size))
        return extents.split(whole, size=PIECE)

    def digests_of(self, start: int, stop: int) -> bytes:
        """Return the digests of the blocks from ``start`` to ``stop``, block-aligned or the end."""
        first, last = digests.entry(start), digests.entry(stop)
        with self._reading():
            return sparse.read_all(self.digest_fd, last - first, first)

    def chunks_in(self, piece: Extent) -> list[Extent]:
        """Return the runs of blocks of ``piece`` that are not zero, as their digests say."""
        found = self.digests_of(*piece)
        return [
            Extent(piece.start + start, piece.start + stop)
            for is_zero, start, stop in digests.runs(found, length=piece.length)
            if not is_zero
        ]

    def data_length(self) -> int:
        """Return the bytes in blocks that are not zero."""
        return sum(extents.total(self.chunks_in(piece)) for piece in self.pieces())

    def read(self, piece: Extent) -> bytes:
        """Return the bytes of ``piece``, each block compared with its digest.

        Raises:
            ImageDamaged: a block differs, or cannot be read.
        """
        expected = self.digests_of(*piece)
        with self._reading():
            data = sparse.read_all(self.fd, piece.length, piece.start)
            os.posix_fadvise(self.fd, piece.start, piece.length, os.POSIX_FADV_DONTNEED)
        found = digests.of_blocks(memoryview(data))
        for start, stop in digests.differences(found, expected, length=piece.length):
            raise errors.ImageDamaged(
                f"{self.files.path} is damaged: bytes {piece.start + start} to"
                f" {piece.start + stop} differ from their digests; restore an older point, and run"
                " cbtfs verify"
            )
        return data

    @contextmanager
    def _reading(self) -> Generator[None]:
        with told("read", self.files.path), imagefiles.readable(self.files.path):
            yield


@contextmanager
def opened(files: ImageFiles, *, size: int, root: str) -> Generator[Committed]:
    """Open an image whose digests have this ``root``; its blocks are compared when they are read.

    Raises:
        ImageDamaged: a file is missing, has another length, or its digests changed.
        StoreError: a file cannot be opened.
    """
    problem = imagefiles.digests_flaw(files, size=size, root=root)
    if problem:
        raise errors.ImageDamaged(
            f"{files.path} cannot be restored: {problem}; restore an older point, and run cbtfs"
            " verify"
        )
    fds = imagefiles.open_files(files, flags=os.O_RDONLY)
    try:
        yield Committed(files, size, *fds)
    finally:
        for fd in fds:
            os.close(fd)
