"""Work: what is read of a disk, and where that begins."""

from dataclasses import replace
from random import Random

import pytest

from cbtfs.bitmap import ChangeBitmap
from cbtfs.extents import Extent
from cbtfs.plan import DiskPlan, Reason
from cbtfs.sample import Sample
from cbtfs.units import CBT_BLOCK, MiB
from cbtfs.work import Work

DISK = DiskPlan(
    device="xvda",
    vdi_uuid="v",
    vdi_ref="r",
    size=4 * MiB,
    method="incremental",
    reason=Reason.CHANGED,
    detail="",
)


def blocks(*numbers: int) -> list[Extent]:
    return [Extent(n * CBT_BLOCK, (n + 1) * CBT_BLOCK) for n in numbers]


def bitmap(*numbers: int) -> ChangeBitmap:
    return ChangeBitmap.of_extents(blocks(*numbers), size=4 * MiB)


def span(first: int, last: int) -> Extent:
    return Extent(first * CBT_BLOCK, last * CBT_BLOCK)


def test_without_a_bitmap_everything_is_read() -> None:
    work = Work(disk=DISK, size=4 * MiB)

    assert list(work.wanted()) == [Extent(0, 4 * MiB)]
    assert (work.total, work.extent_count()) == (4 * MiB, 1)


def test_of_an_empty_disk_nothing_is_read() -> None:
    assert list(Work(disk=DISK, size=0).wanted()) == []


def test_small_gaps_are_read_along_and_counted_for_nothing() -> None:
    work = Work(disk=DISK, size=4 * MiB, expected=bitmap(1, 4, 8))

    assert list(work.wanted()) == [span(1, 5), span(8, 9)]
    assert (work.total, work.extent_count()) == (3 * CBT_BLOCK, 3)


def test_the_sample_is_read_in_its_place() -> None:
    work = Work(disk=DISK, size=4 * MiB, expected=bitmap(10, 20), sample=bitmap(3, 15, 63))

    assert list(work.wanted()) == [
        span(3, 4),
        span(10, 11),
        span(15, 16),
        span(20, 21),
        span(63, 64),
    ]


@pytest.mark.parametrize(
    ("offset", "wanted"),
    [
        (0, [span(1, 3), span(9, 10)]),
        (CBT_BLOCK * 2, [span(2, 3), span(9, 10)]),
        (CBT_BLOCK * 3, [span(9, 10)]),
        (4 * MiB, []),
    ],
)
def test_what_is_done_already_is_not_read_again(offset: int, wanted: list[Extent]) -> None:
    work = Work(disk=DISK, size=4 * MiB, expected=bitmap(1, 2, 9), offset=offset)

    assert list(work.wanted()) == wanted


def test_what_remains_is_told_without_walking_through_it() -> None:
    work = Work(disk=DISK, size=4 * MiB, expected=bitmap(1, 2, 9), sample=bitmap(0, 40))

    assert work.remaining == 5 * CBT_BLOCK
    assert replace(work, offset=2 * CBT_BLOCK).remaining == 3 * CBT_BLOCK
    assert replace(work, offset=4 * MiB).remaining == 0
    assert Work(disk=DISK, size=4 * MiB, offset=MiB).remaining == 3 * MiB


def test_a_sample_is_drawn_of_what_is_not_expected() -> None:
    work = Work(disk=DISK, size=4 * MiB, expected=bitmap(*range(60)))

    found = work.sampled(Sample(at_least=3), Random(1)).sample

    assert found is not None
    assert found.changed_blocks == 3
    assert next(found.extents()).start >= 60 * CBT_BLOCK


@pytest.mark.parametrize("work", [Work(disk=DISK, size=4 * MiB), Work(disk=DISK, size=0)])
def test_where_everything_is_read_there_is_nothing_to_sample(work: Work) -> None:
    assert work.sampled(Sample(), Random(1)).sample is None


def test_a_sample_that_is_turned_off_is_none() -> None:
    work = Work(disk=DISK, size=4 * MiB, expected=bitmap(1))

    assert work.sampled(Sample(share=0.0), Random(1)).sample is None
