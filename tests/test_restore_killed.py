"""Restores into a pool that are killed or interrupted: see ``killpool`` for what must hold then.

``contrib/soak/kill-restore-pool`` does it at every point.
"""

import os
import time
from collections.abc import Iterator

import pytest

from . import killpool
from .killpool import Kind, Point, Trial

EVERY = int(os.environ.get("CBTFS_KILL_EVERY", "0"))
"""Each of so many points; 0: one of each call that is worth it."""

SEED = int(os.environ.get("CBTFS_SEED", str(time.time_ns())))

pytestmark = pytest.mark.timeout(300 + 20_000 // EVERY if EVERY else 120)

CHOSEN: dict[Kind, tuple[str, ...]] = {
    "in place": ("upload sent",),
    "new VM": ("Async.VDI.create answered", "VDI.remove_from_other_config"),
}
"""After what, or before what, a kill leaves most to be done."""

RARE: dict[Kind, tuple[str, ...]] = {
    "in place": (
        "Async.VM.snapshot answered", "VM.add_to_blocked_operations answered",
        "VM.remove_from_blocked_operations",
    ),
    "new VM": ("Async.VDI.create", "VM.set_other_config", "VM.remove_from_other_config"),
}  # fmt: skip
"""Of these one is tried each time."""

INTERRUPTED = ("upload sent",)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    with killpool.open_trial(tmp_path_factory.mktemp("killed"), seed=SEED) as opened:
        yield opened


def points(trial: Trial, kind: Kind, chosen: tuple[str, ...]) -> list[Point]:
    """Return the points to try: each EVERY-th, or one of each that is chosen."""
    trace = trial.trace(kind)
    if EVERY:
        numbers = range(trial.rng.randrange(EVERY) + 1, len(trace) + 1, EVERY)
        return [Point(at) for at in numbers]
    matches = [f" call {call}\n" for call in chosen]
    there = [[line for line in trace if match in f"{line}\n"] for match in matches]
    assert all(there)
    pairs = zip(matches, there, strict=True)
    return [Point(trial.rng.randrange(len(lines)) + 1, match) for match, lines in pairs]


@pytest.mark.parametrize("kind", killpool.KINDS)
def test_a_killed_one_is_finished_or_cleaned_away(trial: Trial, kind: Kind) -> None:
    chosen = (*CHOSEN[kind], trial.rng.choice(RARE[kind]))

    result = killpool.try_points(trial, kind, points(trial, kind, chosen), how="kill")

    print(f"SIGKILL, {kind}: {result}; seed {SEED}")  # noqa: T201 - with -s
    assert not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("kind", killpool.KINDS)
def test_an_interrupted_one_tidies_up_or_says_how_to_go_on(trial: Trial, kind: Kind) -> None:
    result = killpool.try_points(trial, kind, points(trial, kind, INTERRUPTED), how="int")

    print(f"SIGINT, {kind}: {result}; seed {SEED}")  # noqa: T201 - with -s
    assert not result.failures, "\n".join(result.failures)
