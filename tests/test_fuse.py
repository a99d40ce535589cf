"""Tests of cbtfs.fuse: what the kernel, and tools through it, are answered."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.testing

from cbtfs import errors, mountpoint, patience, tree, units
from cbtfs.cache import open_cache
from cbtfs.disks import open_disks
from cbtfs.fuse import Failures, Filesystem
from tests import memory
from tests.memory import MemoryPool
from tests.mounted import mounted, read, run

pytestmark = pytest.mark.fuse

LIVE = memory.a_disk(1, size=4 * units.MiB + 512)
SNAPSHOT = memory.a_disk(2, size=8 * units.MiB, of=1)
INVENTORY = memory.an_inventory(LIVE, SNAPSHOT)


@pytest.fixture
def pool() -> MemoryPool:
    return memory.a_pool(LIVE, SNAPSHOT)


@pytest.fixture
async def top(pool: MemoryPool, tmp_path: Path) -> AsyncIterator[Path]:
    async with mounted(pool, INVENTORY, tmp_path / "mnt") as top:
        yield top


@pytest.fixture
def live(top: Path) -> Path:
    return top / f"by-uuid/{LIVE.uuid}.raw"


@pytest.fixture
def snapshot(top: Path) -> Path:
    return top / f"by-uuid/{SNAPSHOT.uuid}.raw"


def contents(pool: MemoryPool, ref: str) -> bytes:
    return bytes(pool.contents[ref])


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ── Names and attributes ─────────────────────────────────────────────────────────────────────────


async def test_looking_around_never_reaches_the_pool(pool: MemoryPool, top: Path) -> None:
    listing = await run("ls", "-laR", top)
    await run("find", top, "-type", "f", "-size", "+1", "-printf", "%s %b %t\n")
    await run("getfattr", "-R", "-d", "-m", ".", top)
    await run("du", "-s", top)

    assert f"{SNAPSHOT.uuid}.raw" in listing
    assert not pool.opened
    assert pool.taken == 0


async def test_attributes_tell_the_truth(snapshot: Path, top: Path) -> None:
    info = await trio.Path(snapshot).stat()
    folder = await trio.Path(top / "by-uuid").stat()

    assert stat.filemode(info.st_mode) == "-r--r-----"
    assert stat.filemode(folder.st_mode) == "dr-xr-x---"
    assert info.st_size == SNAPSHOT.size
    assert info.st_blocks * 512 == SNAPSHOT.used
    assert info.st_mtime == memory.SNAPSHOT_TIME.timestamp()
    assert (info.st_uid, info.st_gid) == (os.getuid(), os.getgid())


async def test_inode_numbers_outlive_the_mount(pool: MemoryPool, tmp_path: Path) -> None:
    listings: list[str] = []
    for _ in range(2):
        async with mounted(pool, INVENTORY, tmp_path / "mnt") as top:
            listings.append(await run("find", top, "-printf", "%i %P\n"))

    assert listings[0] == listings[1]


async def test_a_name_that_is_not_there_is_not_found(top: Path) -> None:
    for name in ("nothing", "by-uuid/nothing", "by-uuid/\udcff"):
        with pytest.raises(FileNotFoundError):
            await trio.Path(top / name).stat()


async def test_dots_lead_where_they_should(top: Path) -> None:
    inside = await trio.Path(top / "by-sr" / "Local storage" / ".." / ".." / ".").stat()

    assert inside.st_ino == pyfuse3.ROOT_INODE


async def test_links_lead_to_the_files(top: Path, live: Path) -> None:
    named = trio.Path(top / "by-name/disk 1.raw")

    assert await named.is_symlink()
    assert (await named.stat()).st_ino == (await trio.Path(live).stat()).st_ino


async def test_a_large_folder_is_listed_whole(tmp_path: Path) -> None:
    vdis = [memory.a_disk(number) for number in range(1, 1001)]
    async with mounted(memory.a_pool(), memory.an_inventory(*vdis), tmp_path / "mnt") as top:
        names = await trio.to_thread.run_sync(os.listdir, top / "by-uuid")

    assert len(names) == len(set(names)) == 2 * len(vdis)


async def test_text_files_hold_their_text(top: Path) -> None:
    assert (await read(top / "README.txt")).startswith(b"This is a pool")
    assert b'"memory"' in await read(top / "pool.json")


async def test_extended_attributes_tell_of_the_disk(snapshot: Path) -> None:
    names = await trio.to_thread.run_sync(os.listxattr, snapshot)

    assert {"user.cbtfs.uuid", "user.cbtfs.sr", "user.cbtfs.cbt_enabled"} <= set(names)
    for name, value in (
        ("uuid", SNAPSHOT.uuid),
        ("snapshot_of", LIVE.uuid),
        ("sr", "Local storage"),
        ("cbt_enabled", "false"),
    ):
        got = await trio.to_thread.run_sync(os.getxattr, snapshot, f"user.cbtfs.{name}")
        assert got.decode() == value


async def test_other_extended_attributes_do_not_exist(snapshot: Path) -> None:
    with pytest.raises(OSError, match="No data") as caught:
        await trio.to_thread.run_sync(os.getxattr, snapshot, "user.other")

    assert caught.value.errno == errno.ENODATA


@pytest.mark.parametrize("name", ["security.selinux", "system.posix_acl_access", "trusted.x"])
async def test_who_looks_for_labels_is_told_once_that_there_are_none(
    pool: MemoryPool, tmp_path: Path, name: str
) -> None:
    """ls asks again and again for what a file lacks, but not for what a file system lacks."""
    async with mounted(pool, INVENTORY, tmp_path / "mnt") as top:
        with pytest.raises(OSError, match="not supported") as caught:
            await trio.to_thread.run_sync(os.getxattr, top, name)

    assert caught.value.errno == errno.ENOTSUP


@pytest.mark.parametrize(
    "command",
    [
        ["touch", "new"],
        ["mkdir", "new"],
        ["rm", "-f", "README.txt"],
        ["chmod", "600", "README.txt"],
        ["truncate", "-s", "0", "README.txt"],
        ["ln", "-s", "x", "new"],
        ["mv", "README.txt", "new"],
        ["setfattr", "-n", "user.x", "-v", "1", "README.txt"],
    ],
)
async def test_nothing_can_be_changed(top: Path, command: list[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        await run("env", "--chdir", top, *command)

    assert "Read-only file system" in caught.value.stderr


async def test_it_has_the_size_of_all_disks_and_no_room(top: Path) -> None:
    data = await trio.to_thread.run_sync(os.statvfs, top)

    assert data.f_blocks * data.f_frsize == (LIVE.size + SNAPSHOT.size) // 4096 * 4096
    assert (data.f_bfree, data.f_bavail, data.f_namemax) == (0, 0, 255)


# ── Contents ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ref", [LIVE.ref, SNAPSHOT.ref])
async def test_a_disk_is_read_byte_for_byte(
    pool: MemoryPool, top: Path, tmp_path: Path, ref: str
) -> None:
    vdi = INVENTORY.vdis[ref]
    file = top / f"by-uuid/{vdi.uuid}.raw"
    expected = contents(pool, ref)

    await run("cp", "--sparse=always", file, tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == expected
    assert (await run("sha256sum", file)).split()[0] == digest(expected)


async def test_direct_reads_get_the_same(pool: MemoryPool, snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    await run("dd", f"if={snapshot}", f"of={out}", "bs=3M", "iflag=direct", "status=none")

    assert out.read_bytes() == contents(pool, SNAPSHOT.ref)


MAP = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as map:
    print(map[2 << 20 : (2 << 20) + 16].decode())
"""


