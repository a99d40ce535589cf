"""VMs: virtual machines that cbtfs makes in a pool, from their import until they are given away.

As its disks (see ``vdis``), a VM is called as its run is, and tagged, until all of it is there.
"""

import re
from collections.abc import AsyncGenerator, Callable, Mapping

import msgspec
import trio

from . import errors, owner
from .owner import RESTORED, TAG_OWNER, Owned
from .upload import Upload
from .xapi import Session

_REF = re.compile(r"OpaqueRef:[0-9A-Za-z-]+")
_TAGGING = 30.0


class _VIF(msgspec.Struct, frozen=True):
    MAC: str = ""


class NetworkNames(msgspec.Struct, frozen=True):
    """What a network is known by."""

    uuid: str
    name_label: str = ""
    bridge: str = ""


class _Record(msgspec.Struct, frozen=True):
    uuid: str
    name_label: str = ""
    is_a_snapshot: bool = False
    other_config: dict[str, str] = {}


class VMs:
    """What is done with VMs that a restore makes.

    Args:
        session: with the pool.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    async def create(self, archive: bytes, *, run: str, tag: Owned) -> tuple[str, str]:
        """Make a VM of metadata; return its ref and its uuid.

        Args:
            archive: as ``/import_metadata`` takes it; the VM in it is called ``run``.
            run: the name of a run.
            tag: what the VM is tagged with.

        Raises:
            PoolError: the pool refused; what it made nevertheless has that name.
        """

        async def body() -> AsyncGenerator[bytes | memoryview]:
            yield archive

        wanted = Upload("/import_metadata", {}, len(archive), body)
        told = await self._session.upload(wanted, label="cbtfs: restoring a VM")
        refs = _REF.findall(told)
        if len(refs) != 1:
            raise errors.PoolError(f"the pool made {len(refs)} VMs of the metadata of one")
        with trio.move_on_after(_TAGGING, shield=True):  # what has no tag is never cleaned up
            return refs[0], await self._tag(refs[0], tag)
        raise errors.PoolError("the pool took too long to tag a VM")

    async def _tag(self, ref: str, tag: Owned) -> str:
        """Write our tag on a VM, and return its uuid."""
        record = await self._session.fetch("VM.get_record", ref, type=_Record)
        mine = msgspec.structs.replace(tag, self_uuid=record.uuid, role=RESTORED)
        if TAG_OWNER in record.other_config:  # another VM's, which the point is of
            await self._session.call("VM.remove_from_other_config", ref, TAG_OWNER)
        await self._session.call("VM.add_to_other_config", ref, TAG_OWNER, owner.write_owner(mine))
        return record.uuid

    async def attach(self, vm_ref: str, vdi_ref: str, fields: Mapping[str, object]) -> None:
        """Give a halted VM a disk; ``fields`` are those of ``VBD.create``."""
        record = {**fields, "VM": vm_ref, "VDI": vdi_ref, "empty": False}
        await self._session.call_async("VBD.create", record)

    async def add_card(
        self, vm_ref: str, network_ref: str, mac: str, fields: Mapping[str, object]
    ) -> None:
        """Give a halted VM a network card; with the address "" the pool chooses one."""
        record = {**fields, "VM": vm_ref, "network": network_ref, "MAC": mac}
        await self._session.call_async("VIF.create", record)

    async def networks(self) -> dict[str, NetworkNames]:
        """Return the pool's networks by reference."""
        return await self._session.fetch("network.get_all_records", type=dict[str, NetworkNames])

    async def addresses(self) -> set[str]:
        """Return the addresses of all network cards of VMs, in lower case."""
        cards = await self._session.fetch("VIF.get_all_records", type=dict[str, _VIF])
        return {card.MAC.lower() for card in cards.values()}

    async def finish(self, ref: str, *, name: str) -> None:
        """Give a VM its name, and take its tag away: from now on it is its user's."""
        await self._session.call("VM.set_name_label", ref, name)
        await self._session.call("VM.remove_from_other_config", ref, TAG_OWNER)

    async def snapshot(
        self, vm_ref: str, name: str, *, key: str, value: Callable[[str], str]
    ) -> tuple[str, str]:
        """Snapshot a VM for its user; return the snapshot's ref and uuid.

        Args:
            vm_ref: the VM.
            name: of the snapshot.
            key: what it is marked with in ``other_config``.
            value: what that is, of its uuid.
        """
        ref = await self._session.call_async("VM.snapshot", vm_ref, name)
        uuid = await self._session.fetch("VM.get_uuid", ref, type=str)
        await self.unmark(ref, key)  # the VM may have it, from a snapshot it was reverted to
        await self._session.call("VM.add_to_other_config", ref, key, value(uuid))
        return ref, uuid

    async def unmark(self, ref: str, key: str) -> None:
        """Take ``key`` from the ``other_config`` of a VM, if it is there."""
        await self._session.call("VM.remove_from_other_config", ref, key)

    async def destroy(self, run: str) -> None:
        """Destroy the VM that a run made and has not finished; disks stay.

        Raises:
            PoolError: ``run`` is not the name of a run, or the pool refused.
        """
        if not owner.time_of_run(run):
            raise errors.PoolError(f"{run!r} is not the name of a run of cbtfs")
        for ref in await self._session.fetch("VM.get_by_name_label", run, type=list[str]):
            record = await self._session.fetch("VM.get_record", ref, type=_Record)
            if record.name_label == run and not record.is_a_snapshot:
                await self._session.call_async("VM.destroy", ref)
