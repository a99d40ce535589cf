"""Pools for the tests of ``exports`` and ``pool``: the simulated one, opened as the verbs do."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager

from cbtfs import pool as pools
from cbtfs.inventory import VDI, VM, Inventory, Owned
from cbtfs.nbd import Timeouts
from cbtfs.pool import Pool, PoolOptions

from .simulated import RunningPool

OWNER = Owned(self_uuid="", role="base", store="store", point="20261122T020000Z")
RUN = "cbtfs 20261122T020000Z 0123456789abcdef"
QUICK = Timeouts(connect=2.0, request=2.0, close=10.0)


@contextmanager
def in_good_order(pool: RunningPool) -> Iterator[RunningPool]:
    """Yield the pool with no fault set, nothing stolen and nothing counted; mend it on exit."""
    pool.stolen()
    pool.control("reset-counters")
    yield pool
    for key in pool.faults():
        pool.set(key, "")
    pool.control("revive-host", "xcp1", "xcp2")


@asynccontextmanager
async def opened(
    simulated: RunningPool, *, per_host: int = 12, timeouts: Timeouts = QUICK
) -> AsyncGenerator[Pool]:
    """Open the simulated pool."""
    options = PoolOptions(
        name="sim",
        url=simulated.url,
        user="root",
        password="simulated",
        ca_file=str(simulated.ca_file),
        connections_per_host=per_host,
        timeouts=timeouts,
    )
    async with pools.open_pool(options) as pool:
        yield pool


def vm_of(inventory: Inventory, name: str) -> VM:
    """Return a live VM by its name."""
    return next(vm for vm in inventory.live_vms() if vm.name == name)


def disk_of(inventory: Inventory, vm: str, device: str = "xvda") -> VDI:
    """Return a disk of a live VM."""
    disks = inventory.disks_of(vm_of(inventory, vm))
    return next(disk.vdi for disk in disks if disk.device == device)


async def snapshot_of(pool: Pool, vm: str = "web1", device: str = "xvda") -> VDI:
    """Return a new snapshot, tagged as ours, of one disk."""
    disk = disk_of(await pool.inventory(), vm, device)
    ref = await pool.snapshot_vdi(disk.ref, name=RUN, owner=OWNER)
    return (await pool.inventory()).vdis[ref]
