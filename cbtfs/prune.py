"""Prune: the restore points that no rule keeps go, VM by VM.

The verdicts are reached anew under the VM's lock, so that nothing that happened since they were
printed is overlooked: a point that somebody opened, pinned or found damaged, a sync that ended.
"""

from collections.abc import Callable
from contextlib import ExitStack

from . import retention
from .catalogue import VMHistory
from .retention import Keep, Verdict
from .store import Store


def verdicts(store: Store, history: VMHistory, keep: Keep) -> list[Verdict]:
    """Return what becomes of each point of a VM, oldest first; nothing is changed.

    Raises:
        UsageError: the policy keeps nothing.
        StoreError: the store cannot be read.
    """
    return retention.decide(history, keep, store.facts(history))


def prune(
    store: Store,
    vm_uuid: str,
    keep: Keep,
    *,
    locked: bool = False,
    removed: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """Remove the points of a VM that no rule keeps; return what became of each, oldest first.

    Killed at any instant it leaves every point listed whole, or not listed; the next call finishes
    what it began.

    Args:
        store: the store.
        vm_uuid: name of the VM's directory.
        keep: the rules.
        locked: whether the caller holds the VM's lock.
        removed: called with each point that is gone.

    Raises:
        UsageError: the policy keeps nothing.
        StoreLocked: another run has the VM; nothing was removed.
        StoreError: a point cannot be removed; those before it are gone.
    """
    retention.check(keep)
    with ExitStack() as stack:
        if not locked:
            stack.enter_context(store.lock(vm_uuid))
        store.sweep(vm_uuid)
        history = store.history(vm_uuid)
        if history is None:
            return []
        found = verdicts(store, history, keep)
        for index, verdict in enumerate(found):
            if verdict.kept:
                continue
            if not store.remove(vm_uuid, verdict.point.time):
                found[index] = Verdict(verdict.point, ("pinned",))
            elif removed is not None:
                removed(verdict)
    return found
