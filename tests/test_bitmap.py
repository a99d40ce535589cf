"""A CBT bitmap becomes the extents that xapi means."""

import base64
import tracemalloc
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, strategies as st

from cbtfs import bitmap, errors, extents
from cbtfs.bitmap import ChangeBitmap, Marks
from cbtfs.extents import Extent
from cbtfs.units import CBT_BLOCK, MiB, TiB


def changes(bits: bytes, *, size: int) -> ChangeBitmap:
    return ChangeBitmap.from_base64(base64.b64encode(bits), size=size)


def model(bits: bytes, *, size: int) -> list[bool]:
    """The bits as xapi documents them, for every block of the disk, said in another way."""
    blocks = (size + CBT_BLOCK - 1) // CBT_BLOCK
    return [f"{bits[block // 8]:08b}"[block % 8] == "1" for block in range(blocks)]


@st.composite
def disks(draw: st.DrawFn) -> tuple[bytes, int]:
    size = draw(st.integers(0, 200 * CBT_BLOCK))
    length = ((size + CBT_BLOCK - 1) // CBT_BLOCK + 7) // 8
    return draw(st.binary(min_size=length, max_size=length)), size


def test_the_most_significant_bit_is_the_first_block() -> None:
    found = changes(b"\x81\x40", size=16 * CBT_BLOCK).extents()

    assert list(found) == [
        Extent(0, CBT_BLOCK),
        Extent(7 * CBT_BLOCK, 8 * CBT_BLOCK),
        Extent(9 * CBT_BLOCK, 10 * CBT_BLOCK),
    ]


def test_neighbouring_blocks_are_one_extent_also_across_bytes() -> None:
    found = changes(b"\x01\x80", size=MiB).extents()

    assert list(found) == [Extent(7 * CBT_BLOCK, 9 * CBT_BLOCK)]


def test_a_partial_last_block_ends_with_the_disk() -> None:
    changed = changes(b"\xc0", size=CBT_BLOCK + 512)

    assert list(changed.extents()) == [Extent(0, CBT_BLOCK + 512)]
    assert changed.changed_bytes == CBT_BLOCK + 512


def test_padding_bits_stand_for_nothing() -> None:
    changed = changes(b"\x1f", size=3 * CBT_BLOCK)

    assert list(changed.extents()) == []
    assert changed.changed_blocks == changed.changed_bytes == changed.extent_count() == 0


def test_an_empty_disk_has_an_empty_bitmap() -> None:
    changed = changes(b"", size=0)

    assert list(changed.extents()) == []
    assert changed.changed_bytes == changed.extent_count() == 0


def test_text_and_bytes_are_the_same() -> None:
    assert ChangeBitmap.from_base64("gA==", size=MiB // 2).changed_blocks == 1
    assert ChangeBitmap.from_base64(b"gA==", size=MiB // 2).changed_blocks == 1


@pytest.mark.parametrize("text", ["gA=", "gA==\n", "g A==", "gA==gA==", "!!!!", "\u00e9"])
def test_what_is_not_strict_base64_is_refused(text: str) -> None:
    with pytest.raises(errors.ChangesUnknown, match="base64") as caught:
        ChangeBitmap.from_base64(text, size=MiB // 2)

    assert caught.value.reason == "cbt-mismatch"


@pytest.mark.parametrize("length", [0, 1, 3, 4])
def test_a_bitmap_of_another_size_is_refused(length: int) -> None:
    with pytest.raises(errors.ChangesUnknown, match=r"has 2$") as caught:
        changes(bytes(length), size=MiB)

    assert caught.value.reason == "cbt-mismatch"


def test_repr_says_how_much_changed() -> None:
    assert repr(changes(b"\x80\x00", size=MiB)) == "<ChangeBitmap 1 of 16 blocks changed>"


@given(disks())
def test_extents_cover_exactly_the_changed_blocks(disk: tuple[bytes, int]) -> None:
    bits, size = disk
    found = list(changes(bits, size=size).extents())

    covered = [
        any(e.start <= block * CBT_BLOCK < e.stop for e in found)
        for block in range(len(model(bits, size=size)))
    ]

    assert covered == model(bits, size=size)
    assert all(e.start % CBT_BLOCK == 0 for e in found)
    assert all(e.stop % CBT_BLOCK == 0 or e.stop == size for e in found)
    assert list(extents.merge(found)) == found


@given(disks())
def test_the_numbers_agree_with_the_extents(disk: tuple[bytes, int]) -> None:
    bits, size = disk
    changed = changes(bits, size=size)

    assert changed.changed_blocks == sum(model(bits, size=size))
    assert changed.changed_bytes == extents.total(changed.extents())
    assert changed.extent_count() == sum(1 for _ in changed.extents())


@given(disks(), st.integers(1, 20))
def test_runs_are_counted_across_chunks(disk: tuple[bytes, int], chunk: int) -> None:
    bits, size = disk
    changed = changes(bits, size=size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmap, "_COUNT_CHUNK", chunk)
        assert changed.extent_count() == sum(1 for _ in changed.extents())


def test_the_bitmap_of_16_tib_is_held_once() -> None:
    size = 16 * TiB
    text = base64.b64encode(b"\xaa" * (size // CBT_BLOCK // 8)).decode()

    tracemalloc.start()
    changed = ChangeBitmap.from_base64(text, size=size)
    count = changed.extent_count()
    first = next(changed.extents())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert count == changed.changed_blocks == 1 << 27
    assert first == Extent(0, CBT_BLOCK)
    assert peak < 48 * MiB


@given(disks())
def test_a_bitmap_of_its_own_extents_is_the_same(disk: tuple[bytes, int]) -> None:
    bits, size = disk
    before = changes(bits, size=size)

    again = ChangeBitmap.of_extents(before.extents(), size=size)

    assert list(again.extents()) == list(before.extents())
    assert again.changed_blocks == before.changed_blocks


def test_an_extent_sets_every_block_it_touches() -> None:
    found = ChangeBitmap.of_extents(
        [Extent(CBT_BLOCK - 1, CBT_BLOCK + 1), Extent(4 * CBT_BLOCK, 9 * CBT_BLOCK)],
        size=5 * CBT_BLOCK + 512,
    )

    assert list(found.extents()) == [
        Extent(0, 2 * CBT_BLOCK),
        Extent(4 * CBT_BLOCK, 5 * CBT_BLOCK + 512),
    ]


@given(disks(), st.data())
def test_runs_say_of_each_block_whether_it_changed(
    disk: tuple[bytes, int], data: st.DataObject
) -> None:
    bits, size = disk
    expected = model(bits, size=size)
    first = data.draw(st.integers(0, len(expected)))
    last = data.draw(st.integers(first, len(expected)))
    start, stop = first * CBT_BLOCK, min(last * CBT_BLOCK, size)

    found = list(changes(bits, size=size).runs(start, stop))

    blocks = [
        changed
        for changed, begin, end in found
        for _ in range(begin // CBT_BLOCK, -(-end // CBT_BLOCK))
    ]
    assert blocks == expected[first:last]
    if found:
        assert (found[0][1], found[-1][2]) == (start, stop)
        assert all(one[2] == two[1] and one[0] != two[0] for one, two in pairwise(found))


@given(disks(), st.integers(0, 250), st.integers())
def test_a_sample_is_of_unchanged_blocks_and_as_large_as_asked(
    disk: tuple[bytes, int], count: int, seed: int
) -> None:
    bits, size = disk
    changed = model(bits, size=size)

    sample = changes(bits, size=size).sampled(count, Random(seed))

    assert sample.changed_blocks == min(count, changed.count(False))
    picked = [
        index
        for is_in, begin, end in sample.runs(0, size)
        for index in range(begin // CBT_BLOCK, -(-end // CBT_BLOCK))
        if is_in
    ]
    assert not any(changed[index] for index in picked)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_every_unchanged_block_is_sampled_equally_often(count: int) -> None:
    changed = changes(b"\x0f\x70", size=12 * CBT_BLOCK)  # unchanged: 0-3, 8; 9-11 changed
    rng = Random(7)
    seen = dict.fromkeys([0, 1, 2, 3, 8], 0)

    for _ in range(2000):
        for extent in changed.sampled(min(count, 5), rng).extents():
            for block in range(extent.start // CBT_BLOCK, extent.stop // CBT_BLOCK):
                seen[block] += 1

    expected = 2000 * min(count, 5) / 5
    assert all(abs(times - expected) < 150 for times in seen.values())


def test_a_sample_is_found_quickly_among_very_few_unchanged_blocks() -> None:
    changed = ChangeBitmap(bytes(1) + b"\xff" * ((1 << 20) - 1), size=CBT_BLOCK << 23)

    assert list(changed.sampled(4, Random(1)).extents())


@given(disks(), st.data())
def test_a_range_is_clear_if_no_block_of_it_is_set(
    disk: tuple[bytes, int], data: st.DataObject
) -> None:
    bits, size = disk
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))

    marked = model(bits, size=size)[start // CBT_BLOCK : -(-stop // CBT_BLOCK)]
    assert changes(bits, size=size).is_clear(start, stop) == (not any(marked))


@given(disks(), st.randoms(use_true_random=False))
def test_marks_become_a_bitmap(disk: tuple[bytes, int], rng: Random) -> None:
    bits, size = disk
    found = changes(bits, size=size)
    marks = Marks(size=size)
    runs = list(found.extents())
    rng.shuffle(runs)

    for start, stop in runs:
        marks.add(start, stop)

    assert list(marks.bitmap().extents()) == list(found.extents())
