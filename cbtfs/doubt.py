"""Doubt: what it means for older restore points that one of the pool's lists of blocks was wrong.

::

    full     inc      inc      inc      cmp
    A        B        C        D        E      now
             └─── in doubt ────┘

A block that the pool calls unchanged since D is not what D's image holds. The list from D to E may
be wrong, or any one before it, back to the last time when everything was read and compared. E
itself is right: no list was believed in the end.
"""

from collections.abc import Iterable

from .catalogue import DiskPoint, VMHistory
from .plan import Reason


def warnings(disks: Iterable[DiskPoint], history: VMHistory | None) -> list[str]:
    """Return a sentence for each of ``disks`` whose sample did not match.

    Args:
        disks: of a new restore point.
        history: the VM's restore points before it.
    """
    return [_warning(disk, history) for disk in disks if disk.blocks_mismatched]


def _warning(disk: DiskPoint, history: VMHistory | None) -> str:
    count = f"{disk.blocks_mismatched} of {disk.blocks_sampled} sampled blocks"
    by_changes = disk.reason == Reason.CBT_MISMATCH
    if by_changes:
        text = (
            f"{disk.device}: the pool's list of changed blocks was wrong: {count} had changed;"
            " the whole disk was compared and the restore point is right"
        )
    else:
        text = (
            f"{disk.device}: the pool's list of allocated blocks was wrong: {count} held data;"
            " the whole disk was read and the restore point is right"
        )
    since = _since(disk, history, by_changes=by_changes)
    return f"{text}, but points since {since} may not be" if since else text


def _since(disk: DiskPoint, history: VMHistory | None, *, by_changes: bool) -> str:
    """Return the time of the oldest point in doubt, "" if there is none."""
    oldest = ""
    for point in reversed(history.points if history else ()):
        for known in point.disks:
            if known.vdi_uuid != disk.vdi_uuid:
                continue
            if _is_sure(known, by_changes=by_changes):
                return oldest
            oldest = point.time
    return oldest


def _is_sure(disk: DiskPoint, *, by_changes: bool) -> bool:
    """Tell whether no list of the doubted kind was believed when ``disk`` was copied."""
    everything = (disk.resumed or disk.method) != "incremental"
    return everything and (by_changes or disk.allocated < 0)
