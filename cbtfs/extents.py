"""Extent: half-open byte ranges, and the algebra on sequences of them.

::

    0        64K       128K      192K      256K
    |---------|#########|#########|---------|      Extent(start=64K, stop=192K), length 128K

Rules of this file:

1. Every function takes extents sorted by ``start`` and yields them sorted, disjoint and not empty.
2. Everything is lazy: a 16 TiB disk can have 2**27 extents, so nothing here ever holds two of them
   longer than it must, and callers should not make lists either.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """A half-open range ``[start, stop)`` of a disk, in bytes."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Size of the range in bytes."""
        return self.stop - self.start


def merge(extents: Iterable[Extent], *, gap: int = 0) -> Iterator[Extent]:
    """Yield ``extents`` with those joined that overlap, touch, or are at most ``gap`` bytes apart.

    ::

        in          |##|##|----|##|--------|##|
        gap=0       |#####|----|##|--------|##|
        gap=4       |#############|--------|##|      the gap becomes part of the extent

    Empty extents are dropped.
    """
    start = stop = -1
    for extent in extents:
        if extent.start >= extent.stop:
            continue
        if stop < 0:
            start, stop = extent
        elif extent.start - stop <= gap:
            stop = max(stop, extent.stop)
        else:
            yield Extent(start, stop)
            start, stop = extent
    if stop >= 0:
        yield Extent(start, stop)


def clip(extents: Iterable[Extent], *, stop: int) -> Iterator[Extent]:
    """Yield the parts of ``extents`` below byte ``stop``; what lies beyond is not even read."""
    for extent in extents:
        if extent.start >= stop:
            return
        if extent.start < extent.stop:
            yield Extent(extent.start, min(extent.stop, stop))


def split(extents: Iterable[Extent], *, size: int) -> Iterator[Extent]:
    """Yield ``extents`` cut at every multiple of ``size`` bytes, so none is longer than ``size``.

    ::

        in          |---#|####|####|##--|
        out         |---A|BBBB|CCCC|DD--|      | = multiples of size
    """
    for start, stop in extents:
        while start < stop:
            cut = min(stop, start - start % size + size)
            yield Extent(start, cut)
            start = cut


def complement(extents: Iterable[Extent], *, stop: int) -> Iterator[Extent]:
    """Yield what ``extents`` leave free of the range from 0 to ``stop`` bytes."""
    free = 0
    for extent in clip(extents, stop=stop):
        if free < extent.start:
            yield Extent(free, extent.start)
        free = max(free, extent.stop)
    if free < stop:
        yield Extent(free, stop)


def total(extents: Iterable[Extent]) -> int:
    """Return the sum of the lengths of ``extents`` in bytes."""
    return sum(stop - start for start, stop in extents)
