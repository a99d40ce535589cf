"""Damage: where an image differs from its digests, and the record of it beside the image.

A damaged image keeps its place (most of it may be needed one day), but is never a base again: that
is what ``damaged.json`` in its point says. The record of a disk lives until a later check of the
same disk finds nothing, which proves every byte of it right. It has a part of its own for blocks
that are not as the pool has them: image and digests may agree there, so a check of the image alone
leaves that part as it is.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from random import Random, SystemRandom

import msgspec

from . import digests, errors, extents, imagefiles, sparse, units
from .extents import Extent
from .folder import Folder, told
from .imagefiles import ImageFiles

RECORD = "damaged.json"

KEPT_EXTENTS = 1000
"""Extents that are named; all are counted."""

DIGESTS_CHANGED = "its digests changed"
DIGESTS_UNREADABLE = "its digests cannot be read"

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
        sampled_of: of a sample, in how many bytes that may hold data it was drawn; -1 if all of
            the disk was compared.
    """

    problem: str = ""
    blocks: int = 0
    extents: tuple[Extent, ...] = ()
    checked: int = 0
    sampled_of: int = -1

    @property
    def found(self) -> bool:
        """Whether the image must not be used as a base."""
        return bool(self.problem or self.blocks)

    @property
    def sampled(self) -> bool:
        """Whether only a sample was compared, which proves nothing of the rest."""
        return self.sampled_of >= 0


