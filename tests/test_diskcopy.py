"""Disk copy: what is not believed of the pool, and what is read instead.

In the test's process, against a pool whose VM ``v`` has one disk of 32 MiB.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import trio

from cbtfs import logbook, owner as owners, stage as stages, store as stores, sync as syncs
from cbtfs.bitmap import ChangeBitmap
from cbtfs.catalogue import DiskPoint
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.image import Buffer, Image
from cbtfs.journal import DiskJournal
from cbtfs.pool import Pool
from cbtfs.progress import SilentProgress
from cbtfs.sample import Sample
from cbtfs.store import Store
from cbtfs.sync import Outcome, SyncOptions
from cbtfs.units import CBT_BLOCK, MiB

from .pools import opened
from .smallvm import Small, running_small

SIZE = 32 * MiB
DATA = random.Random(1).randbytes(6 * MiB)
AT = 10 * MiB

ALL = Sample(share=1.0, at_most=None)
NONE = Sample(share=0.0)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    with running_small(tmp_path / "pool", sizes=(SIZE,)) as made:
        write(made, DATA, AT)
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with stores.open_store(tmp_path / "store") as made:
        yield made


def write(small: Small, data: bytes, offset: int) -> None:
    guest = small.pool.open_guest("v", "xvda")
    guest.pwrite(data, offset)
    guest.shutdown()


async def sync(
    pool: Pool, store: Store, sample: Sample = NONE, *, progress: SilentProgress | None = None
) -> Outcome:
    target = (await pool.inventory()).find_vm("v")
    (outcome,) = await syncs.run(
        pool,
        store,
        [target],
        progress=progress or SilentProgress(),
        options=SyncOptions(sample=sample),
    )
    assert outcome.error is None, outcome.error
    return outcome


def disk(outcome: Outcome) -> DiskPoint:
    assert outcome.point is not None
    (found,) = outcome.point.disks
    return found


def assert_equal(small: Small, store: Store, outcome: Outcome) -> None:
    assert outcome.point is not None
    guest = small.pool.open_guest("v", "xvda")
    expected = bytes(guest.pread(SIZE, 0))
    guest.shutdown()
    image = store.point_path(outcome.point.vm_uuid, outcome.point.time) / "xvda.raw"
    assert image.read_bytes() == expected


async def test_a_first_copy_reads_only_what_is_allocated(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        outcome = await sync(pool, store)

    found = disk(outcome)
    assert (found.method, found.allocated) == ("full", 6 * MiB)
    assert found.bytes_read == found.bytes_changed == 6 * MiB
    assert_equal(small, store, outcome)


async def test_where_the_pool_cannot_tell_everything_is_read_and_why_is_told(
    small: Small, store: Store
) -> None:
    small.pool.set("http.truncate", "600")
    async with opened(small.pool) as pool:
        outcome = await sync(pool, store)

    found = disk(outcome)
    assert (found.allocated, found.bytes_read) == (-1, SIZE)
    assert "all of it is read: " in found.detail
    assert_equal(small, store, outcome)


async def test_an_allocation_that_leaves_data_out_is_not_believed(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lying(_self: Pool, _vdi_ref: str, *, size: int) -> ChangeBitmap:
        return ChangeBitmap.of_extents([Extent(AT, AT + 2 * MiB)], size=size)

    monkeypatch.setattr(Pool, "allocated", lying)
    async with opened(small.pool) as pool:
        outcome = await sync(pool, store, ALL)

    found = disk(outcome)
    assert (found.method, found.reason, found.allocated) == ("full", "first", -1)
    assert found.blocks_mismatched
    assert_equal(small, store, outcome)


async def test_a_bitmap_that_leaves_changes_out_is_not_believed(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        await sync(pool, store)
        write(small, DATA[:CBT_BLOCK], 0)
        write(small, DATA[:CBT_BLOCK], 20 * MiB)
        small.pool.set("cbt.drop_bits", "1")
        outcome = await sync(pool, store, ALL)
        small.pool.set("cbt.drop_bits", "")
        after = await sync(pool, store, ALL)

    found = disk(outcome)
    assert (found.method, found.reason) == ("compare", "cbt-mismatch")
    assert found.blocks_mismatched == 1
    assert_equal(small, store, outcome)
    assert outcome.point is not None
    (warning,) = outcome.point.warnings
    assert "the pool's list of changed blocks was wrong: 1 of " in warning
    assert disk(after).method == "incremental"


async def test_a_comparison_writes_what_differs_and_makes_holes_of_what_is_gone(
    small: Small, store: Store
) -> None:
    async with opened(small.pool) as pool:
        await sync(pool, store)
        write(small, DATA[:CBT_BLOCK][::-1], AT)
        write(small, bytes(2 * MiB), AT + 4 * MiB)
        for ref, vdi in small.api.records("VDI").items():
            if vdi["type"] == "cbt_metadata":
                small.api.call("VDI.destroy", ref)
        outcome = await sync(pool, store)

    found = disk(outcome)
    assert (found.method, found.reason) == ("compare", "base-lost")
    assert found.bytes_written == CBT_BLOCK
    assert_equal(small, store, outcome)
    assert outcome.point is not None
    image = store.point_path(outcome.point.vm_uuid, outcome.point.time) / "xvda.raw"
    assert image.stat().st_blocks * 512 <= 4 * MiB + CBT_BLOCK


async def test_an_image_beyond_what_is_allocated_now_is_cleared(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_self: Pool, _vdi_ref: str, *, size: int) -> ChangeBitmap:
        return ChangeBitmap.of_extents([], size=size)

    async with opened(small.pool) as pool:
        await sync(pool, store)
        write(small, bytes(len(DATA)), AT)
        for ref, vdi in small.api.records("VDI").items():
            if vdi["type"] == "cbt_metadata":
                small.api.call("VDI.destroy", ref)
        monkeypatch.setattr(Pool, "allocated", nothing)
        outcome = await sync(pool, store, ALL)

    assert disk(outcome).blocks_mismatched == 0
    assert_equal(small, store, outcome)


async def test_a_damaged_base_is_found_before_it_is_built_on(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        first = await sync(pool, store)
        assert first.point is not None
        folder = store.point_path(first.point.vm_uuid, first.point.time)
        with (folder / "xvda.b3").open("r+b") as digests:
            digests.write(b"rotten")
        outcome = await sync(pool, store)

    found = disk(outcome)
    assert (found.method, found.reason) == ("full", "base-damaged")
    assert_equal(small, store, outcome)


async def test_a_base_of_another_store_is_none_of_ours(
    small: Small, store: Store, tmp_path: Path
) -> None:
    async with opened(small.pool) as pool:
        await sync(pool, store)
        with stores.open_store(tmp_path / "other") as other:
            assert disk(await sync(pool, other)).reason == "first"

        assert disk(await sync(pool, store)).method == "incremental"


async def test_a_base_whose_tag_was_taken_away_leads_to_a_comparison(
    small: Small, store: Store
) -> None:
    async with opened(small.pool) as pool:
        await sync(pool, store)
        for ref, vdi in small.api.records("VDI").items():
            if vdi["type"] == "cbt_metadata":
                small.api.call("VDI.remove_from_other_config", ref, owners.TAG_OWNER)
        outcome = await sync(pool, store)

    assert (disk(outcome).method, disk(outcome).reason) == ("compare", "base-lost")
    assert "tagged" in disk(outcome).detail
    assert_equal(small, store, outcome)


async def test_what_a_wrong_bitmap_left_out_is_not_left_out_when_going_on(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample finds the lie at 20 MiB; before that, one at 1 MiB was passed and journaled."""
    monkeypatch.setattr(logbook, "FLUSH_BYTES", 1)
    async with opened(small.pool) as pool:
        await sync(pool, store)
        write(small, DATA[:CBT_BLOCK], MiB)
        write(small, DATA[: 8 * CBT_BLOCK], 20 * MiB)

        async def lying(_self: Pool, _base: str, _snapshot: str, *, size: int) -> ChangeBitmap:
            return ChangeBitmap.of_extents([Extent(0, MiB)], size=size)

        with trio.CancelScope() as scope:

            class AtTheComparison(SilentProgress):
                def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
                    if method == "compare":
                        scope.cancel()

            with monkeypatch.context() as lie:
                lie.setattr(Pool, "changed_blocks", lying)
                lie.setattr(Image, "differing", _passing_below(16 * MiB))
                await sync(pool, store, ALL, progress=AtTheComparison())
        assert scope.cancelled_caught
        outcome = await sync(pool, store)

    assert_equal(small, store, outcome)


