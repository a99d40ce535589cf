"""A snapshot whose data the pool does not let go of: waited for, told, and tidied up later."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs import errors, pool as pools, store as stores, sync as syncs
from cbtfs.progress import SilentProgress
from cbtfs.store import Store
from cbtfs.sync import Outcome, SyncOptions

from .pools import in_good_order, opened, snapshot_of
from .simulated import RunningPool
from .smallvm import running_small

PAUSES = pools.IN_USE_PAUSES
"""As they are; the tests are less patient."""


@pytest.fixture
def simulated(started: RunningPool) -> Iterator[RunningPool]:
    with in_good_order(started) as pool:
        pool.set("vdi.data_destroy_wait", "20ms")
        yield pool


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pause as often as in earnest, but shortly."""
    monkeypatch.setattr(pools, "IN_USE_PAUSES", (0.01,) * len(PAUSES))


def test_a_disk_in_use_is_waited_for_for_well_over_a_minute() -> None:
    assert 75 <= sum(PAUSES) <= 120
    assert list(PAUSES) == sorted(PAUSES)


async def test_a_disk_that_is_in_use_for_long_is_waited_for_and_that_is_told_once(
    simulated: RunningPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pools, "IN_USE_TOLD", 0.02)
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        simulated.set("sr.fail", f"VDI.data_destroy*{len(PAUSES)}:VDI_IN_USE:{vdi.ref}:destroy")
        await pool.data_destroy(vdi.ref)
        kind = (await pool.inventory()).vdis[vdi.ref].type
        await pool.destroy_vdi(vdi.ref)

    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert kind == "cbt_metadata"
    assert len(warnings) == 1
    assert "VDI.data_destroy waits" in warnings[0].getMessage()


async def test_a_disk_that_is_in_use_for_a_moment_is_not_spoken_of(
    simulated: RunningPool, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        simulated.set("sr.fail", "VDI.data_destroy*2:VDI_IN_USE:x:destroy")
        await pool.data_destroy(vdi.ref)
        await pool.destroy_vdi(vdi.ref)

    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_a_disk_that_stays_in_use_keeps_its_data_until_asked_again(
    simulated: RunningPool,
) -> None:
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        simulated.set("sr.fail", "VDI.data_destroy:VDI_IN_USE:x:destroy")
        with pytest.raises(errors.XapiFailure, match="VDI_IN_USE"):
            await pool.data_destroy(vdi.ref)
        assert (await pool.inventory()).vdis[vdi.ref].type == "user"

        simulated.set("sr.fail", "")
        await pool.data_destroy(vdi.ref)
        assert (await pool.inventory()).vdis[vdi.ref].type == "cbt_metadata"
        await pool.destroy_vdi(vdi.ref)


# ── what a sync makes of it ──────────────────────────────────────────────────────────────────────


async def test_a_point_is_committed_what_is_left_is_told_and_the_next_run_removes_it(
    tmp_path: Path,
) -> None:
    with running_small(tmp_path / "pool") as small, stores.open_store(tmp_path / "store") as store:
        small.pool.set("vdi.data_destroy_wait", "20ms")
        small.pool.set("sr.fail", "VDI.data_destroy:VDI_IN_USE:x:destroy")
        async with opened(small.pool) as pool:
            first = await sync(pool, store)
            assert len(small.snapshots()) == 3

            small.pool.set("sr.fail", "")
            second = await sync(pool, store)

        assert first.error is None
        assert first.point is not None
        assert len(first.problems) == 3
        assert all("VDI_IN_USE" in text for text in first.problems)
        assert not second.problems
        assert second.point is not None
        assert {disk.method for disk in second.point.disks} == {"incremental"}
        assert small.snapshots() == []
        assert len(small.bases()) == 3


async def sync(pool: pools.Pool, store: Store) -> Outcome:
    inventory = await pool.inventory()
    (outcome,) = await syncs.run(
        pool,
        store,
        [inventory.find_vm("v")],
        progress=SilentProgress(),
        options=SyncOptions(),
    )
    return outcome
