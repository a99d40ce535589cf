"""``sync.run`` in the test's process, against a pool with one small VM: what a shell cannot order.

The VM ``v`` runs with the disks ``v 0``, ``v 1``, … of 4 MiB each.
"""

import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import trio

from cbtfs import catalogue, errors, pool as pools, store as stores, sync as syncs
from cbtfs.inventory import Inventory
from cbtfs.pool import Pool
from cbtfs.progress import SilentProgress
from cbtfs.store import Stage, Store
from cbtfs.sync import Outcome, SyncOptions, Target

from .pools import opened
from .smallvm import SIZE, Small, running_small

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    with running_small(tmp_path / "pool") as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with stores.open_store(tmp_path / "store") as made:
        yield made


async def sync(
    pool: Pool, store: Store, *vdis: str, inventory: Inventory | None = None, without: str = ""
) -> Outcome:
    """Sync the VM ``v``, or the disk with the uuid given instead, chosen from ``inventory``."""
    inventory = inventory or await pool.inventory()
    targets: Sequence[Target] = [inventory.vdi_by_uuid(uuid) for uuid in vdis]
    (outcome,) = await syncs.run(
        pool,
        store,
        targets or [inventory.find_vm("v")],
        progress=SilentProgress(),
        options=SyncOptions(exclude_disks=(without,) if without else ()),
    )
    return outcome


def methods(outcome: Outcome) -> dict[str, str]:
    """Return method by device."""
    assert outcome.error is None, outcome.error
    assert outcome.point is not None
    return {disk.device: disk.method for disk in outcome.point.disks}


ALL_INCREMENTAL = dict.fromkeys(("xvda", "xvdb", "xvdc"), "incremental")


# ── bases ────────────────────────────────────────────────────────────────────────────────────


async def test_a_disk_of_two_histories_has_a_base_for_each(small: Small, store: Store) -> None:
    uuid = small.uuid("v 0")
    async with opened(small.pool) as pool:
        await sync(pool, store)
        await sync(pool, store, uuid)

        assert methods(await sync(pool, store)) == ALL_INCREMENTAL
        assert methods(await sync(pool, store, uuid)) == {"disk": "incremental"}

    assert small.bases() == ["v 0", "v 0", "v 1", "v 2"]


async def test_a_disk_that_moved_and_is_left_out_keeps_its_base(small: Small, store: Store) -> None:
    moved = small.disk("v 1")
    async with opened(small.pool) as pool:
        await sync(pool, store)
        small.detach(moved)
        small.attach(moved, 4)
        small.add_disk("new", 1)
        told = await sync(pool, store, without="v 1")
        assert methods(told) == {"xvda": "incremental", "xvdb": "full", "xvdc": "incremental"}

        assert methods(await sync(pool, store)) == {**ALL_INCREMENTAL, "xvde": "incremental"}


async def test_the_base_of_a_disk_that_is_gone_goes(small: Small, store: Store) -> None:
    gone = small.disk("v 1")
    async with opened(small.pool) as pool:
        await sync(pool, store)
        small.detach(gone)
        small.api.call("VDI.destroy", gone)

        await sync(pool, store)

    assert small.bases() == ["v 0", "v 2"]


async def test_the_base_of_a_disk_that_is_gone_goes_even_without_its_point(
    small: Small, store: Store
) -> None:
    gone = small.disk("v 1")
    async with opened(small.pool) as pool:
        first = (await sync(pool, store)).point
        assert first is not None
        shutil.rmtree(store.point_path(first.vm_uuid, first.time))
        small.detach(gone)
        small.api.call("VDI.destroy", gone)

        await sync(pool, store)

    assert small.bases() == ["v 0", "v 2"]


