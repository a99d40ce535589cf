"""Read-ahead: which readers of a file go through it in order, and how far ahead of each to fetch.

The kernel asks for a piece at a time, several at once and not quite in order, and a file may have
several readers: four threads, or a loop device below a file system. Each is a stream::

    asked for so far    |###########|                    next: where the stream has got to
    fetched or on its way           |·········|          ahead: up to here
    window                          |——————————————|     from next on: doubled as it goes on

A stream is topped up when half of its window is used up, so that fetches come in good size. No
I/O here: ``Streams.note`` says what to fetch, whoever does it says with ``Streams.fetched`` how far
it got.
"""

from dataclasses import dataclass

from . import units
from .extents import Extent

FIRST = units.MiB
"""Window of a stream that has just been recognised."""

MOST = 32 * units.MiB
"""Window of a long one; more than the kernel, a host and a connection have under way together."""

SLACK = 4 * units.MiB
"""How far from where it has got to a stream may be asked for: the kernel's own requests overtake
one another."""

STREAMS = 16
"""Streams remembered for each open file."""


@dataclass(slots=True, eq=False)
class Stream:
    """A reader that goes forward; ``window`` is 0 until it has done so once."""

    next: int
    ahead: int
    window: int = 0


class Streams:
    """The streams of one open file, the one that was used last at the end.

    Args:
        size: of the file in bytes.
        most: bytes to be ahead of a stream at most.
    """

    def __init__(self, size: int, *, most: int = MOST) -> None:
        self._size = size
        self._most = most
        self._streams: list[Stream] = []

    def note(self, start: int, stop: int) -> tuple[Stream, Extent]:
        """Take a read of bytes ``start`` to ``stop``; return its stream and what to fetch ahead.

        That is empty while the stream is far enough ahead, or shows no order. A read from the
        beginning of the file counts as the beginning of a stream.
        """
        stream = self._found(start)
        if stream is None:
            stream = Stream(stop, stop, FIRST if start == 0 else 0)
            self._streams.append(stream)
            del self._streams[:-STREAMS]
        else:
            self._streams.remove(stream)
            self._streams.append(stream)
            if stop <= stream.next:
                return stream, Extent(stream.ahead, stream.ahead)
            stream.next = stop
            stream.window = stream.window or FIRST
        return stream, self._due(stream)

    def fetched(self, stream: Stream, stop: int) -> None:
        """Note that what lies before ``stop`` is fetched or on its way."""
        stream.ahead = max(stream.ahead, stop)

    def _found(self, start: int) -> Stream | None:
        """Return the stream that a read from ``start`` on belongs to: the one used last, if any."""
        for stream in reversed(self._streams):
            if stream.next - SLACK <= start <= max(stream.ahead, stream.next):
                return stream
        return None

    def _due(self, stream: Stream) -> Extent:
        start = max(stream.ahead, stream.next)
        window = min(stream.window, self._most)
        if not window or start - stream.next > window // 2:
            return Extent(start, start)
        stream.window = min(2 * stream.window, self._most)
        return Extent(start, max(start, min(stream.next + window, self._size)))
