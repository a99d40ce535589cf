"""What the head of a VHD tells about a disk, and that nothing odd in it is believed."""

import struct
import subprocess
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors
from cbtfs.allocation import LARGEST, VHDHead

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 2 * MiB
ABSENT = 0xFFFFFFFF


@dataclass(frozen=True)
class Written:
    """The head of a VHD as somebody might write it; blocks that are there are a set."""

    size: int = 16 * MiB
    there: frozenset[int] = frozenset({1, 2, 5})
    block: int = BLOCK
    header_at: int = 512
    table_at: int = 2048
    entries: int = -1
    kind: int = 3
    footer_cookie: bytes = b"conectix"
    header_cookie: bytes = b"cxsparse"
    footer_version: int = 0x10000
    header_version: int = 0x10000
    footer_sum: int = 0
    header_sum: int = 0
    lowest: int = 8

    @property
    def count(self) -> int:
        return -(-self.size // self.block) if self.entries < 0 else self.entries

    def content(self) -> bytes:
        end = max(self.table_at, self.header_at + 1024)
        data = bytearray(end)
        data[:512] = self.footer()
        data[self.header_at : self.header_at + 1024] = self.header()
        return bytes(data[: max(end, self.table_at)]) + self.table()

    def footer(self) -> bytes:
        fields = struct.pack(
            ">8sIIQI4sI4sQQIII", self.footer_cookie, 2, self.footer_version, self.header_at, 1,
            b"test", 1, b"Wi2k", self.size, self.size, 0, self.kind, 0,
        ).ljust(512, b"\0")  # fmt: skip
        return summed(fields, at=64, change=self.footer_sum)

    def header(self) -> bytes:
        fields = struct.pack(
            ">8sQQIIII", self.header_cookie, 2**64 - 1, self.table_at, self.header_version,
            self.count, self.block, 0,
        ).ljust(1024, b"\0")  # fmt: skip
        return summed(fields, at=36, change=self.header_sum)

    def table(self) -> bytes:
        length = self.block // 512 + 1
        entries = [
            self.lowest + number * length if number in self.there else ABSENT
            for number in range(self.count)
        ]
        return struct.pack(f">{len(entries)}I", *entries)


def summed(fields: bytes, *, at: int, change: int) -> bytes:
    """Return ``fields`` with the checksum in its place, off by ``change``."""
    value = (~sum(fields) + change) & 0xFFFFFFFF
    return fields[:at] + struct.pack(">I", value) + fields[at + 4 :]


def parsed(data: bytes, *, size: int = 16 * MiB, step: int = 0) -> list[tuple[int, int]]:
    head = VHDHead(size=size)
    for start in range(0, len(data), step or len(data)):
        if head.feed(data[start : start + (step or len(data))]):
            break
    return [(start, stop) for start, stop in head.extents()]


# ── what is told ─────────────────────────────────────────────────────────────────────────────────


def test_neighbours_are_joined_and_what_is_absent_is_left_out() -> None:
    assert parsed(Written().content()) == [(2 * MiB, 6 * MiB), (10 * MiB, 12 * MiB)]


@given(st.sets(st.integers(0, 7)), st.integers(1, 700))
def test_pieces_of_any_length_tell_the_same(there: set[int], step: int) -> None:
    data = Written(there=frozenset(there)).content() + b"the disk itself"

    found = parsed(data, step=step)

    assert {n for start, stop in found for n in range(start // BLOCK, stop // BLOCK)} == there


def test_the_last_block_ends_with_the_disk() -> None:
    data = Written(size=5 * MiB, there=frozenset({0, 1, 2})).content()

    assert parsed(data, size=5 * MiB) == [(0, 5 * MiB)]


def test_what_lies_beyond_the_disk_is_left_out() -> None:
    data = Written(there=frozenset({0, 1, 2, 7})).content()  # a VHD is rounded up to whole blocks

    assert parsed(data, size=3 * MiB) == [(0, 3 * MiB)]


def test_no_block_at_all_is_an_empty_disk() -> None:
    assert parsed(Written(there=frozenset()).content()) == []


@pytest.mark.parametrize("block", [512 * KiB, MiB, 4 * MiB])
def test_blocks_may_have_other_sizes(block: int) -> None:
    data = Written(block=block, there=frozenset({1})).content()

    assert parsed(data) == [(block, 2 * block)]


@pytest.mark.parametrize(("header_at", "table_at"), [(512, 1536), (1024, 4096), (512, 65536)])
def test_header_and_table_are_where_the_file_says(header_at: int, table_at: int) -> None:
    data = Written(header_at=header_at, table_at=table_at, lowest=129).content()

    assert parsed(data) == [(2 * MiB, 6 * MiB), (10 * MiB, 12 * MiB)]


def test_no_more_is_asked_for_than_the_table() -> None:
    data = Written().content()
    head = VHDHead(size=16 * MiB)

    assert head.feed(data[:-1]) is False
    assert head.feed(data[-1:]) is True
    assert head.feed(bytes(100)) is True
    assert [e.start for e in head.extents()] == [2 * MiB, 10 * MiB]


def test_the_table_of_the_largest_disk_takes_4_mib() -> None:
    written = Written(size=LARGEST, there=frozenset({0, LARGEST // BLOCK - 1}), lowest=10_000)
    data = written.content()
    tracemalloc.start()
    head = VHDHead(size=LARGEST)
    for start in range(0, len(data), 64 * KiB):
        head.feed(data[start : start + 64 * KiB])
    found = [tuple(extent) for extent in head.extents()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert found == [(0, BLOCK), (LARGEST - BLOCK, LARGEST)]
    assert peak < 16 * MiB


def test_a_vhd_of_qemu_is_understood(tmp_path: Path) -> None:
    raw, vhd = tmp_path / "disk.raw", tmp_path / "disk.vhd"
    with raw.open("wb") as file:
        file.truncate(64 * MiB)
        for offset in (0, 10 * MiB + 4096, 62 * MiB):
            file.seek(offset)
            file.write(b"x" * 512)
    subprocess.run(
        ["qemu-img", "convert", "-O", "vpc", "-o", "subformat=dynamic,force_size=on", raw, vhd],
        check=True,
    )

    found = parsed(vhd.read_bytes(), size=64 * MiB)

    assert found == [(0, BLOCK), (10 * MiB, 12 * MiB), (62 * MiB, 64 * MiB)]


# ── what is not believed ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (Written(footer_cookie=b"conectiX"), "does not begin as a VHD does"),
        (Written(header_cookie=b"cxsparsE"), "no header where one is said to be"),
        (Written(footer_sum=1), "checksum of its footer"),
        (Written(header_sum=1), "checksum of its header"),
        (Written(footer_version=0x20000), "version 0x20000"),
        (Written(header_version=0x20000), "version 0x20000"),
        (Written(kind=2), "no table of blocks"),
        (Written(kind=4), "only the difference"),
        (Written(kind=0), "type 0"),
        (Written(size=14 * MiB), "where the disk has 16777216"),
        (Written(entries=7), "7 blocks where the disk has 8"),
        (Written(entries=0), "0 blocks where the disk has 8"),
        (Written(block=3 * MiB), "blocks of 3145728 bytes"),
        (Written(block=64 * KiB), "blocks of 65536 bytes"),
        (Written(block=1 << 31), "blocks of 2147483648 bytes"),
        (Written(header_at=128 * KiB), "its header is said to be at 131072"),
        (Written(header_at=1000), "its header is said to be at 1000"),
        (Written(table_at=1024), "said to be at 1024"),
        (Written(table_at=2000), "said to be at 2000"),
        (Written(table_at=128 * KiB), "said to be at 131072"),
        (Written(there=frozenset({0}), lowest=4), "lies in the table of blocks itself"),
    ],
)
def test_what_is_odd_makes_the_allocation_unknown(written: Written, why: str) -> None:
    with pytest.raises(errors.AllocationUnknown, match=why):
        parsed(written.content())


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1535, 1536, 2047, 2048, 2079])
def test_a_head_that_ends_early_is_no_head(length: int) -> None:
    head = VHDHead(size=16 * MiB)
    assert not head.feed(Written().content()[:length])

    with pytest.raises(errors.AllocationUnknown, match=f"ended after {length} bytes"):
        list(head.extents())


@pytest.mark.parametrize("at", [*range(0, 512, 7), *range(512, 1536, 13)])
def test_any_flipped_byte_of_footer_and_header_is_noticed(at: int) -> None:
    data = bytearray(Written().content())
    data[at] ^= 0x41

    with pytest.raises(errors.AllocationUnknown):
        parsed(bytes(data))


@given(st.binary(max_size=4096))
def test_rubbish_is_refused(data: bytes) -> None:
    head = VHDHead(size=16 * MiB)
    with pytest.raises(errors.AllocationUnknown):
        head.feed(data)
        list(head.extents())