async def test_what_a_dead_run_left_of_an_excluded_disk_goes(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        small.pool.set("xapi.fail", "VDI.destroy:INTERNAL_ERROR")
        told = await sync(pool, store, without="v 2")
        assert len(told.problems) == 1
        assert small.snapshots() == ["v 2"]
        small.pool.set("xapi.fail", "")

        await sync(pool, store, without="v 2")

    assert small.snapshots() == []
    assert small.bases() == ["v 0", "v 1"]


async def test_a_base_whose_digests_changed_is_none(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        point = (await sync(pool, store)).point
        assert point is not None
        array = store.point_path(point.vm_uuid, point.time) / "xvdb.b3"
        array.write_bytes(b"x" + array.read_bytes()[1:])

        told = await sync(pool, store)

    assert methods(told) == ALL_INCREMENTAL | {"xvdb": "full"}
    assert not store.verify(store.catalogue().resolve("v/latest")).damaged


# ── what happens between choosing, planning and the snapshot ─────────────────────────────────


async def test_a_disk_attached_since_the_vm_was_chosen_is_synced(
    small: Small, store: Store
) -> None:
    async with opened(small.pool) as pool:
        chosen = await pool.inventory()
        small.add_disk("new", 4)

        assert "xvde" in methods(await sync(pool, store, inventory=chosen))


async def test_another_run_since_the_vm_was_chosen_is_built_upon(
    small: Small, store: Store
) -> None:
    async with opened(small.pool) as pool:
        await sync(pool, store)
        chosen = await pool.inventory()
        await sync(pool, store)

        assert methods(await sync(pool, store, inventory=chosen)) == ALL_INCREMENTAL


async def test_a_vm_that_went_since_it_was_chosen_is_told(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        chosen = await pool.inventory()
        small.api.call("VM.shutdown", small.vm)
        small.api.call("VM.destroy", small.vm)

        told = await sync(pool, store, inventory=chosen)

    assert isinstance(told.error, errors.NotFound)


async def test_a_point_without_a_disk_attached_at_the_last_moment_is_partial(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(small.pool) as pool:
        take = pool.snapshot_vm

        async def attach_and_take(vm_ref: str, name: str) -> str:
            small.add_disk("new", 4)
            return await take(vm_ref, name)

        monkeypatch.setattr(pool, "snapshot_vm", attach_and_take)
        told = await sync(pool, store, without="v 2")

    assert told.point is not None
    assert told.point.state == "partial"
    assert [failure.device for failure in told.point.failures] == ["xvde"]
    assert small.snapshots() == []


async def test_without_reflinks_there_must_be_room_for_a_copy_of_the_base(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = small.pool.open_guest("v", "xvda")
    guest.pwrite(b"x" * (1 << 20), 0)
    guest.shutdown()
    shares = False
    monkeypatch.setattr(store, "reflink_supported", lambda: shares)
    async with opened(small.pool) as pool:
        await sync(pool, store)
        monkeypatch.setattr(store, "free_space", lambda: 900 << 10)
        refused = await sync(pool, store)
        shares = True
        told = await sync(pool, store)

    assert isinstance(refused.error, errors.StoreFull)
    assert "v needs about 1" in str(refused.error)
    assert methods(told) == ALL_INCREMENTAL
    assert small.snapshots() == []


async def test_a_disk_of_a_thick_sr_is_not_refused_for_its_size(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    srs = small.api.records("SR")
    local = next(ref for ref, sr in srs.items() if sr["name_label"] == "iSCSI half attached")
    vdi = small.add_disk("v 3", 3, size=SIZE, sr=local)
    assert int(str(small.api.records("VDI")[vdi]["physical_utilisation"])) == SIZE
    monkeypatch.setattr(store, "free_space", lambda: SIZE - 1)
    async with opened(small.pool) as pool:
        told = await sync(pool, store)

    assert methods(told)["xvdd"] == "full"


async def test_a_disk_that_cannot_be_tracked_is_copied_all_the_same(
    small: Small, store: Store
) -> None:
    small.pool.set("xapi.fail", "VDI.enable_cbt:SR_BACKEND_FAILURE_457")
    async with opened(small.pool) as pool:
        told = await sync(pool, store)

    assert set(methods(told).values()) == {"full"}
    assert len(told.problems) == 3
    assert "SR_BACKEND_FAILURE_457" in told.problems[0]
    assert small.snapshots() == small.bases() == []


# ── times ────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_left_of_a_run_in_the_same_second_is_in_nobodys_way(
    small: Small, store: Store
) -> None:
    vm = store.path / small.api.text("VM.get_uuid", small.vm)
    vm.mkdir()
    now = datetime.now(UTC)
    for seconds in range(60):
        time = catalogue.format_time(now + timedelta(seconds=seconds))
        (vm / (f".partial-{time}" if seconds % 2 else time)).mkdir()

    async with opened(small.pool) as pool:
        assert set(methods(await sync(pool, store))) == {"xvda", "xvdb", "xvdc"}


async def test_a_point_at_the_end_of_time_is_told(small: Small, store: Store) -> None:
    async with opened(small.pool) as pool:
        first = (await sync(pool, store)).point
        assert first is not None
        last = msgspec.structs.replace(first, time="99991231T235959Z")
        vm = store.path / first.vm_uuid
        (vm / first.time / "point.json").write_bytes(catalogue.encode(last))
        (vm / first.time).rename(vm / last.time)

        told = await sync(pool, store)

    assert isinstance(told.error, errors.StoreError)
    assert last.time in str(told.error)
    assert small.snapshots() == []


# ── runs that do not end well ────────────────────────────────────────────────────────────────


async def test_a_snapshot_that_appears_after_an_interruption_is_removed_by_the_next_run(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(small.pool) as pool:
        take = pool.snapshot_vm
        interrupted = trio.CancelScope()
        names: list[str] = []

        async def ask(vm_ref: str, name: str) -> str:
            names.append(name)
            interrupted.cancel()
            return await take(vm_ref, name)

        with monkeypatch.context() as patched, interrupted:
            small.pool.set("xapi.delay", "VM.snapshot:60")  # cut short by the cancellation
            patched.setattr(pool, "snapshot_vm", ask)
            await sync(pool, store)
        assert small.snapshots() == []
        small.pool.set("xapi.delay", "")
        small.api.call("VM.snapshot", small.vm, names[0])  # the pool got to it only now

        await sync(pool, store)

    assert small.snapshots() == []
    assert small.bases() == ["v 0", "v 1", "v 2"]
    assert not list(store.path.glob("*/.partial*"))


async def test_a_point_that_cannot_be_committed_leaves_nothing(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stage: Stage, point: object) -> tuple[str, ...]:
        raise errors.StoreFull("no space left")

    async with opened(small.pool) as pool:
        await sync(pool, store)
        with monkeypatch.context() as patched:
            patched.setattr(Stage, "commit", full)
            told = await sync(pool, store)
        assert isinstance(told.error, errors.StoreFull)
        assert small.snapshots() == []
        assert not list(store.path.glob("*/.partial*"))

        assert methods(await sync(pool, store)) == ALL_INCREMENTAL


async def test_a_disk_that_a_control_domain_still_holds_is_taken_back_too(
    small: Small, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stage: Stage, point: object) -> tuple[str, ...]:
        raise errors.StoreFull("no space left")

    monkeypatch.setattr(Stage, "commit", full)
    monkeypatch.setattr(pools, "IN_USE_PAUSES", (0.1,) * 10)
    small.pool.set("nbd.leak", "on")
    async with opened(small.pool) as pool:
        await sync(pool, store)

    assert small.snapshots() == []


async def test_a_snapshot_vm_that_stays_is_not_waited_for(small: Small, store: Store) -> None:
    small.pool.set("xapi.fail", "VM.destroy*1:INTERNAL_ERROR")
    async with opened(small.pool) as pool:
        with trio.fail_after(20):  # xapi alone waits 4 s for the VBDs of each disk, ten times asked
            told = await sync(pool, store)
        assert len(told.problems) == 1

        assert methods(await sync(pool, store)) == ALL_INCREMENTAL

    assert small.snapshots() == []
    assert small.bases() == ["v 0", "v 1", "v 2"]
