"""Owned: the tag that says which objects of a pool cbtfs made, and may therefore destroy.

It stands in the object's ``other_config``, which xapi copies to snapshots and clones; so the tag
names the object it was meant for, and a copy of it on another object counts for nothing.

A task has it as its description, which ``task.create`` takes: to write a task's ``other_config``
needs a higher role than a backup's user has (xen-api, datamodel.ml), and tasks are never copied.
"""

import re
from collections.abc import Mapping

import msgspec

TAG_OWNER = "cbtfs:owner"
"""Key in ``other_config`` of whatever cbtfs made in the pool."""

RESTORED = "restored"
"""Role of a disk that a restore has not finished."""

TASK = "task"
"""Role in the description of a task."""

_RUN_NAME = re.compile(r"cbtfs ([0-9]{8}T[0-9]{6}Z) [0-9a-f]{16}")


class Owned(msgspec.Struct, frozen=True, kw_only=True):
    """The tag on a pool object that cbtfs made, and may therefore destroy.

    Attributes:
        self_uuid: uuid of the tagged object.
        role: ``base`` (kept for the next increment), ``live`` (a mount reads from it), ``made``
            (a user made it through a mount, and it stays until a user removes it), ``restored``
            (a disk that is not whole yet) or ``task``.
        store: uuid of the store it is the base of; "" for the others.
        vm: name of the directory there whose points it belongs to; "" for the others. A disk can be
            in the points of two VMs, or of a VM and of its own, and each has its own base.
        point: time of the restore point it belongs to.
        host: name of the machine that made it.
        pid: process that made it, with ``starttime`` and ``boot`` to tell it from a later one.
        boot: that machine's boot id.
        starttime: when the process began, in clock ticks since boot.
    """

    self_uuid: str = msgspec.field(name="self")
    role: str
    store: str = ""
    vm: str = ""
    point: str = ""
    host: str = ""
    pid: int = 0
    boot: str = ""
    starttime: int = 0


def read_owner(other_config: Mapping[str, str], uuid: str) -> Owned | None:
    """Return the ownership tag of the object with this uuid, or None if it is not ours."""
    try:
        owned = msgspec.json.decode(other_config.get(TAG_OWNER, ""), type=Owned)
    except (ValueError, RecursionError):
        return None
    return owned if uuid and owned.self_uuid == uuid else None


def write_owner(owned: Owned) -> str:
    """Return the value for ``TAG_OWNER`` in the ``other_config`` of the object."""
    return msgspec.json.encode(owned).decode()


def read_task(description: str) -> Owned | None:
    """Return who made the task with this description, or None if it is not ours."""
    try:
        owned = msgspec.json.decode(description, type=Owned)
    except (ValueError, RecursionError):
        return None
    return owned if owned.role == TASK else None


def run_name(time: str, run: str) -> str:
    """Return what a run calls its snapshot in the pool: ``cbtfs TIME RUN``, RUN 16 hex digits."""
    return f"cbtfs {time} {run}"


def time_of_run(name: str) -> str:
    """Return the TIME in a name that ``run_name`` made, "" if it is none."""
    match = _RUN_NAME.fullmatch(name)
    return match[1] if match else ""
