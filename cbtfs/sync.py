"""Sync: restore points of VMs, several at a time - the verb that everything else here exists for.

What happens to one VM, and in which order, is ``vmrun``'s.
"""

from collections.abc import Sequence

import trio

from . import errors, names, target as known
from .catalogue import Catalogue, VMHistory
from .inventory import Inventory
from .plan import VMPlan
from .pool import Pool
from .progress import Progress
from .rate import Rate
from .space import Space
from .store import Store
from .target import SyncOptions, Target
from .vmrun import Outcome, Shared, VMRun

__all__ = ["Outcome", "SyncOptions", "Target", "plan", "run"]

VMS_AT_ONCE = 4
"""VMs under way at a time. 20 VMs of two disks, 20 ms a request: one at a time took 33 s, two 20 s,
four 14.5 s, eight 12.5 s; but each has a snapshot, which grows while its disks wait."""

DISKS_AT_ONCE = 8
"""Disks copied at a time, over all VMs. Their memory is bounded by ``copier.BUFFERS``: the whole
process stays below 256 MiB."""


def plan(
    inventory: Inventory,
    store: Store | None,
    targets: Sequence[Target],
    *,
    options: SyncOptions,
    catalogue: Catalogue | None = None,
) -> list[VMPlan]:
    """Return what ``run`` would do, without changing anything in pool or store.

    Args:
        inventory: the pool now.
        store: where to; None for one that does not exist yet, which is not made for this.
        targets: VMs, and disks by themselves.
        options: how ``run`` would be called.
        catalogue: what the store holds, if it has been read already.
    """
    if catalogue is None and store is not None:
        catalogue = store.catalogue()
    vms = catalogue.vms if catalogue is not None else dict[str, VMHistory]()
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
    """Make a restore point of each target, several at a time; a failure stops only its own VM.

    If cancelled, each VM's run leaves what the next one goes on with, or nothing (see ``draft``),
    all of them within ``draft.CLEANUP`` seconds.

    Returns:
        An outcome for each target, in their order; a target named twice has one run.
    """
    chosen = {known.key_of(target): target for target in targets}
    labels = names.safe_names([(key, t.name) for key, t in chosen.items()], reserved=())
    rate = Rate(options.limit_rate) if options.limit_rate else None
    shared = Shared(trio.CapacityLimiter(DISKS_AT_ONCE), Space(store), labels, rate)
    at_once = trio.CapacityLimiter(VMS_AT_ONCE)
    outcomes: dict[str, Outcome] = {}
    hopeless: list[errors.CbtfsError] = []

    async def one(key: str, target: Target) -> None:
        try:
            outcome = await VMRun(pool, store, target, progress, options, shared).run()
            outcomes[key] = outcome
            # another try would only wait again. But a host may be the only one with an old
            # certificate, and with a login that was refused all else fails at once
            if isinstance(outcome.error, errors.PoolUnreachable):
                hopeless.append(outcome.error)
        finally:
            at_once.release_on_behalf_of(key)

    async with trio.open_nursery() as nursery:
        for key, target in chosen.items():
            await at_once.acquire_on_behalf_of(key)
            if hopeless:
                break
            nursery.start_soon(one, key, target)
    for key, target in chosen.items():
        if key not in outcomes:
            outcomes[key] = Outcome(key, target.name, error=hopeless[0], label=labels[key])
    return [outcomes[known.key_of(target)] for target in targets]
