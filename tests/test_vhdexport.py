"""What a pool tells of a disk's allocation, over the real wire, and what of its failures."""

import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from cbtfs import errors, vhdexport, xapi
from cbtfs.bitmap import ChangeBitmap
from cbtfs.inventory import VDI
from cbtfs.pool import Pool

from .pools import disk_of, in_good_order, opened, snapshot_of
from .simulated import Api, RunningPool

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 2 * MiB


@pytest.fixture
def simulated(started: RunningPool) -> Iterator[RunningPool]:
    with in_good_order(started) as pool:
        pool.set("vdi.data_destroy_wait", "20ms")
        yield pool


@pytest.fixture
def api(simulated: RunningPool) -> Api:
    return Api(simulated).login()


@asynccontextmanager
async def snapshot(
    simulated: RunningPool, device: str = "xvda"
) -> AsyncGenerator[tuple[Pool, VDI]]:
    """Yield the pool with a snapshot of a disk of web1, and destroy that."""
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool, device=device)
        yield pool, vdi
        await pool.destroy_vdi(vdi.ref)


async def unknown(pool: Pool, vdi: VDI, *, size: int = 0) -> str:
    with pytest.raises(errors.AllocationUnknown) as caught:
        await pool.allocated(vdi.ref, size=size or vdi.size)
    return str(caught.value)


def ranges(bitmap: ChangeBitmap) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in bitmap.extents()]


def count(simulated: RunningPool, name: str) -> int:
    counters = msgspec.convert(simulated.control("counters"), dict[str, object])
    return int(str(counters.get(name, 0)))


def left(api: Api, vdi: VDI) -> tuple[set[str], list[str]]:
    """Return what is new of the VBDs of a disk, and the pool's tasks that are ours, by label."""
    vbds = msgspec.convert(api.call("VDI.get_VBDs", vdi.ref), set[str])
    labels = [str(record["name_label"]) for record in api.records("task").values()]
    return vbds - {*vdi.vbd_refs}, [text for text in labels if "cbtfs" in text]


NOTHING = (set[str](), list[str]())


# ── what is told ─────────────────────────────────────────────────────────────────────────────────


async def test_what_is_not_allocated_reads_as_zeros(simulated: RunningPool) -> None:
    async with snapshot(simulated) as (pool, vdi):
        found = await pool.allocated(vdi.ref, size=vdi.size)

        async with pool.open_export(vdi.ref) as export:
            holding = {
                start
                for start in range(0, vdi.size, BLOCK)
                if await export.pread(BLOCK, start) != bytes(BLOCK)
            }

    told = {at for start, stop in ranges(found) for at in range(start, stop, BLOCK)}
    assert holding <= told
    assert 0 < len(told) < vdi.size // BLOCK // 2


async def test_blocks_written_since_are_allocated(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        before = await snapshot_of(pool, device="xvdb")
        guest = simulated.open_guest("web1", "xvdb")
        guest.pwrite(b"x", 251 * MiB)
        guest.shutdown()
        after = await snapshot_of(pool, device="xvdb")
        first = await pool.allocated(before.ref, size=before.size)
        second = await pool.allocated(after.ref, size=after.size)
        for vdi in (before, after):
            await pool.destroy_vdi(vdi.ref)

    assert set(ranges(second)) - set(ranges(first)) == {(250 * MiB, 252 * MiB)}


async def test_a_disk_of_odd_size_ends_where_it_ends(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        found = await pool.inventory()
        odd = next(vdi for vdi in found.detached_disks() if vdi.name == "odd size")
        told = await pool.allocated(odd.ref, size=odd.size)

    assert ranges(told) == [(8 * MiB, odd.size)]


async def test_storage_that_does_not_know_calls_all_of_it_allocated(
    simulated: RunningPool,
) -> None:
    simulated.set("vhd.full", "*")
    async with snapshot(simulated) as (pool, vdi):
        found = await pool.allocated(vdi.ref, size=vdi.size)

    assert ranges(found) == [(0, vdi.size)]


async def test_only_the_head_is_taken(simulated: RunningPool) -> None:
    async with snapshot(simulated) as (pool, vdi):
        simulated.set("vhd.full", "*")
        simulated.control("reset-counters")
        await pool.allocated(vdi.ref, size=vdi.size)

    assert count(simulated, f"read.{vdi.uuid}") < vdi.size / 4


async def test_the_disk_is_free_afterwards_and_no_task_is_left(
    simulated: RunningPool, api: Api
) -> None:
    simulated.set("nbd.detach_delay", "300ms")
    async with snapshot(simulated) as (pool, vdi):
        await pool.allocated(vdi.ref, size=vdi.size)

        assert left(api, vdi) == NOTHING


async def test_a_disk_of_more_than_2040_gib_is_not_asked_for(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        disk = disk_of(await pool.inventory(), "web1")
        simulated.control("reset-counters")
        told = await unknown(pool, disk, size=2040 * GiB + 1)

    assert "2040 GiB" in told
    assert count(simulated, "rpc.task.create") == 0


async def test_a_disk_that_is_no_vhd_is_not_asked_for(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        raw = disk_of(await pool.inventory(), "app1", "xvdd")
        told = await unknown(pool, raw)

    assert "stored as raw" in told
    assert count(simulated, "rpc.task.create") == 0


# ── another host ─────────────────────────────────────────────────────────────────────────────────


async def mails_disk(pool: Pool) -> VDI:
    """Return a disk that only the second host sees."""
    return disk_of(await pool.inventory(), "mail")


async def test_the_host_that_has_the_disk_is_asked(simulated: RunningPool, api: Api) -> None:
    async with opened(simulated) as pool:
        vdi = await mails_disk(pool)
        found = await pool.allocated(vdi.ref, size=vdi.size)

    assert ranges(found) == [(0, BLOCK)]
    assert left(api, vdi) == NOTHING


@pytest.mark.parametrize("known", [False, True])
async def test_a_host_that_cannot_prove_itself_gets_nothing(
    simulated: RunningPool, api: Api, known: bool
) -> None:
    async with opened(simulated) as pool:
        vdi = await mails_disk(pool)
        if known:
            await pool.allocated(vdi.ref, size=vdi.size)
        simulated.set("http.impostor", "xcp2")
        with pytest.raises(errors.AuthenticationFailed, match=r"127\.0\.0\.3"):
            await pool.allocated(vdi.ref, size=vdi.size)

    assert simulated.stolen() == []
    assert left(api, vdi) == NOTHING


async def test_a_host_that_is_not_there_is_named(simulated: RunningPool) -> None:
    simulated.control("kill-host", "xcp2")
    async with opened(simulated) as pool:
        told = await unknown(pool, await mails_disk(pool))

    assert "127.0.0.3 does not answer (Connection refused)" in told


async def test_hosts_that_send_us_round_are_left(simulated: RunningPool, api: Api) -> None:
    simulated.set("http.redirect", "127.0.0.2")
    async with snapshot(simulated) as (pool, vdi):
        assert "from host to host" in await unknown(pool, vdi)
        assert left(api, vdi) == NOTHING


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        # the page of an error within a body that began with 200
        ("nbd.attach_fail", "*", "SR_BACKEND_FAILURE_453"),
        # refused before anything began
        ("xapi.fail", "export_raw_vdi:RBAC_PERMISSION_DENIED:http/get_export_raw_vdi:no", "RBAC"),
        ("xapi.fail", "export_raw_vdi:INTERNAL_ERROR:Unknown format vhd", "Unknown format"),
        ("xapi.fail", "export_raw_vdi:VDI_TOO_LARGE:OpaqueRef:1:2190433320960", "VDI_TOO_LARGE"),
        ("xapi.fail", "task.create:TOO_MANY_PENDING_TASKS", "TOO_MANY_PENDING_TASKS"),
        ("xapi.fail", "VDI.get_record:HANDLE_INVALID:VDI:gone", "HANDLE_INVALID"),
        # cut off
        ("http.truncate", "0", "VDI_IO_ERROR"),
        ("http.truncate", "100", "VDI_IO_ERROR"),
        ("http.truncate", "1000", "VDI_IO_ERROR"),
        ("http.truncate", "2500", "VDI_IO_ERROR"),
        # rubbish
        ("http.flip", "0", "does not begin as a VHD"),
        ("http.flip", "300", "checksum of its footer"),
        ("http.flip", "600", "checksum of its header"),
    ],
)
async def test_a_pool_that_fails_says_why(
    simulated: RunningPool, api: Api, key: str, value: str, why: str
) -> None:
    async with snapshot(simulated) as (pool, vdi):
        simulated.set(key, value)
        told = await unknown(pool, vdi)
        simulated.set(key, "")

        assert why in told
        assert left(api, vdi) == NOTHING
        assert ranges(await pool.allocated(vdi.ref, size=vdi.size))


@pytest.mark.parametrize("after", ["0", "1000", "2500"])
async def test_a_silent_host_is_not_waited_for(
    simulated: RunningPool, api: Api, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    async with snapshot(simulated) as (pool, vdi):
        await pool.allocated(vdi.ref, size=vdi.size)  # not its attaching that is too slow
        monkeypatch.setattr(vhdexport, "SILENCE", 0.5)
        simulated.set("http.stall", after)

        assert "silent" in await unknown(pool, vdi)
        assert left(api, vdi) == NOTHING


async def test_a_host_that_never_comes_to_the_point_is_not_waited_for(
    simulated: RunningPool, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with snapshot(simulated) as (pool, vdi):
        monkeypatch.setattr(vhdexport, "LONGEST", 0.5)
        simulated.set("http.stall", "1000")

        assert "seconds" in await unknown(pool, vdi)
        assert left(api, vdi) == NOTHING


async def test_a_disk_smaller_than_thought_is_not_believed(simulated: RunningPool) -> None:
    async with snapshot(simulated) as (pool, vdi):
        assert "where the disk has" in await unknown(pool, vdi, size=GiB)


async def test_a_refused_login_stays_one(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        disk = disk_of(await pool.inventory(), "web1")
        simulated.control("expire-sessions")
        simulated.set("xapi.fail", "session.login_with_password:SESSION_AUTHENTICATION_FAILED:x:y")
        with pytest.raises(errors.AuthenticationFailed):
            await pool.allocated(disk.ref, size=disk.size)


async def test_a_session_that_ends_just_then_is_renewed(simulated: RunningPool, api: Api) -> None:
    async with snapshot(simulated) as (pool, vdi):
        simulated.set("xapi.delay", "task.create:1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expire_once_waiting, simulated)
            found = await pool.allocated(vdi.ref, size=vdi.size)

        assert ranges(found)
        assert count(simulated, "rpc.session.login_with_password") > 1


async def expire_once_waiting(simulated: RunningPool) -> None:
    """End all sessions while the pool is about to make a task."""
    await until(lambda: count(simulated, "rpc.task.create") > 0)
    simulated.control("expire-sessions")
    simulated.set("xapi.delay", "")


# ── cancelled ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "value", "attached"),
    [
        ("xapi.delay", "task.create:2", False),
        ("xapi.delay", "export_raw_vdi:2", False),
        ("http.stall", "1000", False),
        ("http.stall", "1000", True),
        ("nbd.attach_delay", "2s", True),
        ("nbd.detach_delay", "2s", True),
    ],
)
async def test_if_cancelled_nothing_is_left(
    simulated: RunningPool, api: Api, key: str, value: str, attached: bool
) -> None:
    async with snapshot(simulated) as (pool, vdi):
        simulated.set("http.stall", "1000")  # it does not end before we have seen it
        simulated.set(key, value)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: pool.allocated(vdi.ref, size=vdi.size))
            await until(lambda: bool(left(api, vdi)[0 if attached else 1]))
            nursery.cancel_scope.cancel()

        assert left(api, vdi) == NOTHING


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - it is of another process
            await trio.sleep(0.01)


async def test_no_session_reaches_a_log(
    simulated: RunningPool, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(simulated) as pool:
        disk = await mails_disk(pool)

    with caplog.at_level(logging.DEBUG):
        async with xapi.open_session(
            simulated.url,
            credentials=xapi.Credentials("root", "simulated"),
            trust=xapi.Trust(str(simulated.ca_file)),
        ) as session:
            simulated.set("nbd.attach_fail", "*")
            with pytest.raises(errors.AllocationUnknown):
                await vhdexport.allocated(session, disk.ref, size=disk.size)
            simulated.set("nbd.attach_fail", "")
            await vhdexport.allocated(session, disk.ref, size=disk.size)
            ref = session.ref

    assert "export_raw_vdi" in caplog.text
    assert ref not in caplog.text


async def test_several_disks_may_be_asked_for_at_once(simulated: RunningPool) -> None:
    found: dict[str, int] = {}
    async with opened(simulated) as pool:
        taken = [await snapshot_of(pool, "web1", device) for device in ("xvda", "xvdb")]

        async def ask(vdi: VDI) -> None:
            found[vdi.ref] = (await pool.allocated(vdi.ref, size=vdi.size)).changed_bytes

        async with trio.open_nursery() as nursery:
            for vdi in taken:
                nursery.start_soon(ask, vdi)
        for vdi in taken:
            await pool.destroy_vdi(vdi.ref)

    assert all(found[vdi.ref] for vdi in taken)
