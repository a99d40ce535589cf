"""Instant: a live disk as it is at one moment, for whoever reads it.

A disk that some VM has attached is read through a temporary snapshot: xapi tells neither what
changed on such a disk nor exports it. The snapshot is tagged as ours with the role ``live``: if its
maker is killed, the next mount on the same machine removes it, or ``clean``.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from . import errors, process
from .inventory import VDI, Inventory, Owned

log = logging.getLogger(__name__)

ROLE = "live"
"""Role of temporary snapshots in their owner tag."""

SNAPSHOT_LIMIT = 300.0
"""Seconds that a pool gets to take a snapshot: its SR may be busy with others of the same kind."""

DESTROY_LIMIT = 60.0
"""Seconds that a pool gets to destroy one; after that the next mount does it."""


class Pool(Protocol):
    """What is needed of a pool."""

    async def snapshot_vdi(self, vdi_ref: str, *, name: str, owner: Owned) -> str:
        """Snapshot a VDI, tag the snapshot as ours, and return its reference."""
        ...

    async def destroy_vdi(self, vdi_ref: str) -> None:
        """Destroy a snapshot of ours."""
        ...


def owned(role: str) -> Owned:
    """Return the tag that this process puts on what it makes; bound to an object by the pool."""
    me = process.this_process()
    return Owned(
        self_uuid="", role=role, host=me.host, pid=me.pid, boot=me.boot, starttime=me.starttime
    )


async def take(pool: Pool, vdi: VDI) -> str:
    """Return the reference of a new temporary snapshot of ``vdi``.

    If that fails or is cancelled, it is destroyed again as far as the pool answers.

    Raises:
        PoolError: the pool refused, or took too long.
    """
    owner = owned(ROLE)
    name = f"cbtfs: read by process {owner.pid} on {owner.host}"
    with trio.move_on_after(SNAPSHOT_LIMIT):
        return await pool.snapshot_vdi(vdi.ref, name=name, owner=owner)
    raise errors.PoolError(f"the snapshot of VDI {vdi.uuid} took over {SNAPSHOT_LIMIT:.0f} s")


async def destroy(pool: Pool, vdi: VDI, ref: str) -> bool:
    """Destroy ``ref``, the temporary snapshot of ``vdi``; tell whether it is gone.

    That it is not is logged and nothing more: it will be gone after the next mount, or ``clean``.
    """
    try:
        with trio.fail_after(DESTROY_LIMIT):
            await pool.destroy_vdi(ref)
    except (errors.CbtfsError, trio.TooSlowError) as error:
        log.warning("the temporary snapshot of VDI %s stays for now: %s", vdi.uuid, error)
        return False
    return True


def is_attached(inventory: Inventory, vdi: VDI) -> bool:
    """Tell whether somebody has ``vdi`` attached: a VM, or a control domain that reads it."""
    vbds = (inventory.vbds.get(ref) for ref in vdi.vbd_refs)
    return any(vbd is None or vbd.currently_attached for vbd in vbds)


@asynccontextmanager
async def held(pool: Pool, inventory: Inventory, vdi: VDI) -> AsyncGenerator[str]:
    """Yield the reference of what is read instead of the live disk ``vdi``: itself, or a snapshot.

    A snapshot is destroyed on exit, also if that is cancelled. A disk that nobody has attached is
    read itself: nobody can start its VM while it is.

    Raises:
        PoolError: no snapshot of it can be taken.
    """
    if not is_attached(inventory, vdi):
        yield vdi.ref
        return
    ref = await take(pool, vdi)
    try:
        yield ref
    finally:
        with trio.CancelScope(shield=True):
            await destroy(pool, vdi, ref)
