"""Journal: how far the disks of an unfinished restore point got, as records and as JSON.

::

    .partial-TIME/journal.json    {"disks": {"xvda": {…}, "xvdb": {…}}, "schema": 1}

    disk      |  on disk, with digests  | perhaps, perhaps not  |
              0                       offset                   size

A run that ends early leaves it; the next one goes on from there with the same snapshot. An entry
may only say what is on disk already (``Image.flush``), so the order is: write, flush, journal.

This module knows bytes and records only; ``stage.py`` reads and writes the file. What is read may
have been damaged or tampered with: a journal that is not sound in every entry is none at all.
"""

from collections.abc import Mapping

import msgspec

from . import catalogue, errors, units
from .catalogue import DiskPoint

SCHEMA = 1
"""Version of ``journal.json``; a journal of another version is not gone on with."""

LIMIT = 4 * units.MiB
"""Bytes of the largest journal that is read: a VM has 255 disks at most, at some 1 KiB each."""

METHODS = frozenset({"full", "incremental", "compare"})
"""How a disk can have begun."""

_MOST = 1 << 63
"""More than any number in a journal: bytes of a file, or seconds."""


class DiskJournal(msgspec.Struct, frozen=True, kw_only=True):
    """How far one disk of an unfinished restore point got.

    Attributes:
        device: name of the disk in its VM, ``xvda``.
        snapshot_uuid: the pool's snapshot that is being copied.
        size: of the image in bytes.
        method: how it began: one of ``METHODS``.
        reason: one of ``plan.Reason``.
        detail: a sentence that explains the reason.
        base: time of the point it was cloned from, "" for none.
        base_snapshot_uuid: the snapshot of that point.
        offset: all that is to be copied before this byte is on disk, with its digests.
        distrusted: whether the pool's list of allocated blocks was wrong, so that all is read.
        seconds: time that the copy took so far, over all its runs.
        finished: the disk's record once its image is finished.
    """

    device: str
    vdi_uuid: str
    snapshot_uuid: str
    size: int
    method: str
    reason: str = ""
    detail: str = ""
    base: str = ""
    base_snapshot_uuid: str = ""
    offset: int = 0
    distrusted: bool = False
    bytes_read: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    finished: DiskPoint | None = None


class _Journal(msgspec.Struct, frozen=True, kw_only=True):
    disks: dict[str, DiskJournal]
    schema: int


def encode(disks: Mapping[str, DiskJournal]) -> bytes:
    """Return ``journal.json`` with these entries, by device."""
    return catalogue.as_json(_Journal(disks=dict(disks), schema=SCHEMA))


def decode(data: bytes) -> Mapping[str, DiskJournal]:
    """Return the entries of the ``journal.json`` in ``data``, by device.

    Nothing is raised, whatever ``data`` is: what is not sound cannot be gone on with, and has no
    entries.
    """
    if len(data) > LIMIT:
        return {}
    try:
        found = msgspec.json.decode(data, type=_Journal)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return {}
    if found.schema != SCHEMA:
        return {}
    sound = all(_is_sound(device, entry) for device, entry in found.disks.items())
    return found.disks if sound else {}


def _is_sound(device: str, entry: DiskJournal) -> bool:
    whole = entry.offset % units.CBT_BLOCK == 0 or entry.offset == entry.size
    return (
        entry.device == device
        and entry.method in METHODS
        and (not entry.base or catalogue.is_time(entry.base))
        and whole
        and 0 <= entry.offset <= entry.size < _MOST
        and all(0 <= n < _MOST for n in (entry.bytes_read, entry.bytes_written, entry.seconds))
        and (entry.finished is None or _belongs(entry.finished, entry))
    )


def _belongs(disk: DiskPoint, entry: DiskJournal) -> bool:
    try:
        catalogue.check_disk(disk)
    except errors.StoreError:
        return False
    return (disk.device, disk.vdi_uuid, disk.snapshot_uuid, disk.size) == (
        entry.device,
        entry.vdi_uuid,
        entry.snapshot_uuid,
        entry.size,
    )
