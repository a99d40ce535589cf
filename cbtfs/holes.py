"""Holes: which parts of a snapshot hold nothing, so that reading them costs the pool nothing.

A pool can tell what is allocated of a disk (see ``vhdexport``), but for that it attaches the disk
once more and reads the tables of its whole chain. So it is asked when a disk has shown that it is
read at length, once per snapshot, while the reading goes on.

What it says is not believed blindly, for what it leaves out reads as zeros from then on: some of
those blocks, drawn by lot, are read first. One that holds something, and all is read, as before.
"""

import logging
from collections import OrderedDict
from contextlib import AbstractAsyncContextManager
from random import Random, SystemRandom
from typing import Protocol

from . import digests, errors, extents, units
from .bitmap import ChangeBitmap

log = logging.getLogger(__name__)

WORTH = 64 * units.MiB
"""Bytes of a disk that are read before its pool is asked."""

REST = 192 * units.MiB
"""Bytes of a disk that are left then, at least: otherwise it is read sooner than explained."""

SAMPLE = 32
"""Blocks of 64 KiB without anything that are read before the others are believed: if a share of
them s holds something, that stays unnoticed with the probability (1 - s)**32."""

LIMIT = 16 * units.MiB
"""Bytes of bitmaps that are kept: 32 KiB for 16 GiB, 4 MiB for 2 TiB."""


class Teller(Protocol):
    """What is needed of a pool."""

    async def allocated(self, vdi_ref: str, *, size: int) -> ChangeBitmap:
        """Return which blocks of a snapshot may hold data, or raise AllocationUnknown."""
        ...


class Reading(Protocol):
    """A snapshot that can be read."""

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        ...


class Holes:
    """What is known of the holes of snapshots, those asked for last at the end.

    Args:
        teller: the pool.
        rng: draws the blocks to look at; nobody can foresee what it will be.
        limit: bytes of bitmaps to keep.
    """

    def __init__(self, teller: Teller, *, rng: Random | None = None, limit: int = LIMIT) -> None:
        self._teller = teller
        self._rng = rng or SystemRandom()
        self._limit = limit
        self._known: OrderedDict[str, ChangeBitmap | None] = OrderedDict()

    def known(self, ref: str) -> ChangeBitmap | None:
        """Return which blocks of a snapshot may hold data, None if that is unknown as yet."""
        return self._known.get(ref)

    async def learn(
        self, ref: str, *, size: int, name: str, reading: AbstractAsyncContextManager[Reading]
    ) -> ChangeBitmap | None:
        """Return which blocks of a snapshot may hold data, None if the pool cannot tell.

        Args:
            ref: the snapshot.
            size: its size in bytes.
            name: what to call it in the log.
            reading: a read of it, to be entered.

        Raises:
            CbtfsError: it could not be read.
        """
        if ref not in self._known:
            self._keep(ref, await self._told(ref, size=size, name=name, reading=reading))
        self._known.move_to_end(ref)
        return self._known[ref]

    async def _told(
        self, ref: str, *, size: int, name: str, reading: AbstractAsyncContextManager[Reading]
    ) -> ChangeBitmap | None:
        try:
            allocated = await self._teller.allocated(ref, size=size)
        except errors.PoolError as error:
            log.info("%s: all of it is read: %s", name, error)
            return None
        sample = allocated.sampled(SAMPLE, self._rng)
        buffer = bytearray(units.CBT_BLOCK)
        async with reading as opened:
            for block in extents.split(sample.extents(), size=units.CBT_BLOCK):
                data = memoryview(buffer)[: block.length]
                await opened.read_into(data, block.start)
                if not digests.is_zero(data):
                    log.warning(
                        "%s: the pool calls the block at %d unallocated, but it holds data;"
                        " all of the disk is read",
                        name,
                        block.start,
                    )
                    return None
        log.info("%s: %s hold data", name, units.format_size(allocated.changed_bytes))
        return allocated

    def _keep(self, ref: str, allocated: ChangeBitmap | None) -> None:
        self._known[ref] = allocated
        while len(self._known) > 1 and sum(map(_weight, self._known.values())) > self._limit:
            self._known.popitem(last=False)


def _weight(bitmap: ChangeBitmap | None) -> int:
    """Return about how many bytes an entry takes."""
    return 256 + (bitmap.length if bitmap is not None else 0)
