"""Chunks: parts of an image in the form in which xapi takes them for a disk.

::

    offset (8 bytes)  length (4 bytes)  data  |  offset  length  data  |  …  |  0  0

Little-endian (xen-api, vhd-tool, chunked.ml). What has no chunk stays as it is on the disk.
"""

import struct
from collections.abc import AsyncGenerator, Callable, Iterable

import trio

from .committed import Committed
from .extents import Extent

_HEAD = struct.Struct("<QI")
_END = _HEAD.pack(0, 0)


class Chunks:
    """Some of an image, as chunks.

    Args:
        image: that they are read from, and compared with its digests.
        pieces: returns what to read, each time from the beginning: block-aligned, small enough to
            be held in memory, with what of each is to be sent.
        advanced: called with the bytes of data sent since the last call.

    Attributes:
        length: of all of it in bytes.
        data: bytes of data in it.
    """

    def __init__(
        self,
        image: Committed,
        pieces: Callable[[], Iterable[tuple[Extent, list[Extent]]]],
        *,
        advanced: Callable[[int], None],
    ) -> None:
        self._image = image
        self._pieces = pieces
        self._advanced = advanced
        count = self.data = 0
        for _, chunks in pieces():
            count += len(chunks)
            self.data += sum(chunk.length for chunk in chunks)
        self.length = self.data + (count + 1) * _HEAD.size

    async def parts(self) -> AsyncGenerator[bytes | memoryview]:
        """Yield the body of the request, a bounded part at a time.

        Raises:
            ImageDamaged: a block is not what its digest says, be it sent or not.
        """
        pieces = iter(self._pieces())
        while (found := await trio.to_thread.run_sync(self._next, pieces)) is not None:
            piece, chunks, data = found
            for start, stop in chunks:
                yield _HEAD.pack(start, stop - start)
                yield memoryview(data)[start - piece.start : stop - piece.start]
                self._advanced(stop - start)
        yield _END

    def _next(
        self, pieces: Iterable[tuple[Extent, list[Extent]]]
    ) -> tuple[Extent, list[Extent], bytes] | None:
        for piece, chunks in pieces:
            return piece, chunks, self._image.read(piece)
        return None


def everything(image: Committed) -> Iterable[tuple[Extent, list[Extent]]]:
    """Yield the pieces of an image that may not be zero, with what of each is not."""
    for piece in image.pieces():
        yield piece, image.chunks_in(piece)
