"""Tests of cbtfs.mount: options, and the life of a mount from its start to each of its ends."""

import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from cbtfs import catalogue, errors, mount, mountpoint, units
from cbtfs.catalogue import Catalogue, Point
from cbtfs.disks import DiskOptions
from cbtfs.inventory import Owned
from cbtfs.mount import Backups, MountOptions, View
from tests import memory
from tests.memory import MemoryPool
from tests.mounted import mounted, read, run

LIVE = memory.a_disk(1)
SNAPSHOT = memory.a_disk(2, of=1)
INVENTORY = memory.an_inventory(LIVE, SNAPSHOT)


@pytest.fixture
def pool() -> MemoryPool:
    return memory.a_pool(LIVE, SNAPSHOT)


# ── Options ──────────────────────────────────────────────────────────────────────────────────────


def test_by_default_live_disks_are_read_and_snapshots_linger_a_minute() -> None:
    assert MountOptions.parse("").disks == DiskOptions(live=True, linger=60.0, connections=8)


def test_options_are_what_was_asked_for() -> None:
    options = MountOptions.parse("live=off,linger=10s,timeout=2m,cache=16M,connections=3")

    assert options.disks == DiskOptions(live=False, linger=10.0, connections=3)
    assert options.timeout == 120.0
    assert options.cache == 16 * units.MiB


def test_others_are_let_in_by_root_or_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert MountOptions.parse("").allow_other
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert not MountOptions.parse("").allow_other
    assert MountOptions.parse("allow_other").allow_other


def test_what_mount_8_adds_is_taken() -> None:
    text = "rw,nosuid,nodev,noexec,relatime,noauto,_netdev,x-systemd.automount,user,defaults"

    assert MountOptions.parse(text) == MountOptions()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lingr=3s", "did you mean linger"),
        ("zzz", "no option of mount"),
        ("live=maybe", "live=snapshot or live=off"),
        ("tune=much", "tune=on or tune=off"),
        ("linger=soon", "not a duration"),
        ("cache=big", "not a size"),
        ("connections=0", "from 1 on"),
        ("connections=few", "from 1 on"),
    ],
)
def test_a_wrong_option_is_refused_with_a_hint(text: str, said: str) -> None:
    with pytest.raises(errors.UsageError, match=said):
        MountOptions.parse(text)


def test_the_pools_name_cannot_add_options() -> None:
    named = replace(INVENTORY, pool=replace(INVENTORY.pool, name="a,allow_other\n"))

    options = mount._kernel_options(named, replace(MountOptions(), allow_other=False))

    assert "fsname=cbtfs#a_allow_other_" in options
    assert "allow_other" not in options


# ── Life ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.fuse
async def test_the_kernel_has_it_read_only_and_harmless(pool: MemoryPool, tmp_path: Path) -> None:
    async with mounted(pool, INVENTORY, tmp_path / "mnt") as top:
        told = await run("findmnt", "-n", "-o", "FSTYPE,SOURCE,OPTIONS", top)

    kind, source, options = told.split()
    assert (kind, source) == ("fuse.cbtfs", "cbtfs#memory")
    assert {"ro", "nosuid", "nodev", "noexec", "default_permissions"} <= set(options.split(","))


async def unmount(top: Path) -> None:
    await run("fusermount3", "-u", top)


async def send_sigterm(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def send_sigint(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.fuse
@pytest.mark.parametrize("end", [unmount, send_sigterm, send_sigint])
async def test_whatever_ends_it_leaves_nothing(
    pool: MemoryPool, tmp_path: Path, end: Callable[[Path], Awaitable[None]]
) -> None:
    ready = trio.Event()

    async def live_a_little() -> None:
        await ready.wait()
        await read(tmp_path / f"by-uuid/{LIVE.uuid}.raw")
        assert len(pool.snapshots) == 1
        await end(tmp_path)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live_a_little)
        await mount.serve(pool, view=View(INVENTORY), mountpoint=tmp_path, ready=ready.set)

    assert mountpoint.find(tmp_path) is None
    assert pool.snapshots == {}
    assert pool.open_now == set()


@pytest.mark.fuse
async def test_it_ends_under_those_who_use_it(pool: MemoryPool, tmp_path: Path) -> None:
    async with mounted(pool, INVENTORY, tmp_path / "mnt") as top:
        pool.stop()
        reader = await trio.lowlevel.open_process(
            ["cat", str(top / f"by-uuid/{SNAPSHOT.uuid}.raw")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await pool.asked.wait()

    assert await reader.wait() == 1


@pytest.mark.fuse
@pytest.mark.parametrize("name", ["x" * 5000, "é\n,ro=" * 1000])
async def test_a_pool_may_have_any_name(pool: MemoryPool, tmp_path: Path, name: str) -> None:
    inventory = memory.an_inventory(SNAPSHOT)
    named = replace(inventory, pool=replace(inventory.pool, name=name))
    async with mounted(pool, named, tmp_path / "mnt") as top:
        assert await run("ls", top / "by-uuid")


@pytest.mark.fuse
async def test_restore_points_are_links_into_the_store(pool: MemoryPool, tmp_path: Path) -> None:
    time = "20261122T020000Z"
    point = tmp_path / "store" / memory.uuid_of(7) / time
    point.mkdir(parents=True)
    (point / "xvda.raw").write_bytes(b"contents")
    history = catalogue.history_of(memory.uuid_of(7), [a_point(time)])
    backups = Backups(Catalogue({history.uuid: history}), str(tmp_path / "store"))

    async with mounted(pool, INVENTORY, tmp_path / "mnt", backups=backups) as top:
        assert await read(top / f"backups/web1/{time}/xvda.raw") == b"contents"
        assert await read(top / "backups/web1/latest/xvda.raw") == b"contents"


def a_point(time: str) -> Point:
    return Point(
        tool="0",
        time=time,
        vm_uuid=memory.uuid_of(7),
        vm_name="web1",
        pool_uuid=memory.uuid_of(0),
        snapshot_vm_uuid="",
        disks=(),
        started="",
        finished="",
        state="complete",
    )


@pytest.mark.fuse
async def test_what_a_dead_mount_left_is_removed_first(pool: MemoryPool, tmp_path: Path) -> None:
    host = socket.gethostname()
    dead = Owned(self_uuid=SNAPSHOT.uuid, role="live", host=host, boot="another", pid=1)
    left = memory.left_by(SNAPSHOT, dead)

    async with mounted(pool, memory.an_inventory(LIVE, left), tmp_path / "mnt") as top:
        names = await trio.to_thread.run_sync(os.listdir, top / "by-uuid")
        assert SNAPSHOT.ref not in pool.contents
        assert f"{SNAPSHOT.uuid}.raw" not in names


@pytest.mark.fuse
async def test_what_the_kernel_refuses_is_one_sentence(pool: MemoryPool, tmp_path: Path) -> None:
    broken = replace(MountOptions(), allow_other=False)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(mount, "_kernel_options", lambda *_: {"no_such_option"})
    with monkey.context(), pytest.raises(errors.MountError) as caught:
        await mount.serve(pool, view=View(INVENTORY), mountpoint=tmp_path, options=broken)
    monkey.undo()

    assert "no_such_option" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_directory_that_will_not_do_is_refused(pool: MemoryPool, tmp_path: Path) -> None:
    with pytest.raises(errors.MountError, match="does not exist"):
        await mount.serve(pool, view=View(INVENTORY), mountpoint=tmp_path / "missing")
