"""Draft: a restore point that was not finished is gone on with, or taken back, and nothing between.

In the test's process, against a pool whose VM ``v`` has two disks of 24 MiB full of noise, which
come over in six requests each.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import trio

from cbtfs import draft, errors, journal as journals, logbook, store as stores, sync as syncs, units
from cbtfs.catalogue import DiskPoint
from cbtfs.image import Buffer, Image
from cbtfs.journal import DiskJournal
from cbtfs.pool import Pool
from cbtfs.progress import SilentProgress
from cbtfs.sample import Sample
from cbtfs.store import Store
from cbtfs.sync import Outcome, SyncOptions

from .pools import opened
from .smallvm import Small, running_small

SIZE = 40 * units.MiB
REQUEST = 4 * units.MiB
DEVICES = ("xvda", "xvdb")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    with running_small(tmp_path / "pool", sizes=(SIZE, SIZE)) as made:
        for seed, device in enumerate(DEVICES):
            write(made, device, random.Random(seed).randbytes(SIZE))
        yield made


@pytest.fixture(autouse=True)
def _noted_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "FLUSH_BYTES", 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with stores.open_store(tmp_path / "store") as made:
        yield made


def write(small: Small, device: str, data: bytes, offset: int = 0) -> None:
    guest = small.pool.open_guest("v", device)
    for at in range(0, len(data), REQUEST):
        guest.pwrite(data[at : at + REQUEST], offset + at)
    guest.shutdown()


def content(small: Small, device: str) -> bytes:
    guest = small.pool.open_guest("v", device)
    data = b"".join(bytes(guest.pread(REQUEST, at)) for at in range(0, SIZE, REQUEST))
    guest.shutdown()
    return data


class Watching(SilentProgress):
    """Calls ``act`` once when ``enough`` says so of the bytes read and the disks finished."""

    def __init__(self, enough: Callable[[int, int], bool], act: Callable[[], object]) -> None:
        self._enough = enough
        self._act: Callable[[], object] | None = act
        self._read = 0
        self._finished = 0

    def advanced(self, key: str, *, read: int, written: int) -> None:
        self._read += read
        self._look()

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        self._finished += 1
        self._look()

    def _look(self) -> None:
        if self._act is not None and self._enough(self._read, self._finished):
            act, self._act = self._act, None
            act()


async def sync(
    pool: Pool, store: Store, *, full: bool = False, progress: SilentProgress | None = None
) -> Outcome:
    target = (await pool.inventory()).find_vm("v")
    options = SyncOptions(full=full, connections_per_disk=1, sample=Sample(share=0.0))
    (outcome,) = await syncs.run(
        pool, store, [target], progress=progress or SilentProgress(), options=options
    )
    return outcome


async def interrupted(
    pool: Pool, store: Store, when: Callable[[int, int], bool], *, full: bool = False
) -> None:
    """Sync, and be cancelled ``when`` so many bytes are read and disks finished."""
    with trio.CancelScope() as scope:
        await sync(pool, store, full=full, progress=Watching(when, scope.cancel))
    assert scope.cancelled_caught


def begun(small: Small, store: Store) -> Callable[[int, int], bool]:
    """Return what tells that a part of a disk is on record; until then the pool is slow."""
    small.pool.set("nbd.delay", "100ms")

    def is_begun(_read: int, _finished: int) -> bool:
        entries = [e for path in partials(store) for e in journal(path).values()]
        found = any(entry.offset and entry.finished is None for entry in entries)
        if found:
            small.pool.set("nbd.delay", "")
        return found

    return is_begun


def journal(partial: Path) -> Mapping[str, DiskJournal]:
    file = partial / "journal.json"
    return journals.decode(file.read_bytes()) if file.exists() else {}


def disks(outcome: Outcome) -> dict[str, DiskPoint]:
    assert outcome.error is None, outcome.error
    assert outcome.point is not None
    return {disk.device: disk for disk in outcome.point.disks}


def partials(store: Store) -> list[Path]:
    return list(store.path.glob("*/.partial-*"))


def assert_whole(small: Small, store: Store, outcome: Outcome) -> None:
    """The point equals the guest, and neither pool nor store has anything left over."""
    point = outcome.point
    assert point is not None
    folder = store.point_path(point.vm_uuid, point.time)
    for device in DEVICES:
        assert (folder / f"{device}.raw").read_bytes() == content(small, device)
    assert not store.verify(store.catalogue().resolve(f"{point.vm_uuid}/{point.time}")).damaged
    assert partials(store) == []
    assert (small.snapshots(), small.bases()) == ([], ["v 0", "v 1"])


async def test_what_a_cancelled_run_copied_is_not_read_again(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        await interrupted(pool, store, begun(small, store))
        ((partial,), before) = partials(store), small.snapshots()

        outcome = await sync(pool, store)

    assert len(before) == 3
    found = disks(outcome)
    resumed = [disk for disk in found.values() if disk.method == "resume"]
    assert {disk.resumed for disk in resumed} == {"full"}
    assert sum(disk.bytes_read for disk in found.values()) <= 2 * SIZE + 4 * REQUEST
    assert outcome.point is not None
    assert partial.name == f".partial-{outcome.point.time}"
    assert_whole(small, store, outcome)


async def test_the_point_shows_the_instant_of_the_first_snapshot(
    small: Small, store: Store
) -> None:
    async with opened(small.pool) as pool:
        await interrupted(pool, store, begun(small, store))
        then = {device: content(small, device) for device in DEVICES}
        write(small, "xvda", bytes(SIZE))
        outcome = await sync(pool, store)
        second = await sync(pool, store)

    assert outcome.point is not None
    folder = store.point_path(outcome.point.vm_uuid, outcome.point.time)
    for device in DEVICES:
        assert (folder / f"{device}.raw").read_bytes() == then[device]
    assert {disk.method for disk in disks(second).values()} == {"incremental"}
    assert_whole(small, store, second)


async def test_an_increment_goes_on_too(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        await sync(pool, store)
        for device in DEVICES:
            write(small, device, random.Random(9).randbytes(SIZE))
        await interrupted(pool, store, begun(small, store))

        outcome = await sync(pool, store)

    assert "incremental" in {disk.resumed for disk in disks(outcome).values()}
    assert_whole(small, store, outcome)


async def test_a_disk_that_was_finished_is_taken_as_it_is(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        small.pool.set("nbd.delay", "20ms")
        await interrupted(pool, store, lambda _read, finished: finished == 1)
        small.pool.set("nbd.delay", "")
        small.pool.control("reset-counters")

        outcome = await sync(pool, store)

    assert "full" in {disk.method for disk in disks(outcome).values()}
    assert_whole(small, store, outcome)


async def test_a_finished_disk_that_was_tampered_with_is_copied_again(
    small: Small, store: Store
) -> None:
    async with opened(small.pool) as pool:
        await interrupted(pool, store, lambda _read, finished: finished == 2)
        (partial,) = partials(store)
        with (partial / "xvda.b3").open("r+b") as digests:
            digests.write(b"tampered")

        outcome = await sync(pool, store)

    assert_whole(small, store, outcome)


async def test_a_half_made_image_that_is_gone_is_begun_anew(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        await interrupted(pool, store, begun(small, store))
        (partial,) = partials(store)
        (partial / "xvda.raw").unlink()

        outcome = await sync(pool, store)

    assert disks(outcome)["xvda"].method == "full"
    assert_whole(small, store, outcome)


async def test_a_full_copy_that_is_asked_for_begins_anew(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        await interrupted(pool, store, begun(small, store))

        outcome = await sync(pool, store, full=True)

    assert {disk.method for disk in disks(outcome).values()} == {"full"}
    assert_whole(small, store, outcome)


async def test_without_the_snapshot_it_begins_anew(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        await interrupted(pool, store, begun(small, store))
        for ref, vm in small.api.records("VM").items():
            if vm["is_a_snapshot"]:
                small.api.call("VM.destroy", ref)
        for ref, vdi in small.api.records("VDI").items():
            if vdi["is_a_snapshot"]:
                small.api.call("VDI.destroy", ref)

        outcome = await sync(pool, store)

    assert {disk.method for disk in disks(outcome).values()} == {"full"}
    assert_whole(small, store, outcome)


async def test_an_increment_whose_base_went_meanwhile_is_compared(
    small: Small, store: Store
) -> None:
    async with opened(small.pool) as pool:
        await sync(pool, store)
        for device in DEVICES:
            write(small, device, random.Random(9).randbytes(SIZE))
        await interrupted(pool, store, begun(small, store))
        for ref, vdi in small.api.records("VDI").items():
            if vdi["type"] == "cbt_metadata":
                small.api.call("VDI.destroy", ref)

        outcome = await sync(pool, store)

    assert "compare" in {disk.method for disk in disks(outcome).values()}
    assert_whole(small, store, outcome)


async def test_before_anything_is_copied_nothing_stays(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        with trio.CancelScope() as scope:

            class AtTheStart(SilentProgress):
                def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
                    scope.cancel()

            await sync(pool, store, progress=AtTheStart())

    assert scope.cancelled_caught
    assert partials(store) == []
    assert (small.snapshots(), small.bases()) == ([], [])


async def test_a_lost_host_costs_only_what_was_under_way(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        watching = Watching(begun(small, store), lambda: small.pool.set("nbd.refuse", "*"))
        small.pool.set("nbd.drop_after", "13M")

        failed = await sync(pool, store, progress=watching)

        small.pool.set("nbd.refuse", "")
        small.pool.set("nbd.drop_after", "")
        outcome = await sync(pool, store)

    assert failed.error is not None
    assert any("the next sync goes on from there" in text for text in failed.problems)
    assert "resume" in {disk.method for disk in disks(outcome).values()}
    assert_whole(small, store, outcome)


async def test_what_never_gets_further_is_given_up(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "FRUITLESS", 2)
    small.pool.set("nbd.fail_read_at", str(SIZE * 3 // 4))
    async with opened(small.pool) as pool:
        first = await sync(pool, store)
        after_one = partials(store)
        second = await sync(pool, store)
        after_two = partials(store)
        third = await sync(pool, store)
        after_three = partials(store)
        small.pool.set("nbd.fail_read_at", "")
        left = small.snapshots()
        outcome = await sync(pool, store)

    assert None not in (first.error, second.error, third.error)
    assert after_one == after_two != []
    assert (after_three, left) == ([], [])
    assert {disk.method for disk in disks(outcome).values()} == {"full"}
    assert_whole(small, store, outcome)


async def test_after_a_failure_of_the_store_everything_is_taken_back(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = Image.write

    def write_until_full(self: Image, offset: int, data: Buffer) -> int:
        if offset >= SIZE // 2:
            raise errors.StoreFull("no space left")
        return genuine(self, offset, data)

    async with opened(small.pool) as pool:
        monkeypatch.setattr(Image, "write", write_until_full)
        failed = await sync(pool, store)
        monkeypatch.undo()
        left = (partials(store), small.snapshots(), small.bases())
        outcome = await sync(pool, store)

    assert isinstance(failed.error, errors.StoreFull)
    assert left == ([], [], [])
    assert_whole(small, store, outcome)
