"""A pool as the verbs see it: inventory, snapshots, changed blocks and exports.

Rules of this file:

1. Nothing is destroyed unless the pool says, asked just before, that it is a snapshot and carries
   our tag bound to its own uuid; or, for what a killed run had no time to tag, that it bears the
   name which that run wrote down before it asked for the snapshot.
2. Whatever may wait for another operation of the pool runs as a task there.
3. What is gone already counts as destroyed.
"""

import io
import logging
import tarfile
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field

import msgspec
import trio

from . import errors, inventory, tasks, vhdexport, xapi
from .bitmap import ChangeBitmap
from .events import Feed
from .exports import Exports
from .fresh import Fresh
from .inventory import TAG_OWNER, Inventory, Owned
from .nbd import Export, Timeouts
from .owner import read_unfinished, time_of_run
from .vdis import VDIs
from .vms import VMs
from .xapi import Session

logger = logging.getLogger(__name__)

IN_USE_PAUSES = (1, 2, 3, 4, 5, 7, 10, 13, 14, 15, 16)
"""Seconds between the attempts at a disk that is in use: a minute and a half. Dom0 lets go of it
within seconds, but not while the storage is busy; Xen Orchestra waits for 50 s."""
IN_USE_TOLD = 10.0
"""Seconds after which the waiting is told of."""

_NAMING_LIMIT = 30.0

_UNKNOWN = {
    # code of xapi or of SM (sm, drivers/XE_SR_ERRORCODES.xml) → our reason
    "SR_BACKEND_FAILURE_459": "cbt-mismatch",
    "SR_BACKEND_FAILURE_460": "base-lost",
    "HANDLE_INVALID": "base-lost",
    "VDI_MISSING": "base-lost",
    "INTERNAL_ERROR": "base-lost",  # the two are in different SRs
    "VDI_INCOMPATIBLE_TYPE": "base-lost",
    "VDI_NO_CBT_METADATA": "cbt-off",
    "SR_OPERATION_NOT_SUPPORTED": "cbt-unsupported",
    "VDI_IN_USE": "cbt-mismatch",
}


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """How to reach a pool; ``state_dir`` keeps what was learned about its hosts ("" = nothing)."""

    name: str
    url: str
    user: str
    password: str = field(repr=False)
    ca_file: str = ""
    fingerprints: tuple[str, ...] = ()
    connections_per_host: int = 12
    state_dir: str = ""
    timeouts: Timeouts = field(default_factory=Timeouts)


class _Snapshot(msgspec.Struct, frozen=True):
    """What decides whether a VM or VDI is ours to destroy."""

    uuid: str
    name_label: str = ""
    is_a_snapshot: bool = False
    snapshot_of: str = ""
    other_config: dict[str, str] = {}
    VBDs: tuple[str, ...] = ()


class _Vbd(msgspec.Struct, frozen=True):
    VM: str = ""
    VDI: str = ""
    type: str = ""
    mode: str = ""
    currently_attached: bool = False


