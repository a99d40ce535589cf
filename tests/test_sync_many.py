"""``sync.run`` with several VMs under way: limits, order, twins, and what ends all of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from cbtfs import errors, store as stores, sync as syncs
from cbtfs.catalogue import DiskPoint
from cbtfs.pool import Pool
from cbtfs.progress import SilentProgress
from cbtfs.store import Store
from cbtfs.sync import Outcome, SyncOptions, Target

from . import manyvms
from .commands import leftovers
from .manyvms import DEVICES, NAMES
from .pools import in_good_order, opened
from .simulated import Api, RunningPool

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with manyvms.running(tmp_path_factory.mktemp("many") / "pool", per_host=12) as pool:
        yield pool


@pytest.fixture
def simulated(started: RunningPool) -> Iterator[RunningPool]:
    with in_good_order(started) as pool:
        yield pool


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with stores.open_store(tmp_path / "store") as made:
        yield made


class Watched(SilentProgress):
    """Notes which disks were under way, and how many at a time."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.messages: list[str] = []
        self.under_way: set[str] = set()
        self.most = 0
        self.changed = trio.Event()

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        assert key not in self.under_way
        self.keys.append(key)
        self.under_way.add(key)
        self.most = max(self.most, len(self.under_way))
        self.changed.set()

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        self.under_way.discard(key)

    def message(self, text: str) -> None:
        self.messages.append(text)

    async def until(self, count: int) -> None:
        """Return when so many disks are under way."""
        while len(self.under_way) < count:
            self.changed = trio.Event()
            await self.changed.wait()


async def targets_of(pool: Pool, names: Sequence[str]) -> list[Target]:
    inventory = await pool.inventory()
    return [inventory.find_vm(name) for name in names]


async def sync(
    pool: Pool, store: Store, targets: Sequence[Target], progress: SilentProgress | None = None
) -> list[Outcome]:
    with trio.fail_after(120):
        return await syncs.run(
            pool, store, targets, progress=progress or SilentProgress(), options=SyncOptions()
        )


async def test_outcomes_are_in_the_order_of_the_targets(
    simulated: RunningPool, store: Store
) -> None:
    names = ["b03", "a01", "b00", "a00", "a05", "b09", "a02"]
    async with opened(simulated) as pool:
        done = await sync(pool, store, await targets_of(pool, names))

    assert [outcome.vm_name for outcome in done] == names
    assert all(outcome.point for outcome in done)


@pytest.mark.parametrize("limit", [1, 3])
async def test_disks_at_once_are_limited_over_all_vms(
    simulated: RunningPool, store: Store, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(syncs, "DISKS_AT_ONCE", limit)
    simulated.set("nbd.delay", "20ms")
    watched = Watched()
    async with opened(simulated) as pool:
        await sync(pool, store, await targets_of(pool, NAMES[:5]), watched)

    assert watched.most == limit
    assert sorted(watched.keys) == [f"{name}/{d}" for name in NAMES[:5] for d in DEVICES]


async def test_a_target_named_twice_has_one_run(simulated: RunningPool, store: Store) -> None:
    async with opened(simulated) as pool:
        (vm,) = await targets_of(pool, ["a00"])
        first, second = await sync(pool, store, [vm, vm])

    assert first is second
    assert first.point is not None
    assert len(list((store.path / first.vm_uuid).glob("[0-9]*"))) == 1


async def test_a_vm_and_a_disk_of_it_are_synced_at_the_same_time(
    simulated: RunningPool, store: Store
) -> None:
    async with opened(simulated) as pool:
        inventory = await pool.inventory()
        vm = inventory.find_vm("a00")
        targets: list[Target] = [vm, inventory.disks_of(vm)[0].vdi]
        for method in ("full", "incremental"):
            done = await sync(pool, store, targets)
            methods = [[disk.method for disk in o.point.disks] for o in done if o.point]
            assert methods == [[method] * 2, [method]], [o.error for o in done]


async def test_twins_are_told_apart(simulated: RunningPool, store: Store) -> None:
    api = Api(simulated).login()
    twin = api.named("VM", "b01")
    api.call("VM.set_name_label", twin, "a00")
    watched = Watched()
    try:
        async with opened(simulated) as pool:
            inventory = await pool.inventory()
            twins = [vm for vm in inventory.live_vms() if vm.name == "a00"]
            done = await sync(pool, store, twins, watched)
    finally:
        api.call("VM.set_name_label", twin, "b01")

    labels = [f"a00~{vm.uuid[:8]}" for vm in twins]
    assert [(o.vm_name, o.label) for o in done] == [("a00", label) for label in labels]
    assert sorted(watched.keys) == sorted(f"{label}/{d}" for label in labels for d in DEVICES)


class Relieved(Watched):
    """Has the pool serve again when all disks of so many VMs have failed."""

    def __init__(self, pool: RunningPool, vms: int) -> None:
        super().__init__()
        self.failed = 0
        self._pool = pool
        self._vms = vms

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        self.failed += bool(error)
        if self.failed == self._vms * len(DEVICES):
            self._pool.set("nbd.impostor", "")


async def test_vms_whose_host_shows_an_old_certificate_do_not_stop_the_others(
    simulated: RunningPool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syncs, "VMS_AT_ONCE", 1)
    simulated.set("nbd.impostor", "*")
    async with opened(simulated) as pool:
        done = await sync(pool, store, await targets_of(pool, NAMES[:8]), Relieved(simulated, 6))

    refused = [isinstance(outcome.error, errors.AuthenticationFailed) for outcome in done]
    assert refused == [True] * 6 + [False] * 2
    assert all(outcome.point for outcome in done[6:])


async def test_another_failure_stops_only_its_own_vm(simulated: RunningPool, store: Store) -> None:
    simulated.set("xapi.fail", "VM.snapshot*1:SR_BACKEND_FAILURE_109")
    async with opened(simulated) as pool:
        done = await sync(pool, store, await targets_of(pool, NAMES[:6]))

    assert sorted(bool(outcome.point) for outcome in done) == [False] + [True] * 5


async def test_a_cancelled_sync_leaves_each_vm_for_the_next(
    simulated: RunningPool, store: Store
) -> None:
    simulated.set("nbd.delay", "1s")
    watched = Watched()
    async with opened(simulated) as pool:
        targets = await targets_of(pool, NAMES[:6])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync, pool, store, targets, watched)
            await watched.until(6)
            nursery.cancel_scope.cancel()
        simulated.set("nbd.delay", "")
        done = await sync(pool, store, targets)

    assert [outcome.error for outcome in done] == [None] * 6
    left = leftovers(simulated)
    assert (left.snapshots, left.snapshot_vms, left.dom0_vbds) == ([], [], [])
    assert not list(store.path.glob("*/.partial*"))


async def test_vms_that_fit_one_after_the_other_are_not_refused(
    simulated: RunningPool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    async with opened(simulated) as pool:
        inventory = await pool.inventory()
        vm = inventory.find_vm("a00")
        needed = sum(disk.vdi.used for disk in inventory.disks_of(vm))
        monkeypatch.setattr(store, "free_space", lambda: needed * 3 // 2)
        done = await sync(pool, store, await targets_of(pool, ["a00", "b00"]), watched)

    assert [outcome.error for outcome in done] == [None] * 2
    (text,) = watched.messages
    assert "waiting" in text
