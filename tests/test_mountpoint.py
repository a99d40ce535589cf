"""Tests of cbtfs.mountpoint: what may be mounted on, and what may be taken away."""

import os
import subprocess
from pathlib import Path

import pytest
import trio

from cbtfs import errors, mountpoint
from tests import memory
from tests.memory import MemoryPool
from tests.mounted import mounted

DISK = memory.a_disk(2, of=1)


@pytest.fixture
def pool() -> MemoryPool:
    return memory.a_pool(DISK)


def refusal(path: Path) -> str:
    with pytest.raises(errors.MountError) as caught:
        mountpoint.check(path)
    return str(caught.value)


def test_an_empty_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    monkeypatch.chdir(tmp_path)

    assert mountpoint.check(Path("mnt")) == tmp_path / "mnt"
    assert mountpoint.check(tmp_path / "link") == tmp_path / "mnt"


def test_a_missing_directory_is_refused_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "missing"

    assert refusal(path) == f"{path} does not exist; make it with: mkdir -p {path}"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert "is not a directory" in refusal(tmp_path / "file")


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert "is not empty and would be hidden" in refusal(tmp_path)


def test_a_mount_of_another_kind_is_refused() -> None:
    assert "has proc mounted on it" in refusal(Path("/proc"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            r"31 1 0:5 / /a\040b rw shared:1 master:2 - ext4 /dev/sda1 rw",
            mountpoint.Mounted("/a b", "ext4", "/dev/sda1"),
        ),
        (
            r"31 1 0:5 / /mnt ro - fuse.cbtfs cbtfs\043prod ro,user_id=0",
            mountpoint.Mounted("/mnt", "fuse.cbtfs", "cbtfs#prod"),
        ),
        (
            "31 1 0:5 / /a\x0cb\x85c\u2028d rw - tmpfs none rw",
            mountpoint.Mounted("/a\x0cb\x85c\u2028d", "tmpfs", "none"),
        ),
    ],
)
def test_the_kernels_list_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: mountpoint.Mounted
) -> None:
    (tmp_path / "mountinfo").write_text(f"{line}\n")
    monkeypatch.setattr(mountpoint, "_MOUNTINFO", tmp_path / "mountinfo")

    assert mountpoint.mounts() == [expected]
    assert mountpoint.find(Path(expected.path)) == expected
    assert mountpoint.find(Path("/other")) is None


def test_only_what_is_ours_is_unmounted(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "nothing is mounted on it"), (Path("/proc"), "proc is mounted")):
        with pytest.raises(errors.MountError, match=f"is no cbtfs: {why}"):
            mountpoint.umount(path)


@pytest.mark.fuse
async def test_what_is_mounted_is_refused_and_says_who_serves_it(
    pool: MemoryPool, tmp_path: Path
) -> None:
    async with mounted(pool, memory.an_inventory(DISK), tmp_path / "mnt") as top:
        told = await trio.to_thread.run_sync(refusal, top)
        seen = mountpoint.find(top)
        served = await trio.to_thread.run_sync(mountpoint._ask, top)

    assert told == f"{top} is mounted already; run: cbtfs umount {top}"
    assert seen == mountpoint.Mounted(str(top), "fuse.cbtfs", "cbtfs#memory")
    assert served == mountpoint._Served(pid=os.getpid(), is_silent=False)


@pytest.mark.fuse
async def test_what_is_in_use_stays(pool: MemoryPool, tmp_path: Path) -> None:
    async with mounted(pool, memory.an_inventory(DISK), tmp_path / "mnt") as top:
        user = await trio.to_thread.run_sync(use, top)
        try:
            with pytest.raises(errors.MountError, match=f"{top} is in use; see by whom with: lsof"):
                await trio.to_thread.run_sync(mountpoint.umount, top)
            assert mountpoint.find(top) is not None
        finally:
            user.terminate()
            await trio.to_thread.run_sync(user.communicate)


def use(top: Path) -> "subprocess.Popen[bytes]":
    """Let a process have its working directory in ``top``."""
    process = subprocess.Popen(["sh", "-c", "echo; exec sleep 60"], cwd=top, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.fuse
async def test_a_mount_is_found_without_a_question_to_it(
    pool: MemoryPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(".")
    async with mounted(pool, memory.an_inventory(DISK), tmp_path / "mnt") as top:
        monkeypatch.chdir(tmp_path)
        # in the thread of the mount itself, where a question would never be answered
        for path in (top, Path("mnt"), tmp_path / "link/mnt"):
            assert mountpoint.located(path) == top

    assert mountpoint.located(Path("link/..")) == tmp_path.parent


@pytest.mark.fuse
async def test_a_process_that_hangs_is_told_within_the_time_limit(
    pool: MemoryPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "ANSWER_LIMIT", 0.2)
    async with mounted(pool, memory.an_inventory(DISK), tmp_path / "mnt") as top:
        # in the thread of the mount itself, which so cannot answer
        with pytest.raises(errors.MountError, match="does not answer; end it with kill -9"):
            mountpoint.umount(top)


def test_without_the_device_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)

    with pytest.raises(errors.MountError, match="modprobe fuse"):
        mountpoint.check_fuse()


def test_users_need_the_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: True)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda _: None)

    with pytest.raises(errors.MountError, match="install the package fuse3"):
        mountpoint.check_fuse()
