"""Which parts of a disk may hold data, as a pool tells it: the head of an export that is cut off.

xapi has no call that tells what is allocated. But it exports a disk as a VHD, which begins with a
table of the blocks that are in it (see ``allocation``); behind the table comes the whole disk, so
we hang up there. For a disk that is no VHD in its storage xapi reads all of it before it sends
the table; that is not waited for.
"""

import logging

import msgspec
import trio

from . import allocation, errors
from .allocation import VHDHead
from .bitmap import ChangeBitmap
from .handlers import Beginning
from .units import KiB
from .xapi import Session

logger = logging.getLogger(__name__)

SILENCE = 60.0
"""Seconds without a byte after which the pool is not waited for."""

LONGEST = 300.0
"""Seconds that all of it may take; the head of a disk of 2 TiB has 4 MiB."""

_PAGE = 64 * KiB
"""Bytes of a page that says what went wrong."""


class _VDI(msgspec.Struct, frozen=True):
    """What decides whether asking is worth it."""

    sm_config: dict[str, str] = {}


async def allocated(session: Session, vdi_ref: str, *, size: int) -> ChangeBitmap:
    """Return a bitmap of the blocks of a snapshot that may hold data; the others read as zeros.

    The pool attaches the disk meanwhile. If cancelled, the pool has been told to give up.

    Args:
        session: with the pool.
        vdi_ref: the snapshot.
        size: its virtual size in bytes.

    Raises:
        AllocationUnknown: the pool cannot tell; the text says why.
        AuthenticationFailed: login or certificate refused.
    """
    if size > allocation.LARGEST:
        raise errors.AllocationUnknown("a disk of more than 2040 GiB cannot be exported as a VHD")
    answer = _Answer(size)
    query = {"vdi": vdi_ref, "format": "vhd"}
    wanted = Beginning("/export_raw_vdi", query, answer.take, SILENCE)
    try:
        await _check_stored_as_vhd(session, vdi_ref)
        with trio.move_on_after(LONGEST) as scope:
            await session.peek(wanted, label="cbtfs: allocated blocks of a disk")
    except (errors.AuthenticationFailed, errors.AllocationUnknown):
        raise
    except errors.PoolError as exc:
        raise errors.AllocationUnknown(
            f"the pool cannot tell which blocks hold data: {exc}"
        ) from exc
    if scope.cancelled_caught and not answer.head.complete:
        raise errors.AllocationUnknown(
            f"the pool took more than {LONGEST:.0f} seconds to tell which blocks hold data"
        )
    return await trio.to_thread.run_sync(
        lambda: ChangeBitmap.of_extents(answer.head.extents(), size=size)
    )


async def _check_stored_as_vhd(session: Session, vdi_ref: str) -> None:
    """Raise AllocationUnknown for a disk that the pool would have to read before it can answer."""
    record = await session.fetch("VDI.get_record", vdi_ref, type=_VDI)
    told = record.sm_config.get("image-format") or record.sm_config.get("type") or "vhd"
    if told in {"raw", "qcow2"}:
        raise errors.AllocationUnknown(
            f"the disk is stored as {told}, of which the pool cannot tell what is allocated"
        )


class _Answer:
    """The body of an export: the head of a VHD, or a page that says why there is none."""

    def __init__(self, size: int) -> None:
        self.head = VHDHead(size=size)
        self._begun = False
        self._page = 0

    def take(self, data: bytes) -> bool:
        """Take the next part; return True once no more is needed.

        A page is taken to its end, so that it is the pool that ends the task, with its reason.

        Raises:
            AllocationUnknown: it is neither.
        """
        if not self._begun:
            self._begun = True
            self._page = int(data.startswith(b"<"))
        if not self._page:
            return self.head.feed(data)
        self._page += len(data)
        return self._page > _PAGE
