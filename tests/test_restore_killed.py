"""Restores into a pool that are killed or interrupted: see ``killpool`` for what must hold then.

``contrib/soak/kill-restore-pool`` does it at every point.
"""

import os
import time
from collections.abc import Iterator

import pytest

from . import killpool
from .killmatrix import Result
from .killpool import Kind, Point, Trial

EVERY = int(os.environ.get("CBTFS_KILL_EVERY", "0"))
"""Each of so many points; 0: one of each call that is worth it."""

SEED = int(os.environ.get("CBTFS_SEED", str(time.time_ns())))

pytestmark = pytest.mark.timeout(300 + 20_000 // EVERY if EVERY else 120)

UPLOAD = "upload sent"

CHOSEN: dict[Kind, tuple[str, ...]] = {
    "in place": (UPLOAD,),
    "new VM": ("Async.VDI.create answered", "VDI.remove_from_other_config"),
}
"""Calls before which, or after whose answer, a kill leaves most to be done."""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    with killpool.open_trial(tmp_path_factory.mktemp("killed"), seed=SEED) as opened:
        yield opened


def points(trial: Trial, kind: Kind, chosen: tuple[str, ...]) -> list[Point]:
    """Return the points to try: each EVERY-th, or one of each that is chosen."""
    if EVERY:
        numbers = range(trial.rng.randrange(EVERY) + 1, len(trial.trace(kind)) + 1, EVERY)
        return [Point(at) for at in numbers]
    return [
        Point(trial.rng.randrange(3) + 1 if call == UPLOAD else 1, f" call {call}\n")
        for call in chosen
    ]


def assert_all_tried(result: Result) -> None:
    assert not result.failures, "\n".join(result.failures)
    assert EVERY or "after the end" not in result.tried


@pytest.mark.parametrize("kind", killpool.KINDS)
def test_a_killed_one_is_finished_or_cleaned_away(trial: Trial, kind: Kind) -> None:
    result = killpool.try_points(trial, kind, points(trial, kind, CHOSEN[kind]), how="kill")

    print(f"SIGKILL, {kind}: {result}; seed {SEED}")  # noqa: T201 - with -s
    assert_all_tried(result)


# one in place is interrupted in test_restore_pool, too
@pytest.mark.parametrize("kind", killpool.KINDS if EVERY else ("new VM",))
def test_an_interrupted_one_tidies_up_or_says_how_to_go_on(trial: Trial, kind: Kind) -> None:
    result = killpool.try_points(trial, kind, points(trial, kind, (UPLOAD,)), how="int")

    print(f"SIGINT, {kind}: {result}; seed {SEED}")  # noqa: T201 - with -s
    assert_all_tried(result)
