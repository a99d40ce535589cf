"""The fault points are all that there are, by what the kernel sees; and what goes on after one."""

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cbtfs import units

from .killmatrix import JOURNALED
from .killrun import open_runner
from .smallvm import Small, running_small

pytestmark = pytest.mark.timeout(180)

SIZE = 64 * units.MiB
INTERVAL = 8 * units.MiB
REQUEST = units.MiB
IN_FLIGHT = 4 * REQUEST
"""Bytes on their way at once: two requests on each of two connections."""

HEAD = 4 * units.MiB
"""Bytes that the pool reads to tell which blocks hold data, at most."""

SETTINGS = {"FLUSH_BYTES": INTERVAL, "REQUEST": REQUEST}

IN_PYTHON = {
    "pwrite64": "pwrite",
    "renameat": "rename",
    "mkdirat": "mkdir",
    "symlinkat": "symlink",
    "linkat": "link",
    "unlinkat": "unlink",
    "openat": "open",
    "rmdir": "unlink",
}
"""What os calls it; its ``rmdir`` is a kind of ``unlinkat``, too."""

ONLY_LOOKS = {
    "access", "close", "dup", "dup3", "faccessat", "faccessat2", "fadvise64", "fcntl", "flock",
    "fstat", "fstatfs", "getdents64", "lseek", "mmap", "newfstatat", "poll", "ppoll", "pread64",
    "read", "readlink", "readlinkat", "stat", "statfs", "statx",
}  # fmt: skip
"""Calls that change nothing, or only who may."""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    with running_small(tmp_path / "pool", sizes=[SIZE]) as made:
        guest = made.pool.open_guest("v", "xvda")
        for start in range(0, SIZE, 16 * units.MiB):
            guest.pwrite(bytes(range(1, 129)) * (16 * units.MiB // 128), start)
        guest.shutdown()
        yield made


def sync(small: Small, store: Path) -> list[str]:
    return ["--config", str(small.pool.config), "--store", str(store), "--json", "sync", "--vm=v"]


def bytes_served(small: Small) -> int:
    counters = msgspec.convert(small.pool.control("counters"), dict[str, object])
    return sum(int(str(count)) for name, count in counters.items() if name.startswith("read."))


def changes_seen(log: Path, root: Path) -> Counter[str]:
    """Return how often strace saw the kernel change what is below ``root``, by kind of call."""
    seen: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call is None or str(root) not in line or call[1] in ONLY_LOOKS:
            continue
        if call[1] == "openat" and not re.search("O_CREAT|O_TMPFILE", line):
            continue
        if call[1] == "ioctl" and "FICLONE" not in line:
            continue
        seen[IN_PYTHON.get(call[1], call[1])] += 1
    return seen


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], check=False).returncode == 0


@pytest.mark.skipif(not strace_works(), reason="needs strace, and leave to trace processes")
def test_the_kernel_sees_no_change_that_is_no_point(
    small: Small, reflink_dir: Path, tmp_path: Path
) -> None:
    store = reflink_dir / "store"
    log = tmp_path / "strace"
    counted: Counter[str] = Counter()
    strace = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=%file,%desc"]
    with open_runner(tmp_path / "run", SETTINGS, under=strace) as runner:
        for mode in ("full", "killed", "resumed", "incremental"):
            if mode == "killed":
                shutil.rmtree(store)
            at = 2 if mode == "killed" else 0
            done = runner.run(sync(small, store), root=store, mode="kill", at=at, match=JOURNALED)
            assert done.killed == (mode == "killed"), done.err
            counted += done.kinds()
    counted["unlink"] += counted.pop("rmdir", 0)
    counted["rename"] -= 1  # the one in place of which the run was killed

    assert changes_seen(log, store) == counted


def test_a_killed_full_reads_again_only_what_came_after_its_last_entry(
    small: Small, reflink_dir: Path, tmp_path: Path
) -> None:
    store = reflink_dir / "store"
    with open_runner(tmp_path / "run", SETTINGS) as runner:
        for entries in (1, 3, 5):
            killed = runner.run(
                sync(small, store), root=store, mode="kill", at=entries + 1, match=JOURNALED
            )
            assert killed.killed, killed
            (journal,) = store.glob("*/.partial-*/journal.json")
            offset = json.loads(journal.read_text())["disks"]["xvda"]["offset"]
            assert offset >= entries * INTERVAL - IN_FLIGHT

            small.pool.control("reset-counters")
            done = runner.run(sync(small, store), root=store)

            assert done.status == 0, done.err
            assert SIZE - offset <= bytes_served(small) <= SIZE - offset + HEAD
            shutil.rmtree(store)
