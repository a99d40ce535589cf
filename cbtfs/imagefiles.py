"""Image files: an image at rest, where it is and whether it is whole at first sight.

An image is two files: the raw disk, and the array of its digests. Nothing here writes them.
"""

import heapq
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blake3

from . import digests, errors, extents, sparse, units
from .extents import Extent
from .folder import Folder, told

_ROOT_STEP = 4 * units.MiB


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Where an image and its digests are: two names in an open folder."""

    folder: Folder
    name: str
    digests: str

    @property
    def path(self) -> Path:
        """Path of the image, for messages."""
        return self.folder.path / self.name


def suspects(fd: int, digest_fd: int, where: Extent) -> Iterator[Extent]:
    """Yield what of an image is stored, or has a digest, in whole blocks; the rest is zero.

    Args:
        fd: the raw disk.
        digest_fd: its digests.
        where: in bytes, from the beginning of a block on.
    """
    scale = digests.BLOCK // digests.LENGTH
    entries = Extent(digests.entry(where.start), digests.entry(where.stop))
    array = sparse.data_in(digest_fd, entries)
    claimed = (Extent(start * scale, stop * scale) for start, stop in array)
    stored = sparse.data_in(fd, where)
    both = heapq.merge(whole_blocks(stored), whole_blocks(claimed))
    return extents.clip(extents.merge(both), stop=where.stop)


def whole_blocks(found: Iterable[Extent]) -> Iterator[Extent]:
    """Yield ``found``, each widened to whole blocks; they may overlap then."""
    for start, stop in found:
        yield Extent(start - start % digests.BLOCK, -(-stop // digests.BLOCK) * digests.BLOCK)


def flaw(files: ImageFiles, *, size: int) -> str:
    """Return what is wrong at first sight with an image of a disk of ``size`` bytes, or "".

    Raises:
        StoreError: this user may not look.
    """
    for name, expected in ((files.name, size), (files.digests, digests.array_length(size))):
        try:
            found = files.folder.size(name)
        except errors.StoreError as exc:
            if sparse.is_unreadable(exc.__cause__):
                return f"{name} cannot be read"
            raise
        if found < 0:
            return f"{name} is missing"
        if found != expected:
            return f"{name} has {found} bytes instead of {expected}"
    return ""


def open_files(files: ImageFiles, *, flags: int) -> tuple[int, int]:
    """Return descriptors of image and digests, to be closed by the caller."""
    fd = files.folder.open_file(files.name, flags=flags)
    try:
        return fd, files.folder.open_file(files.digests, flags=flags)
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def opened(base: ImageFiles, *, size: int) -> Generator[tuple[int, int]]:
    """Open a base to be copied: its image and its digests.

    Raises:
        ImageDamaged: it is missing, or has another size than ``size`` bytes.
    """
    problem = flaw(base, size=size)
    if problem:
        raise errors.ImageDamaged(f"{base.folder.path} is no base for a copy: {problem}")
    fds = open_files(base, flags=os.O_RDONLY)
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def readable(path: Path) -> Generator[None]:
    """Turn damage that a read of ``path`` within meets into ``ImageDamaged``."""
    try:
        yield
    except sparse.Unreadable as exc:
        raise errors.ImageDamaged(
            f"{path} cannot be read: the disk below it failed; see dmesg, then run cbtfs verify"
        ) from exc


def digests_flaw(files: ImageFiles, *, size: int, root: str) -> str:
    """Return ``flaw``, or what is wrong with the digests, which must have this ``root``, or "".

    Raises:
        StoreError: they cannot be opened.
    """
    problem = flaw(files, size=size)
    if problem:
        return problem
    fd = files.folder.open_file(files.digests)
    try:
        with told("read", files.folder.path / files.digests):
            return "" if digest_root(fd) == root else f"{files.digests} is not as committed"
    except errors.StoreError as exc:
        if isinstance(exc.__cause__, sparse.Unreadable):
            return f"{files.digests} cannot be read"
        raise
    finally:
        os.close(fd)


def digest_root(fd: int) -> str:
    """Return the digest of a whole digest array, as ``b3sum`` of the file prints it."""
    size = os.fstat(fd).st_size
    hasher = blake3.blake3()
    zeros = bytes(_ROOT_STEP)
    at = 0
    # a 16 TiB disk has an array of 4 GiB, mostly a hole: its zeros are hashed without being read
    for data in extents.split(sparse.data_extents(fd, size=size), size=_ROOT_STEP):
        _hash_zeros(hasher, zeros, data.start - at)
        hasher.update(sparse.read_all(fd, data.length, data.start))
        at = data.stop
    _hash_zeros(hasher, zeros, size - at)
    return hasher.hexdigest()


def _hash_zeros(hasher: blake3.blake3, zeros: bytes, length: int) -> None:
    while length > 0:
        step = min(length, len(zeros))
        hasher.update(memoryview(zeros)[:step])
        length -= step
