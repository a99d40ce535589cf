"""New VM: a VM made again of the metadata in a restore point, with disks that were made for it."""

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from . import errors, ovaxml, units
from .folder import Folder
from .newdisks import CLEANUP, Goal, NewDisks, Restored
from .ovaxml import Card, Metadata
from .owner import TAG_OWNER, is_block, write_owner
from .pool import Pool
from .store import Store
from .vms import NetworkNames, VMs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewVM:
    """A VM that was made."""

    uuid: str
    name: str


def read(store: Store, goal: Goal) -> Metadata:
    """Return the VM of a point, taken apart.

    Raises:
        UsageError: only one disk of the point is wanted.
        StoreError: the point has no metadata of a VM, or they are damaged.
    """
    if goal.point.disk is not None:
        raise errors.UsageError(
            f"a VM is made of a whole point: write {goal.label}, or leave --vm-name out"
        )
    missing = f"{goal.label} has no {ovaxml.FILE}, so no VM can be made of it; leave --vm-name out"
    if not goal.disks:
        raise errors.StoreError(missing)
    with store.image_files(goal.point, goal.disks[0]) as files:
        return ovaxml.take_apart(
            _content(files.folder, missing),
            name=goal.run,
            other_config={TAG_OWNER: write_owner(goal.owner)},
            is_ours=is_block,
        )


def _content(folder: Folder, missing: str) -> bytes:
    if not folder.exists(ovaxml.FILE):
        raise errors.StoreError(missing)
    return folder.read(ovaxml.FILE, limit=64 * units.MiB)


@asynccontextmanager
async def made(
    pool: Pool, metadata: Metadata, new: NewDisks, goal: Goal, *, name: str
) -> AsyncGenerator[tuple[NewVM, list[str]]]:
    """Make a VM with new disks; both are given away at the end of the block.

    If the block fails, or is cancelled, it is destroyed again, and the disks are left to ``new``.
    One call makes it the user's, with its disks; what comes after that only tidies up.

    Yields:
        The VM, and sentences about what of it is not as it was.

    Raises:
        PoolError: the pool refused.
    """
    finished, ref = False, ""
    try:
        ref, uuid = await pool.vms.create(metadata.archive, tag=goal.owner)
        problems = await _with_disks(pool.vms, ref, metadata, new.done)
        problems += await _with_cards(pool.vms, ref, metadata.cards)
        yield NewVM(uuid, name), problems
        await new.give_away(to=lambda: pool.vms.finish(ref, name=name))
        finished = True
    finally:
        if not finished:
            await _destroyed(pool.vms, goal.run, ref, new)


async def _destroyed(vms: VMs, run: str, ref: str, new: NewDisks) -> None:
    with trio.move_on_after(CLEANUP, shield=True):
        try:
            finished = await vms.destroy(run, made=ref)
        except errors.CbtfsError as exc:
            new.leave()
            logger.warning("an unfinished VM, %r, stays until cbtfs clean: %s", run, exc)
            return
        if finished:  # the pool has done what it did not answer
            new.leave()
            logger.warning("the VM is made all the same, %s: do not make another", finished)
        return
    new.leave()
    logger.warning("an unfinished VM, %r, stays until cbtfs clean: the pool is silent", run)


async def _with_disks(
    vms: VMs, ref: str, metadata: Metadata, disks: Sequence[Restored]
) -> list[str]:
    restored = {disk.disk.vdi_uuid: disk for disk in disks}
    problems: list[str] = []
    for slot in metadata.slots:
        disk = restored.pop(slot.vdi_uuid, None)
        if disk is not None:
            await vms.attach(ref, disk.written.ref, slot.fields)
        else:
            problems.append(
                f"the new VM lacks disk {slot.fields.get('userdevice')} (VDI {slot.vdi_uuid}):"
                " it is not in the restore point"
            )
    # a VM that was changed during the sync: its metadata were saved after its disks
    problems += [
        f"{disk.disk.device} is VDI {disk.written.uuid} and not in the new VM: the metadata do not"
        " say where; attach it with xe vbd-create"
        for disk in restored.values()
    ]
    return problems


async def _with_cards(vms: VMs, ref: str, cards: Sequence[Card]) -> list[str]:
    networks, taken = await vms.networks(), await vms.addresses()
    problems: list[str] = []
    for card in cards:
        network = _network(networks, card)
        if not network:
            problems.append(
                f"the new VM lacks network card {card.fields.get('device')}: the pool has no network"
                f" {card.network_name!r}"
            )
            continue
        mac = "" if card.mac.lower() in taken else card.mac
        if not mac:
            problems.append(
                f"network card {card.fields.get('device')} has a new address: another VM of the pool"
                f" has {card.mac}"
            )
        await vms.add_card(ref, network, mac, card.fields)
    return problems


def _network(networks: Mapping[str, NetworkNames], card: Card) -> str:
    """Return the network of the same uuid, else name, else bridge, as xapi matches them; or ""."""
    wanted = (
        ("uuid", card.network_uuid),
        ("name_label", card.network_name),
        ("bridge", card.network_bridge),
    )
    for field, value in wanted:
        for ref, network in networks.items():
            if value and getattr(network, field) == value:
                return ref
    return ""
