"""Verified: when each disk of a restore point was last found whole, as a file in the point.

Only a comparison of every block makes an entry. It says what was true then: files rot afterwards,
and a store that was copied has its records copied, too.
"""

from collections.abc import Mapping
from datetime import datetime

import msgspec

from . import errors
from .folder import Folder

RECORD = "verified.json"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    disks: Mapping[str, str]
    schema: int = 1


def times(point: Folder) -> dict[str, datetime]:
    """Return when each disk was found whole, by device; a disk without a usable time is left out.

    What cannot be read proves nothing, and counts as never.
    """
    found: dict[str, datetime] = {}
    for device, text in _read(point).items():
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            continue
        if time.tzinfo is not None:
            found[device] = time
    return found


def record(point: Folder, device: str, *, now: str) -> None:
    """Note that ``device`` is whole; ``now`` is an ISO time, "" if it is not whole any more.

    The caller holds a lock that keeps others from the record.

    Raises:
        StoreError: the record must change and cannot be written.
    """
    disks = dict(_read(point))
    if now:
        disks[device] = now
    elif disks.pop(device, None) is None:
        return
    content = msgspec.json.format(msgspec.json.encode(_Record(disks=disks)))
    point.write(RECORD, content + b"\n")


def _read(point: Folder) -> Mapping[str, str]:
    try:
        if not point.exists(RECORD):
            return {}
        return msgspec.json.decode(point.read(RECORD), type=_Record).disks
    except (errors.StoreError, ValueError, RecursionError):
        return {}
