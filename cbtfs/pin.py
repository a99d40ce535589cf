"""Pin: the wish that a restore point stays whatever the retention says, as a file in the point."""

import msgspec

from . import errors
from .folder import Folder

RECORD = "pinned.json"


class _Pin(msgspec.Struct, frozen=True, kw_only=True):
    since: str
    schema: int = 1


def is_pinned(point: Folder) -> bool:
    """Tell whether a point is pinned; whatever the record holds, it says so by being there."""
    try:
        return point.exists(RECORD)
    except errors.StoreError:
        return True


def pin(point: Folder, *, now: str) -> bool:
    """Pin a point; return False if it was. ``now`` is an ISO time.

    The caller holds a lock that keeps others from the record.
    """
    if point.exists(RECORD):
        return False
    point.write(RECORD, msgspec.json.format(msgspec.json.encode(_Pin(since=now))) + b"\n")
    return True


def unpin(point: Folder) -> bool:
    """Let retention decide about a point again; return False if it did already."""
    if not point.exists(RECORD):
        return False
    point.remove(RECORD)
    point.sync()
    return True
