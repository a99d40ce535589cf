"""What a pool does for the verbs, and above all what it refuses to destroy."""

import gzip
import io
import os
import socket
import tarfile
from collections.abc import Iterator
from dataclasses import replace

import pytest
import trio

from cbtfs import errors, inventory, pool as pools, tasks, xapi
from cbtfs.inventory import TAG_OWNER, read_owner
from cbtfs.owner import read_task
from cbtfs.pool import Pool, PoolOptions

from .pools import OWNER, RUN, disk_of, in_good_order, opened, snapshot_of, vm_of
from .simulated import Api, RunningPool


@pytest.fixture
def simulated(started: RunningPool, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningPool]:
    monkeypatch.setattr(pools, "IN_USE_PAUSES", (0.01,) * 9)
    with in_good_order(started) as pool:
        pool.set("vdi.data_destroy_wait", "20ms")
        yield pool


@pytest.fixture
def api(simulated: RunningPool) -> Api:
    return Api(simulated).login()


async def test_the_inventory_takes_a_call_for_each_class(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        simulated.control("reset-counters")
        found = await pool.inventory()
        counters = simulated.control("counters")

    assert {"web1", "db1"} <= {vm.name for vm in found.live_vms()}
    assert isinstance(counters, dict)
    assert sum(n for key, n in counters.items() if key.startswith("rpc.")) == 10


async def test_metadata_is_the_ova_xml_of_the_vm(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        web1 = vm_of(await pool.inventory(), "web1")
        text = await pool.export_metadata(web1.uuid)
        with pytest.raises(errors.PoolError):
            await pool.export_metadata("none")

    assert text.startswith(b"<")
    assert web1.uuid.encode() in text


def archive_of(*, link: str = "", size: int = 0, holes: int = 0) -> bytes:
    """Return a tar with an ``ova.xml``: a file, all of it cut off or in holes, or a link."""
    member = tarfile.TarInfo("ova.xml")
    member.type, member.linkname = (tarfile.SYMTYPE, link) if link else (tarfile.REGTYPE, "")
    member.size = size
    if holes:
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(holes)}
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    return target.getvalue()


@pytest.mark.parametrize(
    "answer",
    [
        archive_of(link="ova.xml"),
        archive_of(link="nothing"),
        gzip.compress(archive_of()),
        gzip.compress(archive_of())[:-9],
        archive_of(size=1 << 20),
        archive_of(size=1 << 66),
        archive_of(holes=1 << 62),
        b"",
    ],
    ids=[
        *("endless-link", "dangling-link", "packed", "packed-and-cut"),
        *("cut", "endless", "all-holes", "empty"),
    ],
)
async def test_metadata_that_are_none_are_a_failure_like_others(
    simulated: RunningPool, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    async def export(_session: xapi.Session, _uuid: str) -> bytes:
        return answer

    monkeypatch.setattr(xapi.Session, "export_metadata", export)
    async with opened(simulated) as pool:
        with pytest.raises(errors.PoolError, match=r"has no ova\.xml"):
            await pool.export_metadata("some")


async def test_cbt_may_be_switched_on_twice(simulated: RunningPool, api: Api) -> None:
    async with opened(simulated) as pool:
        disk = disk_of(await pool.inventory(), "web1")
        for _ in range(2):
            await pool.enable_cbt(disk.ref)

    assert api.call("VDI.get_cbt_enabled", disk.ref) is True


# ── snapshots and tags ───────────────────────────────────────────────────────────────────────────


async def test_a_snapshot_of_a_vm_has_all_its_disks(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        web1 = vm_of(await pool.inventory(), "web1")
        ref = await pool.snapshot_vm(web1.ref, RUN)
        found = await pool.inventory()
        await pool.destroy_run_leftovers(web1.ref, RUN)

    assert found.vms[ref].name == RUN
    assert [disk.device for disk in found.disks_of(found.vms[ref])] == ["xvda", "xvdb"]


async def test_a_snapshot_of_a_disk_is_named_and_tagged(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        await pool.destroy_vdi(vdi.ref)

    assert vdi.name == RUN
    owner = read_owner(vdi.other_config, vdi.uuid)
    assert owner is not None
    assert owner.store == "store"


async def test_a_tag_takes_the_place_of_an_earlier_one(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        await pool.tag("VDI", vdi.ref, replace_role("live"))
        tagged = (await pool.inventory()).vdis[vdi.ref]
        await pool.destroy_vdi(vdi.ref)

    owner = read_owner(tagged.other_config, tagged.uuid)
    assert owner is not None
    assert owner.role == "live"
    assert len(tagged.other_config) == len(vdi.other_config)


def replace_role(role: str) -> inventory.Owned:
    return inventory.Owned(self_uuid="", role=role)


async def test_a_snapshot_that_cannot_be_tagged_is_destroyed_again(
    simulated: RunningPool,
) -> None:
    simulated.set("xapi.fail", "VDI.add_to_other_config:RBAC_PERMISSION_DENIED:x:y")
    async with opened(simulated) as pool:
        before = set((await pool.inventory()).vdis)
        with pytest.raises(errors.XapiFailure, match="RBAC"):
            await snapshot_of(pool)
        after = set((await pool.inventory()).vdis)

    assert after - before == set()


async def test_a_cancelled_snapshot_of_a_disk_leaves_nothing(simulated: RunningPool) -> None:
    simulated.set("sr.delay", "200ms")
    async with opened(simulated) as pool:
        before = snapshots(await pool.inventory())
        with trio.move_on_after(0.1):
            await snapshot_of(pool)
        after = snapshots(await pool.inventory())

    assert after == before


def snapshots(found: inventory.Inventory) -> set[str]:
    return {ref for ref, vdi in found.vdis.items() if vdi.is_a_snapshot}


# ── changed blocks ───────────────────────────────────────────────────────────────────────────────


async def test_changed_blocks_are_those_of_the_pools_own_log(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        base = await snapshot_of(pool)
        write(simulated, 0, 1)
        write(simulated, (5 << 16) - 1, 2)
        later = await snapshot_of(pool)
        changes = await pool.changed_blocks(base.ref, later.ref, size=later.size)
        for vdi in (base, later):
            await pool.destroy_vdi(vdi.ref)

    assert [tuple(extent) for extent in changes.extents()] == [(0, 1 << 16), (4 << 16, 6 << 16)]


def write(simulated: RunningPool, offset: int, length: int) -> None:
    """Write some bytes as web1."""
    guest = simulated.open_guest("web1", "xvda")
    guest.pwrite(bytes(length), offset)
    guest.shutdown()


async def unknown(pool: Pool, base: str, later: str, size: int = 512 << 20) -> str:
    with pytest.raises(errors.ChangesUnknown) as caught:
        await pool.changed_blocks(base, later, size=size)
    return caught.value.reason


async def test_what_the_pool_cannot_tell_has_a_reason(simulated: RunningPool, api: Api) -> None:
    async with opened(simulated) as pool:
        base, later = await snapshot_of(pool), await snapshot_of(pool)
        other = await snapshot_of(pool, "web1", "xvdb")

        assert await unknown(pool, later.ref, base.ref) == "base-lost"
        assert await unknown(pool, other.ref, later.ref) == "base-lost"
        assert await unknown(pool, "OpaqueRef:none", later.ref) == "base-lost"
        assert await unknown(pool, base.ref, later.ref, size=1 << 30) == "cbt-mismatch"
        simulated.set("cbt.garble", "base64")
        assert await unknown(pool, base.ref, later.ref) == "cbt-mismatch"
        simulated.set("cbt.garble", "")
        simulated.set("xapi.fail", "VDI.list_changed_blocks*1:SR_BACKEND_FAILURE_459::x:")
        assert await unknown(pool, base.ref, later.ref) == "cbt-mismatch"
        simulated.set("xapi.fail", "VDI.list_changed_blocks*1:SR_OPERATION_NOT_SUPPORTED:sr")
        assert await unknown(pool, base.ref, later.ref) == "cbt-unsupported"
        simulated.set("xapi.fail", "VDI.list_changed_blocks*1:RBAC_PERMISSION_DENIED:x:y")
        with pytest.raises(errors.XapiFailure):
            await pool.changed_blocks(base.ref, later.ref, size=later.size)

        for vdi in (base, later, other):
            await pool.destroy_vdi(vdi.ref)


async def test_changed_blocks_wait_for_a_reader_to_leave(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        base, later = await snapshot_of(pool), await snapshot_of(pool)
        async with pool.open_export(later.ref):
            assert await unknown(pool, base.ref, later.ref) == "cbt-mismatch"

        changes = await pool.changed_blocks(base.ref, later.ref, size=later.size)
        for vdi in (base, later):
            await pool.destroy_vdi(vdi.ref)

    assert changes.changed_blocks == 0


# ── destroying ───────────────────────────────────────────────────────────────────────────────────


async def test_data_goes_and_change_tracking_stays(simulated: RunningPool, api: Api) -> None:
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        await pool.data_destroy(vdi.ref)
        kind = api.call("VDI.get_type", vdi.ref)
        await pool.destroy_vdi(vdi.ref)

    assert kind == "cbt_metadata"


async def test_what_is_not_ours_is_left_alone(simulated: RunningPool, api: Api) -> None:
    async with opened(simulated) as pool:
        found = await pool.inventory()
        web1, live = vm_of(found, "web1"), disk_of(found, "web1")
        foreign = next(ref for ref, vdi in found.vdis.items() if vdi.snapshot_of == live.ref)
        foreign_vm = found.vm_snapshots_of(web1)[0]
        before = set(found.vdis), set(found.vms)

        attempts = (
            *(
                (destroy, ref)
                for ref in (live.ref, foreign)
                for destroy in (pool.data_destroy, pool.destroy_vdi)
            ),
            *((pool.destroy_snapshot_vm, ref) for ref in (web1.ref, foreign_vm.ref)),
        )
        for destroy, ref in attempts:
            with pytest.raises(errors.PoolError, match="left alone"):
                await destroy(ref)
        found = await pool.inventory()

    assert (set(found.vdis), set(found.vms)) == before


async def test_a_tag_counts_neither_on_a_copy_nor_on_a_live_disk(
    simulated: RunningPool, api: Api
) -> None:
    async with opened(simulated) as pool:
        ours = await snapshot_of(pool)
        tag = api.call("VDI.get_other_config", ours.ref)
        assert isinstance(tag, dict)
        live = disk_of(await pool.inventory(), "web1", "xvdb")
        await pool.tag("VDI", live.ref, OWNER)  # as if somebody had put it there
        copied = str(api.call("VDI.snapshot", live.ref, {}))

        for ref in (copied, live.ref):
            with pytest.raises(errors.PoolError, match="left alone"):
                await pool.destroy_vdi(ref)

        api.call("VDI.remove_from_other_config", live.ref, TAG_OWNER)
        api.call("VDI.destroy", copied)
        await pool.destroy_vdi(ours.ref)


async def test_what_is_gone_counts_as_destroyed(simulated: RunningPool) -> None:
    async with opened(simulated) as pool:
        for destroy in (pool.data_destroy, pool.destroy_vdi, pool.destroy_snapshot_vm):
            await destroy("OpaqueRef:none")


async def test_what_clean_removes_is_ours_by_what_the_pool_says_then(
    simulated: RunningPool, api: Api
) -> None:
    theirs = api.text("task.create", "cbtfs: not so", '{"self": "", "role": "base"}')
    async with opened(simulated) as pool:
        found = await pool.inventory()
        live = disk_of(found, "web1")
        (vbd, *_) = live.vbd_refs
        await pool.tag("VDI", live.ref, OWNER)
        with pytest.raises(errors.PoolError, match="left alone"):
            await pool.destroy_unfinished_disk(live.ref)
        web1 = found.vbds[vbd].vm_ref
        for vm in (web1, next(ref for ref, vm in found.vms.items() if vm.is_a_snapshot)):
            with pytest.raises(errors.PoolError, match="left alone"):
                await pool.destroy_unfinished_vm(vm)
        api.call("VDI.remove_from_other_config", live.ref, TAG_OWNER)
        for remove, ref in (
            (pool.destroy_unfinished_disk, live.ref),
            (pool.destroy_unfinished_vm, web1),
            (pool.detach, vbd),
            (pool.remove_task, theirs),
        ):
            with pytest.raises(errors.PoolError, match="left alone"):
                await remove(ref)
            await remove("OpaqueRef:none")  # what is gone counts as removed

        assert theirs not in await pool.tasks()
        assert (await pool.inventory()).vbds[vbd].currently_attached
    api.call("task.destroy", theirs)


async def test_a_task_for_a_handler_says_from_its_first_instant_who_made_it(
    simulated: RunningPool,
) -> None:
    async with opened(simulated) as pool:
        task = await tasks.create(pool._session, "cbtfs: a test", what="nothing")
        (record,) = (await pool.tasks()).values()
        await pool.remove_task(task.ref)
        assert await pool.tasks() == {}

    maker = read_task(record.name_description)
    assert maker is not None
    assert (maker.host, maker.pid) == (socket.gethostname(), os.getpid())


async def test_a_device_that_a_read_of_ours_left_behind_is_detached(
    simulated: RunningPool,
) -> None:
    simulated.set("nbd.leak", "on")
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        async with pool.open_export(vdi.ref):
            pass
        assert (await pool.inventory()).vdis[vdi.ref].vbd_refs

        await pool.data_destroy(vdi.ref)
        assert (await pool.inventory()).vdis[vdi.ref].type == "cbt_metadata"
        await pool.destroy_vdi(vdi.ref)


async def test_a_disk_in_use_here_is_not_torn_away(
    simulated: RunningPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "IN_USE_PAUSES", (0.01,) * 3)
    async with opened(simulated) as pool:
        vdi = await snapshot_of(pool)
        async with pool.open_export(vdi.ref) as export:
            with pytest.raises(errors.XapiFailure, match="VDI_IN_USE"):
                await pool.data_destroy(vdi.ref)
            assert await export.pread(512, 0)
        await pool.destroy_vdi(vdi.ref)


# ── what a dead run left ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tagging", [False, True])
async def test_the_snapshot_that_a_dead_run_named_is_removed_with_its_disks(
    simulated: RunningPool, tagging: bool
) -> None:
    async with opened(simulated) as pool:
        found = await pool.inventory()
        web1 = vm_of(found, "web1")
        before = set(found.vms), snapshots(found)
        await pool.snapshot_vm(web1.ref, RUN)

        await pool.destroy_run_leftovers(web1.ref, RUN, owner=OWNER if tagging else None)
        found = await pool.inventory()

    assert (set(found.vms), snapshots(found)) == before


async def test_disks_that_somebody_else_has_stay(simulated: RunningPool, api: Api) -> None:
    async with opened(simulated) as pool:
        found = await pool.inventory()
        web1, live = vm_of(found, "web1"), disk_of(found, "web1")
        shared = next(vdi for vdi in found.detached_disks() if vdi.name == "old archive")
        made = await pool.snapshot_vm(web1.ref, RUN)
        after = await pool.inventory()
        kept = after.disks_of(after.vms[made])[0].vdi
        attach(api, made, shared.ref)
        attach(api, web1.ref, kept.ref)

        await pool.destroy_run_leftovers(web1.ref, RUN)
        found = await pool.inventory()
        destroy_by_hand(api, kept.ref)

    assert {live.ref, shared.ref, kept.ref} <= set(found.vdis)


def attach(api: Api, vm: str, vdi: str) -> None:
    record = {
        "VM": vm, "VDI": vdi, "userdevice": "7", "bootable": False, "mode": "RO", "type": "Disk",
        "empty": False, "unpluggable": True, "other_config": {}, "qos_algorithm_type": "",
        "qos_algorithm_params": {},
    }  # fmt: skip
    api.call("VBD.create", record)


def destroy_by_hand(api: Api, vdi: str) -> None:
    vbds = api.call("VDI.get_VBDs", vdi)
    assert isinstance(vbds, list)
    for vbd in vbds:
        api.call("VBD.destroy", vbd)
    api.call("VDI.destroy", vdi)


async def test_only_that_vms_and_only_that_runs_snapshot_is_removed(
    simulated: RunningPool,
) -> None:
    async with opened(simulated) as pool:
        found = await pool.inventory()
        web1, db1 = vm_of(found, "web1"), vm_of(found, "db1")
        ref = await pool.snapshot_vm(web1.ref, RUN)

        await pool.destroy_run_leftovers(db1.ref, RUN)
        await pool.destroy_run_leftovers(web1.ref, RUN[:-1] + "0")
        assert ref in (await pool.inventory()).vms

        await pool.destroy_run_leftovers(web1.ref, RUN)
        assert ref not in (await pool.inventory()).vms


@pytest.mark.parametrize("name", ["", "nightly", "cbtfs", "cbtfs 20261122T020000Z ", f"x {RUN}"])
async def test_a_name_that_no_run_gives_is_refused(simulated: RunningPool, name: str) -> None:
    async with opened(simulated) as pool:
        with pytest.raises(errors.PoolError, match="not the name"):
            await pool.destroy_run_leftovers("OpaqueRef:any", name)


async def test_a_live_vm_of_that_name_is_left_alone(simulated: RunningPool, api: Api) -> None:
    web1 = api.named("VM", "web1")
    api.call("VM.set_name_label", web1, RUN)
    try:
        async with opened(simulated) as pool:
            await pool.destroy_run_leftovers(web1, RUN)
    finally:
        api.call("VM.set_name_label", web1, "web1")

    assert api.named("VM", "web1") == web1


# ── opening ──────────────────────────────────────────────────────────────────────────────────────


def test_options_keep_their_password_to_themselves() -> None:
    options = PoolOptions("sim", "https://xcp1", "root", "secret")

    assert "secret" not in repr(options)
    assert replace(options, name="other").password == "secret"
