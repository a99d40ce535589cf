"""Removal: how a restore point goes: out of sight by one rename, then file by file.

::

    20261122T020000Z/  ──rename──►  .removed-20261122T020000Z/  ──unlink…──►  nothing

A run that is killed in between leaves a directory that nothing lists; whoever removes next in the
same folder, or ``clean``, finishes its work.
"""

from . import catalogue
from .folder import Folder

_REMOVED = ".removed-"


def hide(vm: Folder, time: str) -> str:
    """Take the point ``time`` out of sight, for good; return the name it has now.

    The caller holds the VM's lock.

    Raises:
        StoreError: it is still there, as it was.
    """
    name = f"{_REMOVED}{time}"
    if vm.exists(name):  # of a killed run, before a point of the same time was made again
        vm.remove_all(name)
    vm.rename(time, name)
    return name


def hidden(vm: Folder) -> list[str]:
    """Return the names of what is out of sight, oldest first."""
    return [
        name
        for name in sorted(vm.names())
        if name.startswith(_REMOVED) and catalogue.is_time(name.removeprefix(_REMOVED))
    ]


def times(vm: Folder) -> tuple[str, ...]:
    """Return the times of the points that are out of sight, oldest first."""
    return tuple(name.removeprefix(_REMOVED) for name in hidden(vm))


def sweep(vm: Folder) -> int:
    """Remove what is out of sight; return how many points that was. The caller holds the lock."""
    names = hidden(vm)
    for name in names:
        vm.remove_all(name)
    return len(names)
