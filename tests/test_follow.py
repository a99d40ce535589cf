"""A mount shows what the pool has now, whatever happens to the pool meanwhile.

Most tests mount the simulated pool with the real command and look with a user's eyes.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from cbtfs import errors
from cbtfs.follow import Source
from cbtfs.replica import Batch, Event, Replica
from tests import memory
from tests.mounted import mounted, read
from tests.simulated import Api, RunningPool, running_pool
from tests.test_mounted import User, run

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

SOON = 60.0
"""Seconds until something must have shown: five are promised, but the machine may be busy."""


def soon(what: Callable[[], bool]) -> bool:
    """Tell whether something comes true."""
    deadline = time.monotonic() + SOON
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("sim") / "pool") as pool:
        yield pool


@pytest.fixture
def user(pool: RunningPool, tmp_path: Path) -> User:
    return User(pool, tmp_path)


@pytest.fixture
def top(user: User) -> Iterator[Path]:
    with user.mounted() as top:
        yield top


@pytest.fixture
def api(pool: RunningPool) -> Api:
    return Api(pool).login()


@pytest.fixture
def vm(api: Api) -> str:
    """The VM web1."""
    vms = api.records("VM")
    (ref,) = (r for r, f in vms.items() if f["name_label"] == "web1" and not f["is_a_snapshot"])
    return ref


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def latest(top: Path) -> str:
    return (top / "by-vm/web1/snapshots/latest").readlink().name


def snapshots(top: Path) -> set[str]:
    return names(top / "by-vm/web1/snapshots") - {"latest"}


def take(api: Api, vm: str, name: str) -> str:
    """Take a snapshot in a second of its own: ``latest`` goes by times without fractions."""
    time.sleep(1 - time.time() % 1)
    return api.text("VM.snapshot", vm, name)


def destroy(api: Api, snapshot: str) -> None:
    """Destroy a snapshot of a VM with its disks."""
    vbds = api.records("VBD")
    disks = [str(f["VDI"]) for f in vbds.values() if f["VM"] == snapshot and f["type"] == "Disk"]
    api.call("VM.destroy", snapshot)
    for disk in disks:
        api.call("VDI.destroy", disk)


# ── What happens in a pool ───────────────────────────────────────────────────────────────────────


def test_a_new_snapshot_shows_and_latest_points_to_it(top: Path, api: Api, vm: str) -> None:
    before = snapshots(top)

    take(api, vm, "by hand")

    assert soon(lambda: latest(top).endswith("~by hand"))
    assert soon(lambda: (top / "by-vm/web1/snapshots/latest/xvda.raw").exists())
    assert {name.partition("~")[2] for name in snapshots(top) - before} == {"by hand"}
    assert "by hand" in (top / "by-vm/web1/vm.json").read_text()


def test_a_renamed_vm_has_another_folder_and_keeps_its_inode(top: Path, api: Api, vm: str) -> None:
    inode = (top / "by-vm/web1").stat().st_ino

    api.call("VM.set_name_label", vm, "renamed")
    try:
        assert soon((top / "by-vm/renamed/xvda.raw").exists)
        assert soon(lambda: not (top / "by-vm/web1").exists())
        assert (top / "by-vm/renamed").stat().st_ino == inode
        assert "web1" not in names(top / "by-vm")
    finally:
        api.call("VM.set_name_label", vm, "web1")
    assert soon((top / "by-vm/web1/xvda.raw").exists)


def test_a_destroyed_snapshot_is_not_found(top: Path, api: Api, vm: str) -> None:
    snapshot = take(api, vm, "short-lived")
    assert soon(lambda: latest(top).endswith("~short-lived"))
    assert soon((top / "by-vm/web1/snapshots/latest/xvda.raw").exists)
    folder = top / "by-vm/web1/snapshots" / latest(top)
    image = (folder / "xvda.raw").resolve()

    destroy(api, snapshot)

    assert soon(lambda: not folder.exists() and not image.exists())
    with pytest.raises(FileNotFoundError):
        image.open("rb")
    assert not latest(top).endswith("~short-lived")


def test_an_open_folder_stays_a_listing_of_one_instant(top: Path, api: Api, vm: str) -> None:
    before = snapshots(top)
    with os.scandir(top / "by-vm/web1/snapshots") as entries:
        take(api, vm, "during a listing")
        assert soon(lambda: latest(top).endswith("~during a listing"))

        assert {entry.name for entry in entries} == before | {"latest"}


def test_reading_goes_on_when_the_disk_is_gone_as_far_as_it_is_known(
    top: Path, api: Api, vm: str
) -> None:
    snapshot = take(api, vm, "read to the end")
    assert soon(lambda: latest(top).endswith("~read to the end"))
    assert soon((top / "by-vm/web1/snapshots/latest/xvda.raw").exists)
    image = (top / "by-vm/web1/snapshots/latest/xvda.raw").resolve()
    with image.open("rb", buffering=0) as file:
        destroy(api, snapshot)
        assert soon(lambda: not image.exists())

        assert os.fstat(file.fileno()).st_size > 0
        with pytest.raises(OSError, match="Input/output"):
            file.read(4096)
    assert (top / "README.txt").read_text()  # the mount lives


def test_what_did_not_change_keeps_its_attributes(top: Path, api: Api, vm: str) -> None:
    def attributes() -> dict[str, str]:
        lines = run("find", top, "-printf", "%P\t%i %m %s %T@\n").splitlines()
        return dict(line.split("\t") for line in lines)

    before = attributes()

    take(api, vm, "unmoved")
    assert soon(lambda: latest(top).endswith("~unmoved"))
    assert soon((top / "by-vm/web1/snapshots/latest/xvda.raw").exists)

    after = attributes()
    different = {path for path in before if after.get(path) != before[path]}
    assert all(
        path.endswith(".json") or path.startswith("by-vm/web1/snapshots") or path == "by-uuid"
        for path in different
    ), different
    assert "by-vm/web1/snapshots" in different


def test_a_disk_that_grows_shows_its_new_size(top: Path, api: Api) -> None:
    vdi = api.named("VDI", "odd size")
    uuid = str(api.records("VDI")[vdi]["uuid"])
    size = (top / f"by-uuid/{uuid}.raw").stat().st_size

    api.call("VDI.resize", vdi, str(size + (4 << 20)))

    assert soon(lambda: (top / f"by-uuid/{uuid}.raw").stat().st_size >= size + (4 << 20))
    assert f'"size": {size + (4 << 20)}' in (top / f"by-uuid/{uuid}.json").read_text()


def test_what_was_open_during_a_change_does_not_hide_it_from_others(top: Path, api: Api) -> None:
    vdi = api.named("VDI", "odd size")
    described = top / f"by-uuid/{api.records('VDI')[vdi]['uuid']}.json"
    with described.open() as opened:
        api.call("VDI.set_name_description", vdi, "changed")
        api.call("VDI.set_name_label", vdi, "odder size")
        try:
            assert soon(lambda: (top / "by-name/odder size.raw").is_symlink())
            time.sleep(0.5)  # until the kernel has forgotten what it knew
            assert '"odd size"' in opened.read()

            assert '"odder size"' in described.read_text()
        finally:
            api.call("VDI.set_name_label", vdi, "odd size")


def test_an_open_file_keeps_its_size(top: Path, api: Api) -> None:
    vdi = api.named("VDI", "odd size")
    uuid = str(api.records("VDI")[vdi]["uuid"])
    image, described = top / f"by-uuid/{uuid}.raw", top / f"by-uuid/{uuid}.json"
    size = image.stat().st_size
    with image.open("rb", buffering=0) as file:
        api.call("VDI.resize", vdi, str(size + (4 << 20)))
        assert soon(lambda: f'"size": {size + (4 << 20)}' in described.read_text())

        assert os.fstat(file.fileno()).st_size == image.stat().st_size == size
        file.seek(size - 512)
        assert len(file.read(4096)) == 512

    assert soon(lambda: image.stat().st_size == size + (4 << 20))


# ── What happens to a pool ───────────────────────────────────────────────────────────────────────


def shows_a_new_snapshot(top: Path, pool: RunningPool, name: str, *, host: int = 0) -> bool:
    api = Api(pool, host=host).login()
    vms = api.records("VM")
    (vm,) = (r for r, f in vms.items() if f["name_label"] == "web1" and not f["is_a_snapshot"])
    take(api, vm, name)
    return soon(lambda: latest(top).endswith(f"~{name}"))


def test_a_restarted_xapi_is_followed(top: Path, pool: RunningPool) -> None:
    assert shows_a_new_snapshot(top, pool, "before the restart")

    pool.control("restart-xapi")

    assert latest(top).endswith("~before the restart")
    assert shows_a_new_snapshot(top, pool, "after the restart")


def test_what_was_missed_during_a_restart_is_gone(top: Path, pool: RunningPool, api: Api) -> None:
    assert shows_a_new_snapshot(top, pool, "to be missed")
    snapshot = api.named("VM", "to be missed")
    pool.set("xapi.fail", "event.from:INTERNAL_ERROR")
    try:
        destroy(api, snapshot)
        pool.control("restart-xapi")
    finally:
        pool.set("xapi.fail", "")

    assert soon(lambda: not latest(top).endswith("~to be missed"))


def test_expired_sessions_are_no_matter(top: Path, pool: RunningPool) -> None:
    pool.control("expire-sessions")

    assert shows_a_new_snapshot(top, pool, "after expiry")


def test_another_master_is_followed(top: Path, pool: RunningPool) -> None:
    pool.control("failover", "xcp2")
    try:
        assert shows_a_new_snapshot(top, pool, "on the other master", host=1)
    finally:
        pool.control("failover", "xcp1")
    assert shows_a_new_snapshot(top, pool, "back again")


def test_without_xapi_the_names_stay_and_the_log_tells_once(
    top: Path, user: User, pool: RunningPool
) -> None:
    listing = run("ls", "-R", top)
    pool.set("xapi.fail", "event.from:INTERNAL_ERROR")
    try:
        pool.control("restart-xapi")
        assert soon(lambda: "cannot be followed" in user.log.read_text())
        assert run("ls", "-R", top) == listing
    finally:
        pool.set("xapi.fail", "")

    assert shows_a_new_snapshot(top, pool, "after the outage")
    told = user.log.read_text()
    assert told.count("the pool cannot be followed") == 1
    assert told.count("the pool is followed again") == 1


# ── Restore points ───────────────────────────────────────────────────────────────────────────────


def test_a_new_restore_point_shows(user: User, pool: RunningPool) -> None:
    store = user.home / "store"
    user.top.mkdir()
    assert user.cbtfs("--store", store, "mount", user.top).returncode == 0
    try:
        assert list((user.top / "backups").iterdir()) == []  # there is no store yet
        done = user.cbtfs("--store", store, "sync", "--vm", "web1")
        assert done.returncode == 0, done.stderr
        assert soon((user.top / "backups/web1/latest").is_symlink)
        first = (user.top / "backups/web1/latest").readlink().name
        assert user.cbtfs("--store", store, "sync", "--vm", "web1").returncode == 0

        assert soon(lambda: (user.top / "backups/web1/latest").readlink().name > first)
        newest = (user.top / "backups/web1/latest").readlink().name
        assert (user.top / "backups/web1/latest/xvda.raw").stat().st_size > 0

        shutil.rmtree((user.top / "backups/web1" / newest).resolve())
        assert soon(lambda: (user.top / "backups/web1/latest").readlink().name == first)
    finally:
        assert user.cbtfs("umount", user.top).returncode == 0


# ── What a pool may say ──────────────────────────────────────────────────────────────────────────


class Script:
    """A feed of given batches and failures, and nothing after them; fits ``follow.Feed``."""

    def __init__(self, *steps: Batch | Exception) -> None:
        self._steps = list(steps)
        self.begun_anew = 0
        self.over = trio.Event()

    def start_over(self) -> None:
        self.begun_anew += 1

    async def next(self) -> Batch:
        await trio.lowlevel.checkpoint()
        if not self._steps:
            self.over.set()
            await trio.sleep_forever()
        step = self._steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step


@pytest.mark.parametrize(
    "step",
    [
        Batch([Event("vdi", "mod", "r", b"rubbish")]),
        Batch([Event("vdi", "add", "r")]),
        errors.PoolUnreachable("nobody answers"),
        KeyError("a mistake of ours"),
    ],
)
async def test_whatever_a_feed_says_the_mount_goes_on(
    tmp_path: Path, step: Batch | Exception
) -> None:
    feed = Script(step)
    disk = memory.a_disk(1)
    source = Source(feed, Replica())
    shown = memory.an_inventory(disk)
    async with mounted(memory.a_pool(disk), shown, tmp_path / "mnt", source=source) as top:
        await feed.over.wait()
        assert await read(top / f"by-uuid/{disk.uuid}.json")

    assert feed.begun_anew == 1


async def test_a_pool_that_lost_its_pool_record_stays_as_it_was(tmp_path: Path) -> None:
    feed = Script(Batch([Event("vdi", "add", "r", b"{}")]))  # into a replica without a pool
    disk = memory.a_disk(1)
    source = Source(feed, Replica())
    shown = memory.an_inventory(disk)
    async with mounted(memory.a_pool(disk), shown, tmp_path / "mnt", source=source) as top:
        await feed.over.wait()
        assert await read(top / f"by-uuid/{disk.uuid}.json")


async def test_missing_events_are_noticed_once(tmp_path: Path) -> None:
    batch = Batch([], counts={"vdi": 7})
    feed = Script(batch, batch, batch)
    source = Source(feed, Replica())
    async with mounted(memory.a_pool(), memory.an_inventory(), tmp_path / "mnt", source=source):
        await feed.over.wait()

    assert feed.begun_anew == 1
