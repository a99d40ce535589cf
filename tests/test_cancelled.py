"""``sync.run``, cancelled at any checkpoint: nothing is half-listed, and the next sync is right.

``contrib/soak/cancel-sync`` tries every checkpoint; here it is some of them, others each time.
"""

import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from cbtfs import store as stores, sync as syncs
from cbtfs.inventory import VM
from cbtfs.pool import Pool
from cbtfs.progress import SilentProgress
from cbtfs.stage import INTENT
from cbtfs.store import Store
from cbtfs.sync import Outcome, SyncOptions

from .commands import leftovers
from .killmatrix import KINDS, Kind, Trial, open_trial
from .pools import opened

EVERY = int(os.environ.get("CBTFS_CANCEL_EVERY", "120"))
SEED = int(os.environ.get("CBTFS_SEED", str(time.time_ns())))

BOUND = 30.0
"""Seconds that a run may take from its cancellation to its end, on a slow machine."""

pytestmark = [
    pytest.mark.timeout(300 + 40_000 // EVERY),
    # of a request that is cancelled httpx forgets its own generator, and in a TLS handshake
    # httpcore leaves the socket to the garbage collector
    pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning"),
]


@pytest.fixture(scope="module")
def trial(reflink_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    place = reflink_root / "cancelled"
    place.mkdir()
    with open_trial(tmp_path_factory.mktemp("cancelled"), place / "store", seed=SEED) as made:
        yield made
    shutil.rmtree(place)


class Canceller(trio.abc.Instrument):
    """Counts the steps of ``task`` and of what it started; cancels ``scope`` before the last."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, last: int) -> None:
        self.steps = 0
        self.since = 0.0
        self._task = task
        self._scope = scope
        self._last = last

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self._is_of_run(task):
            return
        self.steps += 1
        if self.steps == self._last:
            self.since = trio.current_time()
            self._scope.cancel()

    def _is_of_run(self, task: trio.lowlevel.Task) -> bool:
        above: trio.lowlevel.Task | None = task
        while above is not None and above is not self._task:
            above = above.parent_nursery.parent_task if above.parent_nursery else None
        return above is not None


@dataclass(frozen=True)
class Ended:
    """How a run ended: ``outcome`` is None if it was cancelled; ``took`` seconds from then on."""

    steps: int
    outcome: Outcome | None
    took: float


async def cancelled(trial: Trial, *, at: int) -> Ended:
    """Sync the VM, and cancel that before step ``at``."""
    async with opened(trial.small.pool) as pool:
        with stores.open_store(trial.store) as store:
            vm = (await pool.inventory()).find_vm("v")
            return await cancelled_run(pool, store, vm, at=at)


async def cancelled_run(pool: Pool, store: Store, vm: VM, *, at: int) -> Ended:
    outcome: Outcome | None = None
    scope = trio.CancelScope()
    canceller = Canceller(trio.lowlevel.current_task(), scope, at)
    trio.lowlevel.add_instrument(canceller)
    with scope:
        (outcome,) = await syncs.run(
            pool, store, [vm], progress=SilentProgress(), options=SyncOptions()
        )
    trio.lowlevel.remove_instrument(canceller)
    took = trio.current_time() - canceller.since if canceller.since else 0.0
    return Ended(canceller.steps, outcome, took)


def assert_nothing_is_between(trial: Trial, *, committed: bool) -> None:
    """Fail if the pool holds what the store does not know of, or the other way round."""
    left = leftovers(trial.small.pool)
    partials = list(trial.store.glob("*/.partial*"))
    assert (left.dom0_vbds, left.tasks) == ([], []), left
    assert len(partials) <= 1
    if committed:  # what became of the snapshot is its base
        assert not partials
        assert (left.snapshots, left.snapshot_vms) == ([], []), left
    elif partials and (partials[0] / "journal.json").exists():
        assert left.snapshots, "there is nothing to go on with"
    else:  # but for a name, of what the pool may still be asked to take
        assert [path.name for folder in partials for path in folder.iterdir()] in ([], [INTENT])
        assert (left.snapshots, left.snapshot_vms) == ([], []), left


@pytest.mark.parametrize("kind", KINDS)
def test_cancelled_at_any_checkpoint(trial: Trial, kind: Kind) -> None:
    trial.prepare(kind)
    whole = trio.run(partial(cancelled, trial, at=0))
    assert whole.outcome is not None
    assert whole.outcome.point is not None
    trial.look()
    tried = 0

    for at in range(1 + random.Random(SEED).randrange(EVERY), whole.steps, EVERY):
        trial.prepare(kind)
        ended = trio.run(partial(cancelled, trial, at=at))

        where = f"{kind}, step {at}, seed {SEED}: {ended}"
        assert ended.took < BOUND, where
        assert ended.outcome is None or ended.outcome.error is None, where
        new = trial.look()
        assert new == ["complete"] if ended.outcome else new in ([], ["complete"]), where
        assert_nothing_is_between(trial, committed=bool(new))
        trial.assert_next_sync_is_right()
        tried += 1

    print(  # noqa: T201 - shown with -s
        f"{kind}: cancelled at {tried} of {whole.steps} steps, seed {SEED}"
    )
    assert tried
