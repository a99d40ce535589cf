"""Stage: a restore point in the making, which appears by one rename, complete or not at all.

::

    VM-UUID/.partial-TIME/   intent.json     before anything is changed in the pool
                             journal.json    now and then: what a later run need not do again
                             xvda.raw        written, then fsynced by Image.finish
                             xvda.b3
                             vm.xml
                             point.json      last of all
    VM-UUID/TIME/            the same directory, renamed
    VM-UUID/latest           only now, and only a convenience

Rules of this file:

1. Everything in the directory is on disk before the rename, the rename before ``commit`` returns.
2. Nothing that exists is ever overwritten: the rename fails if the time is taken.
3. What goes wrong after the rename is a warning: the point is there.
4. Intent and journal go only after the rename: killed before, the point can be gone on with. Killed
   right after it, they stay in the point, where nobody reads them, until the next commit.
"""

import hashlib
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from . import catalogue, damage, errors, imagefiles, journal as journals
from .catalogue import DiskPoint, Point
from .folder import Folder
from .image import Image
from .imagefiles import ImageFiles
from .journal import DiskJournal

POINT = "point.json"
INTENT = "intent.json"
JOURNAL = "journal.json"
LATEST = "latest"

_PARTIAL = ".partial-"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._~-]{0,199}")
_UNFINISHED = (INTENT, JOURNAL)
_RESERVED = {POINT, *_UNFINISHED, damage.RECORD, LATEST}


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is about to do; on disk before it changes anything in the pool.

    Attributes:
        time: of the restore point.
        run: random name of the run, in hex digits.
        snapshot_name: what the snapshot in the pool will be called.
        vm_uuid: name of the VM's directory.
        earlier: names of snapshots that dead runs asked for, and that the pool may yet take.
        fruitless: runs in a row that went on with this one and got no further.
        vdis: uuids of the disks that the snapshot is to have.
    """

    time: str
    run: str
    snapshot_name: str
    vm_uuid: str
    pool_uuid: str = ""
    host: str = ""
    boot: str = ""
    pid: int = 0
    starttime: int = 0
    earlier: tuple[str, ...] = ()
    fruitless: int = 0
    vdis: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leftover:
    """A partial point that nobody works on.

    Attributes:
        intent: what the run was about to do; None if none can be read. Without one it did not get
            as far as changing the pool.
        journal: how far its disks got, by device; {} if it cannot be gone on with.
    """

    vm_uuid: str
    time: str
    path: Path
    intent: Intent | None
    journal: Mapping[str, DiskJournal] = field(default_factory=dict[str, DiskJournal], hash=False)


def file_names(device: str) -> tuple[str, str]:
    """Return the names of the image and digests of ``device``: ``xvda.raw`` and ``xvda.b3``.

    Whatever ``device`` is, they are names that a file can have, and no two devices share one.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", device)[:64]
    if stem != device or not stem or stem[0] == "-":
        # "~" is in no plain stem, so this cannot meet another device's name
        stem = f"disk{stem}~{hashlib.sha256(device.encode(errors='replace')).hexdigest()[:8]}"
    return f"{stem}.raw", f"{stem}.b3"


def partial_name(time: str) -> str:
    """Return the name of the directory in which the point ``time`` is made."""
    return f"{_PARTIAL}{time}"


def partial_time(name: str) -> str:
    """Return the time of the partial point called ``name``; "" if it is none."""
    time = name.removeprefix(_PARTIAL)
    return time if name.startswith(_PARTIAL) and catalogue.is_time(time) else ""


def read_intent(vm: Folder, name: str) -> Intent | None:
    """Return what the partial point ``name`` says about its run; None if nothing readable."""
    try:
        with vm.folder(name) as partial:
            return msgspec.json.decode(partial.read(INTENT), type=Intent)
    except (errors.StoreError, ValueError, RecursionError):
        return None


def read_journal(vm: Folder, name: str) -> Mapping[str, DiskJournal]:
    """Return how far the disks of the partial point ``name`` got; {} if nothing usable."""
    try:
        with vm.folder(name) as partial:
            return journals.decode(partial.read(JOURNAL, limit=journals.LIMIT))
    except errors.StoreError:
        return {}


