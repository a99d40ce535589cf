"""Store: a directory of restore points, one folder per VM: lock, stage, list, verify.

::

    STORE/
    ├── cbtfs.json                       format version, uuid, created, tool version
    ├── by-name/ web1 -> ../VM-UUID
    └── VM-UUID/                         of a disk without VM: vdi-UUID/
        ├── 20261122T020000Z/            a restore point (see stage.py how it appears)
        │   ├── point.json  vm.xml  xvda.raw  xvda.b3
        │   ├── damaged.json             only if verify found damage
        │   ├── verified.json            when verify found which disk whole
        │   └── pinned.json              only if somebody wants to keep it
        ├── latest -> 20261122T020000Z
        ├── .lock                        held by whoever works on this VM
        ├── .partial-20261122T020000Z/   work in progress, or what is left of it, with its journal
        └── .removed-20261121T020000Z/   a point on its way out

Rules of this file:

1. A store is hostile input: what is not as it should be is left alone, told in ``problems``, and
   never followed out of the store.
2. Points are written and removed under their VM's lock; links, pins and records of damage are
   written under the store's, and a point goes out of sight under both.
3. A store on a read-only file system can be listed and verified.
"""

import os
import re
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from . import (
    __version__,
    catalogue,
    damage,
    errors,
    image,
    imagefiles,
    lock,
    openfiles,
    pin as pins,
    removal,
    stage as stages,
    tree,
    verified,
)
from .catalogue import Catalogue, DiskPoint, Point, Reference, VMHistory
from .damage import Damage, Disagreement, PoolDamage, Scope
from .extents import Extent
from .folder import FOLDER_MODE, Folder, told
from .imagefiles import ImageFiles
from .retention import Facts
from .stage import Intent, Leftover, Stage, file_names

__all__ = [
    "DiskResult",
    "Intent",
    "Leftover",
    "Stage",
    "Store",
    "Unlisted",
    "VerifyResult",
    "file_names",
    "is_store",
    "open_store",
]

FORMAT = 1
"""Version of the layout; raised only when an older cbtfs could do harm to a newer store."""

_MARKER = "cbtfs.json"
_NAMES = "by-name"
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_VM_FOLDER = re.compile(f"(?:vdi-)?{_UUID}")
_OUR_LINK = re.compile(rf"\.\./((?:vdi-)?{_UUID})")
_NEW_STORE_MAY_HAVE = {lock.NAME, f"{_MARKER}.new", "lost+found"}


