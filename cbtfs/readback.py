"""Readback: what a pool holds after a restore, compared with the digests of what was sent."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from random import Random
from threading import Lock

import trio

from . import digests, errors, extents
from .bitmap import ChangeBitmap
from .committed import Committed
from .copier import Copier
from .extents import Extent
from .pool import Pool

SAMPLE = 64
"""Blocks that hold data, as far as there are so many."""

SAMPLE_OF_ZEROS = 16
"""Blocks that hold zeros."""

CONNECTIONS = 2
"""Connections to each disk that is read back in full."""


@dataclass(frozen=True, slots=True)
class Written:
    """A disk of the pool that was written; ``size`` is its virtual size in bytes."""

    ref: str
    uuid: str
    size: int


async def compare(
    pool: Pool,
    disk: Written,
    image: Committed,
    *,
    whole: bool,
    changed: ChangeBitmap | None = None,
) -> int:
    """Read a disk, or a sample of it, and compare it with the digests of ``image``.

    A sample has some of the blocks in ``changed``, too: those that were written.

    Returns:
        The bytes compared.

    Raises:
        BitmapWrong: a block differs that is not in ``changed``.
        PoolError: they differ; or the disk cannot be read.
        ExportError: as the connection says.
    """
    wanted = await trio.to_thread.run_sync(
        lambda: list(_wanted(image, disk, whole=whole, changed=changed))
    )
    check = _Check(image, disk.uuid, changed)
    copier = Copier(
        lambda: pool.open_export(disk.ref),
        check,
        connections=CONNECTIONS if whole else 1,
        advanced=lambda read, written: None,
    )
    await copier.copy(wanted)
    return check.compared


def _wanted(
    image: Committed, disk: Written, *, whole: bool, changed: ChangeBitmap | None
) -> Iterator[Extent]:
    """Yield what to read: to the end of the last block even if the image ends within it.

    xapi-nbd serves whole sectors only, and a disk may be larger than its image: an SR rounds up.
    """
    found: Iterable[Extent] = [Extent(0, image.size)]
    if not whole:
        found = _sample(image, changed, Random())
    end = min(-(-image.size // digests.BLOCK) * digests.BLOCK, disk.size)
    for start, stop in found:
        if start < stop:
            yield Extent(start, end if stop == image.size else stop)


def _sample(image: Committed, changed: ChangeBitmap | None, rng: Random) -> Iterator[Extent]:
    """Yield random blocks, most of them with data."""
    data = ChangeBitmap.of_extents(
        (chunk for piece in image.pieces() for chunk in image.chunks_in(piece)), size=image.size
    )
    samples = [_some_of(data, rng), data.sampled(SAMPLE_OF_ZEROS, rng)]
    if changed is not None:
        samples.append(_some_of(changed, rng))
    return extents.merge(merge(*(sample.extents() for sample in samples)))


def _some_of(blocks: ChangeBitmap, rng: Random) -> ChangeBitmap:
    others = extents.complement(blocks.extents(), stop=blocks.size)
    return ChangeBitmap.of_extents(others, size=blocks.size).sampled(SAMPLE, rng)


class _Check:
    """Where the bytes land: nowhere; they are only compared."""

    def __init__(self, image: Committed, uuid: str, changed: ChangeBitmap | None) -> None:
        self.compared = 0
        self._image = image
        self._uuid = uuid
        self._changed = changed
        self._lock = Lock()

    def write(self, offset: int, data: memoryview) -> int:
        """Compare what was read at ``offset``; nothing is stored."""
        length = min(len(data), self._image.size - offset)
        found = digests.of_blocks(data[:length])
        expected = self._image.digests_of(offset, offset + length)
        for start, stop in digests.differences(found, expected, length=length):
            raise self._wrong(offset + start, offset + stop)
        with self._lock:
            self.compared += length
        return 0

    def _wrong(self, start: int, stop: int) -> errors.PoolError:
        runs = self._changed.runs(start, stop) if self._changed is not None else ()
        was_same = not all(is_changed for is_changed, _, _ in runs)
        kind = errors.BitmapWrong if was_same else errors.PoolError
        return kind(
            f"VDI {self._uuid} holds something else than the restore point at bytes {start} to"
            f" {stop}{', not known to differ' if was_same else ''}; run the command again, and look"
            " for what else writes to it or for a failing SR"
        )
