"""Work: what is to be brought over of one disk, and where that begins.

::

    block      | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |
    expected         #   #           #                        changed, or allocated
    sample                                       s            only to be compared
    wanted         |-----------------|         |---|          read; small gaps are read along

What is read though nobody expected it, the sample and the gaps, is compared with the image.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import merge
from random import Random
from typing import Self

from . import extents, units
from .bitmap import ChangeBitmap
from .extents import Extent
from .plan import DiskPlan
from .sample import Sample

GAP = 2 * units.CBT_BLOCK
"""Bytes between two extents that are read along: one request less. With 1 % of the blocks changed
at random that makes 3 % more to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be done with a disk, as far as it is known now.

    Attributes:
        disk: the method, why, and what is cloned; its method is never ``resume``.
        size: of the disk in bytes.
        expected: the blocks to bring over; None for all.
        sample: blocks that are only to be compared; None for none.
        offset: where to begin.
    """

    disk: DiskPlan
    size: int
    expected: ChangeBitmap | None = None
    sample: ChangeBitmap | None = None
    offset: int = 0

    @property
    def total(self) -> int:
        """Bytes to bring over, wherever it begins."""
        return self.size if self.expected is None else self.expected.changed_bytes

    @property
    def remaining(self) -> int:
        """Bytes to read, but for small gaps."""
        if self.expected is None:
            return self.size - self.offset
        sampled = self.sample.changed_from(self.offset) if self.sample is not None else 0
        return self.expected.changed_from(self.offset) + sampled

    def wanted(self) -> Iterator[Extent]:
        """Yield what to read, in order."""
        if self.expected is None:
            found: Iterable[Extent] = [Extent(0, self.size)] if self.size else []
        elif self.sample is None:
            found = self.expected.extents()
        else:
            found = merge(self.expected.extents(), self.sample.extents())
        for start, stop in extents.merge(found, gap=GAP):
            if stop > self.offset:
                yield Extent(max(start, self.offset), stop)

    def extent_count(self) -> int:
        """Return how many extents there are to bring over."""
        return int(self.size > 0) if self.expected is None else self.expected.extent_count()

    def sampled(self, sample: Sample, rng: Random) -> Self:
        """Return the same work with a sample, drawn by ``rng``, of what is not expected."""
        if self.expected is None:
            return self
        unexpected = -(-self.size // units.CBT_BLOCK) - self.expected.changed_blocks
        count = sample.count(unexpected)
        return replace(self, sample=self.expected.sampled(count, rng) if count else None)
