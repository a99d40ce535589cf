"""Image: one raw file with its digests: reflink clone, sparse write, fsync.

The only module that makes ioctls. Everything here blocks: call it from worker threads. Several
threads may write one image at once, as long as no two write the same block.

Rules of this file:

1. Writes start at a block boundary and end at one, or at the end of the disk: then every digest is
   that of a whole block (the last one at its true length), and nothing is ever read back.
2. Zeros are never stored: a zero block is a hole, in the image and (as far as the file system's
   blocks allow) in the digest array.
3. The page cache stays clean, see ``sparse.Writer``; data in whole pages of memory is written
   fastest. ``finish`` waits for the rest; only then may a commit name the file.
"""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import blake3

from . import digests, errors, extents, sparse, units
from .folder import Folder, told

Origin = Literal["new", "reflink", "copy"]
"""How an image began: empty, sharing its base's extents, or as a sparse copy of its base."""

_COPY_STEP = 8 * units.MiB
_ROOT_STEP = 4 * units.MiB

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int), on x86 and Arm
_NO_REFLINK = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS}

Buffer = bytes | bytearray | memoryview


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


class Image:
    """An image being written, made by ``create`` or ``clone``; a context manager that closes it.

    Attributes:
        path: where it is, for messages.
        size: of the disk in bytes.
        origin: how it began.
        root: the digest root once ``finish`` is done; "" before, and after another write.

    Any number of threads may call ``write`` and ``zero``; the rest is for one of them alone.
    """

    def __init__(
        self, files: ImageFiles, *, size: int, origin: Origin, fds: tuple[int, int]
    ) -> None:
        self.path = files.path
        self.size = size
        self.origin = origin
        self.root = ""
        self._files = files
        self._fd, self._digest_fd = fds
        self._writer = sparse.Writer(self._fd)

    @classmethod
    def create(cls, files: ImageFiles, *, size: int) -> Self:
        """Make an image of ``size`` bytes that holds zeros and uses no space.

        Raises:
            StoreError: a file of that name exists, or it cannot be made.
        """
        image = cls(files, size=size, origin="new", fds=_new_files(files))
        with told("create", image.path), image._removed_on_error():
            os.ftruncate(image._fd, size)
            os.ftruncate(image._digest_fd, digests.array_length(size))
        return image

    @classmethod
    def clone(
        cls,
        files: ImageFiles,
        *,
        base: ImageFiles,
        base_size: int,
        size: int,
        copied: Callable[[int], None] | None = None,
    ) -> Self:
        """Make an image of ``size`` bytes that begins with the content of ``base``.

        Extents are shared where the file system can; otherwise what is not a hole is copied, and
        ``copied`` called with the bytes of each step. What it raises ends the copy.

        Args:
            files: the image to make.
            base: the image to begin with, and its digests.
            base_size: the size it must have; nobody touched it since it was committed.
            size: of the new disk, at least ``base_size``: beyond it are zeros.
            copied: told of the progress of a copy.

        Raises:
            ImageDamaged: ``base`` is missing or has another size.
            StoreError: the new image cannot be made.
        """
        if size < base_size:
            raise errors.StoreError(f"{files.path} cannot be smaller than its base {base.path}")
        with _opened(base, size=base_size) as sources:
            image = cls(files, size=size, origin="reflink", fds=_new_files(files))
            with told("create", image.path), image._removed_on_error():
                image._take(sources, base_size=base_size, copied=copied)
                image._grow(base_size)
        return image

    def __repr__(self) -> str:
        return f"<Image {self.path} {units.format_size(self.size)} {self.origin}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, offset: int, data: Buffer) -> int:
        """Put ``data`` at ``offset``, and its digests beside; zeros become holes.

        Args:
            offset: in bytes, a multiple of 64 KiB.
            data: ends at a multiple of 64 KiB or at the end of the disk. Not used after return.

        Returns:
            The bytes that were written: ``data`` without its blocks of zeros.

        Raises:
            StoreFull: no space left.
            StoreError: the write failed.
        """
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        if not view:
            return 0
        self.root = ""
        found = digests.of_blocks(view)
        written = 0
        with told("write", self.path):
            for zero, start, stop in digests.runs(found, length=len(view)):
                if zero:
                    sparse.punch(self._fd, offset + start, stop - start)
                else:
                    self._writer.write(view[start:stop], offset + start)
                    written += stop - start
            self._put_digests(offset, found)
        return written

    def zero(self, offset: int, length: int) -> None:
        """Make ``length`` bytes at ``offset`` zero without storing any; ranges as for ``write``."""
        self._check_range(offset, length)
        first = offset // digests.BLOCK * digests.LENGTH
        self.root = ""
        with told("write", self.path):
            if length:
                sparse.punch(self._fd, offset, length)
                sparse.punch(self._digest_fd, first, digests.array_length(length))

    def finish(self) -> str:
        """Bring everything to disk, then return the digest root.

        The folder is the caller's to sync.

        Raises:
            StoreFull, StoreError: not everything could be written; the image is not usable.
        """
        with told("write", self.path):
            self._writer.drain()
            os.fsync(self._fd)
            os.fsync(self._digest_fd)
            self.root = digest_root(self._digest_fd)
        return self.root

    def close(self) -> None:
        """Close the files, whatever their state; a second call does nothing."""
        self._writer.close()
        fds, self._fd, self._digest_fd = (self._fd, self._digest_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    @contextmanager
    def _removed_on_error(self) -> Generator[None]:
        try:
            yield
        except BaseException:
            self.close()
            self._files.folder.remove(self._files.name)
            self._files.folder.remove(self._files.digests)
            raise

    def _check_range(self, offset: int, length: int) -> None:
        stop = offset + length
        whole = stop % digests.BLOCK == 0 or stop == self.size
        if offset < 0 or offset % digests.BLOCK or not whole or stop > self.size:
            raise errors.StoreError(
                f"cannot write {self.path}: {length} bytes at {offset} are no whole blocks of it"
            )

    def _put_digests(self, offset: int, found: bytes) -> None:
        at = offset // digests.BLOCK * digests.LENGTH
        if found.count(0) == len(found):
            sparse.punch(self._digest_fd, at, len(found))
        else:
            sparse.write_all(self._digest_fd, memoryview(found), at)

    def _take(
        self, sources: tuple[int, int], *, base_size: int, copied: Callable[[int], None] | None
    ) -> None:
        if not _reflink(sources[0], self._fd):
            self.origin = "copy"
            self._copy(sources[0], base_size=base_size, copied=copied)
        if not _reflink(sources[1], self._digest_fd):
            os.ftruncate(self._digest_fd, digests.array_length(base_size))
            for extent in sparse.data_extents(sources[1], size=digests.array_length(base_size)):
                sparse.copy_range(sources[1], self._digest_fd, extent)

    def _copy(self, source: int, *, base_size: int, copied: Callable[[int], None] | None) -> None:
        os.ftruncate(self._fd, base_size)
        allocated = sparse.data_extents(source, size=base_size)
        for step in extents.split(allocated, size=_COPY_STEP):
            sparse.copy_range(source, self._fd, step)
            self._writer.add(*step)
            if copied is not None:
                copied(step.length)

    def _grow(self, base_size: int) -> None:
        """Extend to ``size`` with zeros.

        ::

            base      |  block 0  |  blo|                    size no multiple of 64 KiB
            grown     |  block 0  |  blo000000|  zeros   |   block 1 is longer: another digest
        """
        if self.size == base_size:
            return
        os.ftruncate(self._fd, self.size)
        os.ftruncate(self._digest_fd, digests.array_length(self.size))
        start = base_size - base_size % digests.BLOCK
        if start < base_size:
            block = sparse.read_all(self._fd, min(digests.BLOCK, self.size - start), start)
            self._put_digests(start, digests.of_block(memoryview(block)))


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


def reflink_supported(path: Path) -> bool:
    """Tell whether files in the directory ``path`` can share extents, by trying it.

    Raises:
        StoreError: no file can be made there.
    """
    with told("write to", path), ExitStack() as stack:
        # unnamed files where the file system has them: nothing to clean, even if killed
        first = stack.enter_context(tempfile.TemporaryFile(dir=path, prefix=".cbtfs-probe-"))
        second = stack.enter_context(tempfile.TemporaryFile(dir=path, prefix=".cbtfs-probe-"))
        first.write(bytes(digests.BLOCK))
        first.flush()
        return _reflink(first.fileno(), second.fileno())


def flaw(files: ImageFiles, *, size: int) -> str:
    """Return what is wrong at first sight with an image of a disk of ``size`` bytes, or ""."""
    for name, expected in ((files.name, size), (files.digests, digests.array_length(size))):
        found = files.folder.size(name)
        if found < 0:
            return f"{name} is missing"
        if found != expected:
            return f"{name} has {found} bytes instead of {expected}"
    return ""


def digests_match(files: ImageFiles, *, size: int, root: str) -> bool:
    """Tell whether the digest array of an image of ``size`` bytes is there and has this root.

    Raises:
        StoreError: it cannot be read.
    """
    if flaw(files, size=size):
        return False
    fd = files.folder.open_file(files.digests)
    try:
        with told("read", files.folder.path / files.digests):
            return digest_root(fd) == root
    finally:
        os.close(fd)


def _new_files(files: ImageFiles) -> tuple[int, int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    fd = files.folder.open_file(files.name, flags=flags)
    try:
        return fd, files.folder.open_file(files.digests, flags=flags)
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def _opened(base: ImageFiles, *, size: int) -> Generator[tuple[int, int]]:
    problem = flaw(base, size=size)
    if problem:
        raise errors.ImageDamaged(f"{base.folder.path} is no base for a copy: {problem}")
    with ExitStack() as stack:
        fds = [base.folder.open_file(name) for name in (base.name, base.digests)]
        for fd in fds:
            stack.callback(os.close, fd)
        yield fds[0], fds[1]


def _reflink(source: int, target: int) -> bool:
    """Make ``target`` share all extents of ``source``; return False if that is impossible here."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as exc:
        if exc.errno in _NO_REFLINK:
            return False
        raise
    return True
