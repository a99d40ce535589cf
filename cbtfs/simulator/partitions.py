"""Partition tables, written from nothing: an MBR and a GPT with one partition.

A GPT (UEFI specification, section 5)::

    0    protective MBR          n-33   copy of the entries (32 sectors)
    1    header                  n-1    copy of the header
    2    128 entries of 128 bytes
"""

import struct
import uuid
import zlib
from collections.abc import Iterator

SECTOR = 512
ALIGNMENT = 1 << 20
"""Where the partition starts, in bytes; every partitioning tool of today aligns to 1 MiB."""

LINUX = 0x83
LVM = 0x8E
_LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_ENTRIES = 128
_ENTRY = struct.Struct("<16s16sQQQ72s")
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")


def mbr(*, size: int, kind: int = LINUX, disk_id: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the MBR of a disk of ``size`` bytes: one partition from `ALIGNMENT` to the end."""
    first = ALIGNMENT // SECTOR
    yield 0, _boot_sector(kind, first=first, count=size // SECTOR - first, disk_id=disk_id)


def gpt(*, size: int, seed: uuid.UUID, name: str = "data") -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a GPT: one partition from `ALIGNMENT` to 1 MiB before the end."""
    last = size // SECTOR - 1
    entry = _ENTRY.pack(
        _LINUX_DATA.bytes_le,
        uuid.uuid5(seed, "partition").bytes_le,
        ALIGNMENT // SECTOR,
        (size - ALIGNMENT) // SECTOR - 1,
        0,
        name.encode("utf-16-le"),
    )
    entries = entry.ljust(_ENTRIES * _ENTRY.size, b"\0")
    disk = uuid.uuid5(seed, "disk").bytes_le
    yield 0, _boot_sector(0xEE, first=1, count=min(last, 0xFFFFFFFF), disk_id=0)
    yield SECTOR, _header(disk, entries, this=1, other=last, table=2)
    yield 2 * SECTOR, entry.ljust(SECTOR, b"\0")
    yield (last - 32) * SECTOR, entry.ljust(SECTOR, b"\0")
    yield last * SECTOR, _header(disk, entries, this=last, other=1, table=last - 32)


def partition_size(size: int, *, table: str) -> int:
    """Return the bytes of the only partition on a disk of ``size`` bytes (``mbr`` or ``gpt``)."""
    return size - ALIGNMENT - (ALIGNMENT if table == "gpt" else 0)


def _boot_sector(kind: int, *, first: int, count: int, disk_id: int) -> bytes:
    # the cylinder addresses FE FF FF say "look at the sector numbers"
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", first, count)
    return struct.pack("<440xI2x16s48xH", disk_id, entry, 0xAA55)


def _header(disk: bytes, entries: bytes, *, this: int, other: int, table: int) -> bytes:
    last = max(this, other)
    fields = (disk, table, _ENTRIES, _ENTRY.size, zlib.crc32(entries))
    head = (b"EFI PART", 0x10000, _HEADER.size)
    place = (0, this, other, 34, last - 33)
    crc = zlib.crc32(_HEADER.pack(*head, 0, *place, *fields))
    return _HEADER.pack(*head, crc, *place, *fields).ljust(SECTOR, b"\0")
