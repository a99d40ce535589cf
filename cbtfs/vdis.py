"""VDIs: disks that cbtfs makes in a pool, from their creation until they are given away.

A disk is called as its run is, and tagged from its creation until it is whole; only then does it
get its name, and lose the tag. So whatever a killed run leaves is known as ours, and never taken
for a restored disk.

Nothing is destroyed here unless the pool says, asked just before, that it is tagged as such a disk.
"""

import logging
from dataclasses import dataclass

import msgspec
import trio

from . import errors, owner
from .chunks import Chunks
from .owner import RESTORED, TAG_OWNER, Owned
from .upload import Upload
from .xapi import Session

logger = logging.getLogger(__name__)

IN_USE_PAUSES = (0.2, 1, 2, 3, 4, 5, 7, 10, 13)
"""Seconds between the attempts to destroy a disk that a handler still has attached."""

_TAGGING = 30.0


@dataclass(frozen=True, slots=True)
class NewDisk:
    """A disk to be made on an SR.

    Attributes:
        sr_ref: the SR.
        size: in bytes; an SR may round it up.
        run: what it is called until it is whole.
        owner: the tag that it has until then.
    """

    sr_ref: str
    size: int
    run: str
    owner: Owned


class _Record(msgspec.Struct, frozen=True):
    uuid: str
    name_label: str = ""
    virtual_size: int = 0
    is_a_snapshot: bool = False
    other_config: dict[str, str] = {}


class VDIs:
    """What is done with disks that a restore writes.

    Args:
        session: with the pool.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    async def create(self, disk: NewDisk) -> tuple[str, str, int]:
        """Make an empty disk, tagged; return its ref, its uuid, and its size in bytes.

        If that fails or is cancelled, it is destroyed again as far as the pool answers.
        """

        async def undo(ref: str) -> None:
            await self._session.call_async("VDI.destroy", ref)

        # what has no tag is never cleaned up, and its uuid nobody knows before it is there
        unbound = msgspec.structs.replace(disk.owner, self_uuid=disk.run, role=RESTORED)
        nothing: dict[str, object] = {}
        fields: dict[str, object] = {
            "name_label": disk.run,
            "name_description": "",
            "SR": disk.sr_ref,
            "virtual_size": disk.size,
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": {TAG_OWNER: owner.write_owner(unbound)},
            "xenstore_data": nothing,
            "sm_config": nothing,  # beyond 2040 GiB an SR that can makes a QCOW2 by itself
        }
        ref = await self._session.call_async("VDI.create", fields, undo=undo)
        try:
            with trio.fail_after(_TAGGING) as scope:
                scope.shield = True
                record = await self._session.fetch("VDI.get_record", ref, type=_Record)
                tag = msgspec.structs.replace(disk.owner, self_uuid=record.uuid, role=RESTORED)
                # in one step, so that what is ours is never without a tag
                config = {**record.other_config, TAG_OWNER: owner.write_owner(tag)}
                await self._session.call("VDI.set_other_config", ref, config)
        except BaseException as exc:
            with trio.move_on_after(_TAGGING, shield=True):
                await undo(ref)
            if isinstance(exc, trio.TooSlowError):
                raise errors.PoolError("the pool took too long to tag a disk") from exc
            raise
        return ref, record.uuid, record.virtual_size

    async def name(self, ref: str, *, name: str, description: str) -> None:
        """Give a disk that is whole its name."""
        await self._session.call("VDI.set_name_label", ref, name)
        await self._session.call("VDI.set_name_description", ref, description)

    async def release(self, ref: str) -> None:
        """Take a disk's tag away: from now on it is its user's."""
        await self._session.call("VDI.remove_from_other_config", ref, TAG_OWNER)

    async def destroy(self, ref: str) -> None:
        """Destroy a disk that is not whole.

        Raises:
            PoolError: it is not tagged as such, or stays in use.
        """
        for pause in (*IN_USE_PAUSES, None):
            record = await self._record(ref)
            if record is None:
                return
            tag = owner.read_unfinished(
                record.other_config, uuid=record.uuid, name=record.name_label
            )
            if tag is None or record.is_a_snapshot:
                raise errors.PoolError(
                    f"VDI {record.uuid} ({record.name_label!r}) is left alone: it is no disk that"
                    " cbtfs has yet to finish"
                )
            try:
                await self._session.call_async("VDI.destroy", ref)
            except errors.XapiFailure as exc:
                # a handler detaches its disk only after its answer
                if exc.code != "VDI_IN_USE" or pause is None:
                    raise
                await trio.sleep(pause)
            else:
                return

    async def write(self, ref: str, source: Chunks) -> None:
        """Write ``source`` into a disk that is attached nowhere, and leave the rest as it is.

        If cancelled, or when it fails, some of it may have been written.

        Raises:
            ImageDamaged: a block of the image is not what its digest says.
            PoolError: the pool refused, or could not write all of it.
        """
        query = {"vdi": ref, "format": "raw", "chunked": "true"}
        wanted = Upload("/import_raw_vdi", query, source.length, source.parts)
        await self._session.upload(wanted, label="cbtfs: restoring a disk")

    async def _record(self, ref: str) -> _Record | None:
        try:
            return await self._session.fetch("VDI.get_record", ref, type=_Record)
        except errors.XapiFailure as exc:
            if exc.code == "HANDLE_INVALID":
                return None
            raise
