"""Pieces: where each byte of a volume lies that is not in one piece.

A table has a line for each segment of a volume, in sectors of 512 bytes, as dmsetup(8) has them::

    0 32768 linear 0 2048                       all of it in image 0, from its sector 2048 on
    32768 8192 striped 2 128 0 40960 1 2048     128 sectors in image 0, 128 in image 1, and so on

Images are numbered from 0. The segments follow on one another, so every byte lies in one place, and
to look for it ends.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import errors

SECTOR = 512

LIMIT = 4096
"""Pieces of all volumes of an ``open``: each is a word or two of a command line."""

SIZE_LIMIT = 1 << 62
"""Bytes of a volume: the kernel's offsets are below twice that."""


@dataclass(frozen=True, slots=True)
class Segment:
    """``size`` bytes of a volume from ``start`` on.

    Attributes:
        start: in bytes, as the others.
        size: of all columns together.
        columns: for each the number of its image, and the offset there.
        chunk: how much comes from a column before it is the next one's turn; of one column all.
    """

    start: int
    size: int
    columns: tuple[tuple[int, int], ...]
    chunk: int

    def line(self, numbers: Sequence[int]) -> str:
        """Return the line of a table, with ``numbers[0]`` for image 0, and so on."""
        places = " ".join(f"{numbers[i]} {offset // SECTOR}" for i, offset in self.columns)
        one = len(self.columns) == 1
        kind = "linear" if one else f"striped {len(self.columns)} {self.chunk // SECTOR}"
        return f"{self.start // SECTOR} {self.size // SECTOR} {kind} {places}"


class Table:
    """Where a volume lies.

    Args:
        segments: in order.

    Raises:
        StoreError: they do not follow on one another from 0 on, or make no sense.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._starts = [segment.start for segment in segments]
        ends = [0, *(segment.start + segment.size for segment in segments)]
        if not segments or self._starts != ends[:-1] or ends[-1] >= SIZE_LIMIT:
            raise errors.StoreError("a volume's segments do not follow on one another")
        if not all(_makes_sense(segment) for segment in segments):
            raise errors.StoreError("a volume has a segment that makes no sense")
        self.size = ends[-1]

    def __len__(self) -> int:
        """Return of how many pieces it is made."""
        return sum(len(segment.columns) for segment in self.segments)

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield where the bytes lie, in order: image, offset there, length; less beyond the end."""
        stop = min(offset + length, self.size)
        while offset < stop:
            segment = self.segments[bisect_right(self._starts, offset) - 1]
            turn, within = divmod(offset - segment.start, segment.chunk)
            row, column = divmod(turn, len(segment.columns))
            image, first = segment.columns[column]
            count = min(segment.chunk - within, stop - offset)
            yield image, first + row * segment.chunk + within, count
            offset += count

    def lines(self, numbers: Sequence[int]) -> Iterator[str]:
        """Yield the lines, with ``numbers[0]`` for image 0, and so on."""
        return (segment.line(numbers) for segment in self.segments)

    def ends(self) -> Iterator[tuple[int, int]]:
        """Yield up to where each piece reaches: image, offset there."""
        for segment in self.segments:
            for image, first in segment.columns:
                yield image, first + segment.size // len(segment.columns)


def parse(lines: Sequence[str]) -> Table:
    """Return the table that has these lines.

    Raises:
        StoreError: they are no table.
    """
    return Table([_parsed(line) for line in lines])


def _parsed(line: str) -> Segment:
    try:
        match line.split():
            case [start, size, "linear", *places]:
                chunk = size
            case [start, size, "striped", count, chunk, *places] if int(count) * 2 == len(places):
                pass
            case _:
                raise ValueError
        numbers = list(map(int, places))
        columns = zip(numbers[::2], (n * SECTOR for n in numbers[1::2]), strict=True)
        return Segment(int(start) * SECTOR, int(size) * SECTOR, tuple(columns), int(chunk) * SECTOR)
    except ValueError:
        raise errors.StoreError(f"{line!r} is no line of a table") from None


def _makes_sense(segment: Segment) -> bool:
    # as dm-stripe has it, no column ends within a chunk
    row = segment.chunk * len(segment.columns)
    is_whole = segment.chunk > 0 and row > 0 and segment.size > 0 and segment.size % row == 0
    numbers = (segment.start, segment.size, segment.chunk, *(at for _, at in segment.columns))
    is_even = all(number >= 0 and number % SECTOR == 0 for number in numbers)
    return is_whole and is_even and all(image >= 0 for image, _ in segment.columns)
