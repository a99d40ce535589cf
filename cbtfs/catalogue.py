"""Catalogue: the restore points of a store as records, and their JSON form (``point.json``).

A store holds one directory per VM, named by its uuid, and in it one directory per restore
point, named by its time. ``point.json`` describes one point completely, for cbtfs and for ``jq``.
This module only knows bytes and records; ``store.py`` reads and writes the files.

Times are UTC in basic ISO form without colons, ``20261122T020000Z``, so that names sort by time.
A disk without a VM is kept like a VM of one disk: its directory is ``vdi-`` and the disk's uuid,
its device ``disk``.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from . import errors, names

SCHEMA = 1
"""Version of ``point.json``; raised only when an older cbtfs could misread a newer file."""

TIME_PATTERN = re.compile(r"[0-9]{8}T[0-9]{6}Z")
"""What the name of a restore point looks like."""

_TIME_FORMAT = "%Y%m%dT%H%M%SZ"
_TIME_SPEC = re.compile(r"latest(?:~([0-9]{1,6}))?|[0-9][0-9TZ]{0,15}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._~-]{0,254}")


class DiskPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a restore point: a complete image and how it came about.

    Attributes:
        device: name of the disk in its VM, ``xvda``.
        file: name of the raw image beside ``point.json``.
        digests: name of the digest array beside it.
        digest_root: hex digest of the digest array.
        size: virtual size in bytes.
        snapshot_uuid: the pool's snapshot that the image equals; base of the next increment.
        cbt: whether changed block tracking was on when the snapshot was taken.
        method: ``full``, ``incremental``, ``compare`` or ``resume``.
        reason: one of ``plan.Reason``.
        detail: a sentence that explains the reason.
        resumed: of a ``resume`` the method with which it had begun, else "".
        base: time of the point it was cloned from, "" for none.
        extents: how many extents were read.
        bytes_changed: what the pool said had changed; of a full, the size.
        blocks_sampled: blocks called unchanged by the pool that were read and compared.
        blocks_mismatched: those of them that had changed nevertheless.
        allocated: bytes that the pool said may hold data; -1 if it was not asked or cannot tell.
        seconds: time that the copy took.
    """

    device: str
    file: str
    vdi_uuid: str
    size: int
    digests: str = ""
    digest_root: str = ""
    vdi_name: str = ""
    sr_uuid: str = ""
    snapshot_uuid: str = ""
    cbt: bool = False
    method: str = "full"
    reason: str = ""
    detail: str = ""
    resumed: str = ""
    base: str = ""
    base_snapshot_uuid: str = ""
    extents: int = 0
    bytes_changed: int = 0
    blocks_sampled: int = 0
    blocks_mismatched: int = 0
    allocated: int = -1
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0


class DiskFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A disk that is missing from a partial point, and why."""

    device: str
    vdi_uuid: str
    error: str


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One restore point of one VM.

    Attributes:
        tool: version of cbtfs that made it.
        time: name of the point, ``20261122T020000Z``.
        vm_uuid: name of the VM's directory: its uuid, or ``vdi-`` and a disk's uuid.
        job: of the configuration, that made it; "" for none.
        snapshot_vm_uuid: the snapshot VM, which no longer exists; "" for a disk without VM.
        started: ISO time with colons, for people and ``jq``.
        state: ``complete``, or ``partial`` if some disks failed.
    """

    time: str
    vm_uuid: str
    vm_name: str = ""
    pool_uuid: str = ""
    job: str = ""
    snapshot_vm_uuid: str = ""
    disks: tuple[DiskPoint, ...] = ()
    started: str = ""
    finished: str = ""
    state: str = "complete"
    failures: tuple[DiskFailure, ...] = ()
    warnings: tuple[str, ...] = ()
    tool: str = ""
    schema: int = SCHEMA

    def disk(self, device: str) -> DiskPoint | None:
        """Return the disk named ``device``, or None if this point has none."""
        return next((disk for disk in self.disks if disk.device == device), None)


@dataclass(frozen=True, slots=True)
class VMHistory:
    """The restore points of one VM, oldest first."""

    uuid: str
    name: str
    points: tuple[Point, ...] = ()

    @property
    def latest(self) -> Point | None:
        """The newest point, or None."""
        return self.points[-1] if self.points else None


