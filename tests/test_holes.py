"""What a pool leaves out of a disk costs no read, if it can be believed."""

import hashlib
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cbtfs import holes, units
from cbtfs.bitmap import ChangeBitmap
from cbtfs.extents import Extent
from cbtfs.holes import Holes

from .commands import leftovers
from .faulted import bytes_served, counters_of
from .memory import MemoryPool, a_disk, a_pool
from .smallvm import Small, running_small
from .test_mounted import User, run

SIZE = 512 * units.MiB
MiB = units.MiB
REF = "OpaqueRef:1"


class Plain:
    """A snapshot with these bytes, which counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads = 0

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator["Plain"]:
        yield self

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        self.reads += 1
        buffer[:] = self.data[offset : offset + len(buffer)]


def a_teller(*allocated: Extent) -> MemoryPool:
    pool = a_pool(a_disk(1))
    pool.allocation = list(allocated)
    return pool


async def learned(known: Holes, plain: Plain, *, ref: str = REF) -> ChangeBitmap | None:
    return await known.learn(ref, size=len(plain.data), name="a disk", reading=plain.reading())


async def test_what_the_pool_leaves_out_is_looked_at_and_then_believed() -> None:
    plain = Plain(b"x" * MiB + bytes(15 * MiB))
    known = Holes(a_teller(Extent(0, MiB)))

    allocated = await learned(known, plain)

    assert allocated is not None
    assert list(allocated.extents()) == [Extent(0, MiB)]
    assert plain.reads == holes.SAMPLE


async def test_a_pool_is_asked_once_for_each_snapshot() -> None:
    teller, plain = a_teller(), Plain(bytes(4 * MiB))
    known = Holes(teller)

    assert known.known(REF) is None
    first = await learned(known, plain)

    assert await learned(known, plain) is known.known(REF) is first is not None
    assert teller.told == 1


async def test_a_pool_that_cannot_tell_is_asked_once_too() -> None:
    teller, plain = a_pool(a_disk(1)), Plain(bytes(4 * MiB))
    known = Holes(teller)

    assert await learned(known, plain) is None
    assert await learned(known, plain) is None
    assert (teller.told, plain.reads) == (1, 0)


async def test_a_pool_that_leaves_data_out_is_not_believed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = Plain(bytes(8 * MiB) + b"x" * 8 * MiB)

    assert await learned(Holes(a_teller(Extent(0, MiB))), plain) is None
    assert "the pool calls the block at" in caplog.text


@pytest.mark.parametrize("at", [0, 4095, 65535])
async def test_one_byte_is_enough(at: int) -> None:
    data = bytearray(units.CBT_BLOCK * 4)
    data[units.CBT_BLOCK * 3 + at] = 1

    assert await learned(Holes(a_teller()), Plain(bytes(data))) is None


async def test_only_so_much_is_remembered() -> None:
    known, plain = Holes(a_teller(), limit=600), Plain(bytes(4 * MiB))

    for ref in "abc":
        await learned(known, plain, ref=ref)

    assert [known.known(ref) is not None for ref in "abc"] == [False, True, True]


# ── through the kernel ──


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Small, str, str]]:
    """A pool with a snapshot of which every 32nd MiB holds data: its uuid and its digest."""
    with running_small(tmp_path_factory.mktemp("sim") / "pool", sizes=[SIZE]) as small:
        guest, whole, rng = small.pool.open_guest("v", "xvda"), hashlib.sha256(), random.Random(3)
        for at in range(0, SIZE, 32 * MiB):
            data = rng.randbytes(MiB)
            guest.pwrite(data, at)
            whole.update(data)
            whole.update(bytes(31 * MiB))
        guest.shutdown()
        snapshot = small.api.text("VDI.snapshot", small.disk("v 0"), {})
        yield small, small.api.text("VDI.get_uuid", snapshot), whole.hexdigest()


@pytest.mark.fuse
@pytest.mark.timeout(120)
@pytest.mark.parametrize("full", [False, True], ids=["told", "not told"])
def test_a_sparse_disk_is_read_where_it_has_data(
    sparse: tuple[Small, str, str], tmp_path: Path, full: bool
) -> None:
    small, uuid, digest = sparse
    small.pool.set("vhd.full", "*" if full else "")
    user = User(small.pool, tmp_path)
    with user.mounted() as top:
        small.pool.control("reset-counters")

        assert run("sha256sum", top / f"by-uuid/{uuid}.raw").split()[0] == digest

        served = bytes_served(small.pool)
        if full:
            assert SIZE <= served <= 1.05 * SIZE
        else:  # what was read until the pool could tell, what holds data, and the sample
            assert served <= SIZE * 3 // 4
        assert counters_of(small.pool)["rpc.task.create"] == 1
    left = leftovers(small.pool)
    assert (left.dom0_vbds, left.snapshots, left.tasks) == ([], [], [])
