"""A long history of a VM at random, with syncs that are disturbed: every point is right.

``contrib/soak/history`` runs this for as many steps, or as long, as wanted.
"""

import faulthandler
import gc
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from .history_lab import open_lab
from .history_machine import HistoryMachine
from .history_sync import ways

STEPS = int(os.environ.get("CBTFS_STEPS", "2000"))
MINUTES = float(os.environ.get("CBTFS_MINUTES", "0"))
SEED = int(os.environ.get("CBTFS_SEED", "20261122"))

HISTORY = 80
"""Steps of one VM; the next begins anew, with an empty store."""

FEWEST = 20 if MINUTES else 1
"""Histories of one seed in a long run: the first of them are the simplest that there are."""

SETTINGS = settings(
    stateful_step_count=HISTORY,
    database=None,  # the same steps each time, whatever an earlier run found
    deadline=None,  # a step may be a sync
    phases=[Phase.generate, *([Phase.shrink] if os.environ.get("CBTFS_SHRINK") else [])],
    # of the time that it takes to choose steps, and of how much is chosen: both are as they are
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)

pytestmark = pytest.mark.timeout(300 + STEPS + 90 * MINUTES)


def open_files() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def test_every_point_of_a_long_history_is_right(tmp_path: Path, reflink_dir: Path) -> None:
    faulthandler.cancel_dump_traceback_later()  # the whole takes longer than any one wait may
    begun = time.monotonic()
    machine = HistoryMachine
    machine.kills = 2 + STEPS // 400
    with open_lab(tmp_path / "pool", stores=reflink_dir) as lab:
        machine.lab = lab
        before = open_files()
        number = SEED
        while machine.steps < STEPS or time.monotonic() - begun < MINUTES * 60:
            histories = max(FEWEST, -(-(STEPS - machine.steps) // HISTORY))
            print(f"seed {number}: {histories} histories")  # noqa: T201 - shown with -s or a failure
            run_state_machine_as_test(
                seed(number)(machine), settings=settings(SETTINGS, max_examples=histories)
            )
            number += 1
        assert open_files() < before + 40
    print(  # noqa: T201 - shown with -s
        f"{machine.steps} steps, {machine.syncs} syncs in {time.monotonic() - begun:.0f} s",
        *(f"{count:7}  {way}" for way, count in sorted(ways.items())),
        sep="\n",
    )
    assert machine.steps >= STEPS
    if machine.steps >= 1000:  # by then all has happened
        assert {way.split(",")[0].split(" ")[0] for way in ways} >= {
            "full", "incremental", "compare", "resume", "cancel", "break", "kill", "refuse",
        }  # fmt: skip