class Stage(AbstractContextManager["Stage"]):
    """A partial point being filled; made by ``Store.stage`` or ``resume``, closed by the caller.

    Closed without ``commit`` it stays as a leftover, for the next run to go on with or clear away.

    Args:
        vm: the VM's folder; owned from now on.
        vm_uuid: its name.
        time: of the point.
        resumed: whether the directory is there already, from an earlier run.
        ended: called once when this stage is closed.
        committed: called after the commit with the point; returns warnings.
    """

    def __init__(
        self,
        vm: Folder,
        *,
        vm_uuid: str,
        time: str,
        resumed: bool = False,
        ended: Callable[[], None],
        committed: Callable[[Point], tuple[str, ...]],
    ) -> None:
        self.vm_uuid = vm_uuid
        self.time = time
        self._vm = vm
        self._ended = ended
        self._committed = committed
        self._images: dict[str, Image] = {}
        self._metadata: set[str] = set()
        self._journal_lock = threading.Lock()
        name = partial_name(time)
        self._journaled: Mapping[str, DiskJournal] = read_journal(vm, name) if resumed else {}
        self._partial = vm.folder(name) if resumed else vm.make_folder(name)

    @property
    def path(self) -> Path:
        """Where the point is being made."""
        return self._partial.path

    @property
    def journaled(self) -> Mapping[str, DiskJournal]:
        """How far the disks are, by device, as it is on record; replaced, never changed."""
        return self._journaled

    def __repr__(self) -> str:
        return f"<Stage {self.path}>"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close everything, the images too; a second call does nothing."""
        for image in self._images.values():
            image.close()
        if self._partial.fd >= 0:
            self._partial.close()
            self._vm.close()
            self._ended()

    def record(self, intent: Intent) -> None:
        """Put ``intent`` on disk, so that whoever finds this point knows what was going on.

        Raises:
            StoreError: it could not be written; the pool must not be changed.
        """
        self._partial.write(INTENT, msgspec.json.format(msgspec.json.encode(intent)) + b"\n")
        self._vm.sync()

    def journal(self, entry: DiskJournal) -> None:
        """Put on disk how far one disk is; any number of threads may do so at once.

        All that ``entry`` claims must be on disk before: ``Image.flush``, or ``finish``.

        Raises:
            StoreError: it could not be written; the older entry of that disk stays.
        """
        with self._journal_lock:
            self._write_journal({**self._journaled, entry.device: entry})

    def _write_journal(self, disks: Mapping[str, DiskJournal]) -> None:
        self._partial.write(JOURNAL, journals.encode(disks))
        self._journaled = disks

    def new_image(self, file: str, *, size: int) -> Image:
        """Make an image of ``size`` zero bytes; ``file`` is a name of ``file_names``.

        It takes the place of an image that was begun under that name in this partial point.

        Raises:
            StoreError: it cannot be made.
        """
        self.discard_image(file)
        image = Image.create(self._files(file), size=size)
        self._images[file] = image
        return image

    def reopened_image(self, file: str, *, size: int) -> Image:
        """Go on with the image ``file`` that an earlier run left.

        If it was finished then, ``Image.recheck`` is all that it needs.

        Raises:
            ImageDamaged: it is not there with its right size; begin anew.
            StoreError: it cannot be opened for writing.
        """
        files = self._files(file)
        self._close_image(file)
        image = Image.reopen(files, size=size)
        self._images[file] = image
        return image

    def discard_image(self, file: str) -> None:
        """Remove what was begun under the name ``file``, if anything, and its entry in the journal.

        Raises:
            StoreError: it cannot be removed; what is left of it is not gone on with.
        """
        files = self._files(file)
        self._close_image(file)
        with self._journal_lock:
            disks = {d: e for d, e in self._journaled.items() if file_names(d)[0] != file}
            # first: an entry must not outlive the image that it speaks of
            if len(disks) < len(self._journaled):
                self._write_journal(disks)
        for name in (files.name, files.digests):
            self._partial.remove_all(name)

    def cloned_image(
        self,
        file: str,
        *,
        base_time: str,
        base: DiskPoint,
        size: int,
        copied: Callable[[int], None] | None = None,
    ) -> Image:
        """Make an image of ``size`` bytes that begins as disk ``base`` of the point ``base_time``.

        Without reflinks that is a copy of all that the base stores, which can take long: ``copied``
        hears of each step in bytes, and what it raises ends the copy. As ``new_image`` it replaces
        what was begun under that name.

        Raises:
            ImageDamaged: the base is damaged or not whole; the disk needs a full copy.
            StoreError: the new image cannot be made.
        """
        if not self._vm.is_folder(base_time):
            raise errors.ImageDamaged(f"{self._vm.path / base_time} is gone, so it is no base")
        with self._vm.folder(base_time) as point:
            if damage.recorded(point) & {base.device, damage.UNREADABLE}:
                raise errors.ImageDamaged(
                    f"{point.path / base.file} is damaged, so it is no base for another copy"
                )
            files = ImageFiles(point, base.file, base.digests)
            problem = imagefiles.digests_flaw(files, size=base.size, root=base.digest_root)
            if problem:
                raise errors.ImageDamaged(
                    f"{point.path / base.file} is no base for another copy: {problem}"
                )
            self.discard_image(file)
            image = Image.clone(
                self._files(file),
                base=files,
                base_size=base.size,
                size=size,
                copied=copied,
            )
        self._images[file] = image
        return image

    def _close_image(self, file: str) -> None:
        earlier = self._images.pop(file, None)
        if earlier is not None:
            earlier.close()

    def _files(self, file: str) -> ImageFiles:
        stem, _, suffix = file.rpartition(".")
        if suffix != "raw" or not _FILE_NAME.fullmatch(stem):
            raise errors.StoreError(f"{file!r} cannot be the name of an image in {self.path}")
        return ImageFiles(self._partial, file, f"{stem}.b3")

    def write_metadata(self, name: str, content: bytes) -> None:
        """Add the small file ``name``, such as ``vm.xml``.

        Raises:
            StoreError: it cannot be written, or ``name`` is taken by something else.
        """
        if not _FILE_NAME.fullmatch(name) or name in _RESERVED or name.endswith((".raw", ".b3")):
            raise errors.StoreError(f"{name!r} cannot be the name of metadata in {self.path}")
        self._partial.write(name, content)
        self._metadata.add(name)

    def commit(self, point: Point) -> tuple[str, ...]:
        """Make this the restore point ``point``: when it returns, the point survives anything.

        Images of disks that ``point`` does not name (they failed) are removed.

        Returns:
            Warnings about what is only convenience: the links to this point.

        Raises:
            StoreError: nothing was committed; the partial point stays.
        """
        self._check(point)
        self._remove_strays(point)
        self._partial.write(POINT, catalogue.encode(point))
        self._vm.rename(partial_name(self.time), self.time)
        return (*self._tidy(), *self._committed(point))

    def _check(self, point: Point) -> None:
        if (point.time, point.vm_uuid) != (self.time, self.vm_uuid) or not point.disks:
            raise errors.StoreError(f"cannot commit {self.path}: the record is of another point")
        for disk in point.disks:
            image = self._images.get(disk.file)
            if image is None or not image.root or image.root != disk.digest_root:
                raise errors.StoreError(f"cannot commit {self.path}: {disk.file} is not finished")
            if self._files(disk.file).digests != disk.digests or image.size != disk.size:
                raise errors.StoreError(f"cannot commit {self.path}: {disk.file} is not as told")

    def _remove_strays(self, point: Point) -> None:
        images = {name for disk in point.disks for name in (disk.file, disk.digests)}
        for name in self._partial.names():
            if name not in images | self._metadata | set(_UNFINISHED):
                self._partial.remove_all(name)

    def _tidy(self) -> tuple[str, ...]:
        try:
            times = [n for n in self._vm.names() if catalogue.is_time(n) and self._vm.is_folder(n)]
            self._vm.link(LATEST, max(times))
            for time in times:  # of all: a run may have been killed between its commit and this
                self._forget_work(time)
        except errors.StoreError as exc:
            return (str(exc),)
        return ()

    def _forget_work(self, time: str) -> None:
        with self._vm.folder(time) as point:
            for name in _UNFINISHED:
                point.remove(name)
