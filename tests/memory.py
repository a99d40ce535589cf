"""A pool in memory: disks whose blocks tell where they are from, and a record of what was asked."""

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType

import trio

from cbtfs import errors, inventory, units
from cbtfs.bitmap import ChangeBitmap
from cbtfs.extents import Extent
from cbtfs.inventory import SR, VDI, Inventory, Owned

SNAPSHOT_TIME = datetime(2026, 11, 22, 2, tzinfo=UTC)


def uuid_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def a_disk(number: int, *, size: int = 4 * units.MiB, of: int = 0) -> VDI:
    """A live disk, or a snapshot of the disk ``of``."""
    return VDI(
        ref=f"OpaqueRef:{number}",
        uuid=uuid_of(number),
        name=f"disk {number}",
        sr_ref="OpaqueRef:sr",
        size=size,
        used=size // 2,
        is_a_snapshot=bool(of),
        snapshot_of=f"OpaqueRef:{of}" if of else "",
        snapshot_time=SNAPSHOT_TIME if of else inventory.EPOCH,
    )


def an_inventory(*vdis: VDI) -> Inventory:
    return Inventory(
        pool=inventory.Pool(uuid=uuid_of(0), name="memory"),
        srs={"OpaqueRef:sr": SR(ref="OpaqueRef:sr", uuid=uuid_of(99), name="Local storage")},
        vdis={vdi.ref: vdi for vdi in vdis},
    )


@dataclass
class MemoryExport:
    """An export of bytes that do not change any more."""

    pool: "MemoryPool"
    ref: str

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        self.pool.asked.set()
        await self.pool.before_read(self.ref)
        self.pool.reads[self.ref] += 1
        if self.pool.lost:
            raise errors.ExportLost(self.pool.lost.pop())
        if self.ref in self.pool.broken:
            raise errors.ExportError("the disk is broken")
        data = self.pool.contents[self.ref]
        if offset + len(buffer) > len(data):
            raise errors.ExportError("read past the end")
        buffer[:] = data[offset : offset + len(buffer)]


@dataclass
class MemoryPool:
    """Fits ``disks.Pool``. ``stop`` makes every read hang until ``go``."""

    contents: dict[str, bytearray]
    reads: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    open_now: set[str] = field(default_factory=set)
    most_open: int = 0
    snapshots: dict[str, Owned] = field(default_factory=dict)
    taken: int = 0
    broken: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    refused: str = ""
    stuck: bool = False
    slow: bool = False
    allocation: list[Extent] | None = None
    told: int = 0
    server: trio.Event = field(default_factory=trio.Event)
    asked: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.go()

    def stop(self) -> None:
        self.server = trio.Event()

    def go(self) -> None:
        self.server.set()

    async def before_read(self, ref: str) -> None:
        await self.server.wait()

    @asynccontextmanager
    async def open_export(self, vdi_ref: str) -> AsyncGenerator[MemoryExport, None]:
        await trio.lowlevel.checkpoint()
        if vdi_ref not in self.contents:
            raise errors.PoolError(f"no VDI {vdi_ref}")
        self.opened[vdi_ref] += 1
        self.open_now.add(vdi_ref)
        self.most_open = max(self.most_open, len(self.open_now))
        try:
            yield MemoryExport(self, vdi_ref)
        finally:
            self.open_now.discard(vdi_ref)

    async def snapshot_vdi(self, vdi_ref: str, *, name: str, owner: Owned) -> str:
        await trio.lowlevel.checkpoint()
        if self.slow:
            await trio.sleep_forever()
        if self.refused:
            raise errors.PoolError(self.refused)
        self.taken += 1
        ref = f"{vdi_ref}/snapshot{self.taken}"
        self.contents[ref] = bytearray(self.contents[vdi_ref])
        self.snapshots[ref] = owner
        return ref

    async def allocated(self, vdi_ref: str, *, size: int) -> ChangeBitmap:
        await trio.lowlevel.checkpoint()
        self.told += 1
        if self.allocation is None:
            raise errors.AllocationUnknown("the pool does not tell")
        return ChangeBitmap.of_extents(self.allocation, size=size)

    async def destroy_vdi(self, vdi_ref: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.stuck or vdi_ref in self.open_now:
            raise errors.PoolError("the VDI is in use")
        self.snapshots.pop(vdi_ref, None)
        self.contents.pop(vdi_ref, None)


def filled(size: int, *, salt: int = 0) -> bytearray:
    """Bytes that differ from one 4 KiB block to the next."""
    blocks = (b"%08x%08x" % (salt, n) * 256 for n in range(-(-size // 4096)))
    return bytearray(b"".join(blocks)[:size])


def a_pool(*vdis: VDI) -> MemoryPool:
    return MemoryPool({vdi.ref: filled(vdi.size, salt=n) for n, vdi in enumerate(vdis)})


def left_by(vdi: VDI, owner: Owned) -> VDI:
    """``vdi`` with the tag of ``owner``."""
    tag = inventory.write_owner(owner)
    return replace(vdi, other_config=MappingProxyType({inventory.TAG_OWNER: tag}))
