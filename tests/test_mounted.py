"""A simulated pool mounted by the real command, and the tools that people use on disks.

Each test asks the pool what it noticed: connections, snapshots, devices plugged in dom0.
"""

import errno
import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cbtfs import background, mountpoint
from tests.simulated import Api, RunningPool, running_pool
from tests.smallvm import running_small

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]

MiB = 1 << 20
SNAPSHOT = "by-vm/web1/snapshots/latest/xvda.raw"
LIVE = "by-vm/web1/xvdb.raw"


def run(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended; its parent, init, may be slow to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@dataclass(frozen=True)
class User:
    """Somebody at a shell, with a pool to mount and a directory to mount it on."""

    pool: RunningPool
    home: Path

    @property
    def top(self) -> Path:
        return self.home / "mnt"

    @property
    def log(self) -> Path:
        return self.home / "logs" / "cbtfs.log"

    def cbtfs(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a command with the configuration of the pool."""
        outside = (background.READY_FD, "NOTIFY_SOCKET")
        environment = {key: value for key, value in os.environ.items() if key not in outside}
        environment |= {"LOGS_DIRECTORY": str(self.log.parent), "XDG_STATE_HOME": str(self.home)}
        command = [sys.executable, "-m", "cbtfs", "--config", self.pool.config, *arguments]
        return subprocess.run(
            list(map(str, command)), env=environment, check=False, capture_output=True, text=True
        )

    @contextmanager
    def mounted(self, options: str = "linger=60s") -> Generator[Path, None, None]:
        """Mount; on exit unmount, and see that nothing of ours is left in the pool."""
        self.top.mkdir(parents=True, exist_ok=True)
        done = self.cbtfs("mount", "-o", options, self.top)
        assert done.returncode == 0, done.stderr
        try:
            yield self.top
        finally:
            done = self.cbtfs("umount", self.top)
        assert done.returncode == 0, done.stderr
        assert mountpoint.find(self.top) is None

    @property
    def pid(self) -> int:
        """The process behind the mount."""
        return int(os.getxattr(self.top, mountpoint.PID_XATTR))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("sim") / "pool") as pool:
        yield pool


@pytest.fixture
def user(pool: RunningPool, tmp_path: Path) -> User:
    pool.control("reset-counters")
    return User(pool, tmp_path)


@pytest.fixture
def top(user: User) -> Iterator[Path]:
    with user.mounted() as top:
        yield top
    assert temporary_snapshots(user.pool) == []
    assert plugged(user.pool) == []


def temporary_snapshots(pool: RunningPool) -> list[str]:
    """Return the uuids of snapshots made by mounts."""
    found = Api(pool).login().records("VDI").values()
    return [str(r["uuid"]) for r in found if '"role":"live"' in str(r["other_config"])]


def plugged(pool: RunningPool) -> list[str]:
    """Return the VBDs of control domains: what xapi-nbd has plugged for somebody."""
    api = Api(pool).login()
    dom0s = {ref for ref, r in api.records("VM").items() if r["is_control_domain"]}
    return [ref for ref, r in api.records("VBD").items() if r["VM"] in dom0s]


def counters(pool: RunningPool) -> dict[str, object]:
    found = pool.control("counters")
    assert isinstance(found, dict)
    return found


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def expected(pool: RunningPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk behind SNAPSHOT, as nbdcopy reads it from the simulator itself."""
    api = Api(pool).login()
    vms = api.records("VM")
    (web1,) = (r for r in vms.values() if r["name_label"] == "web1" and not r["is_a_snapshot"])
    newest = max(
        (str(vms[ref]["snapshot_time"]), str(vms[ref]["uuid"]), ref)
        for ref in map(str, as_list(web1["snapshots"]))
    )[2]
    vbds = [api.records("VBD")[str(ref)] for ref in as_list(vms[newest]["VBDs"])]
    (vdi,) = (str(r["VDI"]) for r in vbds if r["device"] == "xvda" or r["userdevice"] == "0")
    first = as_list(api.call("VDI.get_nbd_info", vdi))[0]
    assert isinstance(first, dict)
    export = str(first["exportname"]).replace("?", "%3F")
    uri = f"nbds://127.0.0.2:{pool.nbd_port}/{export}?tls-certificates={pool.tls_directory()}"
    copy = tmp_path_factory.mktemp("expected") / "xvda.raw"
    subprocess.run(["nbdcopy", uri, copy], check=True)
    return copy


def as_list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


# ── Looking around ───────────────────────────────────────────────────────────────────────────────


def test_looking_at_everything_costs_no_connection_and_no_snapshot(user: User, top: Path) -> None:
    before = counters(user.pool)
    listing = run("ls", "-laR", top)
    run("find", "-L", top, "-size", "+0")
    run("du", "-sL", top)

    assert counters(user.pool) == before
    assert "xvda.raw -> " in listing
    assert plugged(user.pool) == []


def test_hostile_names_stay_inside(top: Path) -> None:
    links = [path for path in top.rglob("*") if path.is_symlink()]

    assert len(links) > 50
    for link in links:
        assert link.resolve().is_relative_to(top.resolve()), link
    assert run("find", top, "-name", "*[[:cntrl:]]*") == ""


# ── Reading snapshots ────────────────────────────────────────────────────────────────────────────


def by_cp(file: Path, work: Path) -> Path:
    run("cp", "--sparse=always", file, work / "copy")
    return work / "copy"


def by_dd(file: Path, work: Path) -> Path:
    run("dd", f"if={file}", f"of={work}/copy", "bs=1M", "iflag=direct", "conv=sparse")
    return work / "copy"


def by_rsync(file: Path, work: Path) -> Path:
    run("rsync", "-cL", "--sparse", file, work / "copy")
    return work / "copy"


def by_tar(file: Path, work: Path) -> Path:
    run("tar", "-C", file.parent, "-h", "-S", "-cf", work / "a.tar", file.name)
    run("tar", "-C", work, "-xf", work / "a.tar")
    return work / file.name


def by_qemu_img(file: Path, work: Path) -> Path:
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", file, work / "copy")
    return work / "copy"


@pytest.mark.parametrize("tool", [by_cp, by_dd, by_rsync, by_tar, by_qemu_img])
def test_every_tool_copies_what_nbdcopy_reads_from_the_pool(
    top: Path, expected: Path, tmp_path: Path, tool: Callable[[Path, Path], Path]
) -> None:
    copy = tool(top / SNAPSHOT, tmp_path)

    assert copy.stat().st_size == expected.stat().st_size
    assert sha256(copy) == sha256(expected)


def test_qemu_img_and_sha256sum_know_it(top: Path, expected: Path) -> None:
    assert "virtual size: 512 MiB" in run("qemu-img", "info", top / SNAPSHOT)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", top / SNAPSHOT, expected)
    assert run("sha256sum", top / SNAPSHOT).split()[0] == sha256(expected)


@contextmanager
def loop_device(file: Path) -> Generator[str, None, None]:
    """Yield a loop device of ``file`` with its partitions."""
    device = run("losetup", "-r", "-P", "-f", "--show", file).strip()
    try:
        if not Path(f"{device}p1").exists():  # a kernel that does not read partition tables
            run("partx", "-a", device)
        yield device
    finally:
        subprocess.run(["partx", "-d", device], check=False, capture_output=True)
        run("losetup", "-d", device)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for loop devices and mount(8)")
def test_its_file_system_can_be_checked_and_mounted(top: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with loop_device(top / SNAPSHOT) as device:
        run("fsck.ext4", "-n", "-f", f"{device}p1")
        run("mount", "-o", "ro,noload", f"{device}p1", inside)
        try:
            run("env", "--chdir", inside, "sha256sum", "--quiet", "-c", "SHA256SUMS")
            assert (inside / "etc").is_dir()
        finally:
            run("umount", inside)


def test_a_snapshot_takes_one_connection_however_often_it_is_opened(user: User, top: Path) -> None:
    for _ in range(5):
        with (top / SNAPSHOT).open("rb") as file:
            file.read(4096)

    found = counters(user.pool)
    assert [v for key, v in found.items() if key.startswith("nbd.exports.")] == [1]
    assert found.get("vdi.snapshots", 0) == 0


# ── Reading live disks ───────────────────────────────────────────────────────────────────────────


class Guest:
    """Writes a rising number first at the start of its disk and then at its end, all the time."""

    def __init__(self, pool: RunningPool, *, size: int) -> None:
        self._disk = pool.open_guest("web1", "xvdb")
        self._end = size - 4096
        self._thread = threading.Thread(target=self._write)
        self._stop = threading.Event()
        self.number = 0

    def __enter__(self) -> "Guest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._disk.shutdown()

    def _write(self) -> None:
        while not self._stop.is_set():
            self.number += 1
            block = self.number.to_bytes(8) * 512
            self._disk.pwrite(block, 0)
            self._disk.pwrite(block, self._end)


def ends(image: Path) -> tuple[int, int]:
    """Return the numbers at the start and at the end of an image."""
    with image.open("rb") as file:
        first = int.from_bytes(file.read(8))
        file.seek(-4096, os.SEEK_END)
        return first, int.from_bytes(file.read(8))


def test_a_copy_of_a_disk_in_use_is_one_instant_and_the_next_copy_a_later_one(
    user: User, top: Path, tmp_path: Path
) -> None:
    copies: list[tuple[int, int]] = []
    with Guest(user.pool, size=(top / LIVE).stat().st_size) as guest:
        for name in ("one", "two"):
            run("cp", "--sparse=always", top / LIVE, tmp_path / name)
            copies.append(ends(tmp_path / name))
        assert guest.number > copies[1][0] + 10  # it went on writing while we copied

    for first, last in copies:
        assert first - last in (0, 1)
    assert copies[1][0] > copies[0][0]


def test_the_temporary_snapshot_is_no_file_of_another_mount(user: User, top: Path) -> None:
    run("cp", "--sparse=always", top / LIVE, user.home / "copy")
    (uuid,) = temporary_snapshots(user.pool)

    with User(user.pool, user.home / "second").mounted() as second:
        assert not (second / f"by-uuid/{uuid}.raw").exists()
        assert temporary_snapshots(user.pool) == [uuid]  # and it was not taken for a leftover


def test_opening_alone_takes_no_snapshot(user: User, top: Path) -> None:
    with (top / LIVE).open("rb"):
        assert temporary_snapshots(user.pool) == []


def test_a_refused_snapshot_is_an_error_with_a_reason_in_the_log(user: User, top: Path) -> None:
    user.pool.set("xapi.fail", "VDI.snapshot:SR_BACKEND_FAILURE_44")
    try:
        with pytest.raises(OSError, match="Input/output"):
            (top / LIVE).read_bytes()
    finally:
        user.pool.set("xapi.fail", "")

    assert "SR_BACKEND_FAILURE_44" in user.log.read_text()


def test_a_cd_that_no_host_exports_is_an_error_with_a_reason(user: User, top: Path) -> None:
    with pytest.raises(OSError, match="Input/output"):
        (top / "by-sr/ISO library/installer.iso.raw").read_bytes()

    assert "cbtfs: error: read " in user.log.read_text()


# ── Going wrong ──────────────────────────────────────────────────────────────────────────────────


def test_a_lost_connection_costs_a_moment(user: User, top: Path, expected: Path) -> None:
    user.pool.set("nbd.drop_after", "20M")
    try:
        with (top / SNAPSHOT).open("rb") as file:
            assert file.read(50 * MiB) == expected.read_bytes()[: 50 * MiB]
    finally:
        user.pool.set("nbd.drop_after", "")


def test_a_restarted_xapi_is_no_matter_to_those_who_read(
    user: User, top: Path, expected: Path
) -> None:
    with (top / SNAPSHOT).open("rb") as file:
        first = file.read(4 * MiB)
        user.pool.control("restart-xapi")
        rest = file.read(16 * MiB)

    assert first + rest == expected.read_bytes()[: 20 * MiB]
    assert len((top / "by-name" / "odd size.raw").read_bytes()) % (2 * MiB) != 0


def test_memory_stays_bounded_however_much_is_read(user: User, top: Path) -> None:
    for _ in range(2):
        run("dd", f"if={top / SNAPSHOT}", "of=/dev/null", "bs=1M", "iflag=direct")

    status = Path(f"/proc/{user.pid}/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert peak < 256 * 1024  # in KiB


def kill(pid: int) -> None:
    """Kill a process and wait until it has ended."""
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([process], [], [])
    os.close(process)


def test_killed_it_leaves_a_dead_mount_and_the_next_one_cleans_up(user: User) -> None:
    with user.mounted() as top:
        (top / LIVE).read_bytes()
        left = temporary_snapshots(user.pool)
        kill(user.pid)
        with pytest.raises(OSError, match="not connected") as caught:
            list(top.iterdir())
        done = user.cbtfs("mount", top)
        assert "is what a dead cbtfs left; run: cbtfs umount" in done.stderr
        assert user.cbtfs("umount", top).returncode == 0
        assert temporary_snapshots(user.pool) == left
        assert user.cbtfs("mount", top).returncode == 0
        assert temporary_snapshots(user.pool) == []

    assert caught.value.errno == errno.ENOTCONN
    assert len(left) == 1


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing", "does not exist; make it with: mkdir -p"),
        ("full", "is not empty and would be hidden"),
        ("full/file", "is not a directory"),
    ],
)
def test_a_mount_that_cannot_be_is_one_sentence(user: User, path: str, said: str) -> None:
    (user.home / "full").mkdir()
    (user.home / "full" / "file").touch()

    done = user.cbtfs("mount", user.home / path)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_pool_that_does_not_answer_ends_the_mount_with_its_status(user: User) -> None:
    user.top.mkdir()
    config = user.home / "cbtfs.toml"
    config.write_text(user.pool.config.read_text().replace(f":{user.pool.https_port}", ":1"))

    done = user.cbtfs("--config", config, "mount", user.top)

    assert done.returncode == 13, done.stderr
    assert mountpoint.find(user.top) is None


def test_only_a_cbtfs_is_unmounted(user: User) -> None:
    done = user.cbtfs("umount", user.home)

    assert done.returncode == 1
    assert "is no cbtfs: nothing is mounted on it" in done.stderr


def test_umount_returns_when_the_process_has_gone(user: User) -> None:
    user.top.mkdir()
    assert user.cbtfs("mount", user.top).returncode == 0
    pid = user.pid
    (user.top / LIVE).read_bytes()

    assert user.cbtfs("umount", user.top).returncode == 0

    assert is_gone(pid)
    assert temporary_snapshots(user.pool) == []


# ── The tree as a source of copies ───────────────────────────────────────────────────────────────


def test_rsync_of_the_tree_moves_nothing_the_second_time(tmp_path: Path) -> None:
    """Over a remount inode numbers stay; there it has to look into what is no snapshot.

    But reading a live disk changes what is told of it: how much it takes in the pool.
    """
    top = tmp_path / "mnt"

    def rsync(*options: str) -> list[str]:
        """Return the images whose contents are moved."""
        words = ["rsync", "-aH", "--sparse", "--itemize-changes", *options]
        lines = run(*words, f"{top}/", tmp_path / "copy").splitlines()
        return [line for line in lines if line.startswith(">f") and line.endswith(".raw")]

    def inodes() -> set[str]:
        return set(run("find", top, "-mindepth", "1", "-printf", "%P %i\n").splitlines())

    with running_small(tmp_path / "pool") as small:
        small.api.call("VM.snapshot", small.vm, "nightly")
        user = User(small.pool, tmp_path)
        with user.mounted():
            assert len(rsync()) == 2 * 3
            assert rsync() == []
            before = inodes()
        with user.mounted():
            assert inodes() ^ before == set()
            assert rsync("--checksum") == []