async def test_a_file_can_be_mapped(pool: MemoryPool, live: Path) -> None:
    # by another process: a page fault keeps the GIL, and the mount could not answer it
    seen = await run(sys.executable, "-c", MAP, live)

    assert seen.strip().encode() == contents(pool, LIVE.ref)[2 * units.MiB :][:16]


async def test_a_snapshot_is_fetched_once_and_then_kept_by_the_kernel(
    pool: MemoryPool, tmp_path: Path
) -> None:
    # without a cache of our own, whatever the kernel does not keep is fetched again
    async with mounted(pool, INVENTORY, tmp_path / "mnt", options="cache=0") as top:
        await read(top / f"by-uuid/{SNAPSHOT.uuid}.raw")
        fetched = pool.reads[SNAPSHOT.ref]
        await read(top / f"by-uuid/{SNAPSHOT.uuid}.raw")

    assert fetched >= SNAPSHOT.size // units.MiB
    assert pool.reads[SNAPSHOT.ref] < fetched * 1.5  # a kernel short of memory drops some


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel lets only root say so")
@pytest.mark.parametrize(("options", "tuned"), [("", True), ("tune=off", False)])
async def test_the_kernel_is_told_to_read_further_ahead(
    pool: MemoryPool, tmp_path: Path, options: str, tuned: bool
) -> None:
    async with mounted(pool, INVENTORY, tmp_path / "mnt", options=options) as top:
        device = (await trio.to_thread.run_sync(top.stat)).st_dev
        told = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        ahead = int(await trio.to_thread.run_sync(told.read_text)) * units.KiB
        with mountpoint.control() as connections:
            limit = connections / str(os.minor(device)) / "max_background"
            background = int(await trio.to_thread.run_sync(limit.read_text))

    assert (ahead == mountpoint.READ_AHEAD) is tuned
    assert (background == mountpoint.BACKGROUND) is tuned


