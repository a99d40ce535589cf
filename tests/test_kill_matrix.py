"""A sync that is killed, or whose disk fails or is full, at any change that it makes in its store.

``contrib/soak/kill-matrix`` tries every point; here it is some of each kind, others each time.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .killmatrix import KINDS, MODES, Kind, Trial, open_trial, try_points

EVERY = int(os.environ.get("CBTFS_KILL_EVERY", "60"))
SEED = int(os.environ.get("CBTFS_SEED", str(time.time_ns())))
CHOSEN_KINDS = os.environ.get("CBTFS_KILL_KINDS", "").split() or KINDS
CHOSEN_MODES = os.environ.get("CBTFS_KILL_MODES", "").split() or list(MODES)

pytestmark = pytest.mark.timeout(300 + 20_000 // EVERY)


@pytest.fixture(scope="module")
def trial(reflink_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    place = reflink_root / "kill-matrix"
    place.mkdir()
    with open_trial(tmp_path_factory.mktemp("kill"), place / "store", seed=SEED) as opened:
        yield opened
    shutil.rmtree(place)


@pytest.mark.parametrize("mode", CHOSEN_MODES)
@pytest.mark.parametrize("kind", CHOSEN_KINDS)
def test_whatever_goes_wrong_nothing_is_lost(trial: Trial, kind: Kind, mode: str) -> None:
    evidence = Path(tempfile.mkdtemp(prefix="cbtfs-kill-matrix-"))

    result = try_points(trial, kind, MODES[mode], every=EVERY, evidence=evidence)

    print(f"{kind}, {mode}, seed {SEED}: {result}")  # noqa: T201 - shown with -s
    assert not result.failures, "\n".join(result.failures)
    assert result.tried
    evidence.rmdir()


def test_a_point_that_may_not_last_is_none(trial: Trial) -> None:
    lasting = f"fsync {trial.store / trial.vm()}\n"
    trace = trial.trace("incremental")
    commit = next(at for at, line in enumerate(trace) if "renameat2" in line)
    earlier = [line for line in trace[:commit] if f"{line}\n".endswith(lasting)]
    trial.prepare("incremental")

    done = trial.sync(mode="eio", at=len(earlier) + 1, match=lasting)

    assert done.status == 1
    assert "cannot create" in done.err
    assert trial.look() == []
    trial.assert_next_sync_is_right()
