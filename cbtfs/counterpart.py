"""Counterpart: what a pool still has of a disk of a restore point, to compare its image with.

=========  ==================================================================================
snapshot   the point's own snapshot, with its data: all of it must be as in the image
base       that snapshot reduced to its change tracking, and the live disk: what did not change
           since must be as in the image
=========  ==================================================================================

Most points have neither: the pool keeps the metadata of the newest one only. Decided from records
alone; whether the pool can really tell what changed is seen when it is asked.
"""

from dataclasses import dataclass

from .catalogue import DiskPoint, Point, VMHistory
from .inventory import VDI, Inventory


@dataclass(frozen=True, slots=True)
class Counterpart:
    """What there is; ``live`` is None if the snapshot itself can be read."""

    snapshot: VDI
    live: VDI | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """There is nothing to compare with.

    Attributes:
        why: half a sentence.
        is_damage: whether that is damage of the image, seen on the way.
    """

    why: str
    is_damage: bool = False


def find(inventory: Inventory, point: Point, disk: DiskPoint) -> Counterpart | Missing:
    """Return what ``inventory`` has of ``disk``, one of ``point``."""
    if point.pool_uuid and point.pool_uuid != inventory.pool.uuid:
        return Missing(f"it is of another pool, {point.pool_uuid}")
    snapshot = inventory.find_vdi(disk.snapshot_uuid) if disk.snapshot_uuid else None
    if snapshot is None or not snapshot.is_a_snapshot:
        return Missing("the pool no longer has its snapshot, nor what changed since")
    if snapshot.is_readable:
        if snapshot.size != disk.size:
            return Missing(f"its snapshot has {snapshot.size} bytes instead of {disk.size}")
        return Counterpart(snapshot)
    return _based(inventory, snapshot, disk)


def _based(inventory: Inventory, base: VDI, disk: DiskPoint) -> Counterpart | Missing:
    live = inventory.find_vdi(disk.vdi_uuid)
    if live is None or live.is_a_snapshot or not live.is_readable:
        return Missing(f"VDI {disk.vdi_uuid}, which it is of, is not in the pool any more")
    obstacles = {
        "its snapshot belongs to another disk now": base.snapshot_of != live.ref,
        "its snapshot is in another SR than its disk": base.sr_ref != live.sr_ref,
        "change tracking is off": not live.cbt_enabled,
        f"the disk shrank to {live.size} bytes": live.size < disk.size,
    }
    why = next((text for text, applies in obstacles.items() if applies), "")
    return Missing(why) if why else Counterpart(base, live)


def newest(inventory: Inventory, history: VMHistory) -> list[tuple[Point, DiskPoint]]:
    """Return of each disk of a VM the newest point that can be compared, oldest point first.

    A disk of the newest point without any is there too, so that why can be told.
    """
    chosen: dict[str, tuple[Point, DiskPoint]] = {}
    for point in reversed(history.points):
        for disk in point.disks:
            is_there = isinstance(find(inventory, point, disk), Counterpart)
            if disk.vdi_uuid not in chosen and is_there:
                chosen[disk.vdi_uuid] = point, disk
    latest = history.latest
    for disk in latest.disks if latest is not None else ():
        if latest is not None:
            chosen.setdefault(disk.vdi_uuid, (latest, disk))
    return sorted(chosen.values(), key=lambda pair: (pair[0].time, pair[1].device))
