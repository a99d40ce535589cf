"""The budget of connections to each host, kept by real commands that sync 20 VMs with 40 disks."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from . import manyvms
from .commands import Shell
from .manyvms import DEVICES, FILLED, NAMES, STRIDE
from .simulated import RunningPool

pytestmark = pytest.mark.timeout(500)

PER_HOST = 3

SCATTERED = 6
"""Blocks changed; each is a request of its own."""

ONE_BY_ONE = """
import sys
from cbtfs import sync
from cbtfs.__main__ import main
sync.VMS_AT_ONCE = sync.DISKS_AT_ONCE = 1
sys.exit(main())
"""
"""The command, as it were if it copied one disk after another."""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RunningPool]:
    with manyvms.running(tmp_path / "pool", per_host=PER_HOST) as running:
        yield running


@pytest.fixture
def slow(pool: RunningPool) -> RunningPool:
    """The pool, so slow that connections pile up however busy this machine is."""
    pool.set("nbd.attach_delay", "300ms")
    return pool


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[RunningPool]:
    with manyvms.running(tmp_path / "pool", per_host=12) as running:
        yield running


@pytest.fixture
def shell(tmp_path: Path, request: pytest.FixtureRequest) -> Shell:
    name = "roomy" if "roomy" in request.fixturenames else "pool"
    return Shell(request.getfixturevalue(name), tmp_path / "store")


def busiest(pool: RunningPool) -> dict[str, int]:
    """Return the most connections that each host served at a time."""
    counters = pool.control("counters")
    assert isinstance(counters, dict)
    nbd = counters["nbd"]
    assert nbd["turned_away"] == 0
    return {str(host): int(peak) for host, peak in nbd["peak"].items()}


def synced(shell: Shell, names: Sequence[str] = NAMES, *, generation: int = 0) -> list[str]:
    """Return which of the VMs have a restore point with what their guests wrote last."""
    return [
        name
        for name in names
        if all(holds(shell.image(name, d), name, d, generation) for d in DEVICES)
    ]


def holds(image: Path, name: str, device: str, generation: int) -> bool:
    if not image.exists():
        return False
    with image.open("rb") as file:
        for block in range(FILLED):
            expected = manyvms.content(name, device, block, generation=generation)
            file.seek(block * STRIDE)
            if file.read(len(expected)) != expected:
                return False
    return True


def start(shell: Shell, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        shell.command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=shell.env(),
    )


def ended_well(*processes: "subprocess.Popen[str]") -> None:
    """Wait for the processes; each ends with status 0."""
    for process in processes:
        with process:
            _, told = process.communicate()
            assert process.returncode == 0, told


def test_a_sync_uses_the_budget_of_each_host_and_no_more(slow: RunningPool, shell: Shell) -> None:
    shell.run("sync", "--vm", "*")

    assert busiest(slow) == {"xcp1": PER_HOST, "xcp2": PER_HOST}
    assert synced(shell) == list(NAMES)


def test_two_syncs_share_the_budget(slow: RunningPool, shell: Shell) -> None:
    ended_well(start(shell, "sync", "--vm", "a*"), start(shell, "sync", "--vm", "b*"))

    assert busiest(slow) == {"xcp1": PER_HOST, "xcp2": PER_HOST}
    assert synced(shell) == list(NAMES)


@pytest.mark.fuse
def test_a_mount_shares_it_too(slow: RunningPool, shell: Shell, tmp_path: Path) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse")
    top = tmp_path / "mnt"
    top.mkdir()
    shell.run("mount", str(top), "-o", "linger=1s")
    try:
        running = [start(shell, "sync", "--vm", pattern) for pattern in ("a*", "b*")]
        read = [
            holds(top / "by-vm" / name / f"{device}.raw", name, device, 0)
            for name in NAMES[::4]
            for device in DEVICES
        ]
        ended_well(*running)
    finally:
        shell.run("umount", str(top))

    assert all(read)
    assert busiest(slow) == {"xcp1": PER_HOST, "xcp2": PER_HOST}
    assert synced(shell) == list(NAMES)


def test_a_killed_sync_leaves_its_places_to_others(pool: RunningPool, shell: Shell) -> None:
    pool.set("nbd.delay", "10s")
    killed = start(shell, "sync", "--vm", "a*")
    with killed:
        while busiest(pool) != {"xcp1": PER_HOST, "xcp2": PER_HOST}:
            assert killed.poll() is None, killed.communicate()
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    pool.set("nbd.delay", "")

    done = shell.run("sync", "--vm", "b*")

    assert "connections_per_host" not in done.stderr  # nobody was waited for
    assert synced(shell, NAMES[10:]) == list(NAMES[10:])


def test_many_disks_at_once_hide_the_latency_of_each(roomy: RunningPool, shell: Shell) -> None:
    names = NAMES[:4]
    shell.run("sync", "--vm", "a0[0-3]")
    seconds: list[float] = []
    for generation, program in ((1, ["-m", "cbtfs"]), (2, ["-c", ONE_BY_ONE])):
        manyvms.change(roomy, names, blocks=SCATTERED, generation=generation)
        # so long that also on a busy machine it is what the time is spent on
        roomy.set("nbd.delay", "60ms")
        arguments = shell.command("sync", "--vm", "a0[0-3]")[3:]
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, *program, *arguments], check=True, capture_output=True, env=shell.env()
        )
        seconds.append(time.monotonic() - begun)
        roomy.set("nbd.delay", "")
        assert done.stdout.count(b"  inc  ") == len(names) * len(DEVICES)
        assert synced(shell, names, generation=generation) == list(names)

    many, one_by_one = seconds
    assert one_by_one > 3 * many, f"{many:.1f} s, one after another {one_by_one:.1f} s"
