"""Extent: half-open byte ranges, and the algebra on sequences of them.

::

    0        64K       128K      192K      256K
    |---------|#########|#########|---------|      Extent(start=64K, stop=192K), length 128K

Rules of this file:

1. Every function takes extents sorted by ``start`` and yields them sorted, disjoint and not empty.
2. Everything is lazy: a 16 TiB disk can have 2**27 extents, so nothing here ever holds two of them
   longer than it must, and callers should not make lists either.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from random import Random
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


def common(one: Iterable[Extent], other: Iterable[Extent]) -> Iterator[Extent]:
    """Yield what two sequences, each of disjoint extents, have both.

    ::

        one         |####|----|####|########|
        other       |--####|----|####--|##--|
        common      |--##|--|----|##|--|##--|
    """
    left, right = iter(one), iter(other)
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        start, stop = max(a.start, b.start), min(a.stop, b.stop)
        if start < stop:
            yield Extent(start, stop)
        if a.stop < b.stop:
            a = next(left, None)
        else:
            b = next(right, None)


def drawn(
    extents: Iterable[Extent], blocks: int, *, size: int, share: float, rng: Random
) -> Iterator[Extent]:
    """Yield a share of the ``blocks`` in ``extents``, each as likely as any other, in order.

    ::

        block     | 0  1  2 | 3  4  5  6 | 7  8  9 |      as many parts as blocks are wanted
        drawn             2   3                 8         one of each part

    Args:
        extents: block-aligned but for the end of the last.
        blocks: how many these are.
        size: of a block in bytes.
        share: 0 to 1; at least one block is drawn, if there is any and this is not 0.
        rng: draws them.
    """
    wanted = math.ceil(share * blocks)
    bounds = (part * blocks // wanted for part in range(1, wanted + 1))
    numbers = (rng.randrange(low, high) for low, high in pairwise(chain([0], bounds)))
    number = next(numbers, blocks)
    gone = 0
    for start, stop in extents:
        count = -(-(stop - start) // size)
        while number < gone + count:
            at = start + (number - gone) * size
            yield Extent(at, min(at + size, stop))
            number = next(numbers, blocks)
        gone += count


def total(extents: Iterable[Extent]) -> int:
    """Return the sum of the lengths of ``extents`` in bytes."""
    return sum(stop - start for start, stop in extents)
