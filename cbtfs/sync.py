"""Sync: restore points of VMs, one after another - the verb that everything else here exists for.

What happens to one VM, and in which order, is ``vmrun``'s.
"""

from collections.abc import Sequence

from . import errors, target as known
from .inventory import Inventory
from .plan import VMPlan
from .pool import Pool
from .progress import Progress
from .store import Store
from .target import SyncOptions, Target
from .vmrun import Outcome, VMRun

__all__ = ["Outcome", "SyncOptions", "Target", "plan", "run"]


def plan(
    inventory: Inventory, store: Store, targets: Sequence[Target], *, options: SyncOptions
) -> list[VMPlan]:
    """Return what ``run`` would do, without changing anything in pool or store."""
    vms = store.catalogue().vms
    return [
        known.plan_one(inventory, store, t, history=vms.get(known.key_of(t)), options=options)
        for t in targets
    ]


async def run(
    pool: Pool,
    store: Store,
    targets: Sequence[Target],
    *,
    progress: Progress,
    options: SyncOptions,
) -> list[Outcome]:
    """Make a restore point of each target, one after another; a failure stops only its own VM.

    If cancelled, the pool is tidied up (at most ``vmrun.CLEANUP`` seconds) and nothing half-written
    is left in the store, but for the name of a snapshot that the pool may still be taking.
    """
    outcomes: list[Outcome] = []
    hopeless: errors.CbtfsError | None = None
    for target in targets:
        if hopeless is None:
            outcome = await VMRun(pool, store, target, progress, options).run()
        else:
            outcome = Outcome(known.key_of(target), target.name, error=hopeless)
        outcomes.append(outcome)
        if isinstance(outcome.error, errors.AuthenticationFailed | errors.PoolUnreachable):
            hopeless = outcome.error  # another try would only be refused, or wait, again
    return outcomes
