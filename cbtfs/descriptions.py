"""Descriptions: the JSON files of a mount, which say what the pool says of itself, a VM, a disk.

That of a disk is made of ``Facts``: two that are equal give the same text, so that of 10,000 disks
only those are described again of which something has changed.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec

from . import catalogue
from .inventory import SR, VDI, VM, Disk, Inventory, read_owner

Facts = tuple[VDI, SR | None, str, tuple[str, ...], tuple[tuple[str, str, str], ...]]
"""A disk, its SR, the uuid of what it was taken of, those of its snapshots that have a file, and
whose it is: uuid, name and device of each."""


def is_shown(vdi: VDI) -> bool:
    """Tell whether ``vdi`` has a file in the mount: it can be read, and is no tool of our own."""
    if not vdi.is_readable:
        return False
    owned = read_owner(vdi.other_config, vdi.uuid)
    return owned is None or owned.role != "live"


def of_pool(inventory: Inventory, shown: Sequence[VDI]) -> bytes:
    """Return what ``pool.json`` says; ``shown`` are the disks that have a file."""
    pool = inventory.pool
    master = inventory.hosts.get(pool.master_ref)
    return _document(
        {
            "uuid": pool.uuid,
            "name": pool.name,
            "master": master.uuid if master else "",
            "nbd": inventory.nbd_purpose,
            "hosts": [
                {"uuid": h.uuid, "name": h.name, "address": h.address, "enabled": h.enabled}
                for h in inventory.hosts.values()
            ],
            "srs": [
                {"uuid": sr.uuid, "name": sr.name, "type": sr.type, "cbt": sr.cbt_capable}
                for sr in inventory.srs.values()
            ],
            "vms": len(inventory.live_vms()),
            "disks": sum(not vdi.is_a_snapshot for vdi in shown),
            "snapshots": sum(vdi.is_a_snapshot for vdi in shown),
        }
    )


def of_vm(
    vm: VM, disks: Sequence[Disk], snapshots: Sequence[VM], names: Mapping[str, str]
) -> bytes:
    """Return what ``vm.json`` says; ``names`` are the folders of the snapshots by uuid."""
    return _document(
        {
            "uuid": vm.uuid,
            "name": vm.name,
            "power_state": vm.power_state,
            "tags": sorted(vm.tags),
            "disks": [
                {"device": d.device, "uuid": d.vdi.uuid, "name": d.vdi.name, "size": d.vdi.size}
                for d in disks
            ],
            "snapshots": [
                {
                    "uuid": snapshot.uuid,
                    "name": snapshot.name,
                    "time": stamp(snapshot.snapshot_time),
                    "folder": names[snapshot.uuid],
                }
                for snapshot in snapshots
            ],
        }
    )


def facts(inventory: Inventory, vdi: VDI) -> Facts:
    """Return all that the description of ``vdi`` is made of."""
    origin = inventory.vdis.get(vdi.snapshot_of) if vdi.is_a_snapshot else None
    vbds = [vbd for vbd in map(inventory.vbds.get, vdi.vbd_refs) if vbd]
    holders = [(inventory.vms.get(vbd.vm_ref), vbd.device) for vbd in vbds]
    return (
        vdi,
        inventory.srs.get(vdi.sr_ref),
        origin.uuid if origin else "",
        tuple(snapshot.uuid for snapshot in inventory.snapshots_of(vdi) if is_shown(snapshot)),
        tuple((vm.uuid, vm.name, device) for vm, device in holders if vm),
    )


def of_vdi(facts: Facts) -> bytes:
    """Return what ``UUID.json`` says."""
    vdi, sr, origin, snapshots, holders = facts
    return _document(
        {
            "uuid": vdi.uuid,
            "name": vdi.name,
            "description": vdi.description,
            "size": vdi.size,
            "used": vdi.used,
            "type": vdi.type,
            "sr": {"uuid": sr.uuid, "name": sr.name, "type": sr.type} if sr else None,
            "cbt_enabled": vdi.cbt_enabled,
            "read_only": vdi.read_only,
            "is_a_snapshot": vdi.is_a_snapshot,
            "snapshot_of": origin,
            "snapshot_time": stamp(vdi.snapshot_time) if vdi.is_a_snapshot else "",
            "snapshots": snapshots,
            "vms": [{"uuid": uuid, "name": name, "device": dev} for uuid, name, dev in holders],
            "tags": sorted(vdi.tags),
        }
    )


def _document(fields: Mapping[str, object]) -> bytes:
    text = json.dumps({"schema": 1, **fields}, ensure_ascii=False)
    return msgspec.json.format(text.encode(errors="replace"), indent=2) + b"\n"


def stamp(when: datetime) -> str:
    """Return a time as names and documents have it."""
    return catalogue.format_time(when)
