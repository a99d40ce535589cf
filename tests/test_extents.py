"""The algebra of extents agrees with sets of bytes."""

from collections.abc import Iterable, Iterator
from itertools import count, islice, pairwise

import pytest
from hypothesis import given, strategies as st

from cbtfs import extents
from cbtfs.extents import Extent

ranges = st.builds(lambda start, length: Extent(start, start + length), *[st.integers(0, 60)] * 2)
inputs = st.lists(ranges, max_size=12).map(sorted)


def covered(found: Iterable[Extent]) -> set[int]:
    return {byte for extent in found for byte in range(*extent)}


def endless() -> Iterator[Extent]:
    return (Extent(2 * n, 2 * n + 1) for n in count())


def test_an_extent_knows_its_length() -> None:
    assert Extent(10, 25).length == 15


def test_merge_joins_what_overlaps_or_touches() -> None:
    found = extents.merge([Extent(0, 4), Extent(2, 6), Extent(6, 8), Extent(9, 10)])

    assert list(found) == [Extent(0, 8), Extent(9, 10)]


def test_merge_bridges_gaps_up_to_the_given_one() -> None:
    disk = [Extent(0, 4), Extent(8, 12), Extent(17, 20)]

    assert list(extents.merge(disk, gap=4)) == [Extent(0, 12), Extent(17, 20)]


def test_merge_keeps_a_long_extent_that_holds_a_short_one() -> None:
    assert list(extents.merge([Extent(0, 9), Extent(1, 2)])) == [Extent(0, 9)]


@given(inputs)
def test_merge_yields_the_same_bytes_in_disjoint_extents(disk: list[Extent]) -> None:
    found = list(extents.merge(disk))

    assert covered(found) == covered(disk)
    assert all(e.length > 0 for e in found)
    assert all(a.stop < b.start for a, b in pairwise(found))


@given(inputs, st.integers(0, 20))
def test_merge_fills_exactly_the_small_gaps(disk: list[Extent], gap: int) -> None:
    exact = list(extents.merge(disk))
    found = list(extents.merge(disk, gap=gap))
    filled = {
        byte
        for a, b in pairwise(exact)
        if b.start - a.stop <= gap
        for byte in range(a.stop, b.start)
    }

    assert covered(found) == covered(exact) | filled
    assert all(b.start - a.stop > gap for a, b in pairwise(found))


@given(inputs, st.integers(0, 130))
def test_clip_drops_what_lies_beyond(disk: list[Extent], stop: int) -> None:
    found = list(extents.clip(disk, stop=stop))

    assert covered(found) == {byte for byte in covered(disk) if byte < stop}
    assert all(e.length > 0 for e in found)


@given(inputs.map(extents.merge).map(list), st.integers(1, 30))
def test_split_cuts_at_every_multiple_of_the_size(disk: list[Extent], size: int) -> None:
    found = list(extents.split(disk, size=size))

    assert covered(found) == covered(disk)
    assert all(e.start // size == (e.stop - 1) // size for e in found)
    assert list(extents.merge(found)) == disk


@given(inputs, st.integers(0, 130))
def test_complement_is_every_other_byte(disk: list[Extent], stop: int) -> None:
    found = list(extents.complement(disk, stop=stop))

    assert covered(found) == set(range(stop)) - covered(disk)
    assert list(extents.merge(found)) == found


@given(*[inputs.map(extents.merge).map(list)] * 2)
def test_common_is_what_both_have(one: list[Extent], other: list[Extent]) -> None:
    found = list(extents.common(one, other))

    assert covered(found) == covered(one) & covered(other)
    assert extents.total(found) == len(covered(found))


@given(inputs.map(extents.merge).map(list))
def test_total_counts_bytes(disk: list[Extent]) -> None:
    assert extents.total(disk) == len(covered(disk))


@pytest.mark.parametrize(
    "lazy",
    [
        extents.merge(endless()),
        extents.clip(endless(), stop=1 << 40),
        extents.split(endless(), size=4),
        extents.complement(endless(), stop=1 << 40),
        extents.common(endless(), endless()),
    ],
    ids=["merge", "clip", "split", "complement", "common"],
)
def test_endless_input_is_no_problem(lazy: Iterator[Extent]) -> None:
    assert len(list(islice(lazy, 1000))) == 1000


def test_clip_stops_reading_at_the_end() -> None:
    assert len(list(extents.clip(endless(), stop=10))) == 5
