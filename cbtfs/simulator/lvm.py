"""An LVM2 physical volume with one volume group, written without LVM and without root.

On disk (lvm2, lib/format_text/layout.h and lib/label/label.h)::

    0         512        4096          4608                     1 MiB
    |  zero   | label    | mda header  | metadata text, NUL ... | extents of 4 MiB ...
                PV header

All checksums are the CRC-32 polynomial started at `_CRC_START` and not inverted at the end.
"""

import hashlib
import itertools
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SECTOR = 512
EXTENT = 4 << 20
DATA_START = 1 << 20
_MDA = 4096
_CRC_START = 0xF597A6CF
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """One linear volume: its name and where it lies, counted in extents."""

    name: str
    first: int
    count: int

    @property
    def offset(self) -> int:
        """Where the volume starts on the disk, in bytes."""
        return DATA_START + self.first * EXTENT

    @property
    def size(self) -> int:
        """Length of the volume in bytes."""
        return self.count * EXTENT


def physical_volume(
    *, size: int, group: str, volumes: Sequence[LogicalVolume], seed: uuid.UUID, created: int
) -> Iterator[tuple[int, bytes]]:
    """Yield label and metadata of a disk of ``size`` bytes that is wholly the group ``group``."""
    text = _metadata(size=size, group=group, volumes=volumes, seed=seed, created=created)
    raw = text.encode() + b"\0"
    yield SECTOR, _label(size=size, pv=_identifier(seed, "pv"))
    yield _MDA, _area_header(raw)
    yield _MDA + SECTOR, raw


def _crc(data: bytes) -> int:
    # zlib inverts before and after; undo both
    return zlib.crc32(data, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _identifier(seed: uuid.UUID, label: str) -> str:
    number = int.from_bytes(hashlib.sha256(f"{seed} lvm {label}".encode()).digest(), "big")
    text = ""
    for _ in range(32):
        number, digit = divmod(number, len(_ALPHABET))
        text += _ALPHABET[digit]
    return text


def _dashed(identifier: str) -> str:
    cuts = (0, 6, 10, 14, 18, 22, 26, 32)
    return "-".join(identifier[a:b] for a, b in itertools.pairwise(cuts))


def _label(*, size: int, pv: str) -> bytes:
    areas = struct.pack("<QQQQQQQQ", DATA_START, 0, 0, 0, _MDA, DATA_START - _MDA, 0, 0)
    extension = struct.pack("<IIQQ", 2, 1, 0, 0)
    header = struct.pack("<32sQ", pv.encode(), size) + areas + extension
    checked = (struct.pack("<I8s", 32, b"LVM2 001") + header).ljust(SECTOR - 20, b"\0")
    return struct.pack("<8sQI", b"LABELONE", 1, _crc(checked)) + checked


def _area_header(text: bytes) -> bytes:
    location = struct.pack("<QQII", SECTOR, len(text), _crc(text), 0)
    fields = struct.pack("<16sIQQ", b" LVM2 x[5A%r0N*>", 1, _MDA, DATA_START - _MDA)
    checked = (fields + location).ljust(SECTOR - 4, b"\0")
    return struct.pack("<I", _crc(checked)) + checked


def _metadata(
    *, size: int, group: str, volumes: Sequence[LogicalVolume], seed: uuid.UUID, created: int
) -> str:
    extents = (size - DATA_START) // EXTENT
    # the group comes first: LVM finds its name in the first word
    head = (
        f'{group} {{\nid = "{_dashed(_identifier(seed, "vg"))}"\nseqno = {1 + len(volumes)}\n'
        'format = "lvm2"\nstatus = ["RESIZEABLE", "READ", "WRITE"]\nflags = []\n'
        f"extent_size = {EXTENT // SECTOR}\nmax_lv = 0\nmax_pv = 0\nmetadata_copies = 0\n\n"
        f'physical_volumes {{\n\npv0 {{\nid = "{_dashed(_identifier(seed, "pv"))}"\n'
        'device = "/dev/xvda"\n\nstatus = ["ALLOCATABLE"]\nflags = []\n'
        f"dev_size = {size // SECTOR}\npe_start = {DATA_START // SECTOR}\n"
        f"pe_count = {extents}\n}}\n}}\n\nlogical_volumes {{\n"
    )
    tail = (
        '}\n\n}\n\ncontents = "Text Format Volume Group"\nversion = 1\n\ndescription = ""\n\n'
        f'creation_host = "db1"\ncreation_time = {created}\n\n'
    )
    parts = (_volume(volume, seed=seed, created=created) for volume in volumes)
    return "".join([head, *parts, tail])


def _volume(volume: LogicalVolume, *, seed: uuid.UUID, created: int) -> str:
    return (
        f'\n{volume.name} {{\nid = "{_dashed(_identifier(seed, f"lv {volume.name}"))}"\n'
        'status = ["READ", "WRITE", "VISIBLE"]\nflags = []\n'
        f'creation_time = {created}\ncreation_host = "db1"\nsegment_count = 1\n\n'
        f"segment1 {{\nstart_extent = 0\nextent_count = {volume.count}\n\n"
        'type = "striped"\nstripe_count = 1\n\n'
        f'stripes = [\n"pv0", {volume.first}\n]\n}}\n}}\n'
    )