class Pool:
    """One connected pool.

    Attributes:
        name: of the pool in the configuration.
        disks: what is done with disks that a restore makes or writes.
        vms: what is done with VMs that a restore makes.
    """

    def __init__(self, session: Session, *, options: PoolOptions) -> None:
        self.name = options.name
        self._session = session
        self._exports = Exports(
            session, per_host=options.connections_per_host, timeouts=options.timeouts
        )
        self.disks = VDIs(session)
        self.vms = VMs(session)
        self._inventory = Fresh(self._read_inventory)
        self._latest: Callable[[], Inventory | None] = lambda: None  # kept by whoever needs it

    def __repr__(self) -> str:
        return f"<Pool {self.name} {self._session!r}>"

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    async def inventory(self) -> Inventory:
        """Return the pool's objects, read in a constant number of calls that begin after this one.

        Who asks at the same time shares them.
        """
        return await self._inventory.get()

    async def _read_inventory(self) -> Inventory:
        tables = await self._session.tables(inventory.CLASSES)
        found = await trio.to_thread.run_sync(_parsed, tables, self._latest())
        self._latest = weakref.ref(found)
        return found

    def feed(self) -> Feed:
        """Return the events of the pool from now on; the first batch has all its objects."""
        return Feed(self._session)

    async def nbd_purpose(self) -> str:
        """Return ``nbd``, ``insecure_nbd``, or "" if no network of the pool serves NBD."""
        return await self._exports.purpose()

    async def check_nbd(self) -> None:
        """Raise PoolError with the remedy if no network of the pool serves NBD."""
        await self._exports.check()

    async def changed_blocks(self, base_ref: str, snapshot_ref: str, *, size: int) -> ChangeBitmap:
        """Return what was written between two snapshots; ``size`` is the later one's, in bytes.

        To be called before the later one is opened over NBD: xapi refuses it while that is.

        Raises:
            ChangesUnknown: the pool cannot tell; its ``reason`` says why.
        """
        method = "VDI.list_changed_blocks"
        try:
            text = await self._while_in_use(method, base_ref, snapshot_ref, busy=snapshot_ref)
        except errors.XapiFailure as exc:
            reason = _UNKNOWN.get(exc.code)
            if reason is None and exc.code.startswith("SR_BACKEND_FAILURE"):
                reason = "base-lost"
            if reason is None:
                raise
            raise errors.ChangesUnknown(
                f"the pool cannot tell which blocks changed: {exc}", reason=reason
            ) from exc
        return await trio.to_thread.run_sync(lambda: ChangeBitmap.from_base64(text, size=size))

    async def allocated(self, vdi_ref: str, *, size: int) -> ChangeBitmap:
        """Return which blocks of a snapshot may hold data; ``size`` is its own, in bytes.

        The pool attaches the snapshot meanwhile, so it is to be called before that is opened over
        NBD. Takes a few seconds, and five minutes at most.

        Raises:
            AllocationUnknown: the pool cannot tell; the text says why.
            AuthenticationFailed: login or certificate refused.
        """
        return await vhdexport.allocated(self._session, vdi_ref, size=size)

    def open_export(self, vdi_ref: str) -> AbstractAsyncContextManager[Export]:
        """Connect to a host that exports the VDI; on exit its dom0 VBD is gone.

        Raises:
            AuthenticationFailed: a host did not prove who it is; it was told nothing.
            ExportLost: no host let us connect, although several attempts were made.
            ExportError: a host refused.
            PoolError: no host exports the disk; the text says what to do.
        """
        return self._exports.open(vdi_ref)

    async def export_metadata(self, vm_uuid: str) -> bytes:
        """Return the ``ova.xml`` of a VM, from which xapi can make its records again."""
        data = await self._session.export_metadata(vm_uuid)
        try:
            # plain, all there and no link, as xapi makes it: anything else may fill the memory
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                member = archive.getmember("ova.xml")
                is_plain = member.isfile() and 0 <= member.size <= len(data)
                file = archive.extractfile(member) if is_plain else None
                if file is not None:
                    return file.read()
        except (tarfile.TarError, KeyError, OverflowError) as exc:
            raise errors.PoolError(f"the exported metadata of VM {vm_uuid} has no ova.xml") from exc
        raise errors.PoolError(f"the exported metadata of VM {vm_uuid} has no ova.xml")

    # ── making ───────────────────────────────────────────────────────────────────────────────────

    async def enable_cbt(self, vdi_ref: str) -> None:
        """Switch changed block tracking on; harmless if it is."""
        await self._session.call_async("VDI.enable_cbt", vdi_ref)

    async def snapshot_vm(self, vm_ref: str, name: str) -> str:
        """Snapshot a VM, its disks one after another, and return the snapshot's ref.

        If cancelled, a snapshot of that name may exist, or appear when the pool gets to it.
        """
        return await self._session.call_async("VM.snapshot", vm_ref, name)

    async def snapshot_vdi(self, vdi_ref: str, *, name: str, owner: Owned) -> str:
        """Snapshot one disk, name and tag the snapshot, and return its ref.

        If that fails or is cancelled, the snapshot is destroyed again as far as the pool answers.
        """

        async def undo(ref: str) -> None:
            await self._session.call_async("VDI.destroy", ref)

        ref = await self._session.call_async("VDI.snapshot", vdi_ref, {}, undo=undo)
        async with self._named_or_undone(ref, undo):
            await self.tag("VDI", ref, owner)
            await self._session.call("VDI.set_name_label", ref, name)
        return ref

    @asynccontextmanager
    async def _named_or_undone(
        self, ref: str, undo: Callable[[str], Awaitable[None]]
    ) -> AsyncGenerator[None]:
        """Do not let the body, which tags ``ref``, be interrupted; if it fails, undo that."""
        try:
            # what has no tag is never cleaned up
            with trio.fail_after(_NAMING_LIMIT) as scope:
                scope.shield = True
                yield
        except BaseException as exc:
            with trio.move_on_after(_NAMING_LIMIT, shield=True), suppress(errors.CbtfsError):
                await undo(ref)
            if isinstance(exc, trio.TooSlowError):
                raise errors.PoolError("the pool took too long to tag a snapshot") from exc
            raise

    async def make_snapshot(self, vm_ref: str, name: str, *, owner: Owned) -> tuple[str, list[str]]:
        """Snapshot a VM, tag the snapshot and its disks, and return its ref and theirs.

        If that fails or is cancelled, they are destroyed again as far as the pool answers.
        """

        async def undo(ref: str) -> None:
            disks = await self._snapshot_disks(ref)
            await self._session.call_async("VM.destroy", ref)
            for vdi_ref in disks:
                await self._session.call_async("VDI.destroy", vdi_ref)

        ref = await self._session.call_async("VM.snapshot", vm_ref, name, undo=undo)
        async with self._named_or_undone(ref, undo):
            await self.tag("VM", ref, owner)
            disks = await self._snapshot_disks(ref)
            for vdi_ref in disks:
                await self.tag("VDI", vdi_ref, owner)
        return ref, disks

    async def remove_snapshot(self, vm_ref: str) -> None:
        """Destroy a snapshot VM of ours with its disks, as far as they are ours.

        Raises:
            PoolError: it is not ours, or a disk of it stays in use.
        """
        if not await self._ours("VM", vm_ref):
            return
        disks = await self._snapshot_disks(vm_ref)
        await self.destroy_snapshot_vm(vm_ref)
        for vdi_ref in disks:
            await self.destroy_vdi(vdi_ref)

    async def tag(self, class_name: str, ref: str, owner: Owned) -> None:
        """Write our tag on an object (``VM`` or ``VDI``), bound to its uuid, in place of another.

        Raises:
            XapiFailure: it is gone, or the user may not.
        """
        record = await self._session.fetch(f"{class_name}.get_record", ref, type=_Snapshot)
        value = inventory.write_owner(msgspec.structs.replace(owner, self_uuid=record.uuid))
        if TAG_OWNER in record.other_config:
            # in one step, so that what is ours is never without a tag
            config = {**record.other_config, TAG_OWNER: value}
            await self._session.call(f"{class_name}.set_other_config", ref, config)
        else:
            await self._session.call(f"{class_name}.add_to_other_config", ref, TAG_OWNER, value)

    # ── destroying ───────────────────────────────────────────────────────────────────────────────

    async def destroy_snapshot_vm(self, vm_ref: str) -> None:
        """Destroy a snapshot VM of ours; its disks stay.

        Raises:
            PoolError: it is not ours.
        """
        if await self._ours("VM", vm_ref):
            await self._session.call_async("VM.destroy", vm_ref)

    async def data_destroy(self, vdi_ref: str) -> None:
        """Drop the data of a snapshot of ours, keeping its change tracking metadata.

        Its VM must be destroyed and its exports closed before: xapi waits for its VBDs to vanish.

        Raises:
            PoolError: it is not ours, or stays in use.
        """
        if await self._ours("VDI", vdi_ref):
            await self._while_in_use("VDI.data_destroy", vdi_ref, busy=vdi_ref)

    async def destroy_vdi(self, vdi_ref: str) -> None:
        """Destroy a snapshot of ours, data and change tracking metadata.

        Raises:
            PoolError: it is not ours, or stays in use.
        """
        if await self._ours("VDI", vdi_ref):
            await self._while_in_use("VDI.destroy", vdi_ref, busy=vdi_ref)

    async def destroy_unfinished_vm(self, vm_ref: str) -> None:
        """Destroy a VM that a restore made and has not finished; its disks stay.

        Raises:
            PoolError: it is not ours, it is finished, or the pool refused.
        """
        if await self._is_unfinished("VM", vm_ref):
            await self._session.call_async("VM.destroy", vm_ref)

    async def destroy_unfinished_disk(self, vdi_ref: str) -> None:
        """Destroy a disk that a restore made and has not finished.

        Raises:
            PoolError: it is not ours, it is finished, or it stays in use.
        """
        if await self._is_unfinished("VDI", vdi_ref):
            await self._while_in_use("VDI.destroy", vdi_ref, busy=vdi_ref)

    async def release_disk(self, vdi_ref: str) -> None:
        """Take the tag from a disk that a restore made, and that is whole and a user's VM's.

        Raises:
            PoolError: it is not ours.
        """
        if await self._is_unfinished("VDI", vdi_ref):
            await self.disks.release(vdi_ref)

    async def _is_unfinished(self, class_name: str, ref: str) -> bool:
        """Tell whether there is such a VM or disk still.

        Raises:
            PoolError: it is not ours, or it is finished.
        """
        record = await self._record(class_name, ref)
        if record is None:
            return False
        owner = read_unfinished(record.other_config, uuid=record.uuid, name=record.name_label)
        if owner is None or record.is_a_snapshot:
            raise errors.PoolError(
                f"{class_name} {record.uuid} ({record.name_label!r}) is left alone: it is none that"
                " cbtfs has yet to finish"
            )
        return True

    async def tasks(self) -> dict[str, tasks.Record]:
        """Return the tasks that cbtfs made for the pool's handlers, by reference."""
        return await tasks.ours(self._session)

    async def remove_task(self, ref: str) -> None:
        """Cancel and destroy a task of ours, which nobody waits for any more.

        Raises:
            PoolError: it is not ours, or the pool refused.
        """
        await tasks.remove(self._session, ref)

    async def detach(self, vbd_ref: str) -> None:
        """Take a snapshot of ours from a control domain, which has it read-only.

        Raises:
            PoolError: it is not ours, or the pool refused.
        """
        try:
            vbd = await self._session.fetch("VBD.get_record", vbd_ref, type=_Vbd)
            if await self._ours("VDI", vbd.VDI):
                await self._detach(vbd_ref)
        except errors.XapiFailure as exc:
            # xapi-nbd does it, too, once it sees that nobody reads any more
            if exc.code not in {"HANDLE_INVALID", "DEVICE_ALREADY_DETACHED"}:
                raise

    async def destroy_run_leftovers(
        self, ref: str, snapshot_name: str, *, owner: Owned | None = None
    ) -> None:
        """Destroy the snapshot of a VM or VDI that a dead run named, tagged or not, with its disks.

        Args:
            ref: the VM or VDI that was to be snapshot.
            snapshot_name: the name that the run had written down, ``cbtfs TIME RUN``.
            owner: tag to give to the disks first, so that they remain known as ours if this, too,
                is interrupted.

        Raises:
            PoolError: the name is not one of ours, or the pool refused.
        """
        if not time_of_run(snapshot_name):
            raise errors.PoolError(f"{snapshot_name!r} is not the name of a snapshot of cbtfs")
        for vm_ref in await self._named("VM", snapshot_name, of=ref):
            disks = await self._snapshot_disks(vm_ref)
            if owner is not None:
                for vdi_ref in disks:
                    await self.tag("VDI", vdi_ref, owner)
            await self._session.call_async("VM.destroy", vm_ref)
            for vdi_ref in disks:
                await self._while_in_use("VDI.destroy", vdi_ref, busy=vdi_ref)
        for vdi_ref in await self._named("VDI", snapshot_name, of=ref):
            await self._while_in_use("VDI.destroy", vdi_ref, busy=vdi_ref)

    async def _named(self, class_name: str, name: str, *, of: str) -> list[str]:
        fetch = self._session.fetch
        found: list[str] = []
        for ref in await fetch(f"{class_name}.get_by_name_label", name, type=list[str]):
            record = await self._record(class_name, ref)
            if (
                record
                and record.is_a_snapshot
                and (record.snapshot_of, record.name_label)
                == (
                    of,
                    name,
                )
            ):
                found.append(ref)
        return found

    async def _snapshot_disks(self, vm_ref: str) -> list[str]:
        """Return the snapshot disks of a snapshot VM that no other VM has.

        A control domain has a disk because somebody reads it, above all the run that made it.
        """
        found: list[str] = []
        for vbd_ref in await self._session.fetch("VM.get_VBDs", vm_ref, type=list[str]):
            vbd = await self._session.fetch("VBD.get_record", vbd_ref, type=_Vbd)
            record = await self._record("VDI", vbd.VDI) if vbd.type == "Disk" else None
            if record and record.is_a_snapshot and vbd_ref in record.VBDs:
                others = set(record.VBDs) - {vbd_ref}
                if all([await self._is_of_dom0(other) for other in others]):
                    found.append(vbd.VDI)
        return found

    async def _is_of_dom0(self, vbd_ref: str) -> bool:
        """Tell whether a control domain has this VBD, or had it until just now."""
        try:
            vm_ref = await self._session.fetch("VBD.get_VM", vbd_ref, type=str)
            return await self._session.fetch("VM.get_is_control_domain", vm_ref, type=bool)
        except errors.XapiFailure as exc:
            if exc.code == "HANDLE_INVALID":
                return True
            raise

    async def _ours(self, class_name: str, ref: str) -> bool:
        """Tell whether the object exists; raise unless it is then a snapshot tagged as ours."""
        record = await self._record(class_name, ref)
        if record is None:
            return False
        owner = inventory.read_owner(record.other_config, record.uuid)
        if owner is None or not record.is_a_snapshot:
            raise errors.PoolError(
                f"{class_name} {record.uuid} ({record.name_label!r}) is left alone: it is not a "
                "snapshot tagged by cbtfs"
            )
        return True

    async def _record(self, class_name: str, ref: str) -> _Snapshot | None:
        try:
            return await self._session.fetch(f"{class_name}.get_record", ref, type=_Snapshot)
        except errors.XapiFailure as exc:
            if exc.code == "HANDLE_INVALID":
                return None
            raise

    async def _while_in_use(self, method: str, *refs: str, busy: str) -> str:
        """Call ``method``, again while xapi says that the VDI ``busy`` is in use."""
        begun = trio.current_time()
        told = False
        for attempt, pause in enumerate((*IN_USE_PAUSES, None)):
            if attempt > 1 and not self._exports.is_open(busy):
                await self._detach_from_dom0(busy)
            try:
                return await self._session.call_async(method, *refs)
            except errors.XapiFailure as exc:
                gone = exc.code == "HANDLE_INVALID" and method != "VDI.list_changed_blocks"
                if gone:
                    return ""
                if exc.code != "VDI_IN_USE" or pause is None:
                    raise
            waited = trio.current_time() - begun
            if waited >= IN_USE_TOLD and not told:
                told = True
                logger.warning(
                    "%s waits: the pool has called the disk in use for %.0f seconds; it is tried "
                    "again for up to a minute and a half", method, waited,
                )  # fmt: skip
            else:
                logger.info("%s waits: the disk is still in use", method)
            await trio.sleep(pause)
        raise AssertionError("unreachable")

    async def _detach_from_dom0(self, vdi_ref: str) -> None:
        """Unplug what xapi-nbd left in a control domain after a read of ours that broke off.

        Only of a snapshot that is ours, and only what is read-only in a control domain.
        """
        record = await self._record("VDI", vdi_ref)
        if record is None or not record.is_a_snapshot:
            return
        if inventory.read_owner(record.other_config, record.uuid) is None:
            return
        for vbd_ref in record.VBDs:
            try:
                await self._detach(vbd_ref)
            except errors.XapiFailure as exc:
                logger.info("a disk stays attached to a control domain: %s", exc)

    async def _detach(self, vbd_ref: str) -> None:
        vbd = await self._session.fetch("VBD.get_record", vbd_ref, type=_Vbd)
        if vbd.mode != "RO":
            return
        if not await self._session.fetch("VM.get_is_control_domain", vbd.VM, type=bool):
            return
        if vbd.currently_attached:
            await self._session.call_async("VBD.unplug", vbd_ref)
        await self._session.call_async("VBD.destroy", vbd_ref)


def _parsed(tables: Mapping[str, bytes], earlier: Inventory | None) -> Inventory:
    found = inventory.parse(tables)
    return found.sharing(earlier) if earlier is not None else found


@asynccontextmanager
async def open_pool(options: PoolOptions) -> AsyncGenerator[Pool]:
    """Log in to a pool and yield it; log out on exit.

    Raises:
        AuthenticationFailed: login or certificate refused.
        PoolUnreachable: nobody answers.
        ConfigError: an option cannot be used.
    """
    async with xapi.open_session(
        options.url,
        credentials=xapi.Credentials(options.user, options.password),
        trust=xapi.Trust(options.ca_file, options.fingerprints),
        state_dir=options.state_dir or None,
    ) as session:
        yield Pool(session, options=options)
