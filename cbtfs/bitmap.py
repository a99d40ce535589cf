"""ChangeBitmap: which 64 KiB blocks of a disk changed between two snapshots.

``VDI.list_changed_blocks`` answers with standard base64 of one bit per block, the most significant
bit first::

    byte           0x81              0x40
    bit     1 0 0 0 0 0 0 1   0 1 0 0 0 …         set = written to, even with what was there before
    block   0 1 2 3 4 5 6 7   8 9
    extent  [0,64K)  [448K,512K)  [576K,640K)

A disk that is no multiple of 64 KiB has a partial last block, and the last byte may have bits that
stand for nothing: both are clipped to the size of the disk.

The bitmap of 16 TiB is 32 MiB (43 MB as base64): it is decoded once, used in place, and only ever
walked through.
"""

import binascii
from collections.abc import Iterable, Iterator
from random import Random
from typing import Self, cast

from bitarray import bitarray
from bitarray.util import intervals  # pyright: ignore[reportUnknownVariableType] its stub is open

from . import errors
from .extents import Extent
from .units import CBT_BLOCK

_COUNT_CHUNK = 1 << 23
"""Blocks whose runs are counted at a time: the counting copies 1 MiB instead of the bitmap."""


class ChangeBitmap:
    """The changed blocks of a disk of ``size`` bytes.

    Args:
        bits: the bitmap as bytes, most significant bit first; not copied, must not change.
        size: virtual size in bytes of the newer of the two snapshots.

    Attributes:
        size: the same.
        changed_blocks: number of blocks that changed.

    Raises:
        ChangesUnknown: the length of ``bits`` does not belong to ``size``.
    """

    def __init__(self, bits: bytes | memoryview, *, size: int) -> None:
        blocks = -(-size // CBT_BLOCK)
        if len(bits) != -(-blocks // 8):
            raise errors.ChangesUnknown(
                f"the bitmap of changed blocks has {len(bits)} bytes where a disk of {size} bytes"
                f" has {-(-blocks // 8)}",
                reason="cbt-mismatch",
            )
        self.size = size
        self._blocks = blocks
        self._bits = bitarray(buffer=bits, endian="big")
        self.changed_blocks = self._bits.count(1, 0, blocks)

    @classmethod
    def of_extents(cls, marked: Iterable[Extent], *, size: int) -> Self:
        """Return the bitmap of a disk of ``size`` bytes with each block set that ``marked`` has."""
        blocks = -(-size // CBT_BLOCK)
        bits = _clear(blocks)
        for start, stop in marked:
            bits[start // CBT_BLOCK : min(-(-stop // CBT_BLOCK), blocks)] = 1
        return cls(memoryview(bits), size=size)

    @classmethod
    def from_base64(cls, text: str | bytes, *, size: int) -> "ChangeBitmap":
        """Return the bitmap in ``text``, the answer of ``VDI.list_changed_blocks``.

        Args:
            text: strict base64 without line breaks; the caller may drop it afterwards.
            size: virtual size in bytes of ``vdi_to``.

        Raises:
            ChangesUnknown: it is not base64, or its length does not belong to ``size``.
        """
        try:
            bits = binascii.a2b_base64(text, strict_mode=True)
        except ValueError as exc:  # binascii.Error is one
            raise errors.ChangesUnknown(
                f"the bitmap of changed blocks is not base64: {exc}", reason="cbt-mismatch"
            ) from None
        return cls(bits, size=size)

    def __repr__(self) -> str:
        return f"<ChangeBitmap {self.changed_blocks} of {self._blocks} blocks changed>"

    @property
    def length(self) -> int:
        """Bytes that the bitmap itself takes."""
        return -(-self._blocks // 8)

    @property
    def changed_bytes(self) -> int:
        """Bytes in changed blocks, the last block counted at its true length."""
        return self.changed_from(0)

    def changed_from(self, offset: int) -> int:
        """Return the bytes in changed blocks from ``offset``, a multiple of 64 KiB, to the end."""
        first = offset // CBT_BLOCK
        changed = self._bits.count(1, first, self._blocks) * CBT_BLOCK
        if first < self._blocks and self._bits[self._blocks - 1]:
            changed -= self._blocks * CBT_BLOCK - self.size
        return changed

    def extents(self) -> Iterator[Extent]:
        """Yield the changed ranges in order, neighbouring blocks joined, clipped to the size."""
        runs = cast("Iterator[tuple[int, int, int]]", intervals(self._bits))
        for value, start, stop in runs:
            if value and start < self._blocks:
                yield Extent(start * CBT_BLOCK, min(stop * CBT_BLOCK, self.size))

    def extent_count(self) -> int:
        """Return how many extents ``extents`` yields, without walking through them."""
        runs = 0
        before = 0
        for start in range(0, self._blocks, _COUNT_CHUNK):
            chunk = self._bits[start : min(start + _COUNT_CHUNK, self._blocks)]
            follows = chunk >> 1
            follows[0] = before
            before = chunk[-1]
            # a run begins where a set bit does not follow a set bit
            runs += (chunk & ~follows).count()
        return runs

    def is_clear(self, start: int, stop: int) -> bool:
        """Tell whether no block is set that has one of the bytes ``start`` to ``stop``."""
        return self._bits.find(1, start // CBT_BLOCK, -(-stop // CBT_BLOCK)) < 0

    def runs(self, start: int, stop: int) -> Iterator[tuple[bool, int, int]]:
        """Yield ``(changed, start, stop)``, in bytes, for the runs of blocks in a range.

        ::

            block     | 0 | 1 | 2 | 3 |
            changed         x   x
            runs(0, 256K)  (False, 0, 64K)  (True, 64K, 192K)  (False, 192K, 256K)

        Args:
            start: a multiple of 64 KiB.
            stop: a multiple of 64 KiB, or the size of the disk.
        """
        first, last = start // CBT_BLOCK, -(-stop // CBT_BLOCK)
        found = cast("Iterator[tuple[int, int, int]]", intervals(self._bits[first:last]))
        for value, begin, end in found:
            yield bool(value), start + begin * CBT_BLOCK, min(start + end * CBT_BLOCK, stop)

    def sampled(self, count: int, rng: Random) -> Self:
        """Return a bitmap of ``count`` unchanged blocks, each such choice as likely as any other.

        With fewer unchanged blocks than ``count`` it has them all.
        """
        unchanged = self._blocks - self.changed_blocks
        bits = _clear(self._blocks)
        if count <= unchanged // 2:
            self._pick(bits, count, rng)
        else:  # more than half: those to leave out are found sooner
            self._pick(bits, max(unchanged - count, 0), rng)
            bits |= self._bits
            bits.invert()
            bits[self._blocks :] = 0
        return type(self)(memoryview(bits), size=self.size)

    def _pick(self, bits: bitarray, count: int, rng: Random) -> None:
        """Set ``count`` random blocks in ``bits``, at most half of those that are not set here."""
        if (self._blocks - self.changed_blocks) * 64 < self._blocks:
            # drawing would hardly ever meet an unchanged one
            unchanged = list(self._bits.search(bitarray("0"), 0, self._blocks))
            for block in rng.sample(unchanged, count):
                bits[block] = 1
            return
        while count:
            block = rng.randrange(self._blocks)
            if not self._bits[block] and not bits[block]:
                bits[block] = 1
                count -= 1


class Marks:
    """Blocks of a disk of ``size`` bytes that are marked one run after another, in any order."""

    def __init__(self, *, size: int) -> None:
        self.size = size
        self._bits: bitarray | None = None  # memory only for what is marked: mostly nothing is

    def add(self, start: int, stop: int) -> None:
        """Mark the blocks that have one of the bytes ``start`` to ``stop``."""
        if self._bits is None:
            self._bits = _clear(-(-self.size // CBT_BLOCK))
        self._bits[start // CBT_BLOCK : -(-stop // CBT_BLOCK)] = 1

    def bitmap(self) -> ChangeBitmap:
        """Return what is marked; nothing more may be marked afterwards."""
        if self._bits is None:
            return ChangeBitmap.of_extents((), size=self.size)
        return ChangeBitmap(memoryview(self._bits), size=self.size)


def _clear(blocks: int) -> bitarray:
    bits = bitarray(blocks + -blocks % 8, endian="big")
    bits.setall(0)
    return bits