@dataclass(frozen=True, slots=True)
class Reference:
    """What a POINT argument names: a point of a VM, perhaps one disk of it."""

    history: VMHistory
    point: Point
    disk: DiskPoint | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All restore points of a store, by the name of the VM's directory."""

    vms: Mapping[str, VMHistory]

    def find(self, name_or_uuid: str) -> VMHistory:
        """Return the history of the VM with this uuid, or with this name if only one has it.

        Raises:
            NotFound: no VM of the store is called so.
            UsageError: several are; the text lists their uuids.
        """
        history = self.vms.get(name_or_uuid)
        if history is not None:
            return history
        found = sorted(h.uuid for h in self.vms.values() if h.name == name_or_uuid)
        found = found or sorted(
            h.uuid for h in self.vms.values() if name_or_uuid in names.spellings(h.name, h.uuid)
        )
        if not found:
            raise errors.NotFound(f"the store has no restore point of a VM called {name_or_uuid!r}")
        if len(found) > 1:
            raise errors.UsageError(
                f"{len(found)} VMs in the store are called {name_or_uuid!r};"
                f" use a uuid: {', '.join(found)}"
            )
        return self.vms[found[0]]

    def resolve(self, text: str) -> Reference:
        """Return what ``text`` names: ``VM/TIME`` or ``VM/TIME/DISK``.

        TIME is a time, a prefix of one that no other point shares, ``latest``, or ``latest~N`` for
        the N-th before it. VM is a uuid or a name, which may itself contain slashes.

        Raises:
            NotFound: there is no such VM, point or disk.
            UsageError: ``text`` has another form, or names more than one.
        """
        vm, _, time = text.rpartition("/")
        if _TIME_SPEC.fullmatch(time) and vm:
            history = self.find(vm)
            return Reference(history, _find_point(history, time))
        device = time
        vm, _, time = vm.rpartition("/")
        if not (_TIME_SPEC.fullmatch(time) and vm and device):
            raise errors.UsageError(
                f"{text!r} is not a restore point; write VM/TIME or VM/TIME/DISK,"
                " for example web1/latest or web1/20261122T020000Z/xvda"
            )
        history = self.find(vm)
        point = _find_point(history, time)
        disk = point.disk(device)
        if disk is None:
            names = ", ".join(d.device for d in point.disks) or "none"
            raise errors.NotFound(
                f"{history.name}/{point.time} has no disk {device!r}; it has: {names}"
            )
        return Reference(history, point, disk)


def _find_point(history: VMHistory, spec: str) -> Point:
    match = _TIME_SPEC.fullmatch(spec)
    if match is not None and spec.startswith("latest"):
        back = int(match[1] or 0)
        if back < len(history.points):
            return history.points[-1 - back]
        raise errors.NotFound(
            f"{history.name} has {len(history.points)} restore points, so there is no {spec}"
        )
    found = [point for point in history.points if point.time.startswith(spec)]
    if not found:
        raise errors.NotFound(
            f"{history.name} has no restore point {spec}; see 'cbtfs list' for those it has"
        )
    if len(found) > 1:
        times = ", ".join(point.time for point in found[:5])
        more = ", …" if len(found) > 5 else ""
        raise errors.UsageError(
            f"{len(found)} restore points of {history.name} begin with {spec}: {times}{more}"
        )
    return found[0]


def history_of(uuid: str, points: Iterable[Point]) -> VMHistory:
    """Return ``points`` in order as the history of ``uuid``, named as the newest point says."""
    ordered = tuple(sorted(points, key=lambda point: point.time))
    name = ordered[-1].vm_name if ordered else ""
    return VMHistory(uuid, name or uuid, ordered)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────


def encode(point: Point) -> bytes:
    """Return ``point.json``: indented JSON, UTF-8, with a final newline.

    Whatever UTF-8 cannot express (an undecodable path in a warning) becomes ``?``: a restore point
    must not fail to be committed for a character in a message.
    """
    return as_json(point)


def as_json(record: msgspec.Struct) -> bytes:
    """Return any record in the form that ``encode`` gives a point."""
    text = json.dumps(msgspec.to_builtins(record), indent=2, ensure_ascii=False)
    return f"{text}\n".encode(errors="replace")


class _Versioned(msgspec.Struct):
    schema: int


def decode(data: bytes) -> Point:
    """Return the point that ``data``, the bytes of a ``point.json``, describes.

    Raises:
        StoreError: it is not JSON, lacks something, is of a newer schema, or names files outside
            its directory.
    """
    try:
        schema = msgspec.json.decode(data, type=_Versioned).schema
        if schema != SCHEMA:
            raise errors.StoreError(
                f"point.json has schema {schema}, this cbtfs reads {SCHEMA}; use a newer cbtfs"
            )
        point = msgspec.json.decode(data, type=Point)
    except (ValueError, RecursionError) as exc:  # msgspec's errors are ValueErrors
        raise errors.StoreError(f"point.json cannot be read: {exc}") from None
    _check_names(point)
    return point


def _check_names(point: Point) -> None:
    if not is_time(point.time):
        raise errors.StoreError(f"point.json has a bad time: {point.time!r}")
    for disk in point.disks:
        check_disk(disk)


def check_disk(disk: DiskPoint) -> None:
    """Refuse a record that names files outside its point's directory, or has no possible size.

    Raises:
        StoreError: it is such a record.
    """
    if not _FILE_NAME.fullmatch(disk.file) or not _FILE_NAME.fullmatch(disk.digests or "_"):
        raise errors.StoreError(
            f"point.json names a file outside its directory: {disk.file!r}, {disk.digests!r}"
        )
    if disk.size < 0:
        raise errors.StoreError(f"point.json has a negative size for {disk.device}")


# ── Times ────────────────────────────────────────────────────────────────────────────────────


def format_time(when: datetime) -> str:
    """Return ``when``, an aware time, as the name of a point: ``20261122T020000Z``."""
    return when.astimezone(UTC).strftime(_TIME_FORMAT).rjust(16, "0")


def parse_time(text: str) -> datetime:
    """Return the UTC time that ``text``, the name of a point, stands for.

    Raises:
        UsageError: ``text`` is not such a name.
    """
    if TIME_PATTERN.fullmatch(text):
        try:
            return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
        except ValueError:
            pass
    raise errors.UsageError(f"{text!r} is not a time; write for example 20261122T020000Z")


def is_time(name: str) -> bool:
    """Tell whether ``name`` can be the name of a point."""
    try:
        parse_time(name)
    except errors.UsageError:
        return False
    return True
