"""Damage: where an image differs from its digests, and the record of it beside the image.

A damaged image keeps its place (most of it may be needed one day), but is never a base again: that
is what ``damaged.json`` in its point says. The record of a disk lives until a later check of the
same disk finds nothing, which proves every byte of it right.
"""

import errno
import heapq
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass

import msgspec

from . import digests, errors, extents, imagefiles, sparse, units
from .extents import Extent
from .folder import Folder, told
from .imagefiles import ImageFiles

RECORD = "damaged.json"

KEPT_EXTENTS = 1000
"""Extents that are named; all are counted."""

_PIECE = units.MiB
_THREADS = min(4, os.cpu_count() or 1)
_AHEAD = 2 * _THREADS
"""Pieces under way at once."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What a check of one disk found.

    Attributes:
        problem: one sentence about the files as a whole (missing, wrong length); "" if none.
        blocks: how many blocks differ from their digests, or cannot be read.
        extents: where, in bytes; at most the first 1000 of them.
        checked: bytes of the disk compared; a hole whose digests are zero counts.
    """

    problem: str = ""
    blocks: int = 0
    extents: tuple[Extent, ...] = ()
    checked: int = 0

    @property
    def found(self) -> bool:
        """Whether the image must not be used as a base."""
        return bool(self.problem or self.blocks)


def find(
    files: ImageFiles, *, size: int, root: str, advanced: Callable[[int], None] | None = None
) -> Damage:
    """Compare an image of ``size`` bytes with its digests, and these with their ``root``.

    Args:
        files: the image; nothing is written.
        size: of the disk in bytes.
        root: digest root that the array must have.
        advanced: called with the bytes checked since the last call, in the thread of the caller.

    Raises:
        StoreError: a file cannot be read, for another reason than a failing disk.
    """
    problem = imagefiles.flaw(files, size=size)
    if problem:
        return Damage(problem=problem)
    with ExitStack() as stack:
        fd, digest_fd = (files.folder.open_file(n) for n in (files.name, files.digests))
        stack.callback(os.close, fd)
        stack.callback(os.close, digest_fd)
        stack.enter_context(told("read", files.path))
        return _Check(fd, digest_fd, size=size).run(root, advanced or _ignore)


def _ignore(length: int) -> None:
    pass