@dataclass(frozen=True, slots=True)
class Disagreement:
    """What of an image is not as the pool has it.

    Attributes:
        blocks: how many blocks differ.
        zeros: how many of them are zeros in the pool, and hold data in the image.
        extents: where, in bytes; at most the first 1000 of them.
        sampled: whether only a sample was compared.
    """

    blocks: int = 0
    zeros: int = 0
    extents: tuple[Extent, ...] = ()
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Scope:
    """What of an image to compare; all of it by default.

    Attributes:
        share: of the blocks that may hold data, 0 to 1; at least one of them, if there is any.
        only: these blocks, in order; None for no such limit.
        kept: how many extents to name.
        rng: draws the blocks; nobody can foresee what it will be.
    """

    share: float = 1.0
    only: Sequence[Extent] | None = None
    kept: int | None = None
    rng: Random = field(default_factory=SystemRandom)

    def drawn(self, found: Iterable[Extent], length: int) -> Iterator[Extent]:
        """Yield the blocks to compare of those in ``found``, which are ``length`` bytes."""
        blocks = -(-length // digests.BLOCK)
        return extents.drawn(found, blocks, size=digests.BLOCK, share=self.share, rng=self.rng)


def find(
    files: ImageFiles,
    *,
    size: int,
    root: str,
    advanced: Callable[[int], None] | None = None,
    scope: Scope | None = None,
) -> Damage:
    """Compare an image of ``size`` bytes with its digests, and these with their ``root``.

    Args:
        files: the image; nothing is written.
        size: of the disk in bytes.
        root: digest root that the array must have.
        advanced: called with the bytes checked since the last call, in the thread of the caller.
        scope: what to compare; the digest root is checked in any case.

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
        check = _Check(fd, digest_fd, size=size, scope=scope or Scope())
        return check.run(root, advanced or _ignore)


def _ignore(length: int) -> None:
    pass


class _Check:
    """One comparison: pieces are read and digested in threads, results taken in order.

    ::

        image data     |####|    |##########|              |
        digest data    |######|      |##|         |##|     |     in bytes of the disk
        compared       |######|  |##########|     |##|     |     elsewhere both are zero already
    """

    def __init__(self, fd: int, digest_fd: int, *, size: int, scope: Scope) -> None:
        self._fd = fd
        self._digest_fd = digest_fd
        self._size = size
        self._scope = scope
        self._kept = KEPT_EXTENTS if scope.kept is None else scope.kept
        self._own = threading.local()
        self._blocks = 0
        self._extents: list[Extent] = []

    def run(self, root: str, advanced: Callable[[int], None]) -> Damage:
        for fd in (self._fd, self._digest_fd):
            # what the disk holds is of interest, not what the page cache remembers
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            whole = imagefiles.digest_root(self._digest_fd) == root
        except sparse.Unreadable:
            return Damage(problem=DIGESTS_UNREADABLE)
        problem = "" if whole else DIGESTS_CHANGED
        if self._scope.only is not None or self._scope.share < 1:
            return self._run_part(problem, advanced)
        at = 0
        with closing(self._results(self._suspects())) as results:  # no thread outlives the files
            for piece, bad in results:
                self._add(bad)
                advanced(piece.stop - at)
                at = piece.stop
        advanced(self._size - at)
        return Damage(problem, self._blocks, tuple(self._extents), self._size)

    def _run_part(self, problem: str, advanced: Callable[[int], None]) -> Damage:
        of = -1
        chosen: Iterable[Extent] = self._scope.only or ()
        if self._scope.only is None:
            of = extents.total(self._suspects())
            chosen = self._scope.drawn(self._suspects(), of)
        checked = 0
        with closing(self._results(chosen)) as results:
            for piece, bad in results:
                self._add(bad)
                advanced(piece.length)
                checked += piece.length
        return Damage(problem, self._blocks, tuple(self._extents), checked, of)

    def _results(self, wanted: Iterable[Extent]) -> Generator[tuple[Extent, list[Extent]]]:
        waiting: deque[tuple[Extent, Future[list[Extent]]]] = deque()
        with ThreadPoolExecutor(_THREADS) as threads:
            for piece in extents.split(wanted, size=_PIECE):
                if len(waiting) >= _AHEAD:
                    done, result = waiting.popleft()
                    yield done, result.result()
                waiting.append((piece, threads.submit(self._compare, piece)))
            for done, result in waiting:
                yield done, result.result()

    def _suspects(self) -> Iterator[Extent]:
        return imagefiles.suspects(self._fd, self._digest_fd, Extent(0, self._size))

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
            elif len(self._extents) < self._kept:
                self._extents.append(extent)


def _entry(array: bytes, index: int) -> bytes:
    return array[index * digests.LENGTH : (index + 1) * digests.LENGTH]


# ── The record ───────────────────────────────────────────────────────────────────────────────


class PoolDamage(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says of blocks that are not as the pool has them; see ``Disagreement``."""

    found: str
    blocks: int
    zeros: int = 0
    extents: tuple[tuple[int, int], ...] = ()


class DiskDamage(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says of one disk; ``found`` is an ISO time, extents are in bytes.

    ``found`` is "" if the image agrees with its digests, and only ``pool`` says what is wrong.
    """

    found: str
    problem: str = ""
    blocks: int = 0
    extents: tuple[tuple[int, int], ...] = ()
    pool: PoolDamage | None = None


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    disks: Mapping[str, DiskDamage]
    schema: int = 1


UNREADABLE = "*"
"""Stands for all disks of a point whose record cannot be read: it says damage, not where."""


def recorded(point: Folder) -> frozenset[str]:
    """Return the devices that the record of a point names; ``UNREADABLE`` if it is broken."""
    return frozenset(_read_record(point))


def by_pool(point: Folder) -> Mapping[str, PoolDamage]:
    """Return what the record of a point says of blocks that are not as the pool has them."""
    return {
        device: known.pool
        for device, known in _read_record(point).items()
        if known.pool is not None
    }


def record(point: Folder, device: str, damage: Damage, *, now: str) -> None:
    """Make the record of a point say what was found on ``device``: damage, or nothing any more.

    What a sample finds is added to the record; if it finds nothing, the record stays as it is. So
    does what it says of the pool.

    The caller holds a lock that keeps others from the record. ``now`` is an ISO time.

    Raises:
        StoreError: the record must change and cannot be written.
    """
    disks = dict(_read_record(point))
    known = disks.get(device)
    if damage.found:
        found = DiskDamage(
            found=now,
            problem=damage.problem,
            blocks=damage.blocks,
            extents=tuple((e.start, e.stop) for e in damage.extents),
            pool=known.pool if known is not None else None,
        )
        before = known if damage.sampled else None
        disks[device] = found if before is None else _joined(before, found)
    elif damage.sampled or known is None or (known.pool is not None and not known.found):
        return
    elif known.pool is not None:
        disks[device] = DiskDamage(found="", pool=known.pool)
    else:
        del disks[device]
    _write_record(point, disks)


def record_pool(
    point: Folder,
    device: str,
    found: Disagreement,
    *,
    unproven: Callable[[Sequence[Extent]], Iterator[Extent]],
    now: str,
) -> None:
    """Make the record of a point say what of ``device`` is not as the pool has it, or nothing.

    What was on record before stays unless it was compared anew; a sample compares nothing anew.

    Args:
        point: of the image.
        device: the disk.
        found: what a comparison with the pool found.
        unproven: tells what of some blocks the comparison did not reach.
        now: an ISO time.

    Raises:
        StoreError: the record must change and cannot be written.
    """
    disks = dict(_read_record(point))
    known = disks.get(device) or DiskDamage(found="")
    pool = _joined_pool(known.pool, found, unproven=unproven, now=now)
    if pool == known.pool:
        return
    disks[device] = msgspec.structs.replace(known, pool=pool)
    if pool is None and not known.found:
        del disks[device]
    _write_record(point, disks)


def _joined_pool(
    before: PoolDamage | None,
    found: Disagreement,
    *,
    unproven: Callable[[Sequence[Extent]], Iterator[Extent]],
    now: str,
) -> PoolDamage | None:
    """Return what is on record after ``found``; blocks that are not named cannot be cleared."""
    left = [Extent(*e) for e in before.extents] if before else []
    unnamed = before.blocks - _blocks_in(left) if before else 0
    if left and not found.sampled:
        left = list(unproven(left))
    if unnamed and not found.sampled and next(unproven([_EVERYTHING]), None) is None:
        unnamed = 0
    merged = list(extents.merge(sorted((*left, *found.extents))))
    beyond = found.blocks - _blocks_in(found.extents)
    blocks = _blocks_in(merged) + max(unnamed, beyond)
    if not blocks:
        return None
    if before is not None and not found.blocks and blocks == before.blocks:
        return before
    zeros = max(found.zeros, before.zeros if before and (found.sampled or left) else 0)
    named = tuple((e.start, e.stop) for e in merged[:KEPT_EXTENTS])
    return PoolDamage(found=now, blocks=blocks, zeros=min(zeros, blocks), extents=named)


_EVERYTHING = Extent(0, 1 << 62)


def _blocks_in(named: Iterable[Extent]) -> int:
    return sum(-(-(stop - start) // digests.BLOCK) for start, stop in named)


def _write_record(point: Folder, disks: Mapping[str, DiskDamage]) -> None:
    if disks:
        content = msgspec.json.format(msgspec.json.encode(_Record(disks=disks)))
        point.write(RECORD, content + b"\n")
    else:
        point.remove(RECORD)
        point.sync()


def _joined(before: DiskDamage, found: DiskDamage) -> DiskDamage:
    """Return a record of both; blocks beyond the extents that are named may be counted twice."""
    named = [Extent(*e) for e in (*before.extents, *found.extents)]
    merged = list(extents.merge(sorted(named)))
    twice = extents.total(named) - extents.total(merged)
    return DiskDamage(
        found=found.found,
        problem=found.problem or before.problem,
        blocks=before.blocks + found.blocks - -(-twice // digests.BLOCK),
        extents=tuple((e.start, e.stop) for e in merged[:KEPT_EXTENTS]),
        pool=found.pool,
    )


def _read_record(point: Folder) -> Mapping[str, DiskDamage]:
    try:
        if not point.exists(RECORD):
            return {}
        return msgspec.json.decode(point.read(RECORD), type=_Record).disks
    except (errors.StoreError, ValueError, RecursionError):
        return {UNREADABLE: DiskDamage(found="")}
