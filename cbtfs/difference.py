"""Difference: which blocks of two images are not the same, from their digests alone.

::

    old       | d0 | d1 | 00 |              16 bytes for each 64 KiB; zeros beyond the smaller disk
    new       | d0 | d7 | 00 | d8 | d9 |
    differ         |====|    |=========|

An array is believed only after its digest root was found to be the recorded one. The images are not
read: that they equal their digests is what ``verify`` checks.
"""

import heapq
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from . import digests, errors, extents, imagefiles, sparse, units
from .catalogue import DiskPoint
from .extents import Extent
from .folder import Folder, told
from .imagefiles import ImageFiles

_STEP = 256 * units.KiB
"""Bytes of an array compared at a time: of 1 GiB of the disk."""


@dataclass(slots=True)
class Tally:
    """What differs: ``changed`` bytes of the disk in so many ``extents``."""

    changed: int = 0
    extents: int = 0

    def add(self, extent: Extent) -> None:
        """Count one more extent."""
        self.changed += extent.length
        self.extents += 1


class DigestArray:
    """The digests of one image, found to be as they were committed; a context manager.

    Args:
        folder: of the point; may be closed afterwards.
        disk: the disk's record in it.

    Attributes:
        disk: the same.
        size: of it in bytes.

    Raises:
        ImageDamaged: they are missing, or not as committed.
        StoreError: they cannot be opened.
    """

    def __init__(self, folder: Folder, disk: DiskPoint) -> None:
        self.disk = disk
        self.size = disk.size
        self._path = folder.path / disk.digests
        files = ImageFiles(folder, disk.file, disk.digests)
        problem = imagefiles.digests_flaw(files, size=disk.size, root=disk.digest_root)
        if problem:
            raise errors.ImageDamaged(
                f"what {folder.path} has of {disk.device} cannot be compared: {problem};"
                " run cbtfs verify"
            )
        self._fd = folder.open_file(disk.digests)

    def __repr__(self) -> str:
        return f"<DigestArray {self._path}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def stored(self) -> Iterator[Extent]:
        """Yield the parts of the array, in its own bytes, that may hold something else than zeros.

        Raises:
            ImageDamaged: the file system's own data are damaged.
        """
        with told("read", self._path), imagefiles.readable(self._path):
            yield from sparse.data_extents(self._fd, size=digests.array_length(self.size))

    def read(self, where: Extent) -> bytes:
        """Return a part of the array; beyond its end there are zeros.

        Raises:
            ImageDamaged: it cannot be read.
        """
        stop = min(where.stop, digests.array_length(self.size))
        length = max(stop - where.start, 0)
        with told("read", self._path), imagefiles.readable(self._path):
            return sparse.read_all(self._fd, length, where.start).ljust(where.length, b"\0")

    def digests_of(self, start: int, stop: int) -> bytes:
        """Return the digests of the blocks from ``start`` to ``stop``, in bytes of the disk.

        Beyond the end of the disk all is zero.

        Raises:
            ImageDamaged: they cannot be read.
        """
        return self.read(Extent(digests.entry(start), digests.entry(stop)))

    def data(self) -> Iterator[Extent]:
        """Yield the parts of the disk that hold data, in bytes, in whole blocks.

        Raises:
            ImageDamaged: the digests cannot be read.
        """
        return between(NoDigests(), self)


class NoDigests:
    """In place of the digests of an image where there is none: of a disk of no bytes."""

    size = 0

    def stored(self) -> Iterator[Extent]:
        """Yield nothing."""
        return iter(())

    def read(self, where: Extent) -> bytes:
        """Return zeros."""
        return bytes(where.length)


Digests = DigestArray | NoDigests


def between(old: Digests, new: Digests) -> Iterator[Extent]:
    """Yield where two disks differ, in bytes, in whole blocks, neighbouring ones joined.

    A block that only the larger disk has differs if it holds something. So does the last block of
    the smaller one, unless both are zeros, if it is longer in the other.

    Raises:
        ImageDamaged: an array cannot be read.
    """
    size = max(old.size, new.size)
    yield from extents.clip(extents.merge(_runs(old, new)), stop=size)


def _runs(old: Digests, new: Digests) -> Iterator[Extent]:
    both = heapq.merge(_whole(old.stored()), _whole(new.stored()))
    for piece in extents.split(extents.merge(both), size=_STEP):
        begin = digests.block(piece.start)
        length = digests.block(piece.stop) - begin
        found = digests.differences(new.read(piece), old.read(piece), length=length)
        yield from (Extent(begin + start, begin + stop) for start, stop in found)


def _whole(parts: Iterable[Extent]) -> Iterator[Extent]:
    """Yield ``parts`` in whole digests, whatever the size of the file system's blocks."""
    for start, stop in parts:
        yield Extent(start - start % digests.LENGTH, -(-stop // digests.LENGTH) * digests.LENGTH)


# ── Disks of points ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Pair:
    """A disk in two points; None where a point has none like it."""

    old: DiskPoint | None
    new: DiskPoint | None

    @property
    def device(self) -> str:
        """What to call the disk: by its newer name."""
        disk = self.new or self.old
        return disk.device if disk is not None else ""


def pairs(old: Iterable[DiskPoint], new: Iterable[DiskPoint]) -> list[Pair]:
    """Return which disks of two points belong together: the same VDI, else the same device."""
    left = list(old)
    right = list(new)
    found: dict[str, DiskPoint] = {}
    for is_same in (_is_same_vdi, _is_same_device):
        for disk in right:
            same = [] if disk.device in found else [d for d in left if is_same(d, disk)]
            if same:
                found[disk.device] = same[0]
                left.remove(same[0])
    return [Pair(found.get(d.device), d) for d in right] + [Pair(d, None) for d in left]


def _is_same_vdi(one: DiskPoint, other: DiskPoint) -> bool:
    return one.vdi_uuid == other.vdi_uuid


def _is_same_device(one: DiskPoint, other: DiskPoint) -> bool:
    return one.device == other.device
