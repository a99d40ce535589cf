"""Image copy: an image brought into an open file or onto a device, each block proved by its digest.

::

    image     |####|    |####|         |        what is stored, or has a digest
    target    |#####|      |####|      |        what it holds already, if it may
    then      |####|----|~~~~|~~~------|        # kept, ~ copied, - made zero

Rules of this file:

1. No block is written before its digest was compared with that of the image: a damaged image ends
   the copy, unless damage was asked for.
2. What the target holds already is worth what its digests say, wherever it comes from. So a copy
   that was interrupted is gone on with, and what is right already is not written again.
3. What counts as read back has passed the page cache.
"""

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from heapq import merge
from pathlib import Path
from random import Random, SystemRandom
from types import TracebackType
from typing import TypeVar

from . import digests, errors, extents, imagefiles, sparse, units
from .extents import Extent
from .folder import told, told_outside
from .imagefiles import ImageFiles
from .sample import Sample

_T = TypeVar("_T")

PIECE = units.MiB
"""Bytes that are read, compared and written at a time."""

ZERO_STEP = 64 * units.MiB
"""Bytes made zero at a time, so that an interruption is noticed soon."""

KEPT_EXTENTS = 1000
"""Damaged extents that are remembered."""

_THREADS = min(4, os.cpu_count() or 1)
_AHEAD = 2 * _THREADS

VAIN = 16
"""Pieces in a row that had nothing right in the target; from then on only each sixteenth is
compared: reading a device that holds something else altogether would take as long as writing it."""

SAMPLE = Sample()
"""What is read back unless all is; once of what is stored, once of what is zero."""


@dataclass(frozen=True, slots=True)
class Source:
    """An open image: descriptors of the raw file and of its digests, which prove ``size`` bytes."""

    path: Path
    fd: int
    digest_fd: int
    size: int

    def suspects(self, where: Extent) -> Iterator[Extent]:
        """Yield, in whole blocks, what of ``where`` is stored or has a digest; the rest is zero."""
        return imagefiles.suspects(self.fd, self.digest_fd, where)

    def stored(self) -> int:
        """Return how many bytes are stored, in whole blocks."""
        with self.readable():
            found = sparse.data_extents(self.fd, size=self.size)
            return extents.total(
                extents.clip(extents.merge(imagefiles.whole_blocks(found)), stop=self.size)
            )

    def expected(self, piece: Extent) -> bytes:
        """Return the digests of the blocks of ``piece``."""
        length = digests.array_length(piece.length)
        with self.readable():
            return sparse.read_all(self.digest_fd, length, digests.entry(piece.start))

    def readable(self) -> "_Readable":
        """Turn what goes wrong with a read of it within into an error that names it."""
        return _Readable(self.path)


