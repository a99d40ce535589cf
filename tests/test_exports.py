"""Which host a disk is read from, how often at a time, and what a user is told when none serves."""

import json
import ssl
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from cbtfs import errors, exports
from cbtfs.handlers import Web
from cbtfs.inventory import VDI
from cbtfs.nbd import Export
from cbtfs.pool import Pool

from .pools import QUICK, disk_of, in_good_order, opened, snapshot_of, vm_of
from .simulated import Api, RunningPool


@pytest.fixture
def simulated(started: RunningPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningPool]:
    monkeypatch.setattr(exports, "_PAUSE", 0.01)
    with in_good_order(started) as pool:
        yield pool


async def shared_disk(pool: Pool) -> VDI:
    """Return a snapshot that both hosts export."""
    inventory = await pool.inventory()
    web1 = disk_of(inventory, "web1")
    return next(vdi for vdi in inventory.vdis.values() if vdi.snapshot_of == web1.ref)


@asynccontextmanager
async def exported(
    simulated: RunningPool, *, per_host: int = 12
) -> AsyncGenerator[tuple[Pool, VDI]]:
    async with opened(simulated, per_host=per_host) as pool:
        yield pool, await shared_disk(pool)


async def failure(simulated: RunningPool, vdi: VDI | None = None) -> errors.CbtfsError:
    found: errors.CbtfsError | None = None
    async with exported(simulated) as (pool, shared):
        try:
            async with pool.open_export((vdi or shared).ref):
                pass
        except errors.CbtfsError as exc:
            found = exc
    assert found is not None
    assert "session_id" not in str(found)
    return found


