"""Owned: the tag that says which objects of a pool cbtfs made, and may therefore destroy.

It stands in the object's ``other_config``, which xapi copies to snapshots and clones; so the tag
names the object it was meant for, and a copy of it on another object counts for nothing.

A disk or a VM that a restore makes has the tag from the beginning, when nobody knows its uuid yet:
it is then bound to the name of the run, which the object bears until it is finished.

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

RESTORING = "restoring"
"""Role in the sentence by which a VM is kept from starting while its disks are written over."""

BLOCKED = ("start", "start_on")
"""Keys of ``blocked_operations`` that such a VM has. What is blocked is refused with the value as
the reason (xen-api, xapi_vm_lifecycle.ml); a snapshot and a clone of the VM have none of it."""

SAFETY = "cbtfs before restore of "
"""How the name of the snapshot begins that is taken of such a VM before."""

UNFINISHED = ", not finished"
"""How that name ends until the restore is finished."""

_FACTS = '{"self":'
"""How what a program is to know begins, after a sentence for people."""

_RUN_NAME = re.compile(r"cbtfs ([0-9]{8}T[0-9]{6}Z) [0-9a-f]{16}")


class Owned(msgspec.Struct, frozen=True, kw_only=True):
    """The tag on a pool object that cbtfs made, and may therefore destroy.

    Attributes:
        self_uuid: uuid of the tagged object.
        role: ``base`` (kept for the next increment), ``live`` (a mount reads from it), ``made``
            (a user made it through a mount, and it stays until a user removes it), ``restored``
            (a disk or VM that is not whole yet), ``restoring`` or ``task``.
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


class Block(Owned, frozen=True, kw_only=True):
    """What keeps a VM from starting.

    Attributes:
        snapshot: uuid of the snapshot that has the VM's disks as they were before.
        disks: uuids of the disks that may be half written.
    """

    snapshot: str = ""
    disks: tuple[str, ...] = ()


def read_owner(other_config: Mapping[str, str], uuid: str) -> Owned | None:
    """Return the ownership tag of the object with this uuid, or None if it is not ours."""
    owned = _tag_in(other_config)
    return owned if owned is not None and uuid and owned.self_uuid == uuid else None


def read_unfinished(other_config: Mapping[str, str], *, uuid: str, name: str) -> Owned | None:
    """Return the tag of a disk or VM that a restore has not finished, None if it is none."""
    owned = _tag_in(other_config)
    if owned is None or owned.role != RESTORED or not owned.self_uuid:
        return None
    return owned if owned.self_uuid == (name if time_of_run(owned.self_uuid) else uuid) else None


def _tag_in(other_config: Mapping[str, str]) -> Owned | None:
    try:
        return msgspec.json.decode(other_config.get(TAG_OWNER, ""), type=Owned)
    except (ValueError, RecursionError):
        return None


def write_owner(owned: Owned) -> str:
    """Return the value for ``TAG_OWNER`` in the ``other_config`` of the object."""
    return msgspec.json.encode(owned).decode()


def read_block(blocked: Mapping[str, str], uuid: str) -> Block | None:
    """Return what keeps the VM with this uuid from starting, None if it is nothing of ours."""
    found = [_block_in(blocked.get(operation, "")) for operation in BLOCKED]
    ours = [block for block in found if block is not None and uuid and block.self_uuid == uuid]
    return ours[0] if ours else None


def may_start(blocked: Mapping[str, str]) -> bool:
    """Tell whether somebody has let a VM start again that we had blocked."""
    return not all(operation in blocked for operation in BLOCKED)


def read_standing_block(blocked: Mapping[str, str], uuid: str) -> Block | None:
    """Return as ``read_block``, but None if somebody has let the VM start again."""
    return None if may_start(blocked) else read_block(blocked, uuid)


def is_finished(safety_name: str) -> bool:
    """Tell of the snapshot taken before, by its name, whether the restore after it was finished."""
    return safety_name.startswith(SAFETY) and not safety_name.endswith(UNFINISHED)


def is_block(reason: str) -> bool:
    """Tell whether a value of ``blocked_operations`` is a sentence of ours, about whichever VM."""
    return _block_in(reason) is not None


def write_block(sentence: str, block: Block) -> str:
    """Return the value for ``BLOCKED`` in the ``blocked_operations`` of the VM.

    Args:
        sentence: what is told to whoever tries to start it.
        block: who keeps it from that.
    """
    return f"{sentence} {msgspec.json.encode(block).decode()}"


def _block_in(reason: str) -> Block | None:
    _, brace, rest = reason.rpartition(_FACTS)
    try:
        block = msgspec.json.decode(f"{brace}{rest}", type=Block)
    except (ValueError, RecursionError):
        return None
    return block if block.role == RESTORING else None


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
