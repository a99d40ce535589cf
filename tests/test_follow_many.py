"""A pool of 10,000 disks, with a thousand snapshots a minute, is followed without falling behind.

``contrib/soak/follow`` makes more of them, and prints how long each took to show.
"""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.simulated import Api, RunningPool, running_pool
from tests.test_mounted import User

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(0)]

SNAPSHOTS = int(os.environ.get("CBTFS_FOLLOW_SNAPSHOTS", "100"))
INTERVAL = 60 / 1000
THREADS = 4
SOON = 60.0
"""Seconds until a snapshot must have shown: five are promised, but the machine may be busy."""


class Maker:
    """Takes snapshots at a steady pace; ``made`` has when each was ready, by uuid."""

    def __init__(self, pool: RunningPool, vdis: Sequence[str]) -> None:
        self.made: dict[str, float] = {}
        self._pool = pool
        self._begun = time.monotonic()
        due = [(vdi, number * INTERVAL) for number, vdi in enumerate(vdis)]
        self._threads = [
            threading.Thread(target=self._make, args=(due[n::THREADS],)) for n in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_at_work(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _make(self, due: Sequence[tuple[str, float]]) -> None:
        api = Api(self._pool).login()
        for vdi, after in due:
            time.sleep(max(0.0, self._begun + after - time.monotonic()))
            snapshot = api.text("VDI.snapshot", vdi, {})
            self.made[api.text("VDI.get_uuid", snapshot)] = time.monotonic()


def peak(pid: int) -> int:
    """Return the most memory that a process ever had, in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def watch(top: Path, maker: Maker) -> list[float]:
    """Return after how many seconds each of the snapshots showed."""
    shown: dict[str, float] = {}
    while maker.is_at_work or len(shown) < len(maker.made):
        made = maker.made.copy()
        for uuid in made.keys() - shown.keys():
            waited = time.monotonic() - made[uuid]
            if (top / f"by-uuid/{uuid}.raw").exists():
                shown[uuid] = waited
            assert waited < SOON, f"{len(shown)} of {len(made)} show"
        time.sleep(0.1)
    return sorted(shown.values())


def test_a_thousand_snapshots_a_minute_are_followed(tmp_path: Path) -> None:
    with running_pool(tmp_path / "pool", "large") as pool:
        user = User(pool, tmp_path)
        disks = list(Api(pool).login().records("VDI"))[:SNAPSHOTS]
        with user.mounted() as top:
            took = watch(top, Maker(pool, disks))
            memory = peak(user.pid)

    sys.stdout.write(
        f"{len(took)} snapshots: half of them show after {took[len(took) // 2]:.1f} s, all after "
        f"{took[-1]:.1f} s; {memory >> 10} MiB at the most\n"
    )
    assert len(took) == SNAPSHOTS
    assert memory < 256 << 10
