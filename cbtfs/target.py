"""Target: what a restore point is made of - a VM with its disks, or a disk without VM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import errors, plan as planning, resume
from .catalogue import VMHistory
from .inventory import VDI, VM, Inventory
from .plan import Damaged, VMPlan
from .process import Process
from .resume import Resumption
from .retention import Keep
from .sample import Sample
from .store import Leftover, Store

Target = VM | VDI
"""What a restore point is made of: a VM with its disks, or a disk without VM."""


def key_of(target: Target) -> str:
    """Return the name of the target's directory in the store."""
    return target.uuid if isinstance(target, VM) else f"vdi-{target.uuid}"


@dataclass(frozen=True, slots=True)
class SyncOptions:
    """How to sync.

    Attributes:
        full: copy everything, whatever the pool says has changed.
        exclude_disks: globs of disk names and devices to leave out.
        connections_per_disk: NBD connections; the host serves each of them serially.
        sample: how many of the blocks that the pool calls unchanged are read and compared.
        limit_rate: bytes per second read from the pool, over all disks; 0 for no limit.
        lock_wait: seconds to wait for another run of the same VM to end.
        job: name of the job, which the point remembers.
        keep: what is kept of the VM's points, after a new one was made; None for all.
        keeps: the same of all jobs, by name: whose points the VM has too, those count as well.
    """

    full: bool = False
    exclude_disks: tuple[str, ...] = ()
    connections_per_disk: int = 2
    sample: Sample = field(default_factory=Sample)
    limit_rate: int = 0
    lock_wait: float = 0.0
    job: str = ""
    keep: Keep | None = None
    keeps: Mapping[str, Keep | None] = field(default_factory=dict[str, Keep | None], hash=False)


def plan_one(
    inventory: Inventory,
    store: Store | None,
    target: Target,
    *,
    history: VMHistory | None,
    options: SyncOptions,
) -> VMPlan:
    """Return what to do with the disks of ``target``, given its restore points so far.

    ``store`` is None for one that does not exist yet.
    """
    if store is None:
        return _plan_new(inventory, None, target, history=history, options=options)
    leftovers = [left for left in store.leftovers(key_of(target)) if not _is_alive(left)]
    plan, resumption = decide(
        inventory, store, target, leftovers=leftovers, history=history, options=options
    )
    return resumption.plan if resumption is not None else plan


def decide(
    inventory: Inventory,
    store: Store,
    target: Target,
    *,
    leftovers: Sequence[Leftover],
    history: VMHistory | None,
    options: SyncOptions,
) -> tuple[VMPlan, Resumption | None]:
    """Return what to do with ``target`` in a new restore point, and what to go on with instead."""
    plan = _plan_new(inventory, store, target, history=history, options=options)
    if options.full:
        return plan, None  # from the beginning, as asked
    found = resume.find(
        inventory, target, plan, leftovers, store=store.uuid, history=history,
        damaged=_damaged(store, key_of(target), history),
    )  # fmt: skip
    return plan, found


def _damaged(store: Store | None, key: str, history: VMHistory | None) -> Damaged:
    """Return what tells whether an image of the directory ``key`` was found damaged."""
    times = {point.time for point in history.points} if history is not None else set[str]()

    def damaged(time: str, device: str) -> bool:
        return store is not None and time in times and device in store.damaged(key, time)

    return damaged


def _plan_new(
    inventory: Inventory,
    store: Store | None,
    target: Target,
    *,
    history: VMHistory | None,
    options: SyncOptions,
) -> VMPlan:
    """Return what to do with ``target`` in a new restore point."""
    key = key_of(target)

    damaged = _damaged(store, key, history)
    identity = store.uuid if store is not None else ""
    if isinstance(target, VM):
        return planning.plan_vm(
            inventory,
            target,
            history,
            store=identity,
            full=options.full,
            exclude=options.exclude_disks,
            damaged=damaged,
        )
    return planning.plan_vdi(
        inventory, target, history, store=identity, full=options.full, damaged=damaged
    )


def _is_alive(leftover: Leftover) -> bool:
    """Tell whether the run that made ``leftover`` may still be at it."""
    intent = leftover.intent
    if intent is None:
        return False
    process = Process(
        host=intent.host, boot=intent.boot, pid=intent.pid, starttime=intent.starttime
    )
    return not process.is_dead()


def still_there(inventory: Inventory, target: Target) -> Target:
    """Return ``target`` as it is in ``inventory``.

    Raises:
        NotFound: it is gone.
    """
    known = inventory.vms if isinstance(target, VM) else inventory.vdis
    found = known.get(target.ref)
    if found is None or found.uuid != target.uuid:
        raise errors.NotFound(f"the pool no longer has {target.name!r}; nothing was synced")
    return found
