"""Allocation: which parts of a disk may hold data, read off the head of its export as a VHD.

::

    0        512        data offset        table offset
    | footer | …        | header, 1024     | …  | table: a sector number per block |  blocks …
      (a copy)                                    ffffffff = the block is not in the file

All numbers are big-endian (Microsoft, Virtual Hard Disk Image Format Specification 1.0). xapi's
vhd-tool leaves a sector free before the table and writes blocks of 2 MiB, but neither is a promise:
what the header says counts. What is not in the file reads as zeros.

Rules of this file:

1. The head is hostile input. Whatever is odd in it makes the allocation unknown: to read too much
   costs time, to read too little costs data.
2. What is needed of the head is kept, and nothing beyond it: 4 MiB for a disk of 2 TiB. Behind it
   comes the whole disk.
"""

import struct
from collections.abc import Iterator

from . import errors
from .extents import Extent
from .units import GiB, KiB, MiB

LARGEST = 2040 * GiB
"""The largest disk that a VHD can hold, in bytes; xapi refuses to export more as one."""

_SECTOR = 512
_FOOTER = struct.Struct(">8s4xI Q24xQ4xI I 444x")  # cookie, version, data offset, size, type, sum
_FOOTER_SUM = 64
_HEADER = struct.Struct(">8s8xQ I I I I 984x")  # cookie, table, version, entries, block, sum
_HEADER_SUM = 36
_ENTRY = struct.Struct(">I")
_VERSION = 1
_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_ABSENT = 0xFFFFFFFF
_BLOCKS = range(512 * KiB, 64 * MiB + 1)
_FARTHEST = 64 * KiB
"""Bytes that may lie before the header, or between it and the table."""


class VHDHead:
    """The head of a VHD, fed piece by piece until ``feed`` says that it is complete.

    Args:
        size: of the disk in bytes; what the VHD holds beyond it is left out.

    Attributes:
        complete: whether ``extents`` can be asked.
    """

    def __init__(self, *, size: int) -> None:
        self.complete = False
        self._size = size
        self._data = bytearray()
        self._wanted = _FOOTER.size
        self._header = self._table = -1
        self._block = 0

    def __repr__(self) -> str:
        return f"<VHDHead {len(self._data)} of {self._wanted} bytes>"

    def feed(self, data: bytes) -> bool:
        """Take the next bytes of the file; return True once no more are needed.

        Raises:
            AllocationUnknown: this is no VHD, or none that tells about the whole disk.
        """
        rest = memoryview(data)
        while not self.complete:
            missing = self._wanted - len(self._data)
            self._data += rest[:missing]
            rest = rest[missing:]
            if len(self._data) < self._wanted:
                return False
            self._advance()
        return True

    def extents(self) -> Iterator[Extent]:
        """Yield the ranges that may hold data, in order, neighbours joined, clipped to the size.

        Raises:
            AllocationUnknown: the head is not complete, or its table is damaged.
        """
        if not self.complete:
            raise errors.AllocationUnknown(
                f"the export ended after {len(self._data)} bytes, before its table of blocks did"
            )
        start = -1
        lowest = -(-self._wanted // _SECTOR)
        for number, (sector,) in enumerate(_ENTRY.iter_unpack(self._entries())):
            if sector == _ABSENT:
                if start >= 0:
                    yield Extent(start * self._block, number * self._block)
                start = -1
                continue
            if sector < lowest:
                raise _unusable(f"block {number} lies in the table of blocks itself")
            if start < 0:
                start = number
        if start >= 0:
            yield Extent(start * self._block, self._size)

    # ── the three parts of the head ──────────────────────────────────────────────────────────────

    def _advance(self) -> None:
        """Read the part that is complete now, and say how much the next one needs."""
        if self._header < 0:
            self._read_footer()
            self._wanted = self._header + _HEADER.size
        elif self._table < 0:
            self._read_header()
            self._wanted = self._table + 4 * self._count
        else:
            self.complete = True

    @property
    def _count(self) -> int:
        return -(-self._size // self._block)

    def _read_footer(self) -> None:
        raw = bytes(self._data)
        cookie, version, header, size, kind, told = _FOOTER.unpack(raw)
        if cookie != b"conectix":
            raise _unusable("it does not begin as a VHD does")
        if _checksum(raw, at=_FOOTER_SUM) != told:
            raise _unusable("the checksum of its footer is wrong")
        if version >> 16 != _VERSION:
            raise _unusable(f"it is of the unknown version {version:#x}")
        if kind == _FIXED:
            raise _unusable("it has no table of blocks")
        if kind == _DIFFERENCING:
            raise _unusable("it holds only the difference to another disk")
        if kind != _DYNAMIC:
            raise _unusable(f"it is of the unknown type {kind}")
        if size < self._size:
            raise _unusable(f"it has {size} bytes where the disk has {self._size}")
        if not _FOOTER.size <= header <= _FARTHEST or header % _SECTOR:
            raise _unusable(f"its header is said to be at {header}")
        self._header = header

    def _read_header(self) -> None:
        raw = bytes(self._data[self._header :])
        cookie, table, version, entries, block, told = _HEADER.unpack(raw)
        if cookie != b"cxsparse":
            raise _unusable("it has no header where one is said to be")
        if _checksum(raw, at=_HEADER_SUM) != told:
            raise _unusable("the checksum of its header is wrong")
        if version >> 16 != _VERSION:
            raise _unusable(f"its header is of the unknown version {version:#x}")
        if block not in _BLOCKS or block & (block - 1):
            raise _unusable(f"it has blocks of {block} bytes")
        self._block = block
        if entries < self._count:
            raise _unusable(f"its table has {entries} blocks where the disk has {self._count}")
        end = self._header + _HEADER.size
        if not end <= table <= end + _FARTHEST or table % _SECTOR:
            raise _unusable(f"its table of blocks is said to be at {table}")
        self._table = table

    def _entries(self) -> memoryview:
        return memoryview(self._data)[self._table : self._wanted]


def _unusable(why: str) -> errors.AllocationUnknown:
    return errors.AllocationUnknown(f"the export as a VHD cannot be used: {why}")


def _checksum(raw: bytes, *, at: int) -> int:
    """Return the ones' complement of the sum of all bytes but the four of the checksum itself."""
    return ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFFFFFF
