"""Tests of cbtfs.disks: one instant for all open files, snapshots that never outlive their use."""

import errno
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import NoReturn

import pytest
import trio
import trio.testing

from cbtfs import cache as cache_module, connections, disks as disks_module, errors, process, units
from cbtfs.cache import open_cache
from cbtfs.disks import DiskOptions, Disks, Source, open_disks
from cbtfs.inventory import VDI, Owned
from cbtfs.readahead import Streams
from tests import memory
from tests.memory import MemoryPool

LIVE = memory.a_disk(1)
OTHER = memory.a_disk(3)
SNAPSHOT = memory.a_disk(2, of=1)


@pytest.fixture
def pool() -> MemoryPool:
    return memory.a_pool(LIVE, SNAPSHOT, OTHER)


@pytest.fixture
async def disks(pool: MemoryPool) -> AsyncIterator[Disks]:
    async with open_disks(pool, options=DiskOptions(linger=60.0)) as disks:
        yield disks


async def first_bytes(source: Source) -> bytes:
    async with open_cache() as cache:
        return bytes(await cache.read(source, offset=0, length=8))


def guest_writes(pool: MemoryPool, text: bytes) -> None:
    pool.contents[LIVE.ref][: len(text)] = text


async def test_opening_and_closing_touch_nothing(pool: MemoryPool, disks: Disks) -> None:
    for vdi in (LIVE, SNAPSHOT):
        disks.close(disks.open(vdi, size=vdi.size))
    await trio.testing.wait_all_tasks_blocked()

    assert pool.taken == 0
    assert not pool.opened


async def test_a_snapshot_is_read_as_it_is(pool: MemoryPool, disks: Disks) -> None:
    source = disks.open(SNAPSHOT, size=SNAPSHOT.size)

    assert await first_bytes(source) == pool.contents[SNAPSHOT.ref][:8]
    assert pool.taken == 0
    assert source.key == SNAPSHOT.uuid


async def test_a_live_disk_is_read_at_the_instant_of_the_first_read(
    pool: MemoryPool, disks: Disks
) -> None:
    source = disks.open(LIVE, size=LIVE.size)
    guest_writes(pool, b"at first")
    assert await first_bytes(source) == b"at first"
    guest_writes(pool, b"later on")

    assert await first_bytes(source) == b"at first"
    assert pool.taken == 1


async def test_the_temporary_snapshot_says_whose_it_is(pool: MemoryPool, disks: Disks) -> None:
    await first_bytes(disks.open(LIVE, size=LIVE.size))

    (owner,) = pool.snapshots.values()
    assert owner.role == "live"
    assert process.Process(owner.host, owner.boot, owner.pid, owner.starttime) == (
        process.this_process()
    )


async def test_files_open_at_the_same_time_show_one_instant(pool: MemoryPool, disks: Disks) -> None:
    one = disks.open(LIVE, size=LIVE.size)
    await first_bytes(one)
    guest_writes(pool, b"later on")
    two = disks.open(LIVE, size=LIVE.size)

    assert two is one
    disks.close(one)
    assert await first_bytes(two) != b"later on"


async def test_who_opens_what_nobody_has_open_sees_it_as_it_is_now(
    pool: MemoryPool, disks: Disks
) -> None:
    one = disks.open(LIVE, size=LIVE.size)
    await first_bytes(one)
    disks.close(one)
    guest_writes(pool, b"later on")

    two = disks.open(LIVE, size=LIVE.size)

    assert await first_bytes(two) == b"later on"
    assert two.key != one.key


async def test_no_two_sources_of_a_live_disk_have_one_key(disks: Disks) -> None:
    keys: set[str] = set()
    for _ in range(20):  # of a source that is gone, another may take the place in memory
        source = disks.open(LIVE, size=LIVE.size)
        keys.add(source.key)
        disks.close(source)
        del source

    assert len(keys) == 20


