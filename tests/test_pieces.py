"""Pieces: every byte of a volume lies where device-mapper would look for it."""

from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors, pieces
from cbtfs.pieces import SECTOR, Segment, Table

Shape = tuple[int, int, int]
"""Of a segment: columns, rows, sectors in a chunk."""

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)), min_size=1)


def table(shapes: Sequence[Shape]) -> Table:
    """Return a table whose pieces lie at places of their own in as many images as it takes."""
    segments: list[Segment] = []
    start = 0
    for number, (width, rows, chunk) in enumerate(shapes):
        size = width * rows * chunk * SECTOR
        columns = tuple((i, (number * 100 + 7) * SECTOR) for i in range(width))
        segments.append(Segment(start, size, columns, chunk * SECTOR if width > 1 else size))
        start += size
    return Table(segments)


def sectors(shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """Return image and sector of each sector, told off one by one."""
    found: list[tuple[int, int]] = []
    for number, (width, rows, chunk) in enumerate(shapes):
        for row in range(rows):
            for column in range(width):
                first = number * 100 + 7 + row * chunk
                found += [(column, first + i) for i in range(chunk)]
    return found


@given(shapes, st.data())
def test_any_range_is_the_sectors_told_off_one_by_one(
    shapes: list[Shape], data: st.DataObject
) -> None:
    made, told = table(shapes), sectors(shapes)
    assert made.size == len(told) * SECTOR
    offset = data.draw(st.integers(0, made.size))
    length = data.draw(st.integers(0, made.size + SECTOR))

    parts = list(made.parts(offset, length))

    expected = range(offset, min(offset + length, made.size))
    bytes_of = [(image, at + i) for image, at, count in parts for i in range(count)]
    assert bytes_of == [
        (told[at // SECTOR][0], told[at // SECTOR][1] * SECTOR + at % SECTOR) for at in expected
    ]
    ends = {image: max(e for i, e in made.ends() if i == image) for image, _ in made.ends()}
    assert all(end <= ends[image] for image, end in ((i, at + n) for i, at, n in parts))


@given(shapes)
def test_table_is_what_its_lines_say(shapes: list[Shape]) -> None:
    made = table(shapes)

    assert pieces.parse(list(made.lines(range(4)))).segments == made.segments


def test_lines_are_those_of_device_mapper() -> None:
    made = Table(
        [
            Segment(0, 1 << 20, ((1, 2 << 20),), 1 << 20),
            Segment(1 << 20, 1 << 20, ((0, 0), (1, 4 << 20)), 1 << 16),
        ]
    )

    assert list(made.lines([3, 5])) == [
        "0 2048 linear 5 4096",
        "2048 2048 striped 2 128 3 0 5 8192",
    ]
    assert len(made) == 3


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["1 8 linear 0 0"],
        ["0 8 linear 0 0", "9 8 linear 0 0"],
        ["0 8 linear 0 0", "0 8 linear 0 0"],
        ["0 0 linear 0 0"],
        ["0 -8 linear 0 0"],
        ["0 8 linear 0 -1"],
        ["0 8 linear -1 0"],
        ["0 8 linear 0"],
        ["0 8 linear"],
        ["0 8 striped 0 8"],
        ["0 8 striped 2 0 0 0 1 0"],
        ["0 8 striped 2 -4 0 0 1 0"],
        ["0 8 striped 2 8 0 0 1 0"],
        ["0 16 striped 3 8 0 0 1 0"],
        ["0 eight linear 0 0"],
        ["0 8 zero"],
        [""],
        [f"0 {1 << 60} linear 0 0"],
    ],
)
def test_what_is_no_table_is_refused(lines: list[str]) -> None:
    with pytest.raises(errors.StoreError):
        pieces.parse(lines)
