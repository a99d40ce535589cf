"""Restore file: one disk of a restore point, out of the store into a file or onto a block device.

::

    target     written                              appears or becomes usable
    file       beside it, under another name        by a rename, after all was read back
    device     in place, its last MiB, and then     when these are there: they were zero, so that
               its first, after everything else     nothing takes a half-written disk for one

A file on the file system of the store shares the image's extents, where that is possible. Either
way something of what was written, or all of it, is read from disk again and compared with the
digests; of a device before its first MiB is written, for until then another run may go on.
"""

import os
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from . import (
    blockdevice,
    digests,
    errors,
    extents,
    image,
    imagecopy,
    imagefiles,
    sparse,
    units,
)
from .blockdevice import BlockDevice
from .catalogue import DiskPoint
from .extents import Extent
from .folder import told, told_outside
from .imagecopy import ImageCopy, Source
from .imagefiles import ImageFiles
from .partialfile import PartialFile

How = Literal["reflink", "copy", "device", "compare"]


class Told(Protocol):
    """Who is told how far a restore is; what ``advanced`` raises ends it."""

    def begun(self, what: Literal["copy", "verify"], total: int) -> None:
        """``total`` bytes are to be copied, or read back."""
        ...

    def advanced(self, read: int, written: int) -> None:
        """So many more bytes of the total are done, and so many were written."""
        ...

    def warned(self, text: str) -> None:
        """Something that the user should know, though it goes on."""
        ...


@dataclass(frozen=True, slots=True)
class Wish:
    """How to restore.

    Attributes:
        forced: an existing file, the content of a device, and damage in the image do not matter.
        whole: all is read back, not only a sample.
        among: one of several; a file that an earlier run finished is compared with the image, and
            left as it is if it is the same.
        damaged: whether the disk is on record as damaged.
    """

    forced: bool = False
    whole: bool = False
    among: bool = False
    damaged: bool = False

    @property
    def spared(self) -> bool:
        """Whether an existing file is not refused before it was looked into."""
        return self.forced or self.among


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be done; ``bytes_to_write`` is at most that."""

    how: How
    bytes_to_write: int
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done.

    Attributes:
        written: bytes written that are no zeros.
        reflinked: whether the file shares the extents of the image instead.
        resumed: whether some of it was there already.
        verified: bytes of the disk that were read back and compared.
        damaged: bytes that are as damaged as the image.
        seconds: that it took.
    """

    written: int
    reflinked: bool
    resumed: bool
    verified: int
    damaged: int
    seconds: float


def check_target(path: Path, *, store: Path, wish: Wish) -> None:
    """Refuse a target that could not be right, before anything is read.

    Args:
        path: absolute, without symbolic links but perhaps to a device.
        store: the directory of the store.
        wish: how to restore.

    Raises:
        UsageError: it is in the store, or a file that exists, or cannot hold a disk.
        StoreError: its folder is not there.
    """
    if blockdevice.is_block_device(path):
        backing = blockdevice.backing_file(path)
        if backing is not None and _is_within(backing, store):
            raise errors.UsageError(f"{path} is a loop device of {backing}, which is in the store")
        return
    with told_outside("create", path):
        path.parent.stat()
    if _is_within(path, store):
        raise errors.UsageError(f"{path} is in the store itself; choose another place")
    if path.exists() and not path.is_file():
        raise errors.UsageError(f"{path} is neither a file nor a block device; choose another name")
    if path.exists() and not wish.spared:
        raise _exists(path)


def _exists(path: Path) -> errors.UsageError:
    return errors.UsageError(f"{path} exists already; --force replaces it")


def _is_within(path: Path, store: Path) -> bool:
    """Tell whether ``path`` lies below ``store``, however both are written."""
    if not store.exists():
        return False
    return any(p.exists() and p.samefile(store) for p in (path, *path.parents))


def plan(files: ImageFiles, disk: DiskPoint, target: Path, *, wish: Wish) -> Plan:
    """Return what ``restore`` would do; nothing is changed.

    Raises:
        CbtfsError: it would refuse.
    """
    _refuse_damaged(files, wish)
    with _opened_source(files, disk, wish, warn=lambda _: None) as source:
        stored = source.stored()
        if blockdevice.is_block_device(target):
            with BlockDevice.open(target, only_look=True) as device:
                _check_device(device, source, wish)
            return Plan("device", stored)
        if target.exists() and not wish.forced:
            return Plan("compare", 0)
        partial = target.with_name(PartialFile.name_of(target, identity=disk.digest_root))
        resumes = partial.exists()
        if _shares_extents(files, target.parent):
            return Plan("reflink", 0, resumes)
        return Plan("copy", stored, resumes)


def _shares_extents(files: ImageFiles, folder: Path) -> bool:
    return os.fstat(files.folder.fd).st_dev == folder.stat().st_dev and image.reflink_supported(
        folder
    )


