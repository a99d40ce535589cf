"""Proof: which of several possible digests are those that a digest root was made of.

Where an array of digests has another root than the recorded one, and an image differs from it in
some blocks, either may be wrong there: each such block is a dispute. ::

    dispute      written (in the array)   actual (of the image)   others (of other points)
    block 1      d1                       x1                      d1, d1         likely d1
    block 7      x7                       d7                      d7             likely d7

The likely ones are tried first, then all combinations if there are few. The root decides.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import blake3

from . import digests, extents, sparse, units
from .extents import Extent

TRIES = 4096
"""Combinations that are tried at most, and as many as ``EFFORT`` allows."""

EFFORT = 2 * units.GiB
"""Bytes digested at most to try combinations; the array of a disk of 1 TiB has 256 MiB."""

_STEP = 4 * units.MiB


@dataclass(frozen=True, slots=True)
class Dispute:
    """A block, by its ``index``, whose digest is not certain; ``actual`` is b"" if unreadable."""

    index: int
    written: bytes
    actual: bytes
    others: tuple[bytes, ...] = ()

    def choices(self) -> list[bytes]:
        """Return the digests that it may have, likely ones first."""
        known = dict.fromkeys((self.actual, self.written, *self.others))
        return sorted(filter(None, known), key=lambda d: -self.others.count(d))


def settled(
    fd: int, disputes: Sequence[Dispute], *, size: int, root: str
) -> dict[int, bytes] | None:
    """Return the right digest of each disputed block, by index; None if none is proven.

    Args:
        fd: of the array, which is ``size`` bytes long.
        disputes: in order of their blocks; all others are taken as they stand in the array.
        size: in bytes.
        root: hex digest that the right array has.

    Raises:
        Unreadable: the array cannot be read.
    """
    tries = max(2, min(TRIES, EFFORT // max(size, 1)))
    for candidate in itertools.islice(_candidates(disputes, tries), tries + 2):
        if _root(fd, candidate, size=size) == root:
            return candidate
    return None


def _candidates(disputes: Sequence[Dispute], tries: int) -> Iterator[dict[int, bytes]]:
    choices = {dispute.index: dispute.choices() for dispute in disputes}
    yield {index: likely[0] for index, likely in choices.items()}
    yield {d.index: d.actual or d.written for d in disputes}
    if math.prod(map(len, choices.values())) <= tries:
        for chosen in itertools.product(*choices.values()):
            yield dict(zip(choices, chosen, strict=True))


def _root(fd: int, instead: Mapping[int, bytes], *, size: int) -> str:
    hasher = blake3.blake3()
    patches = sorted(instead.items())
    at = 0
    for start, stop in extents.split([Extent(0, size)], size=_STEP):
        piece = bytearray(sparse.read_all(fd, stop - start, start))
        while at < len(patches) and patches[at][0] * digests.LENGTH < stop:
            index, entry = patches[at]
            offset = index * digests.LENGTH - start
            piece[offset : offset + digests.LENGTH] = entry
            at += 1
        hasher.update(piece)
    return hasher.hexdigest()