async def test_at_most_one_snapshot_of_a_disk_stays(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    for _ in range(5):
        source = disks.open(LIVE, size=LIVE.size)
        await first_bytes(source)
        disks.close(source)
    await trio.sleep(1)

    assert pool.taken == 5
    assert len(pool.snapshots) == 1


async def test_a_snapshot_lingers_and_then_goes(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    source = disks.open(LIVE, size=LIVE.size)
    await first_bytes(source)
    disks.close(source)

    await trio.sleep(59)
    assert len(pool.snapshots) == 1
    await trio.sleep(2)
    assert pool.snapshots == {}
    assert pool.open_now == set()


async def test_an_open_file_keeps_its_snapshot(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    await first_bytes(disks.open(LIVE, size=LIVE.size))
    await trio.sleep(3600)

    assert len(pool.snapshots) == 1


async def test_opening_without_reading_leaves_what_lingers(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    source = disks.open(LIVE, size=LIVE.size)
    await first_bytes(source)
    disks.close(source)
    disks.close(disks.open(LIVE, size=LIVE.size))

    await trio.sleep(30)
    assert len(pool.snapshots) == 1
    await trio.sleep(31)
    assert pool.snapshots == {}


async def test_the_connection_to_a_snapshot_is_used_again(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    for _ in range(3):
        source = disks.open(SNAPSHOT, size=SNAPSHOT.size)
        await first_bytes(source)
        disks.close(source)
        await trio.sleep(connections.IDLE - 1)
    await trio.sleep(2)

    assert pool.opened == {SNAPSHOT.ref: 1}
    assert pool.open_now == set()
    source = disks.open(SNAPSHOT, size=SNAPSHOT.size)
    await first_bytes(source)
    assert pool.opened == {SNAPSHOT.ref: 2}


async def test_a_lost_connection_is_made_again(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    source = disks.open(LIVE, size=LIVE.size)
    pool.lost += ["gone", "and again"]

    assert await first_bytes(source) == pool.contents[LIVE.ref][:8]
    assert pool.taken == 1
    assert sum(pool.opened.values()) == 3


async def test_a_connection_that_is_lost_each_time_fails(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    pool.lost += ["gone"] * disks_module.TRIES

    with pytest.raises(errors.ExportLost):
        await first_bytes(disks.open(SNAPSHOT, size=SNAPSHOT.size))


@dataclass
class SilentPool(MemoryPool):
    """A pool one disk of which does not answer, and loses its connection when ``silence`` ends."""

    silent: str = ""
    silence: trio.Event = field(default_factory=trio.Event)

    async def before_read(self, ref: str) -> None:
        if ref == self.silent and not self.silence.is_set():
            await self.silence.wait()
            raise errors.ExportLost("the host is gone")


async def test_who_waits_for_a_connection_keeps_nobody_from_using_one(
    nursery: trio.Nursery, autojump_clock: trio.abc.Clock
) -> None:
    one, two = memory.a_disk(1, of=9), memory.a_disk(2, of=9)
    pool = SilentPool(memory.a_pool(one, two).contents)
    chunk = 16 * units.KiB
    chunks = cache_module.Cache(nursery, limit=96 * chunk, chunk=chunk, grain=chunk)

    async def read_through(vdi: VDI) -> None:
        source, streams = opened.open(vdi, size=vdi.size), Streams(vdi.size)
        for at in range(0, vdi.size, chunk):
            data = await chunks.read(source, offset=at, length=chunk, streams=streams)
            assert data == pool.contents[vdi.ref][at : at + chunk]

    async with open_disks(pool, options=DiskOptions(connections=1)) as opened:
        with trio.fail_after(60):
            async with trio.open_nursery() as readers:
                pool.silent = one.ref
                readers.start_soon(read_through, one)
                await trio.sleep(1)
                readers.start_soon(read_through, two)
                await trio.sleep(connections.TURN + 1)
                pool.silence.set()


async def test_who_waited_for_memory_as_the_connection_was_lost_reads_over_another(
    nursery: trio.Nursery, autojump_clock: trio.abc.Clock
) -> None:
    vdi = memory.a_disk(1, of=9)
    pool = SilentPool(memory.a_pool(vdi).contents, silent=vdi.ref)
    chunk = 16 * units.KiB
    chunks = cache_module.Cache(nursery, limit=96 * chunk, chunk=chunk, grain=chunk)

    async def read(source: Source, at: int) -> None:
        data = await chunks.read(source, offset=at, length=chunk)
        assert data == pool.contents[vdi.ref][at : at + chunk]

    async with open_disks(pool, options=DiskOptions(connections=1)) as opened:
        source = opened.open(vdi, size=vdi.size)
        async with trio.open_nursery() as readers:
            for number in range(2 * cache_module.FETCHES):
                readers.start_soon(read, source, number * chunk)
            await trio.sleep(1)
            pool.silence.set()


async def test_a_failure_while_holes_are_learned_does_not_change_the_instant(
    pool: MemoryPool, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    monkeypatch.setattr(disks_module, "WORTH", 8)
    monkeypatch.setattr(disks_module, "REST", 8)

    async def fail(vdi_ref: str, *, size: int) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(pool, "allocated", fail)
    async with open_disks(pool) as disks:
        source = disks.open(LIVE, size=LIVE.size)
        guest_writes(pool, b"at first")
        assert await first_bytes(source) == b"at first"
        await trio.sleep(1)
        guest_writes(pool, b"later on")

        assert await first_bytes(source) == b"at first"
    assert pool.snapshots == {}


async def test_a_refused_snapshot_fails_the_read_and_the_next_read_tries_again(
    pool: MemoryPool, disks: Disks
) -> None:
    source = disks.open(LIVE, size=LIVE.size)
    pool.refused = "the SR is full"
    with pytest.raises(errors.PoolError, match="the SR is full"):
        await first_bytes(source)
    pool.refused = ""

    assert await first_bytes(source) == pool.contents[LIVE.ref][:8]


async def test_a_snapshot_that_takes_for_ever_is_given_up(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    pool.slow = True

    with pytest.raises(errors.PoolError, match="took over 300 s"):
        await first_bytes(disks.open(LIVE, size=LIVE.size))


async def test_the_end_does_not_wait_for_ever(
    pool: MemoryPool, autojump_clock: trio.abc.Clock
) -> None:
    async with open_disks(pool) as disks:
        pool.slow = True
        with trio.move_on_after(1):
            await first_bytes(disks.open(LIVE, size=LIVE.size))
        began = trio.current_time()

    assert trio.current_time() - began <= 120


@pytest.mark.parametrize(
    "vdi",
    [replace(LIVE, type="cbt_metadata"), replace(LIVE, missing=True), replace(LIVE, managed=False)],
)
async def test_what_has_no_data_is_not_asked_for(pool: MemoryPool, disks: Disks, vdi: VDI) -> None:
    with pytest.raises(errors.ExportError, match="no data"):
        await first_bytes(disks.open(vdi, size=vdi.size))

    assert pool.taken == 0


async def test_at_the_end_nothing_is_left(pool: MemoryPool) -> None:
    async with open_disks(pool) as disks:
        for vdi in (LIVE, OTHER, SNAPSHOT):
            await first_bytes(disks.open(vdi, size=vdi.size))
        assert len(pool.snapshots) == 2

    assert pool.snapshots == {}
    assert pool.open_now == set()


async def test_cancelled_it_leaves_nothing_either(pool: MemoryPool) -> None:
    with trio.CancelScope() as scope:
        async with open_disks(pool) as disks:
            source = disks.open(LIVE, size=LIVE.size)
            await first_bytes(source)
            scope.cancel()
            await trio.sleep_forever()

    assert pool.snapshots == {}
    assert pool.open_now == set()
    with pytest.raises(errors.ExportError, match="ending"):
        await first_bytes(source)


async def test_a_snapshot_taken_for_a_killed_reader_goes_too(
    pool: MemoryPool, disks: Disks, autojump_clock: trio.abc.Clock
) -> None:
    source = disks.open(LIVE, size=LIVE.size)
    with trio.move_on_after(0):
        await first_bytes(source)
    disks.close(source)
    await trio.sleep(1)
    assert len(pool.snapshots) == 1

    await trio.sleep(60)
    assert pool.snapshots == {}


async def test_a_snapshot_that_cannot_be_destroyed_is_told(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_disks(pool) as disks:
        await first_bytes(disks.open(LIVE, size=LIVE.size))
        pool.stuck = True

    assert "stays for now: the VDI is in use" in caplog.text


async def test_live_disks_can_be_forbidden(pool: MemoryPool) -> None:
    async with open_disks(pool, options=DiskOptions(live=False)) as disks:
        assert not disks.allows(LIVE)
        assert disks.allows(SNAPSHOT)


DEAD = Owned(self_uuid=SNAPSHOT.uuid, role="live", host=socket.gethostname(), boot="another", pid=1)


@pytest.mark.parametrize(
    ("owner", "goes"),
    [
        (DEAD, True),
        (
            Owned(self_uuid=SNAPSHOT.uuid, role="live", host="elsewhere", boot="another", pid=1),
            False,
        ),
        (Owned(self_uuid=SNAPSHOT.uuid, role="base", host=DEAD.host, boot="another", pid=1), False),
        (Owned(self_uuid=LIVE.uuid, role="live", host=DEAD.host, boot="another", pid=1), False),
        (None, False),
    ],
)
async def test_only_what_a_dead_mount_left_is_removed(
    pool: MemoryPool, owner: Owned | None, goes: bool
) -> None:
    vdi = memory.left_by(SNAPSHOT, owner) if owner else SNAPSHOT

    await disks_module.remove_leftovers(pool, memory.an_inventory(LIVE, vdi))

    assert (SNAPSHOT.ref not in pool.contents) == goes


async def test_what_a_living_mount_uses_stays(pool: MemoryPool) -> None:
    me = process.this_process()
    owner = Owned(
        self_uuid=SNAPSHOT.uuid,
        role="live",
        host=me.host,
        boot=me.boot,
        pid=os.getpid(),
        starttime=me.starttime,
    )

    await disks_module.remove_leftovers(pool, memory.an_inventory(memory.left_by(SNAPSHOT, owner)))

    assert SNAPSHOT.ref in pool.contents


async def test_a_leftover_that_cannot_be_removed_is_told(
    pool: MemoryPool, caplog: pytest.LogCaptureFixture
) -> None:
    pool.open_now.add(SNAPSHOT.ref)

    await disks_module.remove_leftovers(pool, memory.an_inventory(memory.left_by(SNAPSHOT, DEAD)))

    assert "stays: the VDI is in use" in caplog.text


async def test_what_the_body_raises_comes_out_as_it_is(pool: MemoryPool) -> None:
    with pytest.raises(errors.MountError, match="busy"):
        async with open_disks(pool):
            raise errors.MountError("busy")