def restore(
    files: ImageFiles, disk: DiskPoint, target: Path, *, wish: Wish, told: Told
) -> Restored:
    """Write the image of ``disk`` into ``target``: see the head of this module.

    Interrupted at any point it can be called again, and goes on.

    Args:
        files: where the image is.
        disk: its record.
        target: one that ``check_target`` accepts.
        wish: how.
        told: is told how far it is.

    Raises:
        ImageDamaged: the image is; nothing appeared.
        UsageError: the device is too small, or holds something.
        StoreLocked: another run writes the same file.
        StoreFull: no space left; what is written stays for the next run.
        StoreError: it could not be read or written, or reads back differently.
    """
    started = time.monotonic()
    _refuse_damaged(files, wish)
    if wish.damaged:
        told.warned(f"{files.path} is on record as damaged, and restored all the same")
    with _opened_source(files, disk, wish, warn=told.warned) as source:
        job = _Job(source, wish, told)
        if blockdevice.is_block_device(target):
            job.to_device(target)
        elif target.exists() and not wish.forced:
            job.compare(target)
        else:
            job.to_file(target, identity=disk.digest_root)
    return job.restored(time.monotonic() - started)


def _refuse_damaged(files: ImageFiles, wish: Wish) -> None:
    if wish.damaged and not wish.forced:
        raise errors.ImageDamaged(
            f"{files.path} is on record as damaged; cbtfs verify says where; restore another"
            " point, or copy it as it is with --force"
        )


def _opened_source(
    files: ImageFiles, disk: DiskPoint, wish: Wish, *, warn: Callable[[str], None]
) -> AbstractContextManager[Source]:
    return imagecopy.opened(
        files, size=disk.size, root=disk.digest_root, warn=warn if wish.forced else None
    )


def _check_device(device: BlockDevice, source: Source, wish: Wish) -> None:
    """Refuse a device that is too small, or holds something that is not ours.

    Raises:
        UsageError: it is, or does.
    """
    if device.size < source.size:
        raise errors.UsageError(
            f"{device.path} is too small: it has {device.size} bytes, the disk {source.size}"
        )
    if wish.forced or not device.holds_something():
        return
    if not _looks_begun(device, source):
        raise errors.UsageError(
            f"{device.path} is not empty: there is something in its first or last MiB; --force"
            " overwrites it"
        )


def _looks_begun(device: BlockDevice, source: Source) -> bool:
    """Tell whether a device looks as an interrupted restore of ``source`` leaves it in the end.

    That has written some of the last MiB of the disk then, but not the first.
    """
    edge = min(blockdevice.EDGE, device.size)
    _, _, tail = _parts(source.size)
    beyond = max(source.size, device.size - edge)
    if device.is_not_zero(0, edge) or not tail.length:
        return False
    if device.is_not_zero(beyond, device.size - beyond):
        return False
    with told_outside("read", device.path):
        found = digests.of_blocks(memoryview(sparse.read_all(device.fd, tail.length, tail.start)))
    return all(
        not any(found[digests.entry(start) : digests.entry(stop)])
        for start, stop in digests.differences(found, source.expected(tail), length=tail.length)
    )


def _parts(size: int) -> tuple[Extent, Extent, Extent]:
    """Return first MiB, middle, and last MiB of a disk, in whole blocks; each may be empty."""
    head = min(blockdevice.EDGE, size)
    start = size - blockdevice.EDGE
    start = max(start - start % digests.BLOCK, head)
    return Extent(0, head), Extent(head, start), Extent(start, size)


