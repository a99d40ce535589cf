"""Image: one raw file with its digests: reflink clone, sparse write, fsync.

Everything here blocks: call it from worker threads. Several threads may write one image at once, as
long as no two write the same block.

Rules of this file:

1. Writes start at a block boundary and end at one, or at the end of the disk: then every digest is
   that of a whole block (the last one at its true length), and nothing is ever read back.
2. Zeros are never stored: a zero block is a hole, in the image and (as far as the file system's
   blocks allow) in the digest array.
3. The page cache stays clean, see ``sparse.Writer``; data in whole pages of memory is written
   fastest. ``finish`` waits for the rest; only then may a commit name the file.
"""

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from . import digests, errors, extents, imagefiles, sparse, units
from .extents import Extent
from .folder import told
from .imagefiles import ImageFiles

Origin = Literal["new", "reflink", "copy", "resumed"]
"""How an image began: empty, sharing its base's extents, as a sparse copy of its base, or as what
an earlier run left."""

_COPY_STEP = 8 * units.MiB

_ZERO_STEP = 64 * units.KiB
"""Bytes of digests looked at together where a range becomes zero: of 256 MiB of the disk."""

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL

Buffer = bytes | bytearray | memoryview


class Image:
    """An image being written, made by ``create``, ``clone`` or ``reopen``; a context manager.

    Attributes:
        path: where it is, for messages.
        size: of the disk in bytes.
        origin: how it began.
        root: the digest root once ``finish`` is done; "" before, and after another write.

    Any number of threads may call ``write``, ``merge``, ``differing``, ``zero`` and ``flush``; the
    rest is for one of them alone. After a write that failed, nothing more is written: the kernel
    tells of a page that it could not write only once.
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
        self._failure: errors.StoreError | None = None  # set once, by whichever thread meets it

    @classmethod
    def create(cls, files: ImageFiles, *, size: int) -> Self:
        """Make an image of ``size`` bytes that holds zeros and uses no space.

        Raises:
            StoreError: a file of that name exists, or it cannot be made.
        """
        image = cls(files, size=size, origin="new", fds=imagefiles.open_files(files, flags=_NEW))
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
            ImageDamaged: ``base`` is missing, has another size, or cannot be read.
            StoreError: the new image cannot be made.
        """
        if size < base_size:
            raise errors.StoreError(f"{files.path} cannot be smaller than its base {base.path}")
        with imagefiles.opened(base, size=base_size) as sources:
            image = cls(
                files, size=size, origin="reflink", fds=imagefiles.open_files(files, flags=_NEW)
            )
            with (
                told("create", image.path),
                image._removed_on_error(),
                imagefiles.readable(base.path),
            ):
                image._take(sources, base_size=base_size, copied=copied)
                image._grow(base_size, base=base)
        return image

    @classmethod
    def reopen(cls, files: ImageFiles, *, size: int) -> Self:
        """Go on with an image of ``size`` bytes that an earlier run left unfinished, or finished.

        What that run had flushed is there, and all that it never wrote is as in the beginning. In
        between image and digests need not match: the machine itself may have gone down. So
        ``merge`` and ``zero`` look at such an image itself, too.

        Raises:
            ImageDamaged: it is missing, has another size, or has another name too (of a copy of
                the store by hard links, perhaps), which would change with it.
            StoreError: it cannot be opened for writing.
        """
        problem = imagefiles.flaw(files, size=size)
        if problem:
            raise errors.ImageDamaged(f"{files.path} cannot be gone on with: {problem}")
        fds = imagefiles.open_files(files, flags=os.O_RDWR)
        image = cls(files, size=size, origin="resumed", fds=fds)
        if any(os.fstat(fd).st_nlink > 1 for fd in fds):
            image.close()
            raise errors.ImageDamaged(f"{files.path} cannot be gone on with: it has hard links")
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
        view = self._checked(offset, data)
        found = digests.of_blocks(view)
        self.root = ""
        with self._writing():
            return self._store(offset, view, found)

    def merge(self, offset: int, data: Buffer) -> int:
        """Do as ``write``, but leave alone the blocks that have this content already.

        Returns:
            The bytes that were written.

        Raises:
            ImageDamaged: the digests that the image began with cannot be read.
            StoreFull, StoreError: as for ``write``.
        """
        view = self._checked(offset, data)
        found = digests.of_blocks(view)
        known = self._known(offset, len(found))
        written = 0
        self.root = ""
        with self._writing():
            for start, stop in digests.differences(found, known, length=len(view)):
                written += self._store(
                    offset + start, view[start:stop], digests.part(found, start, stop)
                )
            if self.origin == "resumed" and written < len(view):
                written += self._mend(offset, view, found, known)
        return written

    def differing(self, offset: int, data: Buffer) -> int:
        """Return how many blocks of ``data`` are not those of the image; nothing is written.

        Args:
            offset: as for ``write``.
            data: as for ``write``.

        Raises:
            ImageDamaged: the digests that the image began with cannot be read.
        """
        view = self._checked(offset, data)
        found = digests.of_blocks(view)
        known = self._known(offset, len(found))
        runs = digests.differences(found, known, length=len(view))
        return sum(-(-(stop - start) // digests.BLOCK) for start, stop in runs)

    def zero(self, offset: int, length: int) -> None:
        """Make ``length`` bytes at ``offset`` zero without storing any; ranges as for ``write``.

        What is zero already costs next to nothing.
        """
        self._check_range(offset, length)
        self.root = ""
        with self._writing():
            for start, stop in self._not_zero(Extent(offset, offset + length)):
                sparse.punch(self._fd, start, stop - start)
                sparse.punch(
                    self._digest_fd,
                    digests.entry(start),
                    digests.entry(stop) - digests.entry(start),
                )

    def flush(self) -> None:
        """Bring to disk what was written before the call: the image, then its digests.

        Other threads may go on writing; what they write meanwhile may be on disk or not.

        Raises:
            StoreFull, StoreError: not everything could be written; the image is not usable.
        """
        with self._writing():
            self._writer.drain()
            os.fdatasync(self._fd)
            os.fdatasync(self._digest_fd)

    def finish(self) -> str:
        """Bring everything to disk, then return the digest root.

        The folder is the caller's to sync.

        Raises:
            StoreFull, StoreError: not everything could be written; the image is not usable.
        """
        with self._writing():
            self._writer.drain()
            os.fsync(self._fd)
            os.fsync(self._digest_fd)
            root = imagefiles.digest_root(self._digest_fd)
        self.root = root
        return root

    def recheck(self) -> str:
        """Return the digest root of an image that an earlier run finished, and set ``root``.

        Raises:
            ImageDamaged: its digests cannot be read.
        """
        with (
            told("read", self.path),
            imagefiles.readable(self._files.folder.path / self._files.digests),
        ):
            self.root = imagefiles.digest_root(self._digest_fd)
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

    @contextmanager
    def _writing(self) -> Generator[None]:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        try:
            with told("write", self.path):
                yield
        except errors.StoreError as exc:
            self._failure = exc
            raise

    def _checked(self, offset: int, data: Buffer) -> memoryview:
        view = memoryview(data).cast("B")
        self._check_range(offset, len(view))
        return view

    def _check_range(self, offset: int, length: int) -> None:
        stop = offset + length
        whole = stop % digests.BLOCK == 0 or stop == self.size
        if offset < 0 or offset % digests.BLOCK or not whole or stop > self.size:
            raise errors.StoreError(
                f"cannot write {self.path}: {length} bytes at {offset} are no whole blocks of it"
            )

    def _store(self, offset: int, view: memoryview, found: bytes) -> int:
        """Write ``view``, then its digests ``found``; return the bytes that are no zero blocks."""
        written = 0
        for zero, start, stop in digests.runs(found, length=len(view)):
            if zero:
                sparse.punch(self._fd, offset + start, stop - start)
            else:
                self._writer.write(view[start:stop], offset + start)
                written += stop - start
        self._put_digests(offset, found)
        return written

    def _put_digests(self, offset: int, found: bytes) -> None:
        if not found:
            return
        if found.count(0) == len(found):
            sparse.punch(self._digest_fd, digests.entry(offset), len(found))
        else:
            sparse.write_all(self._digest_fd, memoryview(found), digests.entry(offset))

    def _known(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of digests as they are, from that of the block at ``offset``."""
        path = self._files.folder.path / self._files.digests
        with told("read", path), imagefiles.readable(path):
            return sparse.read_all(self._digest_fd, length, digests.entry(offset))

    def _mend(self, offset: int, view: memoryview, found: bytes, known: bytes) -> int:
        """Write the blocks whose digests are right already, but which are not there themselves."""
        written = 0
        for start in range(0, len(view), digests.BLOCK):
            block = view[start : start + digests.BLOCK]
            digest = digests.part(found, start, start + digests.BLOCK)
            same = digest == digests.part(known, start, start + digests.BLOCK)
            if same and not self._holds(offset + start, block):
                written += self._store(offset + start, block, digest)
        return written

    def _holds(self, offset: int, block: memoryview) -> bool:
        try:
            return sparse.read_all(self._fd, len(block), offset) == block.tobytes()
        except sparse.Unreadable:
            return False

    def _not_zero(self, where: Extent) -> Iterator[Extent]:
        """Yield what may hold something else than zeros, in whole blocks, not in order."""
        if self.origin == "resumed":
            for start, stop in sparse.data_in(self._fd, where):
                whole = -(-stop // digests.BLOCK) * digests.BLOCK
                yield Extent(start - start % digests.BLOCK, min(whole, where.stop))
        entries = Extent(digests.entry(where.start), digests.entry(where.stop))
        stored = sparse.data_in(self._digest_fd, entries)
        for start, stop in extents.split(stored, size=_ZERO_STEP):
            part = sparse.read_all(self._digest_fd, stop - start, start)
            if part.count(0) < len(part):
                yield Extent(digests.block(start), min(digests.block(stop), where.stop))

    def _take(
        self, sources: tuple[int, int], *, base_size: int, copied: Callable[[int], None] | None
    ) -> None:
        if not sparse.reflink(sources[0], self._fd):
            self.origin = "copy"
            self._copy(sources[0], base_size=base_size, copied=copied)
        if not sparse.reflink(sources[1], self._digest_fd):
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

    def _grow(self, base_size: int, *, base: ImageFiles) -> None:
        """Extend to ``size`` with zeros; a base's last block that rotted must not get a new digest.

        ::

            base      |  block 0  |  blo|                    size no multiple of 64 KiB
            grown     |  block 0  |  blo000000|  zeros   |   block 1 is longer: another digest
        """
        if self.size == base_size:
            return
        start = base_size - base_size % digests.BLOCK
        last = sparse.read_all(self._fd, base_size - start, start)
        if last and digests.of_block(memoryview(last)) != self._known(start, digests.LENGTH):
            raise errors.ImageDamaged(f"the last block of {base.path} differs from its digest")
        os.ftruncate(self._fd, self.size)
        os.ftruncate(self._digest_fd, digests.array_length(self.size))
        if last:
            block = last.ljust(min(digests.BLOCK, self.size - start), b"\0")
            self._put_digests(start, digests.of_block(memoryview(block)))


def reflink_supported(path: Path) -> bool:
    """Tell whether files in the directory ``path`` can share extents, by trying it.

    Raises:
        StoreError: no file can be made there.
    """
    with told("write to", path), ExitStack() as stack:
        # unnamed files where the file system has them: nothing to clean, even if killed
        first = stack.enter_context(tempfile.TemporaryFile(dir=path, prefix=".cbtfs-probe-"))
        second = stack.enter_context(tempfile.TemporaryFile(dir=path, prefix=".cbtfs-probe-"))
        os.write(first.fileno(), bytes(digests.BLOCK))
        return sparse.reflink(first.fileno(), second.fileno())