async def test_a_journal_that_cannot_be_read_again_leaves_nothing_of_the_old_image(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan goes on with what was begun; then the journal is gone, and with it how it began."""
    monkeypatch.setattr(logbook, "FLUSH_BYTES", 1)
    genuine = stages.read_journal
    read = 0

    def readable_once(vm: Folder, name: str) -> Mapping[str, DiskJournal]:
        nonlocal read
        read += 1
        return genuine(vm, name) if read == 1 else {}

    async def nothing(_self: Pool, _vdi_ref: str, *, size: int) -> ChangeBitmap:
        return ChangeBitmap.of_extents([], size=size)

    async with opened(small.pool) as pool:
        await sync(pool, store)
        write(small, bytes(len(DATA)), AT)
        write(small, bytes(len(DATA)), MiB)
        with trio.CancelScope() as scope:

            class OnTheWay(SilentProgress):
                def advanced(self, key: str, *, read: int, written: int) -> None:
                    scope.cancel()

            await sync(pool, store, progress=OnTheWay())
        assert scope.cancelled_caught
        monkeypatch.setattr(stages, "read_journal", readable_once)
        monkeypatch.setattr(Pool, "allocated", nothing)
        outcome = await sync(pool, store, ALL)

    assert read == 2
    assert disk(outcome).method == "compare"
    assert_equal(small, store, outcome)


def _passing_below(offset: int) -> Callable[[Image, int, Buffer], int]:
    """Return an ``Image.differing`` that overlooks what lies below ``offset``, as a sample may."""
    genuine = Image.differing

    def differing(self: Image, at: int, data: Buffer) -> int:
        return genuine(self, at, data) if at >= offset else 0

    return differing


async def test_for_little_to_read_one_connection_is_enough(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        small.pool.control("reset-counters")
        await sync(pool, store)

    counters = small.pool.control("counters")
    assert isinstance(counters, dict)
    assert counters["nbd"]["connections"] == 1
