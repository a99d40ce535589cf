"""Landing: expected blocks reach the image, the rest is compared with it."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cbtfs import errors
from cbtfs.bitmap import ChangeBitmap
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.image import Image
from cbtfs.imagefiles import ImageFiles
from cbtfs.landing import Landing
from cbtfs.units import CBT_BLOCK
from cbtfs.work import Work

from .test_work import DISK

SIZE = 4 * CBT_BLOCK + 512
OLD = random.Random(1).randbytes(SIZE)
NEW = random.Random(2).randbytes(SIZE)


@pytest.fixture
def image(any_dir: Path) -> Iterator[Image]:
    with (
        Folder.open(any_dir) as folder,
        Image.create(ImageFiles(folder, "xvda.raw", "xvda.b3"), size=SIZE) as image,
    ):
        image.write(0, OLD)
        yield image


def landing(image: Image, *expected: int, method: str = "incremental") -> Landing:
    marked = [Extent(n * CBT_BLOCK, (n + 1) * CBT_BLOCK) for n in expected]
    bitmap = ChangeBitmap.of_extents(marked, size=SIZE)
    return Landing(image, Work(disk=replace(DISK, method=method), size=SIZE, expected=bitmap))


def content(image: Image) -> bytes:
    image.finish()
    return image.path.read_bytes()


def test_expected_blocks_are_written_and_the_gap_compared(image: Image) -> None:
    data = NEW[:CBT_BLOCK] + OLD[CBT_BLOCK : 2 * CBT_BLOCK] + NEW[2 * CBT_BLOCK : 3 * CBT_BLOCK]
    target = landing(image, 0, 2)

    assert target.write(0, memoryview(data)) == 2 * CBT_BLOCK

    assert content(image) == data + OLD[3 * CBT_BLOCK :]
    assert (target.compared, target.wrong) == (1, 0)


def test_a_block_that_nobody_expected_to_differ_is_told(image: Image) -> None:
    target = landing(image, 0)

    with pytest.raises(errors.BitmapWrong, match="1 of 1 blocks"):
        target.write(3 * CBT_BLOCK, memoryview(NEW)[3 * CBT_BLOCK : 4 * CBT_BLOCK])

    assert (target.compared, target.wrong) == (1, 1)
    assert content(image) == OLD


def test_the_end_of_an_odd_disk_is_compared_too(image: Image) -> None:
    target = landing(image, 0)

    target.write(4 * CBT_BLOCK, memoryview(OLD)[4 * CBT_BLOCK :])
    with pytest.raises(errors.BitmapWrong):
        target.write(4 * CBT_BLOCK, memoryview(NEW)[4 * CBT_BLOCK :])


def test_a_comparison_writes_only_what_differs(image: Image) -> None:
    data = OLD[: 2 * CBT_BLOCK] + NEW[2 * CBT_BLOCK :]
    target = Landing(image, Work(disk=replace(DISK, method="compare"), size=SIZE))

    assert target.write(0, memoryview(data)) == SIZE - 2 * CBT_BLOCK

    assert content(image) == data


def test_without_a_bitmap_all_is_written(image: Image) -> None:
    target = Landing(image, Work(disk=replace(DISK, method="full"), size=SIZE))

    assert target.write(0, memoryview(NEW)) == SIZE

    assert content(image) == NEW
    assert target.compared == 0