class _Job:
    """One restore, made for one call of ``to_file`` or ``to_device``."""

    def __init__(self, source: Source, wish: Wish, told: Told) -> None:
        self._source = source
        self._wish = wish
        self._told = told
        self._reflinked = False
        self._written = 0
        self._kept = 0
        self._damaged: list[Extent] = []
        self._verified = 0

    def restored(self, seconds: float) -> Restored:
        return Restored(
            written=self._written,
            reflinked=self._reflinked,
            resumed=self._kept > 0,
            verified=self._verified,
            damaged=sum(extent.length for extent in self._damaged),
            seconds=round(seconds, 3),
        )

    def to_file(self, path: Path, *, identity: str) -> None:
        with PartialFile.open(path, identity=identity) as partial:
            partial.resize(self._source.size)
            self._reflinked = self._shared(partial)
            try:
                self._fill(partial)
            except BaseException:
                self._keep(partial)
                raise
            partial.commit(replace=self._wish.forced)

    def compare(self, path: Path) -> None:
        """Refuse a file that is not the same as the image; one that is has been restored already.

        Raises:
            UsageError: it is not.
        """
        with told_outside("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            size = self._source.size
            if os.fstat(fd).st_size != size:
                raise _exists(path)
            with self._copy(fd, path) as copy:
                self._told.begun("verify", size)
                if copy.check(copy.everything(), self._told.advanced):
                    raise _exists(path)
        finally:
            os.close(fd)
        self._verified = self._kept = size

    def _fill(self, partial: PartialFile) -> None:
        with self._copy(partial.fd, partial.path, blank=not partial.began) as copy:
            if not self._reflinked:
                _check_space(partial, self._source)
                self._told.begun("copy", copy.total)
                copy.bring(Extent(0, self._source.size), self._told.advanced)
            copy.flush()
            self._read_back(copy, partial.path)

    def _keep(self, partial: PartialFile) -> None:
        """Leave what is copied for the next run; what is shared costs nothing to share again."""
        if self._reflinked:
            partial.discard()
        elif partial.allocated():
            self._told.warned(
                f"what is copied stays in {partial.partial_path}; the same command goes on from"
                " there"
            )

    def _shared(self, partial: PartialFile) -> bool:
        with told_outside("create", partial.path), imagefiles.readable(self._source.path):
            return sparse.reflink(self._source.fd, partial.fd)

    def to_device(self, path: Path) -> None:
        with BlockDevice.open(path) as device:
            _check_device(device, self._source, self._wish)
            if device.size > self._source.size:
                self._told.warned(_larger(device, self._source.size))
            with self._copy(device.fd, path, is_device=True) as copy:
                self._overwrite(device, copy)

    def _overwrite(self, device: BlockDevice, copy: ImageCopy) -> None:
        head, middle, tail = _parts(self._source.size)
        self._told.begun("copy", copy.total)
        if device.holds_something():
            for edge in (head, tail):
                copy.zero(edge)
            copy.flush()
        for part in (middle, tail):
            copy.bring(part, self._told.advanced)
            copy.flush()
        with self._reading_back(copy, device.path) as check:
            check(Extent(head.stop, self._source.size))
            copy.bring(head, lambda read, written: self._told.advanced(0, 0))
            copy.flush()
            check(head)

    def _copy(
        self, fd: int, path: Path, *, blank: bool = False, is_device: bool = False
    ) -> ImageCopy:
        return ImageCopy(
            self._source,
            fd,
            path=path,
            blank=blank,
            is_device=is_device,
            forced=self._wish.forced,
        )

    def _read_back(self, copy: ImageCopy, path: Path) -> None:
        """Compare what is on disk now with the digests; raises as ``_reading_back``."""
        with self._reading_back(copy, path) as check:
            check(Extent(0, self._source.size))

    @contextmanager
    def _reading_back(self, copy: ImageCopy, path: Path) -> Generator[Callable[[Extent], None]]:
        """Yield what compares a part of what is on disk now with the digests.

        Raises:
            ImageDamaged: the image that the file shares extents with is damaged.
            StoreError: the target does not hold what was written.
        """
        sample = [] if self._wish.whole else copy.sampled()
        total = self._source.size if self._wish.whole else sum(e.length for e in sample)
        self._told.begun("verify", total)

        def check(where: Extent) -> None:
            what = copy.everything() if self._wish.whole else sample
            self._judge(copy, path, copy.check(extents.common(what, [where]), self._told.advanced))

        yield check
        self._verified = total
        self._written, self._kept = copy.written, copy.kept
        if not self._reflinked:
            self._damaged = list(copy.damaged)
        if self._damaged:
            self._told.warned(
                f"{path} is as damaged as {self._source.path}: {imagecopy.places(self._damaged)}"
                " are not as they were backed up"
            )

    def _judge(self, copy: ImageCopy, path: Path, wrong: list[Extent]) -> None:
        """Raise what it means that ``wrong`` reads back otherwise, if that was not asked for."""
        if self._reflinked and wrong:
            if not self._wish.forced:
                raise imagecopy.damaged_at(self._source.path, wrong)
            self._damaged = wrong
        elif imagecopy.beyond(wrong, copy.damaged):
            where = imagecopy.places(imagecopy.beyond(wrong, copy.damaged))
            raise errors.StoreError(
                f"{path} does not hold what was written to it: {where} read back differently; the"
                " disk below it may be failing, see dmesg"
            )


def _larger(device: BlockDevice, size: int) -> str:
    more = units.format_size(device.size - size)
    return f"{device.path} is {more} larger than the disk; what lies beyond is left as it is"


def _check_space(partial: PartialFile, source: Source) -> None:
    """Refuse early what would fill the file system.

    Raises:
        StoreFull: the image takes more than is free.
    """
    with told("look at", source.path):
        taken = os.fstat(source.fd).st_blocks * 512
    needed, free = taken - partial.allocated(), partial.free_space()
    if needed > free:
        raise errors.StoreFull(
            f"{partial.path} needs about {units.format_size(needed)} more and its file system has"
            f" {units.format_size(free)} free; make room, or choose another place"
        )
