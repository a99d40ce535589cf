"""ChangeLog: which 64 KiB blocks of a disk were written, as blktap and SM keep it.

A VDI with change tracking has one log. Taking a snapshot renames the live log to the
snapshot's and starts an empty one, so the logs of a disk form a chain from old to new::

    log of:   snapshot 1 ──child──> snapshot 2 ──child──> live
    holds:    writes before 1       between 1 and 2        since 2

What changed from 1 to 2 is therefore the log of 2; from 1 to live, those of 2 and live, ORed
(sm, drivers/VDI.py). Inside a byte the lowest bit is the first block, as tapdisk writes it
(blktap, include/cbt-util.h); the answer to ``list_changed_blocks`` has the highest bit first.
"""

import base64
from collections.abc import Iterator
from typing import TypedDict

BLOCK = 64 << 10
"""Bytes that one bit stands for."""

_PAGE = 4096  # bytes of a bitmap kept together: 2 GiB of disk
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class LogDump(TypedDict):
    """A log in ``state.json``; pages are base64."""

    size: int
    parent: str
    child: str
    consistent: bool
    pages: dict[str, str]


class ChangeLog:
    """One log; not thread-safe, its disk's lock guards it.

    Attributes:
        size: of the disk this log describes, in bytes.
        parent: uuid of the VDI with the next older log, "" if none.
        child: uuid of the VDI with the next newer log, "" if none.
        consistent: False while a host has the disk open for writing, and after it crashed.
        pages: 4 KiB pieces of the bitmap by number; those without a set bit may be missing.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.parent = ""
        self.child = ""
        self.consistent = True
        self.pages: dict[int, bytearray] = {}
        self._on_disk: dict[int, bytes] | None = None

    def __repr__(self) -> str:
        return f"<ChangeLog {sum(1 for _ in self.ranges())} ranges of {self.size} bytes>"

    def length(self) -> int:
        """Return the length of the bitmap, in bytes."""
        blocks = -(-self.size // BLOCK)
        return -(-blocks // 8)

    def mark(self, offset: int, length: int) -> None:
        """Enter a write of ``length`` bytes, at least one, at ``offset``."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK + 1
        while first < last and first % 8:
            self._or_byte(first // 8, 1 << first % 8)
            first += 1
        while first < last and last % 8:
            last -= 1
            self._or_byte(last // 8, 1 << last % 8)
        for number in range(first // 8 // _PAGE, -(-(last // 8) // _PAGE)):
            low = max(first // 8 - number * _PAGE, 0)
            high = min(last // 8 - number * _PAGE, _PAGE)
            self._page(number)[low:high] = b"\xff" * (high - low)

    def merge(self, older: "ChangeLog") -> None:
        """Add the writes of ``older``, as destroying its VDI does."""
        for number, page in older.pages.items():
            mine = self._page(number)
            both = int.from_bytes(mine, "little") | int.from_bytes(page, "little")
            mine[:] = both.to_bytes(_PAGE, "little")

    def without(self, count: int) -> "ChangeLog":
        """Return a copy that has forgotten the first ``count`` blocks written."""
        kept = ChangeLog(self.size)
        kept.merge(self)
        for number in sorted(kept.pages):
            page = kept.pages[number]
            for block in list(_set_bits(page, first=0)):
                if not count:
                    return kept
                page[block // 8] &= ~(1 << block % 8)
                count -= 1
        return kept

    def grow(self, size: int) -> None:
        """Follow a resize: the new part was not written."""
        self.size = size

    def bitmap(self) -> bytearray:
        """Return the whole bitmap, lowest bit first."""
        bits = bytearray(-(-self.length() // _PAGE) * _PAGE)
        for number, page in self.pages.items():
            bits[number * _PAGE : (number + 1) * _PAGE] = page
        del bits[self.length() :]
        return bits

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open byte ranges written, in order, neighbours joined, within size."""
        since = until = -1
        for block in self._blocks():
            if block != until and until > since:
                yield since * BLOCK, until * BLOCK
            since = since if block == until else block
            until = block + 1
        if until > since:
            yield since * BLOCK, min(until * BLOCK, self.size)

    def activate(self) -> None:
        """A host opened the disk for writing: from now on the file on disk lags behind."""
        self.consistent = False
        self._on_disk = {number: bytes(page) for number, page in self.pages.items()}

    def deactivate(self) -> None:
        """The host closed it in good order."""
        self.consistent = True
        self._on_disk = None

    def crash(self) -> None:
        """The host died: what it had only in memory is lost, at worst everything since."""
        if self._on_disk is not None:
            self.pages = {number: bytearray(page) for number, page in self._on_disk.items()}
            self._on_disk = None

    def dump(self) -> LogDump:
        """Return the log as JSON can hold it."""
        pages = {str(n): base64.b64encode(p).decode() for n, p in self.pages.items() if any(p)}
        return {
            "size": self.size,
            "parent": self.parent,
            "child": self.child,
            "consistent": self.consistent,
            "pages": pages,
        }

    @classmethod
    def restore(cls, dump: LogDump) -> "ChangeLog":
        """Return the log that ``dump`` gave."""
        self = cls(dump["size"])
        self.parent, self.child = dump["parent"], dump["child"]
        self.consistent = dump["consistent"]
        self.pages = {int(n): bytearray(base64.b64decode(p)) for n, p in dump["pages"].items()}
        return self

    def _blocks(self) -> Iterator[int]:
        for number in sorted(self.pages):
            yield from _set_bits(self.pages[number], first=number * _PAGE * 8)

    def _page(self, number: int) -> bytearray:
        return self.pages.setdefault(number, bytearray(_PAGE))

    def _or_byte(self, index: int, bits: int) -> None:
        self._page(index // _PAGE)[index % _PAGE] |= bits


def union(logs: "list[ChangeLog]") -> ChangeLog:
    """Return one log with the writes of all, of the size of the last."""
    merged = ChangeLog(logs[-1].size)
    for log in logs:
        merged.merge(log)
    return merged


def encode(log: ChangeLog) -> bytes:
    """Return the bitmap of a log as ``list_changed_blocks`` answers it: highest bit first."""
    return bytes(log.bitmap().translate(_REVERSED))


def _set_bits(page: bytearray, *, first: int) -> Iterator[int]:
    for index, byte in enumerate(page):
        while byte:
            low = byte & -byte
            yield first + index * 8 + low.bit_length() - 1
            byte ^= low
