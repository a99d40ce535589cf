"""SIGKILL of ``sync`` at random instants: nothing wrong is listed, and the next sync succeeds.

``contrib/soak/kill-sync N`` runs this with N kills and says where they fell.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs import units

from .commands import Shell, guest_content, items, leftovers
from .simulated import RunningPool, running_pool

KILLS = int(os.environ.get("CBTFS_KILLS", "4"))
SEED = int(os.environ.get("CBTFS_SEED", str(time.time_ns())))

REGION = 64 * units.MiB
"""Of each disk, what the guest writes to: the store's file system is small."""

pytestmark = pytest.mark.timeout(60 + 60 * KILLS)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RunningPool]:
    with running_pool(tmp_path / "pool") as running:
        yield running


def write(pool: RunningPool, rng: random.Random) -> None:
    for device in ("xvda", "xvdb"):
        guest = pool.open_guest("web1", device)
        for _ in range(20):
            data = rng.randbytes(rng.choice([512, 4096, 70000 // 512 * 512, 2**20]))
            guest.pwrite(data, rng.randrange((REGION - len(data)) // 512) * 512)
        guest.shutdown()


def killed_after(shell: Shell, delay: float, *arguments: str) -> bool:
    """Run a sync and kill it ``delay`` seconds later; tell whether it was still running."""
    command = shell.command("sync", "--vm", "web1", *arguments)
    with subprocess.Popen(command, env=shell.env(), stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def assert_all_points_are_whole(shell: Shell) -> None:
    if not shell.store.exists():
        return
    for vm in items(shell.json("list"), "vms"):
        for point in items(vm, "points"):
            assert point["state"] == "complete"
            assert [disk["device"] for disk in items(point, "disks")] == ["xvda", "xvdb"]
    shell.run("verify")


def test_killed_at_any_instant(pool: RunningPool, reflink_dir: Path, tmp_path: Path) -> None:
    shell = Shell(pool, reflink_dir / "store")
    rng = random.Random(SEED)
    killed = 0
    begun = time.monotonic()
    shell.sync("web1")
    usual = time.monotonic() - begun

    for number in range(KILLS):
        write(pool, rng)
        arguments = rng.choice([(), ("--full",)])
        delay = rng.uniform(0, usual)
        killed += killed_after(shell, delay, *arguments)
        print(  # noqa: T201 - shown with -s
            f"seed {SEED}, kill {number}: {delay:.3f} s into sync {' '.join(arguments)}"
        )

        assert_all_points_are_whole(shell)
        shell.sync("web1")
        for device in ("xvda", "xvdb"):
            content = guest_content(pool, "web1", device, tmp_path / "guest.raw")
            assert shell.image("web1", device).read_bytes() == content
        left = leftovers(pool)
        assert len(left.bases) == 2
        assert (left.snapshots, left.snapshot_vms, left.dom0_vbds) == ([], [], [])
        assert not list(shell.store.glob("*/.partial*"))
        forget_all_but_latest(shell)

    print(  # noqa: T201 - shown with -s
        f"{killed} of {KILLS} syncs were killed before they ended"
    )
    assert killed > 0
    shell.run("verify")


def forget_all_but_latest(shell: Shell) -> None:
    """Remove old points as a user may, by hand, so that the test fits on a small disk."""
    latest = shell.store / "by-name/web1/latest"
    for point in latest.resolve().parent.iterdir():
        if point.is_dir() and not point.is_symlink() and point.name != latest.resolve().name:
            subprocess.run(["rm", "-r", point], check=True)