class _Check:
    """One comparison: pieces are read and digested in threads, results taken in order.

    ::

        image data     |####|    |##########|              |
        digest data    |######|      |##|         |##|     |     in bytes of the disk
        compared       |######|  |##########|     |##|     |     elsewhere both are zero already
    """

    def __init__(self, fd: int, digest_fd: int, *, size: int) -> None:
        self._fd = fd
        self._digest_fd = digest_fd
        self._size = size
        self._own = threading.local()
        self._blocks = 0
        self._extents: list[Extent] = []

    def run(self, root: str, advanced: Callable[[int], None]) -> Damage:
        for fd in (self._fd, self._digest_fd):
            # what the disk holds is of interest, not what the page cache remembers
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            problem = (
                "" if imagefiles.digest_root(self._digest_fd) == root else "its digests changed"
            )
        except sparse.Unreadable:
            return Damage(problem="its digests cannot be read")
        at = 0
        with closing(self._results()) as results:  # no thread may outlive the descriptors
            for piece, bad in results:
                self._add(bad)
                advanced(piece.stop - at)
                at = piece.stop
        advanced(self._size - at)
        return Damage(problem, self._blocks, tuple(self._extents), self._size)

    def _results(self) -> Generator[tuple[Extent, list[Extent]]]:
        waiting: deque[tuple[Extent, Future[list[Extent]]]] = deque()
        with ThreadPoolExecutor(_THREADS) as threads:
            for piece in extents.split(self._suspects(), size=_PIECE):
                if len(waiting) >= _AHEAD:
                    done, result = waiting.popleft()
                    yield done, result.result()
                waiting.append((piece, threads.submit(self._compare, piece)))
            for done, result in waiting:
                yield done, result.result()

    def _suspects(self) -> Iterator[Extent]:
        stored = sparse.data_extents(self._fd, size=self._size)
        array = sparse.data_extents(self._digest_fd, size=digests.array_length(self._size))
        scale = digests.BLOCK // digests.LENGTH
        claimed = (Extent(start * scale, stop * scale) for start, stop in array)
        both = heapq.merge(_whole_blocks(stored), _whole_blocks(claimed))
        return extents.clip(extents.merge(both), stop=self._size)

    def _compare(self, piece: Extent) -> list[Extent]:
        """Return the blocks of ``piece`` that differ; runs in a thread."""
        first = piece.start // digests.BLOCK * digests.LENGTH
        expected = sparse.read_all(self._digest_fd, digests.array_length(piece.length), first)
        try:
            data = self._read(piece)
        except sparse.Unreadable:
            blocks = list(extents.split([piece], size=digests.BLOCK))
            return [piece] if len(blocks) == 1 else [b for p in blocks for b in self._compare(p)]
        found = digests.of_blocks(data)
        os.posix_fadvise(self._fd, piece.start, piece.length, os.POSIX_FADV_DONTNEED)
        if found == expected:
            return []
        return [
            Extent(start, min(start + digests.BLOCK, piece.stop))
            for index, start in enumerate(range(piece.start, piece.stop, digests.BLOCK))
            if _entry(found, index) != _entry(expected, index)
        ]

    def _read(self, piece: Extent) -> memoryview:
        # one buffer a thread: finding fresh pages costs more than the digest
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(bytearray(_PIECE))
        buffer: memoryview = self._own.buffer[: piece.length]
        done = 0
        while done < piece.length:
            with sparse.reading():
                count = os.preadv(self._fd, [buffer[done:]], piece.start + done)
            if count == 0:
                raise sparse.Unreadable(errno.EIO, "the file ends early")
            done += count
        return buffer

    def _add(self, bad: Iterable[Extent]) -> None:
        for extent in bad:
            self._blocks += 1
            if self._extents and self._extents[-1].stop == extent.start:
                self._extents[-1] = Extent(self._extents[-1].start, extent.stop)
            elif len(self._extents) < KEPT_EXTENTS:
                self._extents.append(extent)


def _whole_blocks(found: Iterable[Extent]) -> Iterator[Extent]:
    for start, stop in found:
        yield Extent(start - start % digests.BLOCK, -(-stop // digests.BLOCK) * digests.BLOCK)


def _entry(array: bytes, index: int) -> bytes:
    return array[index * digests.LENGTH : (index + 1) * digests.LENGTH]


# ── The record ───────────────────────────────────────────────────────────────────────────────


class DiskDamage(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says of one disk; ``found`` is an ISO time, extents are in bytes."""

    found: str
    problem: str = ""
    blocks: int = 0
    extents: tuple[tuple[int, int], ...] = ()


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    disks: Mapping[str, DiskDamage]
    schema: int = 1


UNREADABLE = "*"
"""Stands for all disks of a point whose record cannot be read: it says damage, not where."""


def recorded(point: Folder) -> frozenset[str]:
    """Return the devices that the record of a point names; ``UNREADABLE`` if it is broken."""
    return frozenset(_read_record(point))


def record(point: Folder, device: str, damage: Damage, *, now: str) -> None:
    """Make the record of a point say what was found on ``device``: damage, or nothing any more.

    The caller holds a lock that keeps others from the record. ``now`` is an ISO time.

    Raises:
        StoreError: the record must change and cannot be written.
    """
    disks = dict(_read_record(point))
    if damage.found:
        disks[device] = DiskDamage(
            found=now,
            problem=damage.problem,
            blocks=damage.blocks,
            extents=tuple((e.start, e.stop) for e in damage.extents),
        )
    elif disks.pop(device, None) is None:
        return
    if disks:
        content = msgspec.json.format(msgspec.json.encode(_Record(disks=disks)))
        point.write(RECORD, content + b"\n")
    else:
        point.remove(RECORD)
        point.sync()


def _read_record(point: Folder) -> Mapping[str, DiskDamage]:
    try:
        if not point.exists(RECORD):
            return {}
        return msgspec.json.decode(point.read(RECORD), type=_Record).disks
    except (errors.StoreError, ValueError, RecursionError):
        return {UNREADABLE: DiskDamage(found="")}
