"""Snapshots of VMs that a user makes and removes with ``mkdir`` and ``rmdir``, through the kernel.

The simulated pool is asked what came of it; everything is done by the real command and coreutils.
"""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulated import Api, RunningPool, running_pool
from tests.test_mounted import User, plugged, run, sha256

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("sim") / "pool") as pool:
        yield pool


@pytest.fixture
def user(pool: RunningPool, tmp_path: Path) -> User:
    return User(pool, tmp_path)


@pytest.fixture(scope="module")
def top(pool: RunningPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount that all tests share but those that mount themselves."""
    with User(pool, tmp_path_factory.mktemp("shared")).mounted("snapshots") as top:
        yield top


@pytest.fixture
def snapshots(top: Path) -> Path:
    """The folder of the snapshots of web1."""
    return top / "by-vm/web1/snapshots"


@pytest.fixture
def api(pool: RunningPool) -> Api:
    return Api(pool).login()


def vms(api: Api, name: str) -> list[dict[str, object]]:
    """Return the snapshots of VMs with this name."""
    found = api.records("VM").values()
    return [dict(vm) for vm in found if vm["is_a_snapshot"] and vm["name_label"] == name]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def disks(api: Api) -> set[str]:
    """Return the VDIs, without what the storage keeps for itself ("base copy")."""
    return {str(vdi["uuid"]) for vdi in api.records("VDI").values() if vdi["managed"]}


def test_mkdir_takes_a_snapshot_and_rmdir_removes_it(
    snapshots: Path, api: Api, pool: RunningPool
) -> None:
    before = disks(api)

    run("mkdir", snapshots / "before the upgrade")

    (vm,) = vms(api, "before the upgrade")
    assert '"role":"made"' in str(vm["other_config"])
    made = disks(api) - before
    assert made
    tags = {str(d["uuid"]): str(d["other_config"]) for d in api.records("VDI").values()}
    assert [uuid for uuid in made if '"role":"made"' not in tags[uuid]] == []
    # all of it is there at once, and can be read
    images = sorted((snapshots / "before the upgrade").iterdir())
    assert [image.name for image in images] == ["xvda.raw", "xvdb.raw"]
    assert all(sha256(image) for image in images)
    assert "before the upgrade" in names_in(snapshots)
    assert (snapshots / "latest").readlink() == Path("before the upgrade")

    run("rmdir", snapshots / "before the upgrade")

    assert "before the upgrade" not in names_in(snapshots)
    assert vms(api, "before the upgrade") == []
    assert disks(api) == before
    assert plugged(pool) == []


def test_it_shows_the_instant_when_it_was_taken(snapshots: Path, pool: RunningPool) -> None:
    live = snapshots.parent / "xvda.raw"
    before = sha256(live)
    (snapshots / "instant").mkdir()
    guest = pool.open_guest("web1", "xvda")
    guest.pwrite(b"later" * 1024, 0)
    guest.shutdown()
    try:
        assert sha256(snapshots / "instant/xvda.raw") == before
        assert sha256(live) != before
    finally:
        (snapshots / "instant").rmdir()


def test_it_stays_over_a_remount(user: User, api: Api) -> None:
    with user.mounted("snapshots") as top:
        folder = top / "by-vm/web1/snapshots/kept"
        folder.mkdir()
        inode = folder.stat().st_ino
    with user.mounted("snapshots") as top:
        folder = top / "by-vm/web1/snapshots/kept"
        assert folder.stat().st_ino == inode
        folder.rmdir()
    assert vms(api, "kept") == []


def test_what_is_not_of_mkdir_is_not_removed(snapshots: Path, api: Api) -> None:
    (foreign,) = [p for p in snapshots.iterdir() if p.name.endswith("~nightly")][:1]
    before = disks(api)

    with pytest.raises(PermissionError) as refusal:
        foreign.rmdir()

    assert refusal.value.errno == errno.EPERM
    assert disks(api) == before
    assert foreign.is_dir()


def test_one_that_is_open_is_busy(snapshots: Path, api: Api) -> None:
    (snapshots / "open").mkdir()
    with (snapshots / "open/xvda.raw").open("rb") as file:
        file.read(4096)
        with pytest.raises(OSError, match="busy"):
            (snapshots / "open").rmdir()
        assert file.read(4096)
    (snapshots / "open").rmdir()
    assert vms(api, "open") == []


@pytest.mark.parametrize("name", ["a\nb", b"\xff\xfe", "x" * 256])
def test_names_that_could_not_stay_are_refused(
    snapshots: Path, api: Api, name: str | bytes
) -> None:
    before = disks(api)

    with pytest.raises(OSError, match=r"Invalid argument|File name too long"):
        snapshots.joinpath(os.fsdecode(name)).mkdir()

    assert disks(api) == before


def test_a_name_that_is_there_exists(snapshots: Path, api: Api) -> None:
    before = disks(api)
    with pytest.raises(FileExistsError):
        (snapshots / "latest").mkdir()
    assert disks(api) == before


@pytest.mark.parametrize(
    "command",
    [
        ["mkdir", "{top}/folder"],
        ["mkdir", "{top}/by-vm/web1/folder"],
        ["touch", "{top}/by-vm/web1/snapshots/file"],
        ["ln", "-s", "there", "{top}/link"],
        ["rm", "-f", "{top}/README.txt"],
        ["mv", "{top}/by-vm/web1", "{top}/by-vm/web2"],
        ["chmod", "777", "{top}/README.txt"],
        ["setfattr", "-n", "user.x", "-v", "y", "{top}/README.txt"],
        ["cp", "/dev/null", "{top}/README.txt"],
        ["truncate", "-s", "0", "{top}/by-vm/web1/xvda.raw"],
    ],
)
def test_all_else_is_read_only(top: Path, command: list[str]) -> None:
    done = subprocess.run(
        [word.format(top=top) for word in command],
        check=False, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip

    assert done.returncode != 0
    assert "Read-only file system" in done.stderr


def test_without_the_option_nothing_is_made(user: User, api: Api) -> None:
    before = disks(api)
    with user.mounted() as top, pytest.raises(OSError, match="Read-only file system"):
        (top / "by-vm/web1/snapshots/new").mkdir()
    assert disks(api) == before


@pytest.mark.parametrize(
    ("failure", "number"),
    [
        ("SR_BACKEND_FAILURE_44", errno.ENOSPC),
        ("SR_BACKEND_FAILURE_109", errno.EMLINK),
        ("INTERNAL_ERROR", errno.EIO),
    ],
)
def test_a_refusal_is_told_and_leaves_nothing(
    snapshots: Path, api: Api, pool: RunningPool, failure: str, number: int
) -> None:
    before = disks(api)
    pool.set("xapi.fail", f"VM.snapshot:{failure}")
    try:
        with pytest.raises(OSError, match=r"\[Errno") as refusal:
            (snapshots / "refused").mkdir()
    finally:
        pool.set("xapi.fail", "")

    assert refusal.value.errno == number
    assert disks(api) == before
    assert not (snapshots / "refused").exists()


def test_one_that_cannot_be_tagged_is_taken_back(
    snapshots: Path, api: Api, pool: RunningPool
) -> None:
    before = disks(api)
    pool.set("xapi.fail", "VM.add_to_other_config:INTERNAL_ERROR")
    try:
        with pytest.raises(OSError, match="Input/output"):
            (snapshots / "untagged").mkdir()
    finally:
        pool.set("xapi.fail", "")

    assert vms(api, "untagged") == []
    assert disks(api) == before


def test_who_waits_for_one_can_be_killed(snapshots: Path, api: Api, pool: RunningPool) -> None:
    before = disks(api)
    pool.set("xapi.delay", "VM.snapshot:20s")
    try:
        waiting = subprocess.Popen(["mkdir", snapshots / "slow"])
        time.sleep(1)
        begun = time.monotonic()
        waiting.kill()
        waiting.wait(15)
        assert time.monotonic() - begun < 15
    finally:
        pool.set("xapi.delay", "")

    deadline = time.monotonic() + 60
    while vms(api, "slow") or disks(api) != before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_many_at_once_while_the_pool_changes(snapshots: Path, api: Api) -> None:
    """The kernel's locks and the following of the pool do not wait for each other."""
    before = disks(api)
    (web1,) = (r for r, f in api.records("VM").items() if f["name_label"] == "web1")
    names = [f"one of many {n}" for n in range(3)]
    others = [api.text("VM.snapshot", web1, f"in between {n}") for n in range(2)]
    threads = [threading.Thread(target=(snapshots / name).mkdir) for name in names]
    for thread in threads:
        thread.start()
    others += [api.text("VM.snapshot", web1, f"in between {n}") for n in range(2, 6)]
    for thread in threads:
        thread.join()
    try:
        assert set(names) <= names_in(snapshots)
    finally:
        for name in names:
            (snapshots / name).rmdir()
        for other in others:
            vbds = api.records("VBD").values()
            its = [str(vbd["VDI"]) for vbd in vbds if vbd["VM"] == other and vbd["type"] == "Disk"]
            api.call("VM.destroy", other)
            for vdi in its:
                api.call("VDI.destroy", vdi)
    assert disks(api) == before
