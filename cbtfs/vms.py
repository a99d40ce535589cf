"""VMs: virtual machines that cbtfs makes in a pool, and those whose disks it writes over.

As its disks (see ``vdis``), a new VM is called as its run is, and tagged, from its import until all
of it is there.

A VM whose disks are written over is kept from starting by ``blocked_operations``, where xapi keeps
a reason for each operation that somebody has blocked. The reason says who did it, so that it can be
taken away after a killed run; what somebody else has blocked stays as it is.
"""

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress

import msgspec
import trio

from . import errors, owner, process
from .owner import RESTORED, TAG_OWNER, Block, Owned
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
    power_state: str = ""
    other_config: dict[str, str] = {}
    blocked_operations: dict[str, str] = {}


def busy(block: Block, name: str) -> errors.PoolBusy:
    """Return what to say when another run keeps the VM of this name from starting."""
    is_here = block.host == process.this_process().host
    gone = f", or if that machine is gone for good: cbtfs clean --unblock --host {block.host}"
    return errors.PoolBusy(
        f"disks of VM {name!r} are being restored by process {block.pid} on {block.host}; wait for"
        f" it{'' if is_here else gone}"
    )


class VMs:
    """What is done with VMs that a restore makes.

    Args:
        session: with the pool.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    async def create(self, archive: bytes, *, tag: Owned) -> tuple[str, str]:
        """Make a VM of metadata; return its ref and its uuid.

        Args:
            archive: as ``/import_metadata`` takes it; the VM in it is called as its run is, and has
                a tag that is bound to that name.
            tag: what the VM is tagged with.

        Raises:
            PoolError: the pool refused; what it made nevertheless has that name and tag.
        """

        async def body() -> AsyncGenerator[bytes | memoryview]:
            yield archive

        wanted = Upload("/import_metadata", {}, len(archive), body)
        told = await self._session.upload(wanted, label="cbtfs: restoring a VM")
        refs = _REF.findall(told)
        if len(refs) != 1:
            raise errors.PoolError(f"the pool made {len(refs)} VMs of the metadata of one")
        with trio.move_on_after(_TAGGING, shield=True):
            return refs[0], await self._tag(refs[0], tag)
        raise errors.PoolError("the pool took too long to tag a VM")

    async def _tag(self, ref: str, tag: Owned) -> str:
        """Bind our tag to the uuid of a VM, and return that."""
        record = await self._session.fetch("VM.get_record", ref, type=_Record)
        mine = msgspec.structs.replace(tag, self_uuid=record.uuid, role=RESTORED)
        # in one step, so that what is ours is never without a tag
        config = {**record.other_config, TAG_OWNER: owner.write_owner(mine)}
        await self._session.call("VM.set_other_config", ref, config)
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

    async def destroy(self, run: str, *, made: str) -> str:
        """Destroy the VM that a run made and has not finished; disks stay.

        If it is finished, it stays, and its uuid is returned, else "".

        Args:
            run: the name of the run, which the VM bears until shortly before its end.
            made: reference of the VM; "" if that did not become known.

        Raises:
            PoolError: the pool refused.
        """
        named = await self._session.fetch("VM.get_by_name_label", run, type=list[str])
        for ref in dict.fromkeys((*named, *([made] if made else []))):
            record = await self._session.fetch("VM.get_record", ref, type=_Record)
            tag = owner.read_unfinished(
                record.other_config, uuid=record.uuid, name=record.name_label
            )
            if tag is None or record.is_a_snapshot:
                return record.uuid
            await self._session.call_async("VM.destroy", ref)
        return ""

    # ── one whose disks are written over ─────────────────────────────────────────────────────────

    async def snapshot(
        self, vm_ref: str, name: str, *, late: Callable[[str], None]
    ) -> tuple[str, str]:
        """Snapshot a VM for its user; return the snapshot's ref and uuid.

        If cancelled, and the pool takes it all the same, ``late`` is given its uuid.
        """

        async def uuid_of(ref: str) -> str:
            return await self._session.fetch("VM.get_uuid", ref, type=str)

        async def undo(ref: str) -> None:
            late(await uuid_of(ref))

        uuid = ""
        ref = await self._session.call_async("VM.snapshot", vm_ref, name, undo=undo)
        with trio.CancelScope(shield=True):
            uuid = await uuid_of(ref)
        return ref, uuid

    async def rename(self, ref: str, name: str) -> None:
        """Give a VM or a snapshot another name."""
        await self._session.call("VM.set_name_label", ref, name)

    async def block(
        self, vm_ref: str, sentence: str, block: Block, *, is_dead: Callable[[Owned], bool]
    ) -> None:
        """Keep a halted VM from starting; what somebody else has blocked is blocked already.

        Args:
            vm_ref: the VM.
            sentence: what is told to whoever tries to start it.
            block: who does it.
            is_dead: whether what blocked it before certainly runs no more.

        Raises:
            PoolBusy: another run of cbtfs is at it, or may be.
            PoolError: it is not halted, or the pool refused.
        """
        record = await self._session.fetch("VM.get_record", vm_ref, type=_Record)
        former = owner.read_block(record.blocked_operations, record.uuid)
        if former is not None and not is_dead(former):
            raise busy(former, record.name_label)
        reason = owner.write_block(sentence, block)
        if former is not None:
            # in one step, so that it is never without a block while it is half written
            rest = {k: v for k, v in record.blocked_operations.items() if not owner.is_block(v)}
            mine = {key: reason for key in owner.BLOCKED if key not in rest}
            await self._session.call("VM.set_blocked_operations", vm_ref, rest | mine)
        else:
            await self._add_blocks(vm_ref, record, reason)
        record = await self._session.fetch("VM.get_record", vm_ref, type=_Record)
        if record.power_state != "Halted":
            await self.unblock(vm_ref, is_dead=lambda found: found == block)
            raise errors.PoolError(
                f"VM {record.name_label!r} was started just now; shut it down and run the command"
                f" again: xe vm-shutdown uuid={record.uuid}"
            )

    async def _add_blocks(self, vm_ref: str, record: _Record, reason: str) -> None:
        for key in owner.BLOCKED:
            if key in record.blocked_operations:
                continue
            try:
                await self._session.call("VM.add_to_blocked_operations", vm_ref, key, reason)
            except errors.XapiFailure as exc:
                if exc.code != "MAP_DUPLICATE_KEY":
                    raise
                raise errors.PoolBusy(
                    f"somebody else blocked the start of VM {record.name_label!r} just now; run"
                    " the command again"
                ) from exc

    async def unblock(self, vm_ref: str, *, is_dead: Callable[[Block], bool]) -> None:
        """Let a VM start again, as far as it was a run of cbtfs that ``is_dead`` accepts."""
        record = await self._session.fetch("VM.get_record", vm_ref, type=_Record)
        block = owner.read_block(record.blocked_operations, record.uuid)
        if block is None or not is_dead(block):
            return
        for key in owner.BLOCKED:
            if owner.is_block(record.blocked_operations.get(key, "")):
                await self._session.call("VM.remove_from_blocked_operations", vm_ref, key)
        # until 2024 xapi did not do that by itself, and a start button stayed grey; the user of a
        # backup need not be allowed to ask for it
        with suppress(errors.XapiFailure):
            await self._session.call("VM.update_allowed_operations", vm_ref)
