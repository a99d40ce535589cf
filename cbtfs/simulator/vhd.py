"""A disk as a VHD file, streamed: dynamic, or differencing against a base.

::

    0        512      1536    2048          each allocated block of 2 MiB          end - 512
    | footer | header | empty | BAT, padded | sector bitmap 512 | data 2 MiB | ... | footer |

The empty sector is vhd-tool's (xen-api, ocaml/libs/vhd/vhd_format/f.ml). All numbers are
big-endian; the BAT has 4 bytes for each block (Microsoft, Virtual Hard Disk Image Format
Specification 1.0). Only blocks that hold data are in the file; their bitmap marks sectors that do.
"""

import itertools
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

SECTOR = 512
BLOCK = 2 << 20
LARGEST = 2040 << 30
"""The largest disk a VHD can hold, in bytes (xen-api refuses more with VDI_TOO_LARGE)."""

_GRAIN = 64 << 10
_WHOLE = (1 << 32) - 1
_TABLE = 2048
_FIXED_TIME = 0x30000000  # seconds since 2000: an export of equal data is equal
_DYNAMIC, _DIFFERENCING = 3, 4
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sB427x")
_HEADER = struct.Struct(">8sQQIIII16sII512s192s256x")
_NOT_THERE = 0xFFFFFFFF

Read = Callable[[int, memoryview], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a VHD will hold.

    Args:
        size: of the disk in bytes.
        identifier: the VDI's uuid.
        blocks: number of block → 32-bit mask of its 64 KiB grains that hold data.
        parent: the base's uuid, if this is a differencing disk.
    """

    size: int
    identifier: uuid.UUID
    blocks: dict[int, int]
    parent: uuid.UUID | None = None

    @property
    def count(self) -> int:
        """How many blocks the disk has, allocated or not."""
        return -(-self.size // BLOCK)

    @property
    def table_size(self) -> int:
        """Length of the BAT in bytes, padded to sectors."""
        return -(-self.count * 4 // SECTOR) * SECTOR

    @property
    def length(self) -> int:
        """Length of the whole file in bytes."""
        return _TABLE + self.table_size + len(self.blocks) * (SECTOR + BLOCK) + SECTOR


def allocation(ranges: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the `Plan.blocks` that hold the half-open byte ranges ``ranges``."""
    blocks: dict[int, int] = {}
    for start, stop in ranges:
        grains = range(start // _GRAIN, -(-stop // _GRAIN))
        for number, group in itertools.groupby(grains, lambda grain: grain // 32):
            mask = 0
            for grain in group:
                mask |= 1 << (31 - grain % 32)
            blocks[number] = blocks.get(number, 0) | mask
    return dict(sorted(blocks.items()))


def everything(size: int) -> dict[int, int]:
    """Return the `Plan.blocks` that hold every block of a disk of ``size`` bytes."""
    return dict.fromkeys(range(-(-size // BLOCK)), _WHOLE)


def stream(plan: Plan, read: Read) -> Iterator[bytes | memoryview]:
    """Yield the file in pieces; a piece is valid until the next is asked for.

    Args:
        plan: what to write.
        read: fills a view with the disk's bytes from an offset, never beyond the disk's end.
    """
    footer = _footer(plan)
    yield footer + _header(plan) + bytes(SECTOR)
    yield _table(plan)
    block = memoryview(bytearray(SECTOR + BLOCK))
    for number, mask in plan.blocks.items():
        # one grain is 128 sectors: 16 bytes of the bitmap
        bits = (b"\xff" * 16 if mask >> (31 - grain) & 1 else bytes(16) for grain in range(32))
        block[:SECTOR] = b"".join(bits)
        data = block[SECTOR:]
        held = min(BLOCK, plan.size - number * BLOCK)
        read(number * BLOCK, data[:held])
        if held < BLOCK:
            data[held:] = bytes(BLOCK - held)
        if plan.parent is not None:
            _clear_absent(data, mask)
        yield block
    yield footer


def _clear_absent(data: memoryview, mask: int) -> None:
    """Zero the grains that a differencing disk leaves to its parent."""
    for grain in range(32):
        if not mask >> (31 - grain) & 1:
            data[grain * _GRAIN : (grain + 1) * _GRAIN] = bytes(_GRAIN)


def _table(plan: Plan) -> bytes:
    table = bytearray(b"\xff" * plan.table_size)
    first = (_TABLE + plan.table_size) // SECTOR
    for place, number in enumerate(plan.blocks):
        struct.pack_into(">I", table, number * 4, first + place * (SECTOR + BLOCK) // SECTOR)
    return bytes(table)


def _footer(plan: Plan) -> bytes:
    kind = _DYNAMIC if plan.parent is None else _DIFFERENCING
    head = (b"conectix", 2, 0x10000, 512, _FIXED_TIME, b"tap\0", 0x10003, bytes(4))
    size = (plan.size, plan.size, *_geometry(plan.size), kind)
    tail = (plan.identifier.bytes, 0)
    return _FOOTER.pack(*head, *size, _checksum(_FOOTER.pack(*head, *size, 0, *tail)), *tail)


def _header(plan: Plan) -> bytes:
    parent = plan.parent.bytes if plan.parent else bytes(16)
    name = f"{plan.parent}.vhd".encode("utf-16-be") if plan.parent else b""
    head = (b"cxsparse", 0xFFFFFFFFFFFFFFFF, _TABLE, 0x10000, plan.count, BLOCK)
    tail = (parent, _FIXED_TIME if plan.parent else 0, 0, name, b"")
    return _HEADER.pack(*head, _checksum(_HEADER.pack(*head, 0, *tail)), *tail)


def _checksum(data: bytes) -> int:
    return ~sum(data) & 0xFFFFFFFF


def _geometry(size: int) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors per track by the specification's appendix."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    track, cylinders_heads = 17, total // 17
    heads = max(4, -(-cylinders_heads // 1024))
    if cylinders_heads >= heads * 1024 or heads > 16:
        track, heads, cylinders_heads = 31, 16, total // 31
    if cylinders_heads >= heads * 1024:
        track, heads, cylinders_heads = 63, 16, total // 63
    return cylinders_heads // heads, heads, track
