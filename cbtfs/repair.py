"""Repair: damaged blocks of an image made whole again, from where its VM's other points have them.

::

    image     | ok | XX | ok | XX | XX |        what a check found
    digests   | d0 | d1 | d2 | 00 | d4 |        proven by the recorded digest root
    repaired       |=======  ====              d1 read from another point, zeros made of nothing

Nothing is written that the recorded digest root does not prove: it proves the digests, and these
prove the block that was found elsewhere.

Rules of this file:

1. Damage is on record before anything is written, and until all of it is gone. So a run that is
   killed leaves what it found, in part repaired, and the next one finishes.
2. The caller holds the VM's lock where something is written.
3. Only the damaged image is written, in place; it shares blocks with the others, but a write
   changes one file only.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

from . import damage, digests, errors, extents, imagefiles, proof, sparse
from .catalogue import DiskPoint, Point, Reference
from .damage import Damage, Scope
from .extents import Extent
from .folder import Folder, told
from .imagefiles import ImageFiles
from .store import Store

ZEROS = ""
"""In place of the time of a point: blocks of zeros need none."""

KEPT_EXTENTS = 100_000
"""Extents repaired in one round."""

DISPUTED = 1 << 18
"""Blocks that may differ from digests which have changed, too: 16 GiB."""


@dataclass(frozen=True, slots=True)
class Found:
    """Blocks that can be repaired, or were, from the point ``time``, or ``ZEROS``."""

    extent: Extent
    time: str


@dataclass(frozen=True, slots=True)
class Repair:
    """What can be repaired of a disk, or was.

    Attributes:
        found: where it comes from; neighbouring blocks from one point are joined.
        entries: digests that changed, and can be proven otherwise.
        left: what is damaged all the same.
    """

    found: tuple[Found, ...] = ()
    entries: int = 0
    left: Damage = field(default_factory=Damage)

    @property
    def blocks(self) -> int:
        """How many blocks were found."""
        return sum(_count(found.extent) for found in self.found)

    @property
    def does_something(self) -> bool:
        """Whether anything can be repaired."""
        return bool(self.found or self.entries)


def possible(store: Store, reference: Reference, found: Damage) -> Repair:
    """Return what of ``found``, the damage of one disk, can be repaired; nothing is written.

    Raises:
        StoreError: the point is gone, or cannot be read.
    """
    disk = _disk(reference)
    with store.opened_point(reference.history.uuid, reference.point.time) as folder:
        with _Patient.opened(store, reference, folder, disk, write=False) as patient:
            return patient.treat(found)


def repair(store: Store, reference: Reference) -> Repair:
    """Repair what can be of one disk, and put on record what is left; the caller holds the lock.

    Raises:
        StoreError: the point is gone, or cannot be written.
    """
    disk = _disk(reference)
    done = Repair()
    with store.opened_point(reference.history.uuid, reference.point.time) as folder:
        files = ImageFiles(folder, disk.file, disk.digests)
        scope = Scope(kept=KEPT_EXTENTS)
        left = damage.find(files, size=disk.size, root=disk.digest_root, scope=scope)
        while left.found:
            for problem in store.record_check(folder, disk.device, _told(left)):
                raise errors.StoreError(problem)
            with _Patient.opened(store, reference, folder, disk, write=True) as patient:
                step = patient.treat(left)
            done = replace(done, found=done.found + step.found, entries=done.entries + step.entries)
            many = left.blocks > sum(map(_count, left.extents))
            left = step.left
            if not many or not step.does_something:
                break
            left = damage.find(files, size=disk.size, root=disk.digest_root, scope=scope)
        for problem in store.record_check(folder, disk.device, _told(left)):
            raise errors.StoreError(problem)
    return replace(done, left=_told(left))


def _disk(reference: Reference) -> DiskPoint:
    if reference.disk is None:
        raise errors.UsageError("a repair is of one disk")
    return reference.disk


def _told(found: Damage) -> Damage:
    """Return ``found`` with no more extents than are named."""
    return replace(found, extents=found.extents[: damage.KEPT_EXTENTS])


class _Patient:
    """A damaged image, and how it can be made whole; ``fd`` is open for writing, or is not."""

    def __init__(
        self,
        store: Store,
        reference: Reference,
        files: ImageFiles,
        disk: DiskPoint,
        *,
        fds: tuple[int, int],
        write: bool,
    ) -> None:
        self._store = store
        self._reference = reference
        self._files = files
        self._disk = disk
        self._fd, self._digest_fd = fds
        self._write = write
        self._proven: dict[int, bytes] = {}  # entries by block, where the array has others

    @classmethod
    @contextmanager
    def opened(
        cls, store: Store, reference: Reference, folder: Folder, disk: DiskPoint, *, write: bool
    ) -> Generator["_Patient"]:
        """Open the two files; a missing or cut one is nobody's patient."""
        files = ImageFiles(folder, disk.file, disk.digests)
        with ExitStack() as stack:
            fds = (-1, -1)
            if not imagefiles.flaw(files, size=disk.size):
                fds = imagefiles.open_files(files, flags=os.O_RDWR if write else os.O_RDONLY)
                for fd in fds:
                    stack.callback(os.close, fd)
            stack.enter_context(told("repair", files.path))
            yield cls(store, reference, files, disk, fds=fds, write=write)

    def treat(self, found: Damage) -> Repair:
        """Repair what can be of ``found``, or only find out."""
        if found.problem == damage.DIGESTS_CHANGED:
            found = self._settle(found)
        if self._fd < 0 or found.problem:
            return Repair(left=found)
        cures, left = self._search(found.extents)
        unnamed = found.blocks - sum(map(_count, found.extents))
        rest = Damage(
            blocks=sum(map(_count, left)) + unnamed, extents=tuple(left), checked=found.checked
        )
        entries = len(self._proven)
        if self._write and (cures or entries):
            rest = self._finished(cures, rest)
        return Repair(
            found=tuple(sorted(cures, key=lambda f: f.extent)), entries=entries, left=rest
        )

    # ── digests ──────────────────────────────────────────────────────────────────────────────

    def _settle(self, found: Damage) -> Damage:
        """Find out which digests are the right ones; return ``found`` less what was only those."""
        blocks = sum(map(_count, found.extents))
        if self._fd < 0 or blocks != found.blocks or blocks > DISPUTED:
            return found
        disputes = self._disputes(list(_blocks(found.extents)))
        proven = proof.settled(
            self._digest_fd,
            disputes,
            size=digests.array_length(self._disk.size),
            root=self._disk.digest_root,
        )
        if proven is None:
            return found
        self._proven = {d.index: proven[d.index] for d in disputes if proven[d.index] != d.written}
        if self._write:
            for index, entry in self._proven.items():
                sparse.write_all(self._digest_fd, memoryview(entry), index * digests.LENGTH)
            os.fsync(self._digest_fd)
        wrong = {d.index for d in disputes if proven[d.index] != d.actual}
        bad = [b for b in _blocks(found.extents) if b.start // digests.BLOCK in wrong]
        return replace(found, problem="", blocks=len(bad), extents=tuple(extents.merge(bad)))

    def _disputes(self, blocks: Sequence[Extent]) -> list[proof.Dispute]:
        others: dict[Extent, list[bytes]] = {block: [] for block in blocks}
        for _, other in self._others():
            for block in blocks:
                with suppress(sparse.Unreadable):
                    others[block].append(other.entry(block))
        return [
            proof.Dispute(
                index=block.start // digests.BLOCK,
                written=self._entry(block),
                actual=_digest_at(self._fd, block),
                others=tuple(others[block]),
            )
            for block in blocks
        ]

    def _entry(self, block: Extent) -> bytes:
        index = block.start // digests.BLOCK
        found = self._proven.get(index)
        if found is not None:
            return found
        return sparse.read_all(self._digest_fd, digests.LENGTH, index * digests.LENGTH)

    # ── blocks ───────────────────────────────────────────────────────────────────────────────

    def _search(self, wanted: Sequence[Extent]) -> tuple[list[Found], list[Extent]]:
        """Return what of ``wanted`` was found, and repaired if it is to be; and what was not."""
        found, left = self._made_of_nothing(wanted)
        for point, other in self._others():
            if not left:
                break
            missing: list[Extent] = []
            for block in _blocks(left):
                if self._take(other, block):
                    _add(found, Found(block, point.time))
                else:
                    _put(missing, block)
            left = missing
        return found, left

    def _made_of_nothing(self, wanted: Sequence[Extent]) -> tuple[list[Found], list[Extent]]:
        """Return which of ``wanted`` are to be zeros, and made so if they are; and the others."""
        found: list[Found] = []
        left: list[Extent] = []
        for block in _blocks(wanted):
            if self._entry(block) != digests.ZERO:
                _put(left, block)
                continue
            if self._write:
                sparse.punch(self._fd, block.start, block.length)
            _add(found, Found(block, ZEROS))
        return found, left

    def _take(self, other: "_Other", block: Extent) -> bool:
        """Tell whether ``other`` has a block whole; if it is to be, it is repaired from there."""
        data = other.whole(block, self._entry(block))
        if data is None:
            return False
        if self._write and not _shared(other.fd, self._fd, block):
            sparse.write_all(self._fd, memoryview(data), block.start)
        return True

    def _others(self) -> Iterator[tuple[Point, "_Other"]]:
        """Yield the same disk in the other points of the VM, the nearest in time first."""
        points = self._reference.history.points
        times = [point.time for point in points]
        here = times.index(self._reference.point.time)
        near = sorted(range(len(points)), key=lambda index: abs(index - here))
        for point in (points[index] for index in near if index != here):
            for disk in filter(self._is_same, point.disks):
                with suppress(errors.StoreError):  # removed meanwhile, perhaps
                    yield from self._opened_other(point, disk)

    def _opened_other(self, point: Point, disk: DiskPoint) -> Iterator[tuple[Point, "_Other"]]:
        with (
            self._store.opened_point(point.vm_uuid, point.time) as folder,
            _Other(folder, disk) as other,
        ):
            yield point, other

    def _is_same(self, disk: DiskPoint) -> bool:
        return disk.vdi_uuid == self._disk.vdi_uuid or disk.device == self._disk.device

    def _finished(self, cures: Sequence[Found], rest: Damage) -> Damage:
        """Bring to disk what was repaired; return ``rest`` with what is damaged even so."""
        os.fsync(self._fd)
        os.fsync(self._digest_fd)
        only = sorted(found.extent for found in cures)
        again = damage.find(
            self._files,
            size=self._disk.size,
            root=self._disk.digest_root,
            scope=Scope(only=list(extents.merge(only)), kept=KEPT_EXTENTS),
        )
        return replace(
            rest,
            problem=again.problem,
            blocks=rest.blocks + again.blocks,
            extents=tuple(extents.merge(sorted((*rest.extents, *again.extents)))),
        )


class _Other:
    """The image of another point, from which blocks are taken; a context manager."""

    def __init__(self, folder: Folder, disk: DiskPoint) -> None:
        files = ImageFiles(folder, disk.file, disk.digests)
        self._size = disk.size
        self.fd, self._digest_fd = imagefiles.open_files(files, flags=os.O_RDONLY)

    def __enter__(self) -> "_Other":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)
        os.close(self._digest_fd)

    def entry(self, block: Extent) -> bytes:
        """Return the digest of a block as this point has it; ``Unreadable`` if it has none."""
        return sparse.read_all(self._digest_fd, digests.LENGTH, digests.entry(block.start))

    def whole(self, block: Extent, wanted: bytes) -> bytes | None:
        """Return the bytes of a block if they have the digest ``wanted``, else None."""
        if block.stop > self._size:
            return None
        try:
            if self.entry(block) != wanted:
                return None
            # what is shared with the image afterwards is what the disk has, not the page cache
            os.posix_fadvise(self.fd, block.start, block.length, os.POSIX_FADV_DONTNEED)
            data = sparse.read_all(self.fd, block.length, block.start)
        except sparse.Unreadable:
            return None
        return data if digests.of_block(memoryview(data)) == wanted else None


def _shared(source: int, target: int, block: Extent) -> bool:
    """Share a block if that is possible; tell whether it was."""
    try:
        return sparse.reflink_range(source, target, block)
    except sparse.Unreadable:
        return False


def _digest_at(fd: int, block: Extent) -> bytes:
    """Return the digest of a block as it is, b"" if it cannot be read."""
    try:
        data = sparse.read_all(fd, block.length, block.start)
    except sparse.Unreadable:
        return b""
    return digests.of_block(memoryview(data))


def _blocks(parts: Sequence[Extent]) -> Iterator[Extent]:
    return extents.split(parts, size=digests.BLOCK)


def _count(extent: Extent) -> int:
    return -(-extent.length // digests.BLOCK)


def _put(runs: list[Extent], block: Extent) -> None:
    """Append a block; there may be millions, so neighbours are joined at once."""
    if runs and runs[-1].stop == block.start:
        runs[-1] = Extent(runs[-1].start, block.stop)
    else:
        runs.append(block)


def _add(runs: list[Found], found: Found) -> None:
    """Append what was found, as ``_put`` does."""
    last = runs[-1] if runs else None
    if last is not None and (last.extent.stop, last.time) == (found.extent.start, found.time):
        runs[-1] = Found(Extent(last.extent.start, found.extent.stop), found.time)
    else:
        runs.append(found)
