"""Digests: 16 bytes of BLAKE3 for every 64 KiB block of an image, in an array of their own.

::

    image     |  block 0  |  block 1  |  block 2 |          the last block may be shorter
    array     | d0        | 00…00     | d2       |          16 bytes each; zero for a block of zeros

The array of a disk is a file beside its image (``xvda.b3``): ``b3sum --length 16`` of a block gives
its entry, ``b3sum`` of the whole array the digest root that ``point.json`` records.
"""

from collections.abc import Iterator

import blake3
from bitarray import bitarray

from . import units

BLOCK = units.CBT_BLOCK
LENGTH = 16
"""Bytes a digest: 128 bits, enough against accident and against anyone without 2^64 tries."""

ZERO = bytes(LENGTH)

_ZERO_BLOCK = bytes(BLOCK)
_PROBE = 64
_ZERO_PROBE = bytes(_PROBE)


def array_length(size: int) -> int:
    """Return the bytes of the digest array of an image of ``size`` bytes."""
    return -(-size // BLOCK) * LENGTH


def entry(offset: int) -> int:
    """Return where in the array the digest of the block at ``offset`` begins.

    For the end of a disk, be it within a block, that is the end of the array.
    """
    return array_length(offset)


def block(at: int) -> int:
    """Return where in the disk the block begins whose digest is at ``at`` in the array."""
    return at // LENGTH * BLOCK


def part(found: bytes, start: int, stop: int) -> bytes:
    """Return the digests of bytes ``start`` to ``stop`` of the data that ``found`` is of."""
    return found[entry(start) : entry(stop)]


def is_zero(block: memoryview) -> bool:
    """Tell whether ``block``, at most one block long, holds zeros only.

    A memoryview compares item by item (1.05 GB/s measured), a copy of it as one memcmp (6.7 GB/s);
    nearly all other blocks are settled by their first bytes.
    """
    length = len(block)
    if block[:_PROBE].tobytes() != _ZERO_PROBE[:length]:
        return False
    return block.tobytes() == (_ZERO_BLOCK if length == BLOCK else _ZERO_BLOCK[:length])


def of_block(block: memoryview) -> bytes:
    """Return the digest of one block; the global interpreter lock is free meanwhile."""
    return ZERO if is_zero(block) else blake3.blake3(block).digest(length=LENGTH)


def of_blocks(data: memoryview) -> bytes:
    """Return the digests of consecutive blocks, the last of which may be shorter."""
    return b"".join([of_block(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)])


def runs(found: bytes, *, length: int) -> Iterator[tuple[bool, int, int]]:
    """Yield ``(is_zero, start, stop)``, in bytes, for the runs of blocks behind digests ``found``.

    Args:
        found: digests as ``of_blocks`` returns them.
        length: of the data they were made from.
    """
    start = 0
    previous = found[:LENGTH] == ZERO
    for index in range(1, len(found) // LENGTH):
        at = index * LENGTH
        zero = found[at : at + LENGTH] == ZERO
        if zero != previous:
            yield previous, start, index * BLOCK
            start, previous = index * BLOCK, zero
    if start < length:
        yield previous, start, length


def differences(found: bytes, known: bytes, *, length: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)``, in bytes, for the runs of blocks whose digests differ.

    Args:
        found: digests as ``of_blocks`` returns them.
        known: as many digests that they are compared with.
        length: of the data they were made from.
    """
    if found == known:
        return
    # a step for each run, not for each digest: of a terabyte there are 16 million
    marked = bitarray(buffer=found) ^ bitarray(buffer=known)
    plain = marked.tobytes()
    first = marked.find(1)
    while first >= 0:
        start = first // 8 // LENGTH
        stop = _equal_from(plain, start)
        yield start * BLOCK, min(stop * BLOCK, length)
        first = marked.find(1, stop * LENGTH * 8)


def _equal_from(marked: bytes, index: int) -> int:
    """Return which entry, from ``index`` on, is the first to be all zero; the end if none is."""
    at = marked.find(ZERO, index * LENGTH)
    while at >= 0:
        found = -(-at // LENGTH)
        if marked[found * LENGTH : (found + 1) * LENGTH] == ZERO:
            return found
        at = marked.find(ZERO, at + 1)
    return len(marked) // LENGTH