async def test_an_export_is_what_the_guest_wrote(simulated: RunningPool, tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    copy = ["nbdcopy", simulated.guest("web1", "xvdb"), str(image)]

    async with opened(simulated) as pool:
        await trio.run_process(copy)
        snapshot = await snapshot_of(pool, "web1", "xvdb")
        async with pool.open_export(snapshot.ref) as export:
            data = await export.pread(export.size, 0)
        await pool.destroy_vdi(snapshot.ref)

    assert data == image.read_bytes()


@pytest.mark.parametrize(
    ("port", "name"), [(1 << 70, "/x"), (0, "/x"), (10809, "x" * 5000), (10809, "/\0")]
)
async def test_an_address_that_cannot_be_one_is_an_answer_not_understood(
    simulated: RunningPool, monkeypatch: pytest.MonkeyPatch, port: int, name: str
) -> None:
    asked = Web.post

    async def answer(
        self: Web, host: str, context: ssl.SSLContext, method: str, params: Sequence[object]
    ) -> bytes:
        if method != "VDI.get_nbd_info":
            return await asked(self, host, context, method, params)
        return json.dumps([{"exportname": name, "address": "127.0.0.1", "port": port}]).encode()

    monkeypatch.setattr(Web, "post", answer)

    assert "answer to VDI.get_nbd_info is not understood" in str(await failure(simulated))


@pytest.mark.parametrize("fault", ["nbd.impostor", "nbd.strip", "nbd.no_tls"])
async def test_an_attacker_hears_neither_session_nor_data(
    simulated: RunningPool, fault: str
) -> None:
    simulated.set(fault, "*")

    found = await failure(simulated)

    assert isinstance(found, errors.AuthenticationFailed)
    assert simulated.stolen() == []


@pytest.mark.parametrize("fault", ["nbd.refuse", "nbd.silent"])
async def test_another_host_is_tried(simulated: RunningPool, fault: str) -> None:
    simulated.set(fault, "xcp1")

    async with opened(simulated, timeouts=replace(QUICK, connect=0.5)) as pool:
        vdi = await shared_disk(pool)
        for _ in range(3):
            async with pool.open_export(vdi.ref) as export:
                assert export.address.host in {"127.0.0.3", "127.0.0.13"}


async def test_a_host_that_died_under_a_read_is_not_the_first_again(
    simulated: RunningPool,
) -> None:
    async with exported(simulated) as (pool, vdi):
        async with pool.open_export(vdi.ref) as export:
            first = export.address.host
            simulated.control("drop-nbd")
            with pytest.raises(errors.ExportLost):
                await export.pread(1 << 20, 0)
        later: list[str] = []
        async with AsyncExitStack() as stack:
            for _ in range(3):
                export = await stack.enter_async_context(pool.open_export(vdi.ref))
                later.append(export.address.host[-1])

    assert first[-1] not in later


async def test_a_full_host_is_explained(simulated: RunningPool) -> None:
    simulated.set("nbd.refuse", "*")

    found = await failure(simulated)

    assert isinstance(found, errors.ExportLost)
    assert "127.0.0." in str(found)


async def test_connections_spread_over_the_hosts_within_the_budget(
    simulated: RunningPool,
) -> None:
    async with exported(simulated, per_host=2) as (pool, vdi):
        leave, used, opening = trio.Event(), list[str](), trio.Event()

        async def use() -> None:
            async with pool.open_export(vdi.ref) as export:
                used.append(export.address.host[-1])
                if len(used) == 4:
                    opening.set()
                await leave.wait()

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(use)
            await opening.wait()
            counters = simulated.control("counters")
            leave.set()

    assert sorted(used[:4]) == ["2", "2", "3", "3"]
    assert len(used) == 5
    assert isinstance(counters, dict)


async def test_connections_to_one_disk_do_not_race(simulated: RunningPool) -> None:
    simulated.set("nbd.attach_delay", "30ms")
    async with exported(simulated) as (pool, vdi):
        done: list[Export] = []

        async def use() -> None:
            async with pool.open_export(vdi.ref) as export:
                await export.pread(4096, 0)
                done.append(export)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(use)

    assert len(done) == 4


async def test_on_exit_the_disk_is_attached_to_no_host(simulated: RunningPool) -> None:
    simulated.set("nbd.detach_delay", "200ms")
    async with exported(simulated) as (pool, vdi):
        async with pool.open_export(vdi.ref):
            during = set((await pool.inventory()).vdis[vdi.ref].vbd_refs)
        after = set((await pool.inventory()).vdis[vdi.ref].vbd_refs)

    assert len(during - after) == 1
    assert after == set(vdi.vbd_refs)


async def test_an_expired_session_is_renewed_with_its_export_names(
    simulated: RunningPool,
) -> None:
    async with exported(simulated) as (pool, vdi):
        simulated.control("expire-sessions")
        async with pool.open_export(vdi.ref) as export:
            assert await export.pread(512, 0)


async def test_a_disk_of_one_host_is_read_there(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        mail = await snapshot_of(pool, "mail")
        async with pool.open_export(mail.ref) as export:
            assert export.address.host[-1] == "3"
            assert len(await export.pread(export.size, 0)) == mail.size
        await pool.destroy_vdi(mail.ref)


async def test_sectors_of_4096_bytes_are_read(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        inventory = await pool.inventory()
        names = {d.vdi.name: d.device for d in inventory.disks_of(vm_of(inventory, "app1"))}
        for name in ("app1 4k", "app1 odd"):
            snapshot = await snapshot_of(pool, "app1", names[name])
            async with pool.open_export(snapshot.ref) as export:
                tail = await export.pread(700, export.size - 700)
                assert tail == (await export.pread(export.size, 0))[-700:]
            await pool.destroy_vdi(snapshot.ref)


# ── without NBD ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def purposes(simulated: RunningPool) -> Iterator[Api]:
    """An API that may change the networks' purposes; the first ones come back."""
    api = Api(simulated).login()
    before = {ref: record["purpose"] for ref, record in api.records("network").items()}
    yield api
    for wanted in (False, True):
        for ref, record in api.records("network").items():
            change(api, ref, record["purpose"], before[ref], wanted=wanted)


def change(api: Api, ref: str, now: object, then: object, *, wanted: bool) -> None:
    assert isinstance(now, list)
    assert isinstance(then, list)
    source, target, call = (then, now, "add") if wanted else (now, then, "remove")
    for purpose in source:
        if purpose not in target:
            api.call(f"network.{call}_purpose", ref, purpose)


def without_purpose(api: Api) -> list[str]:
    """Take every purpose away; return the networks that had one."""
    found = []
    for ref, record in api.records("network").items():
        assert isinstance(record["purpose"], list)
        for purpose in record["purpose"]:
            api.call("network.remove_purpose", ref, purpose)
            found.append(ref)
    return found


async def test_a_pool_without_purpose_says_how_to_give_it_one(
    simulated: RunningPool, purposes: Api
) -> None:
    without_purpose(purposes)

    found = await failure(simulated)

    assert type(found) is errors.PoolError
    assert "param-key=nbd" in str(found)
    async with opened(simulated) as pool:
        assert await pool.nbd_purpose() == ""
        with pytest.raises(errors.PoolError, match="param-key=nbd"):
            await pool.check_nbd()


async def test_plain_nbd_is_read_only_where_the_pool_says_insecure(
    simulated: RunningPool, purposes: Api
) -> None:
    for network in without_purpose(purposes):
        purposes.call("network.add_purpose", network, "insecure_nbd")

    async with exported(simulated) as (pool, vdi):
        assert await pool.nbd_purpose() == "insecure_nbd"
        await pool.check_nbd()
        async with pool.open_export(vdi.ref) as export:
            assert not export.address.tls
            assert len(await export.pread(1 << 20, 0)) == 1 << 20


async def test_a_storage_that_no_host_has_attached_is_named(simulated: RunningPool) -> None:
    api = Api(simulated).login()
    async with opened(simulated) as pool:
        inventory = await pool.inventory()
        archive = next(vdi for vdi in inventory.vdis.values() if vdi.name == "old archive")
    pbds = api.call("SR.get_PBDs", archive.sr_ref)
    assert isinstance(pbds, list)
    for pbd in pbds:
        api.call("PBD.unplug", pbd)
    try:
        found = await failure(simulated, archive)
    finally:
        for pbd in pbds:
            api.call("PBD.plug", pbd)

    assert inventory.srs[archive.sr_ref].name in str(found)
    assert "pbd-plug" in str(found)


async def test_a_disk_that_is_gone_is_xapis_failure(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        with pytest.raises(errors.XapiFailure, match="HANDLE_INVALID"):
            async with pool.open_export("OpaqueRef:none"):
                pass


def test_an_answer_with_a_credential_does_not_show_it() -> None:
    info = exports._NbdInfo("/uuid?session_id=OpaqueRef:secret", "10.0.0.1", 10809, "pem")

    assert "secret" not in repr(info)


async def test_a_host_that_goes_on_failing_is_told_of_once(
    simulated: RunningPool, caplog: pytest.LogCaptureFixture
) -> None:
    simulated.set("nbd.refuse", "*")
    async with opened(simulated) as pool:
        for disk in (await snapshot_of(pool), await snapshot_of(pool)):
            with pytest.raises(errors.ExportLost):
                await pool.open_export(disk.ref).__aenter__()

    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == len(set(told)) == 2  # one for each host