class _Readable:
    """``told`` and ``imagefiles.readable`` together; used for every piece, so no generators."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, OSError):
            with told("read", self._path), imagefiles.readable(self._path):
                raise exc


@contextmanager
def opened(
    files: ImageFiles, *, size: int, root: str, warn: Callable[[str], None] | None = None
) -> Generator[Source]:
    """Open the image of a disk of ``size`` bytes to be copied.

    Args:
        files: where it is.
        size: of the disk.
        root: digest root that its digests must have.
        warn: told that the digests are not those; without it, that is an error.

    Raises:
        ImageDamaged: it has another size, or its digests are not as committed.
        StoreError: it cannot be opened.
    """
    problem = imagefiles.flaw(files, size=size)
    if problem:
        raise errors.ImageDamaged(
            f"{files.path} cannot be restored: {problem}; restore another point, or copy what there"
            " is with cp --sparse=always"
        )
    problem = imagefiles.digests_flaw(files, size=size, root=root)
    if problem:
        if warn is None:
            raise errors.ImageDamaged(
                f"{files.path} cannot be trusted: {problem}; restore another point, or copy it as"
                " it is with --force"
            )
        warn(f"{files.path} is copied as it is: {problem}")
    fds = imagefiles.open_files(files, flags=os.O_RDONLY)
    try:
        yield Source(files.path, *fds, size)
    finally:
        for fd in fds:
            os.close(fd)


@dataclass(slots=True)
class _Done:
    """What became of a piece: bytes written, bytes that were right, extents that are damaged."""

    written: int = 0
    kept: int = 0
    damaged: list[Extent] = field(default_factory=list[Extent])


Advanced = Callable[[int, int], None]
"""Called with bytes read and bytes written since the last call, in the thread of the caller; what
it raises ends the copy."""


class ImageCopy(AbstractContextManager["ImageCopy"]):
    """One copy under way; closed by the caller, who owns the descriptors, too.

    Attributes:
        written: bytes written that are no zeros.
        kept: bytes that are no zeros and were in the target already.
        damaged: what of the image differs from its digests and was copied all the same, in bytes.

    Args:
        source: the image.
        fd: the target: a file of the image's size, or a device that is no smaller.
        path: of the target, for messages.
        blank: whether the target is known to be zero throughout.
        is_device: whether it is a device.
        forced: whether damaged blocks are copied as they are; one that cannot be read becomes zero.
    """

    def __init__(
        self,
        source: Source,
        fd: int,
        *,
        path: Path,
        blank: bool = False,
        is_device: bool = False,
        forced: bool = False,
    ) -> None:
        self.written = 0
        self.kept = 0
        self.damaged: list[Extent] = []
        self._source = source
        self._fd = fd
        self._path = path
        self._blank = blank
        self._is_device = is_device
        self._forced = forced
        self._writer = sparse.Writer(fd)
        self._reader = sparse.Reader(fd)
        self._own = threading.local()
        self._vain = 0  # a hint, so threads may lose each other's counts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close what this opened; a second call does nothing."""
        self._writer.close()
        self._reader.close()

    @property
    def total(self) -> int:
        """Bytes of the image that are to be copied, or found in the target; about."""
        return self._source.stored()

    # ── Copying ──────────────────────────────────────────────────────────────────────────────

    def bring(self, where: Extent, advanced: Advanced) -> None:
        """Make ``where`` of the target equal the image; it ends at whole blocks, or with the disk.

        Raises:
            ImageDamaged: the image differs from its digests; what was copied before it is right.
            StoreFull, StoreError: it cannot be read or written.
        """
        if not self._blank:
            self._clear(where, advanced)
        pieces = extents.split(self._source.suspects(where), size=PIECE)
        with self._source.readable(), closing(_ahead(pieces, self._bring)) as results:
            for _, done in results:
                self.written += done.written
                self.kept += done.kept
                self._note(done.damaged)
                advanced(done.written + done.kept, done.written)

    def zero(self, where: Extent) -> None:
        """Make ``where`` of the target zero, whatever the image has there."""
        with told_outside("write", self._path):
            if self._is_device:
                sparse.zero_out(self._fd, where.start, where.length)
                self._writer.add(*where)
            else:
                sparse.punch(self._fd, where.start, where.length)

    def flush(self) -> None:
        """Bring to disk what was written; for a file, its size and its extents, too."""
        with told_outside("write", self._path):
            self._writer.drain()
            os.fsync(self._fd)

    def _clear(self, where: Extent, advanced: Advanced) -> None:
        """Make zero what the image neither stores nor has a digest of."""
        with self._source.readable():
            for gap in extents.split(_gaps(self._source.suspects(where), where), size=ZERO_STEP):
                holes = [gap] if self._is_device else _listed(self._fd, gap, self._path)
                for stored in holes:
                    self.zero(stored)
                advanced(0, 0)

    def _bring(self, piece: Extent) -> _Done:
        """Make ``piece`` of the target right; runs in a thread."""
        expected = self._source.expected(piece)
        done = _Done()
        kept = _stored(expected, piece.length)
        for start, stop in self._wrong(piece, expected):
            part = digests.part(expected, start, stop)
            kept -= _stored(part, stop - start)
            self._copy(Extent(piece.start + start, piece.start + stop), part, done)
        done.kept = kept
        return done

    def _wrong(self, piece: Extent, expected: bytes) -> list[tuple[int, int]]:
        """Return what of ``piece`` the target has not got, as far as it is worth looking."""
        whole = [(0, piece.length)]
        if self._blank or (self._vain >= VAIN and piece.start // PIECE % VAIN):
            return whole
        with told_outside("read", self._path):
            try:
                view = self._reader.read(self._buffer(), piece.length, piece.start)
            except sparse.Unreadable:
                return whole  # written again, it may well be readable
        found = digests.of_blocks(view)
        wrong = list(digests.differences(found, expected, length=piece.length))
        self._vain = self._vain + 1 if wrong == whole else 0
        return wrong

    def _copy(self, run: Extent, expected: bytes, done: _Done) -> None:
        view = self._read(run, expected, done)
        found = digests.of_blocks(view)
        for start, stop in digests.differences(found, expected, length=run.length):
            self._damaged([Extent(run.start + start, run.start + stop)], done)
        with told_outside("write", self._path):
            for zero, start, stop in digests.runs(found, length=run.length):
                if not zero:
                    self._writer.write(view[start:stop], run.start + start)
                    done.written += stop - start
                elif not self._blank:
                    self.zero(Extent(run.start + start, run.start + stop))

    def _read(self, run: Extent, expected: bytes, done: _Done) -> memoryview:
        """Return ``run`` of the image; if damage was asked for, zeros for what cannot be read."""
        view = memoryview(self._buffer())[: run.length]
        try:
            with self._source.readable():
                _read_into(self._source.fd, view, run.start)
                os.posix_fadvise(self._source.fd, run.start, run.length, os.POSIX_FADV_DONTNEED)
        except errors.ImageDamaged:
            for block in extents.split([run], size=digests.BLOCK):
                part = view[block.start - run.start : block.stop - run.start]
                self._read_block(block, part, done)
        return view

    def _read_block(self, block: Extent, view: memoryview, done: _Done) -> None:
        try:
            with self._source.readable():
                _read_into(self._source.fd, view, block.start)
        except errors.ImageDamaged:
            self._damaged([block], done)
            view[:] = bytes(len(view))

    def _damaged(self, found: list[Extent], done: _Done) -> None:
        if not self._forced:
            raise errors.ImageDamaged(_damage_sentence(self._source.path, found))
        done.damaged += found

    def _note(self, damaged: list[Extent]) -> None:
        both = extents.merge(sorted({*self.damaged, *damaged}))
        self.damaged = list(both)[:KEPT_EXTENTS]

    def _buffer(self) -> mmap.mmap:
        # one a thread, on whole pages, as direct reads and writes want it
        if not hasattr(self._own, "buffer"):
            self._own.buffer = mmap.mmap(-1, PIECE)
        buffer: mmap.mmap = self._own.buffer
        return buffer

    # ── Reading back ─────────────────────────────────────────────────────────────────────────

    def sampled(self, rng: Random | None = None) -> list[Extent]:
        """Return blocks to read back: first and last, and some of what is stored and what is not.

        The list is in order; ``rng`` draws them.
        """
        size, rng = self._source.size, rng or SystemRandom()
        whole = Extent(0, size)
        with self._source.readable():
            stored = extents.total(self._source.suspects(whole))
            numbers = {0, max(size - 1, 0) // digests.BLOCK} if size else set[int]()
            numbers |= _drawn(self._source.suspects(whole), stored, rng)
            numbers |= _drawn(_gaps(self._source.suspects(whole), whole), size - stored, rng)
        found = (Extent(n * digests.BLOCK, (n + 1) * digests.BLOCK) for n in sorted(numbers))
        return list(extents.clip(found, stop=size))

    def everything(self) -> Iterator[Extent]:
        """Yield all that can differ: what image or target store; of a device, all of it."""
        whole = Extent(0, self._source.size)
        if self._is_device:
            yield whole
            return
        stored = _listed(self._fd, whole, self._path)
        both = extents.merge(merge(self._source.suspects(whole), imagefiles.whole_blocks(stored)))
        yield from extents.clip(both, stop=whole.stop)

    def check(self, what: Iterable[Extent], advanced: Advanced) -> list[Extent]:
        """Read ``what`` back, in whole blocks, from the disk; return what differs from the digests.

        Raises:
            StoreError: the target cannot be read.
        """
        wrong: list[Extent] = []
        pieces = extents.split(what, size=PIECE)
        with self._source.readable(), closing(_ahead(pieces, self._check)) as results:
            for piece, found in results:
                if len(wrong) < KEPT_EXTENTS:
                    wrong += found
                advanced(piece.length, 0)
        return list(extents.merge(wrong))

    def _check(self, piece: Extent) -> list[Extent]:
        expected = self._source.expected(piece)
        with told_outside("read back", self._path):
            try:
                view = self._reader.read(self._buffer(), piece.length, piece.start)
            except sparse.Unreadable:
                return [piece]
        found = digests.of_blocks(view)
        return [
            Extent(piece.start + start, piece.start + stop)
            for start, stop in digests.differences(found, expected, length=piece.length)
        ]


def beyond(found: Iterable[Extent], known: Iterable[Extent]) -> list[Extent]:
    """Return the blocks of ``found`` that are in none of ``known``, merged."""
    accepted = {block.start for block in extents.split(known, size=digests.BLOCK)}
    blocks = extents.split(found, size=digests.BLOCK)
    return list(extents.merge(block for block in blocks if block.start not in accepted))


def damaged_at(path: Path, found: list[Extent]) -> errors.ImageDamaged:
    """Return the error for an image that differs from its digests at ``found``."""
    return errors.ImageDamaged(_damage_sentence(path, found))


def _damage_sentence(path: Path, found: list[Extent]) -> str:
    return (
        f"{path} is damaged: {places(found)} differ from their digests; restore another point, or"
        " copy it as it is with --force"
    )


def places(found: list[Extent]) -> str:
    """Return for people where ``found`` is: ``bytes 0 to 65536, …``, at most five of them."""
    named = ", ".join(f"{start} to {stop}" for start, stop in found[:5])
    return f"bytes {named}" + (f" and {len(found) - 5} more places" if len(found) > 5 else "")


def _listed(fd: int, where: Extent, path: Path) -> Iterator[Extent]:
    with told_outside("read", path):
        yield from sparse.data_in(fd, where)


def _stored(found: bytes, length: int) -> int:
    """Return how many of the bytes behind digests ``found`` are in blocks that are not zero."""
    return sum(stop - start for zero, start, stop in digests.runs(found, length=length) if not zero)


def _gaps(found: Iterable[Extent], where: Extent) -> Iterator[Extent]:
    """Yield what ``found``, all within ``where``, leaves free of it."""
    free = where.start
    for start, stop in found:
        if free < start:
            yield Extent(free, start)
        free = stop
    if free < where.stop:
        yield Extent(free, where.stop)


def _drawn(found: Iterable[Extent], total: int, rng: Random) -> set[int]:
    """Return numbers of some blocks of ``found``, which are ``total`` bytes in whole blocks."""
    count = -(-total // digests.BLOCK)
    wanted = deque(sorted(rng.sample(range(count), SAMPLE.count(count))))
    numbers: set[int] = set()
    passed = 0
    for start, stop in found:
        blocks = -(-(stop - start) // digests.BLOCK)
        while wanted and wanted[0] < passed + blocks:
            numbers.add(start // digests.BLOCK + wanted.popleft() - passed)
        passed += blocks
    return numbers


def _ahead(pieces: Iterable[Extent], work: Callable[[Extent], _T]) -> Generator[tuple[Extent, _T]]:
    """Yield pieces with what ``work`` makes of them in threads, in order; some are under way."""
    waiting: deque[tuple[Extent, Future[_T]]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for piece in pieces:
            if len(waiting) >= _AHEAD:
                done, result = waiting.popleft()
                yield done, result.result()
            waiting.append((piece, threads.submit(work, piece)))
        for done, result in waiting:
            yield done, result.result()


def _read_into(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        with sparse.reading():
            count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise sparse.ends_early()
        done += count