async def test_a_live_disk_read_twice_shows_two_instants(pool: MemoryPool, live: Path) -> None:
    before = await read(live)
    pool.contents[LIVE.ref][:5] = b"after"
    after = await read(live)

    assert before[:5] != b"after"
    assert after[:5] == b"after"
    assert after[5:] == before[5:]


async def test_a_copy_of_a_busy_disk_is_one_instant(pool: MemoryPool, live: Path) -> None:
    before = contents(pool, LIVE.ref)

    def copy_while_the_guest_writes() -> bytes:
        with live.open("rb", buffering=0) as file:
            parts = [file.read(4096)]
            while parts[-1]:
                pool.contents[LIVE.ref][:] = os.urandom(LIVE.size)
                parts.append(file.read(units.MiB))
        return b"".join(parts)

    assert await trio.to_thread.run_sync(copy_while_the_guest_writes) == before
    assert pool.taken == 1


async def test_files_open_at_the_same_time_agree(pool: MemoryPool, live: Path) -> None:
    def read_interleaved() -> tuple[bytes, bytes]:
        with live.open("rb") as one:
            first = one.read()
            pool.contents[LIVE.ref][:5] = b"after"
            os.posix_fadvise(one.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with live.open("rb") as two:
                return first, two.read()

    first, second = await trio.to_thread.run_sync(read_interleaved)
    assert first == second


async def test_a_disk_that_grew_keeps_its_size_here(pool: MemoryPool, live: Path) -> None:
    pool.contents[LIVE.ref] += b"more" * 1024

    assert len(await read(live)) == LIVE.size


async def test_sixty_four_readers_fetch_each_chunk_once(pool: MemoryPool, snapshot: Path) -> None:
    digests: list[str] = []

    async def sum_up() -> None:
        digests.append((await run("sha256sum", snapshot)).split()[0])

    async with trio.open_nursery() as nursery:
        for _ in range(64):
            nursery.start_soon(sum_up)

    assert set(digests) == {digest(contents(pool, SNAPSHOT.ref))}
    assert pool.reads[SNAPSHOT.ref] == SNAPSHOT.size // units.MiB


# ── Failures ─────────────────────────────────────────────────────────────────────────────────────


async def test_what_cannot_be_read_is_an_error_told_once(
    pool: MemoryPool, snapshot: Path, live: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool.broken.add(SNAPSHOT.ref)

    with pytest.raises(OSError, match="Input/output") as caught:
        await read(snapshot)

    assert caught.value.errno == errno.EIO
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert told == [f"read {SNAPSHOT.uuid}.raw: the disk is broken"]
    assert len(await read(live)) == LIVE.size  # and everything else goes on


async def test_what_failed_can_be_read_when_it_works_again(
    pool: MemoryPool, live: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool.refused = "the SR is full"
    with pytest.raises(OSError, match="Input/output"):
        await read(live)
    pool.refused = ""

    assert await read(live) == contents(pool, LIVE.ref)
    assert "the SR is full" in caplog.text


async def test_a_mistake_of_ours_does_not_end_the_mount(
    pool: MemoryPool, snapshot: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool.contents[SNAPSHOT.ref] = bytearray(10)  # and the fake pool raises what it should not
    pool.broken = None  # type: ignore[assignment]

    with pytest.raises(OSError, match="Input/output"):
        await read(snapshot)

    assert "TypeError" in caplog.text
    assert (await trio.Path(snapshot).stat()).st_size == SNAPSHOT.size


async def test_a_silent_server_is_an_error_within_the_time_limit(
    pool: MemoryPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with mounted(pool, INVENTORY, tmp_path / "mnt", options="timeout=200ms") as top:
        pool.stop()
        with pytest.raises(OSError, match="Input/output"):
            await read(top / f"by-uuid/{SNAPSHOT.uuid}.raw")
        pool.go()
        assert len(await read(top / f"by-uuid/{SNAPSHOT.uuid}.raw")) == SNAPSHOT.size

    assert "no answer from the pool within 0.2 s" in caplog.text


@pytest.mark.parametrize("flags", [[], ["iflag=direct"]])
async def test_a_reader_that_waits_can_be_killed(
    pool: MemoryPool, snapshot: Path, flags: list[str]
) -> None:
    pool.stop()
    command = ["dd", f"if={snapshot}", "of=/dev/null", "bs=1M", *flags]
    process = await trio.lowlevel.open_process(command)
    await pool.asked.wait()
    process.kill()
    with trio.move_on_after(10) as limit:
        await process.wait()
    pool.go()
    await process.wait()

    assert not limit.cancelled_caught


def test_a_reader_may_have_any_name() -> None:
    name = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff', 0, 0, 0); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()

        assert not patience.is_killed(process.pid)
        process.kill()


async def test_others_are_served_while_one_waits(
    pool: MemoryPool, top: Path, snapshot: Path
) -> None:
    pool.stop()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, snapshot)
        await pool.asked.wait()
        assert b"memory" in await read(top / "pool.json")
        pool.go()


async def test_live_disks_can_be_refused(pool: MemoryPool, tmp_path: Path) -> None:
    async with mounted(pool, INVENTORY, tmp_path / "mnt", options="live=off") as top:
        with pytest.raises(PermissionError):
            await read(top / f"by-uuid/{LIVE.uuid}.raw")
        assert len(await read(top / f"by-uuid/{SNAPSHOT.uuid}.raw")) == SNAPSHOT.size

    assert pool.taken == 0


async def test_what_the_tree_does_not_have_is_stale(pool: MemoryPool) -> None:
    now = memory.SNAPSHOT_TIME
    names = tree.build(INVENTORY, backups=None, store_path="", now=now)
    async with open_disks(pool) as opened, open_cache() as kept:
        system = Filesystem(names, inventory=INVENTORY, disks=opened, cache=kept)
        for number in (0, 999):
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await system.getattr(number, pyfuse3.RequestContext())
            assert caught.value.errno == errno.ESTALE
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await system.read(999, 0, 1)

    assert caught.value.errno == errno.EIO
    assert system.name_of("getattr", 999) == "inode 999"
    assert system.name_of("read", 999) == "handle 999"
    assert system.name_of("statfs", pyfuse3.RequestContext()) == "/"


async def test_only_what_is_new_while_a_disk_is_snapshot_may_be_temporary(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tree.build(INVENTORY, backups=None, store_path="", now=memory.SNAPSHOT_TIME)
    new = memory.a_disk(3, of=1)
    later = memory.an_inventory(LIVE, SNAPSHOT, new)
    taken = trio.Event()

    async def take(*_: object, **__: object) -> str:
        await taken.wait()
        return new.ref

    monkeypatch.setattr(pool, "snapshot_vdi", take)
    async with open_disks(pool) as opened, open_cache() as kept:
        system = Filesystem(names, inventory=INVENTORY, disks=opened, cache=kept)
        async with trio.open_nursery() as readers:
            readers.start_soon(opened.use, opened.open(LIVE, size=LIVE.size))
            await trio.testing.wait_all_tasks_blocked()
            found: list[frozenset[str]] = []
            for _ in range(2):
                found.append(system.temporary(later))
                system.switch(names, later)
            taken.set()

    assert found == [{new.ref}] * 2


def test_a_failure_is_told_again_after_a_new_open(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    for _ in range(3):
        failures.report("read", "a.raw", errors.ExportError("no"))
    assert len(caplog.records) == 1

    failures.forget("b.raw")
    failures.report("read", "a.raw", errors.ExportError("no"))
    assert len(caplog.records) == 1

    failures.forget("a.raw")
    failures.report("read", "a.raw", errors.ExportError("no"))
    assert len(caplog.records) == 2