class _Marker(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    uuid: str
    created: str
    tool: str


@dataclass(frozen=True, slots=True)
class DiskResult:
    """What ``verify`` found on one disk."""

    disk: DiskPoint
    damage: Damage


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What ``verify`` found in one point; ``warnings`` say what could not be recorded."""

    point: Point
    disks: tuple[DiskResult, ...]
    warnings: tuple[str, ...] = ()

    @property
    def damaged(self) -> bool:
        """Whether any disk is damaged."""
        return any(result.damage.found for result in self.disks)


@dataclass(frozen=True, slots=True)
class Unlisted:
    """A restore point that is not listed, because something of it is missing or unreadable."""

    vm_uuid: str
    time: str
    why: str


@contextmanager
def open_store(path: Path, *, create: bool = True) -> Generator["Store"]:
    """Open the store at ``path``; one is made there if ``create`` and the directory is empty.

    Only the directory itself is made, not its parents: a missing parent is more often a file
    system that is not mounted than a wish.

    Raises:
        StoreError: there is none, or it is of a newer format.
    """
    if create:
        with told("create the store", path), suppress(FileExistsError):
            path.mkdir(mode=FOLDER_MODE)
    with Folder.open(path) as folder:
        if create and not folder.exists(_MARKER):
            _initialise(folder)
        yield Store(folder, _read_marker(folder).uuid)


def is_store(path: Path) -> bool:
    """Tell whether there is a store at ``path``, of whichever format."""
    return (path / _MARKER).exists()


def _initialise(folder: Folder) -> None:
    with lock.held(folder, wait=True):
        names = set(folder.names())
        if _MARKER in names:
            return  # another process was quicker
        if not names <= _NEW_STORE_MAY_HAVE:
            raise errors.StoreError(
                f"{folder.path} is no store and not empty; name an empty directory"
            )
        marker = _Marker(
            format=FORMAT, uuid=str(uuid.uuid4()), created=_now(), tool=f"cbtfs {__version__}"
        )
        folder.write(_MARKER, msgspec.json.format(msgspec.json.encode(marker)) + b"\n")


def _read_marker(folder: Folder) -> _Marker:
    if not folder.exists(_MARKER):
        raise errors.StoreError(
            f"{folder.path} is no store: it has no {_MARKER}; the first 'cbtfs sync' makes one"
        )
    try:
        marker = msgspec.json.decode(folder.read(_MARKER), type=_Marker)
    except (ValueError, RecursionError) as exc:
        raise errors.StoreError(f"{folder.path / _MARKER} cannot be read: {exc}") from None
    if marker.format != FORMAT:
        raise errors.StoreError(
            f"{folder.path} has format {marker.format}, this cbtfs knows {FORMAT}; use a newer one"
        )
    return marker


class Store:
    """An open store; made by ``open_store``.

    Everything blocks. Different threads may work on different VMs, or read.

    Attributes:
        path: of its directory.
        uuid: its identity, which tags in the pool name.
        problems: sentences about what the last ``catalogue`` found amiss.
        unlisted: the points among that; damage, if anybody trusted in them.
    """

    def __init__(self, folder: Folder, identity: str) -> None:
        self.path = folder.path
        self.uuid = identity
        self.problems: tuple[str, ...] = ()
        self.unlisted: tuple[Unlisted, ...] = ()
        self._folder = folder
        self._staged: set[tuple[str, str]] = set()
        self._shares: bool | None = None  # not known

    def __repr__(self) -> str:
        return f"<Store {self.path}>"

    # ── Reading ──────────────────────────────────────────────────────────────────────────────

    def catalogue(self) -> Catalogue:
        """Read all restore points; what cannot be read is left out, and told in ``problems``.

        Raises:
            StoreError: the store's own directory cannot be read.
        """
        problems: list[str] = []
        unlisted: list[Unlisted] = []
        histories: dict[str, VMHistory] = {}
        for name in self._folder.names():
            if _VM_FOLDER.fullmatch(name):
                points = self._read_vm(name, problems, unlisted)
                if points:
                    histories[name] = catalogue.history_of(name, points)
        problems += [
            f"{self.point_path(point.vm_uuid, point.time)} is not listed: {point.why}"
            for point in unlisted
        ]
        self.problems, self.unlisted = tuple(problems), tuple(unlisted)
        return Catalogue(histories)

    def history(self, vm_uuid: str) -> VMHistory | None:
        """Read the restore points of one VM, as ``catalogue`` does for all; None without any."""
        points = self._read_vm(vm_uuid, [], [])
        return catalogue.history_of(vm_uuid, points) if points else None

    def keys(self) -> list[str]:
        """Return the names of the directories of VMs and disks, with points or without.

        Raises:
            StoreError: the store's own directory cannot be read.
        """
        return sorted(name for name in self._folder.names() if _VM_FOLDER.fullmatch(name))

    def inspect(self, vm_uuid: str) -> tuple[VMHistory | None, tuple[str, ...]]:
        """Read the restore points of one VM as ``history`` does, and say what cannot be read."""
        problems: list[str] = []
        unlisted: list[Unlisted] = []
        points = self._read_vm(vm_uuid, problems, unlisted)
        problems += [f"{self.point_path(vm_uuid, p.time)}: {p.why}" for p in unlisted]
        return catalogue.history_of(vm_uuid, points) if points else None, tuple(problems)

    def _read_vm(self, vm_uuid: str, problems: list[str], unlisted: list[Unlisted]) -> list[Point]:
        points: list[Point] = []
        with ExitStack() as stack:
            try:
                vm = stack.enter_context(self._folder.folder(vm_uuid))
                times = [name for name in vm.names() if catalogue.is_time(name)]
            except errors.StoreError as exc:
                problems.append(f"{self.path / vm_uuid} is not listed: {exc}")
                return []
            for time in times:
                try:
                    points.append(_read_point(vm, time, vm_uuid=vm_uuid))
                except errors.StoreError as exc:
                    unlisted.append(Unlisted(vm_uuid, time, str(exc)))
        return points

    def damaged(self, vm_uuid: str, time: str) -> frozenset[str]:
        """Return the devices of a point that ``verify`` found damaged; none may be a base."""
        with self._vm(vm_uuid) as vm, vm.folder(time) as point:
            found = damage.recorded(point)
            if damage.UNREADABLE not in found:
                return found
            return frozenset(d.device for d in _read_point(vm, time, vm_uuid=vm_uuid).disks)

    def facts(self, history: VMHistory) -> dict[str, Facts]:
        """Return what is known of each point of a VM beside its record, by time."""
        times = {point.time for point in history.points}
        in_use = openfiles.identities(lambda path: path.parent.name in times)
        facts: dict[str, Facts] = {}
        with self._vm(history.uuid) as vm:
            for point in history.points:
                with vm.folder(point.time) as folder:
                    files = (folder.identity(disk.file) for disk in point.disks)
                    facts[point.time] = Facts(
                        pinned=pins.is_pinned(folder),
                        open=any(file in in_use for file in files),
                        damaged=self.damaged(history.uuid, point.time),
                    )
        return facts

    def is_pinned(self, vm_uuid: str, time: str) -> bool:
        """Tell whether somebody wants to keep a point whatever the retention says."""
        with self._vm(vm_uuid) as vm, vm.folder(time) as point:
            return pins.is_pinned(point)

    @contextmanager
    def opened_point(self, vm_uuid: str, time: str) -> Generator[Folder]:
        """Yield the directory of a point.

        Raises:
            StoreError: it is not there any more, or this user may not look.
        """
        with self._vm(vm_uuid) as vm, vm.folder(time) as point:
            yield point

    def point_path(self, vm_uuid: str, time: str) -> Path:
        """Return the directory of a point."""
        return self.path / vm_uuid / time

    def free_space(self) -> int:
        """Return the bytes that this user can still write to the store's file system."""
        with told("look at", self.path):
            info = os.fstatvfs(self._folder.fd)
        return info.f_bavail * info.f_frsize

    def clone_size(self, vm_uuid: str, images: Iterable[tuple[str, DiskPoint]]) -> int:
        """Return the bytes that clones of ``images`` take, each a disk of the point of a time.

        That is nothing where files can share extents, and nothing is known of what is gone.

        Raises:
            StoreError: nothing can be written here.
        """
        chosen = list(images)
        if not chosen or self.reflink_supported():
            return 0
        total = 0
        for time, disk in chosen:
            with suppress(errors.StoreError), self.opened_point(vm_uuid, time) as point:
                total += point.stored(disk.file) + point.stored(disk.digests)
        return total

    def reflink_supported(self) -> bool:
        """Tell whether files in this store can share extents, by trying it once.

        Raises:
            StoreError: nothing can be written here.
        """
        if self._shares is None:
            self._shares = image.reflink_supported(self.path)
        return self._shares

    # ── Writing ──────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def lock(self, vm_uuid: str) -> Generator[None]:
        """Hold the lock of a VM; its folder is made if need be.

        The kernel releases it when the process ends, however it ends.

        Raises:
            StoreLocked: another run has it; the text says who.
        """
        known = self._folder.exists(vm_uuid)
        with self._vm(vm_uuid, create=True) as vm:
            if not known:
                self._folder.sync()
            with lock.held(vm, wait=False):
                yield

    def stage(self, vm_uuid: str, *, time: str) -> Stage:
        """Begin the restore point ``time``; the caller holds the VM's lock, and closes the stage.

        Raises:
            StoreError: there is such a point already, or a leftover of one.
        """
        if not catalogue.is_time(time):
            raise errors.StoreError(f"{time!r} cannot be the name of a restore point")
        return self._stage(vm_uuid, time, resumed=False)

    def resume(self, leftover: Leftover) -> Stage:
        """Go on with a partial point; the caller holds the VM's lock, and closes the stage.

        Raises:
            StoreError: it is not there any more, or there is a point of that time.
        """
        return self._stage(leftover.vm_uuid, leftover.time, resumed=True)

    def _stage(self, vm_uuid: str, time: str, *, resumed: bool) -> Stage:
        with ExitStack() as stack:
            vm = stack.enter_context(self._vm(vm_uuid))
            if vm.exists(time):
                raise errors.StoreError(f"cannot create {vm.path / time}: it exists already")
            stage = Stage(
                vm,
                vm_uuid=vm_uuid,
                time=time,
                resumed=resumed,
                ended=lambda: self._staged.discard((vm_uuid, time)),
                committed=self._update_names,
            )
            self._staged.add((vm_uuid, time))
            stack.pop_all()
        return stage

    def leftovers(self, vm_uuid: str) -> list[Leftover]:
        """Return the partial points of ended runs, oldest first; the caller holds the VM's lock.

        Stages of this store object that are still open are not among them.
        """
        if not self._folder.exists(vm_uuid):
            return []
        found: list[Leftover] = []
        with self._vm(vm_uuid) as vm:
            for name in vm.names():
                time = stages.partial_time(name)
                if time and (vm_uuid, time) not in self._staged:
                    found.append(
                        Leftover(
                            vm_uuid,
                            time,
                            vm.path / name,
                            stages.read_intent(vm, name),
                            stages.read_journal(vm, name),
                        )
                    )
        return found

    def times(self, vm_uuid: str) -> frozenset[str]:
        """Return the times that no new point can have: of points, listed or not, and partial ones.

        Raises:
            StoreError: the VM has no folder, or it cannot be read.
        """
        with self._vm(vm_uuid) as vm:
            names = vm.names()
        taken = (stages.partial_time(name) or name for name in names)
        return frozenset(time for time in taken if catalogue.is_time(time))

    def abandon(self, leftover: Leftover) -> None:
        """Remove a partial point; the caller holds the VM's lock and has tidied up the pool.

        Raises:
            StoreError: it cannot be removed.
        """
        with self._vm(leftover.vm_uuid) as vm:
            vm.remove_all(stages.partial_name(leftover.time))

    def pin(self, vm_uuid: str, time: str, *, wanted: bool) -> bool:
        """Pin a point, or take its pin away; return False if nothing had to be done.

        Raises:
            StoreError: there is no such point any more, or nothing can be written.
        """
        with (
            self._vm(vm_uuid) as vm,
            lock.held(self._folder, wait=True),
            vm.folder(time) as point,
        ):
            return pins.pin(point, now=_now()) if wanted else pins.unpin(point)

    def remove(self, vm_uuid: str, time: str) -> bool:
        """Remove a point; return False if it has been pinned meanwhile, and stays.

        The caller holds the VM's lock.

        Raises:
            StoreError: it cannot be removed; it is as it was, or what is left of it is not listed.
        """
        with self._vm(vm_uuid) as vm:
            with lock.held(self._folder, wait=True):
                if self.is_pinned(vm_uuid, time):
                    return False
                name = removal.hide(vm, time)
            vm.remove_all(name)
        return True

    def removed(self, vm_uuid: str) -> tuple[str, ...]:
        """Return the times of the points that a killed run has begun to remove, oldest first."""
        with self._vm(vm_uuid) as vm:
            return removal.times(vm)

    def sweep(self, vm_uuid: str) -> int:
        """Finish what killed runs have begun to remove; return how many points that was.

        The caller holds the VM's lock.
        """
        with self._vm(vm_uuid) as vm:
            return removal.sweep(vm)

    def verify(
        self,
        reference: Reference,
        *,
        advanced: Callable[[int], None] | None = None,
        scope: Scope | None = None,
    ) -> VerifyResult:
        """Compare images with their digests, and record in the point what is damaged or whole.

        A disk with damage on record that is found whole again loses the record.

        Args:
            reference: a point, or one disk of it.
            advanced: called with the bytes checked since the last call, up to the disks' sizes.
            scope: what of each disk to compare; None for all.

        Raises:
            StoreError: the point cannot be read.
        """
        point, vm_uuid = reference.point, reference.history.uuid
        disks = (reference.disk,) if reference.disk else point.disks
        results: list[DiskResult] = []
        warnings: list[str] = []
        with self._vm(vm_uuid) as vm, vm.folder(point.time) as folder:
            for disk in disks:
                files = ImageFiles(folder, disk.file, disk.digests)
                found = damage.find(
                    files, size=disk.size, root=disk.digest_root, advanced=advanced, scope=scope
                )
                results.append(DiskResult(disk, found))
                warnings += self.record_check(folder, disk.device, found)
        return VerifyResult(point, tuple(results), tuple(warnings))

    @contextmanager
    def image_files(self, reference: Reference, disk: DiskPoint) -> Generator[ImageFiles]:
        """Yield where the image of ``disk``, one of the point of ``reference``, is.

        Raises:
            StoreError: the point is gone, or cannot be opened.
        """
        with self.opened_point(reference.history.uuid, reference.point.time) as folder:
            yield ImageFiles(folder, disk.file, disk.digests)

    def record_check(self, point: Folder, device: str, found: Damage) -> list[str]:
        """Put on record what a check of ``device`` found; return what prevents that, if it matters.

        That a disk is whole need not be on record: then it is only verified more often.
        """
        if found.sampled and not found.found:
            return []
        now = _now()
        try:
            with lock.held(self._folder, wait=True):
                damage.record(point, device, found, now=now)
                whole = not found.found and device not in damage.recorded(point)
                verified.record(point, device, now=now if whole else "")
        except errors.StoreError as exc:
            if found.found or damage.recorded(point):
                return [f"the result for {device} is not on record: {exc}"]
        return []

    def record_agreement(
        self,
        reference: Reference,
        device: str,
        found: Disagreement,
        *,
        unproven: Callable[[Sequence[Extent]], Iterator[Extent]],
    ) -> list[str]:
        """Put on record what of ``device`` is not as the pool has it; see ``damage.record_pool``.

        Returns:
            What prevents that, if it matters.

        Raises:
            StoreError: the point is gone.
        """
        now = _now()
        with ExitStack() as stack:
            point = stack.enter_context(
                self.opened_point(reference.history.uuid, reference.point.time)
            )
            try:
                stack.enter_context(lock.held(self._folder, wait=True))
                damage.record_pool(point, device, found, unproven=unproven, now=now)
                if device in damage.recorded(point):
                    verified.record(point, device, now="")
            except errors.StoreError as exc:
                if found.blocks or damage.recorded(point):
                    return [f"the result for {device} is not on record: {exc}"]
        return []

    def pool_damage(self, vm_uuid: str, time: str) -> Mapping[str, PoolDamage]:
        """Return what of each disk of a point is on record as not what the pool has."""
        with self.opened_point(vm_uuid, time) as point:
            return damage.by_pool(point)

    def _vm(self, vm_uuid: str, *, create: bool = False) -> Folder:
        if not _VM_FOLDER.fullmatch(vm_uuid):
            raise errors.StoreError(f"{vm_uuid!r} is no uuid, so {self.path} can have no such VM")
        return self._folder.folder(vm_uuid, create=create)

    # ── Names ────────────────────────────────────────────────────────────────────────────────

    def _update_names(self, point: Point) -> tuple[str, ...]:
        """Make ``by-name`` show the VM of ``point``; return what went wrong."""
        try:
            with (
                lock.held(self._folder, wait=True),
                self._folder.folder(_NAMES, create=True) as names,
            ):
                plain = tree.safe_names([(point.vm_uuid, point.vm_name)])[point.vm_uuid]
                if names.link_target(plain) == f"../{point.vm_uuid}":
                    return ()
                return self._rebuild_names(names)
        except errors.StoreError as exc:
            return (str(exc),)

    def _rebuild_names(self, names: Folder) -> tuple[str, ...]:
        # a new name can make another VM's name ambiguous, so all of them are looked at
        pairs = [(vm.uuid, vm.name) for vm in self.catalogue().vms.values()]
        wanted = {name: f"../{key}" for key, name in tree.safe_names(pairs).items()}
        warnings: list[str] = []
        for name, wish in wanted.items():
            target = names.link_target(name)
            if target is None and names.exists(name):
                warnings.append(f"{names.path / name} is in the way of a link to {wish}")
            elif target != wish:
                names.link(name, wish)
        # only now: a VM is never without a link
        for name in names.names():
            target = names.link_target(name)
            if target is not None and _OUR_LINK.fullmatch(target) and name not in wanted:
                names.remove(name)
        return tuple(warnings)


def _read_point(vm: Folder, time: str, *, vm_uuid: str) -> Point:
    """Return the point ``time``, once it is sure that its files are there.

    Raises:
        StoreError: it is not a complete point.
    """
    with vm.folder(time) as folder:
        point = catalogue.decode(folder.read(stages.POINT))
        if (point.time, point.vm_uuid) != (time, vm_uuid):
            raise errors.StoreError(f"its {stages.POINT} is of another point, {point.time}")
        for disk in point.disks:
            files = ImageFiles(folder, disk.file, disk.digests)
            problem = imagefiles.flaw(files, size=disk.size)
            if problem:
                raise errors.StoreError(problem)
    return point


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
