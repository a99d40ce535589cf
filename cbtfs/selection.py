"""Selection: which VMs are meant by names, globs, tags and storage repositories."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from . import errors, names
from .inventory import VM, Inventory


def select_vms(inventory: Inventory, patterns: Sequence[str]) -> list[VM]:
    """Return the live VMs that any of ``patterns`` selects, by name and uuid.

    A pattern is a uuid, a name or a glob of names, ``tag:GLOB``, or ``sr:GLOB`` (name or uuid of an
    SR that holds one of the VM's disks). If nothing is called so, a name as it is printed will do:
    with characters escaped, or with the digits that tell twins apart.

    Raises:
        NotFound: a plain name or uuid selects nothing, or all patterns together do.
    """
    vms = inventory.live_vms()
    chosen: set[str] = set()
    for pattern in patterns:
        found = {vm.ref for vm in vms if _selects(inventory, pattern, vm)}
        found = found or {vm.ref for vm in vms if pattern in names.spellings(vm.name, vm.uuid)}
        if not found and not is_open(pattern):
            raise errors.NotFound(f"pool {inventory.pool.name!r} has no VM called {pattern!r}")
        chosen |= found
    if not chosen:
        told = ", ".join(map(repr, patterns))
        raise errors.NotFound(f"no VM of pool {inventory.pool.name!r} matches {told or 'nothing'}")
    return [vm for vm in vms if vm.ref in chosen]


def is_open(pattern: str) -> bool:
    """Tell whether it is in order that ``pattern``, of ``select_vms``, selects nothing."""
    return pattern.startswith(("tag:", "sr:")) or any(c in pattern for c in "*?[")


def _selects(inventory: Inventory, pattern: str, vm: VM) -> bool:
    if pattern.startswith("tag:"):
        return any(fnmatchcase(tag, pattern[4:]) for tag in vm.tags)
    if pattern.startswith("sr:"):
        srs = [inventory.srs.get(disk.vdi.sr_ref) for disk in inventory.disks_of(vm)]
        return any(fnmatchcase(n, pattern[3:]) for sr in srs if sr for n in (sr.name, sr.uuid))
    return pattern in {vm.name, vm.uuid} or fnmatchcase(vm.name, pattern)
