"""A pool as the verbs see it: inventory, snapshots, changed blocks and exports."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from .bitmap import ChangeBitmap
from .inventory import Inventory, Owned
from .nbd import Export, Timeouts


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


class Pool:
    """One connected pool."""

    name: str

    async def inventory(self) -> Inventory:
        """Return the pool's objects, read in a constant number of calls."""
        raise NotImplementedError

    async def nbd_purpose(self) -> str:
        """Return ``nbd``, ``insecure_nbd``, or "" if no network of the pool serves NBD."""
        raise NotImplementedError

    async def check_nbd(self) -> None:
        """Raise PoolError with the remedy if no network of the pool serves NBD."""
        raise NotImplementedError

    async def enable_cbt(self, vdi_ref: str) -> None:
        """Switch changed block tracking on; harmless if it is."""
        raise NotImplementedError

    async def snapshot_vm(self, vm_ref: str, name: str) -> str:
        """Snapshot a VM, its disks one after another, and return the snapshot's ref."""
        raise NotImplementedError

    async def snapshot_vdi(self, vdi_ref: str, *, name: str, owner: Owned) -> str:
        """Snapshot one disk, name and tag the snapshot, and return its ref."""
        raise NotImplementedError

    async def tag(self, class_name: str, ref: str, owner: Owned) -> None:
        """Write our tag on an object (``VM`` or ``VDI``), bound to its uuid."""
        raise NotImplementedError

    async def changed_blocks(self, base_ref: str, snapshot_ref: str, *, size: int) -> ChangeBitmap:
        """Return what was written between two snapshots; ``size`` is the later one's.

        Raises:
            ChangesUnknown: the pool cannot tell; its ``reason`` says why.
        """
        raise NotImplementedError

    def open_export(self, vdi_ref: str) -> AbstractAsyncContextManager[Export]:
        """Connect to a host that exports the VDI; on exit its dom0 VBD is gone."""
        raise NotImplementedError

    async def export_metadata(self, vm_uuid: str) -> bytes:
        """Return the ``ova.xml`` of a VM."""
        raise NotImplementedError

    async def destroy_snapshot_vm(self, vm_ref: str) -> None:
        """Destroy a snapshot VM of ours; its disks stay."""
        raise NotImplementedError

    async def data_destroy(self, vdi_ref: str) -> None:
        """Drop the data of a snapshot of ours, keeping its change tracking metadata."""
        raise NotImplementedError

    async def destroy_vdi(self, vdi_ref: str) -> None:
        """Destroy a snapshot of ours."""
        raise NotImplementedError

    async def destroy_run_leftovers(
        self, vm_ref: str, snapshot_name: str, *, owner: Owned | None = None
    ) -> None:
        """Destroy the untagged snapshot of ``vm_ref`` that a dead run named, with its disks."""
        raise NotImplementedError


@asynccontextmanager
async def open_pool(options: PoolOptions) -> AsyncIterator[Pool]:
    """Log in to a pool and yield it; log out on exit."""
    raise NotImplementedError
    yield Pool()
