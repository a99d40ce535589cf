"""Virtual machines of the simulated pool: life, snapshots, revert, guests' disks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .smallpool import BLOCK, Failed, Json, MiB, SmallPool

NULL = "OpaqueRef:NULL"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallPool]:
    pool = SmallPool(tmp_path)
    yield pool
    pool.pool.close()


def devices(small: SmallPool, vm: str) -> dict[str, dict[str, Json]]:
    vbds = small.client.texts("VM.get_VBDs", vm)
    records = [small.client.record("VBD", vbd) for vbd in vbds]
    return {str(record["userdevice"]): record for record in records}


def test_a_vm_snapshot_is_a_halted_template_with_vbds_of_its_own(small: SmallPool) -> None:
    taken = small.client.text("VM.snapshot", small.web1, "before update")
    record = small.client.record("VM", taken)

    assert record["name_label"] == "before update"
    assert record["is_a_snapshot"] is True
    assert record["is_a_template"] is True
    assert record["power_state"] == "Halted"
    assert record["snapshot_of"] == small.web1
    assert record["resident_on"] == NULL
    assert small.client.call("VM.get_snapshots", small.web1) == [taken]
    found = devices(small, taken)
    assert found.keys() == {"0", "1", "3"}
    assert not any(vbd["currently_attached"] for vbd in found.values())
    assert [vbd["device"] for vbd in found.values()] == ["xvda", "xvdb", "xvdd"]


def test_disks_are_snapshotted_and_a_cd_is_shared(small: SmallPool) -> None:
    found = devices(small, small.client.text("VM.snapshot", small.web1, "x"))

    assert small.client.call("VDI.get_snapshot_of", str(found["0"]["VDI"])) == small.root
    assert small.client.call("VDI.get_snapshot_of", str(found["1"]["VDI"])) == small.data
    assert found["3"]["VDI"] == small.iso


def test_disks_can_be_left_out(small: SmallPool) -> None:
    taken = small.client.text("VM.snapshot", small.web1, "x", [small.data])

    assert devices(small, taken).keys() == {"0", "3"}


def test_snapshots_follow_each_other(small: SmallPool) -> None:
    first = small.client.text("VM.snapshot", small.web1, "1")
    second = small.client.text("VM.snapshot", small.web1, "2")

    assert small.client.call("VM.get_parent", second) == first
    assert small.client.call("VM.get_children", first) == [second]
    assert small.client.call("VM.get_parent", small.web1) == second


def test_destroying_a_vm_leaves_its_vdis(small: SmallPool) -> None:
    taken = small.client.text("VM.snapshot", small.web1, "x")
    vdi = str(devices(small, taken)["0"]["VDI"])
    small.client.call("VM.destroy", taken)

    assert small.client.call("VDI.get_VBDs", vdi) == []
    assert small.client.call("VM.get_snapshots", small.web1) == []
    with pytest.raises(Failed, match="HANDLE_INVALID"):
        small.client.record("VM", taken)


def test_a_running_vm_is_not_destroyed(small: SmallPool) -> None:
    with pytest.raises(Failed) as failed:
        small.client.call("VM.destroy", small.web1)

    assert failed.value.code == "VM_BAD_POWER_STATE"
    assert failed.value.params == [small.web1, "halted", "running"]


def test_a_failing_disk_takes_the_snapshots_made_before_with_it(small: SmallPool) -> None:
    with small.pool.lock:
        small.pool.db.set("VDI", small.data, sharable=True)

    with pytest.raises(Failed, match="VDI_IS_SHARABLE"):
        small.client.call("VM.snapshot", small.web1, "x")

    assert small.client.call("VDI.get_snapshots", small.root) == []
    assert small.client.call("VM.get_snapshots", small.web1) == []


def test_there_is_no_one_instant_for_all_disks(small: SmallPool) -> None:
    small.pool.faults.set("sr.delay", "0.1")
    task = small.client.text("Async.VM.snapshot", small.web1, "x")
    while not small.client.texts("VDI.get_snapshots", small.root):
        pass
    small.write(small.root, 9)
    small.write(small.data, 9)
    while small.client.call("task.get_status", task) == "pending":
        pass

    (taken,) = small.client.texts("VM.get_snapshots", small.web1)
    found = devices(small, taken)
    assert small.disk(str(found["0"]["VDI"])).pread(9 * BLOCK + 17, 1) == b"\0"
    assert small.disk(str(found["1"]["VDI"])).pread(9 * BLOCK + 17, 1) == b"!"


def test_guests_see_the_disks_of_running_vms_only(small: SmallPool) -> None:
    def seen() -> list[tuple[str, str]]:
        return [(disk.vm_name, disk.device) for disk in small.pool.live_disks()]

    assert seen() == [("web1", "xvda"), ("web1", "xvdb")]
    small.client.call("VM.hard_shutdown", small.web1)
    assert seen() == []
    small.client.call("VM.start", small.idle, False, False)
    assert seen() == [("idle", "xvda")]


def test_a_guests_disk_stays_the_same_over_snapshots(small: SmallPool) -> None:
    disk = small.pool.live_disks()[0].disk
    taken = small.snapshot(small.root)
    disk.write(0, b"after")

    assert small.pool.live_disks()[0].disk is disk
    assert small.disk(taken).pread(0, 5) == bytes(5)


def test_a_disk_that_never_ran_has_no_device(small: SmallPool) -> None:
    assert devices(small, small.idle)["0"]["device"] == ""
    small.client.call("VM.start", small.idle, False, False)
    assert devices(small, small.idle)["0"]["device"] == "xvda"


def test_a_template_does_not_start(small: SmallPool) -> None:
    taken = small.client.text("VM.snapshot", small.idle, "x")

    with pytest.raises(Failed, match="VM_IS_TEMPLATE"):
        small.client.call("VM.start", taken, False, False)


def test_a_vm_starts_where_its_srs_are_seen(small: SmallPool) -> None:
    vdi = small.builder.add_vdi(small.local, "lone", size=MiB)
    vm = small.builder.add_vm("picky", running_on=small.host2)
    small.builder.add_vbd(vm, vdi, userdevice="0")
    small.client.call("VM.start", vm, False, False)

    assert small.client.call("VM.get_resident_on", vm) == small.host1
    assert vm in small.client.texts("host.get_resident_VMs", small.host1)


def test_revert_halts_the_vm_and_puts_the_snapshots_disks_back(small: SmallPool) -> None:
    small.write(small.root, 1)
    taken = small.client.text("VM.snapshot", small.web1, "x")
    small.write(small.root, 2)
    small.client.call("VM.revert", taken)

    assert small.client.call("VM.get_power_state", small.web1) == "Halted"
    found = devices(small, small.web1)
    assert found.keys() == {"0", "1", "3"}
    live = small.disk(str(found["0"]["VDI"]))
    assert live.pread(BLOCK + 17, 1) == b"!"
    assert live.pread(2 * BLOCK + 17, 1) == b"\0"
    small.client.call("VM.start", small.web1, False, False)
    with pytest.raises(Failed, match="REVERT_ONLY_ALLOWED_ON_SNAPSHOT"):
        small.client.call("VM.revert", small.web1)


def test_what_is_blocked_is_refused_with_the_reason(small: SmallPool) -> None:
    client = small.client
    client.call("VM.add_to_blocked_operations", small.idle, "start", "in repair")

    with pytest.raises(Failed, match=r"OPERATION_BLOCKED.*in repair"):
        client.call("VM.start", small.idle, False, False)
    client.call("VM.start_on", small.idle, small.host1, False, False)
    client.call("VM.hard_shutdown", small.idle)
    assert "start" not in client.texts("VM.get_allowed_operations", small.idle)
    client.call("VM.remove_from_blocked_operations", small.idle, "start")
    assert "start" not in client.texts("VM.get_allowed_operations", small.idle)
    client.call("VM.update_allowed_operations", small.idle)
    assert "start" in client.texts("VM.get_allowed_operations", small.idle)


def test_a_snapshot_has_no_blocks_and_leads_back_to_those_there_were(small: SmallPool) -> None:
    client = small.client
    client.call("VM.add_to_blocked_operations", small.idle, "destroy", "before")
    taken = client.text("VM.snapshot", small.idle, "x")
    client.call("VM.add_to_blocked_operations", small.idle, "start", "after")
    client.call("VM.set_name_label", small.idle, "renamed")

    assert client.call("VM.get_blocked_operations", taken) == {}
    client.call("VM.revert", taken)

    assert client.call("VM.get_blocked_operations", small.idle) == {"destroy": "before"}
    assert client.call("VM.get_name_label", small.idle) != "renamed"
    client.call("VM.start", small.idle, False, False)


def test_revert_destroys_a_disk_that_came_after_the_snapshot(small: SmallPool) -> None:
    taken = small.client.text("VM.snapshot", small.idle, "x")
    later = small.builder.add_vdi(small.shared, "later", size=8 * MiB)
    small.builder.add_vbd(small.idle, later, userdevice="1")

    small.client.call("VM.revert", taken)

    assert devices(small, small.idle).keys() == {"0"}
    with pytest.raises(Failed, match="HANDLE_INVALID"):
        small.client.call("VDI.get_record", later)


@pytest.mark.parametrize(("method", "more"), [("VM.clone", []), ("VM.copy", [NULL])])
def test_a_copy_of_a_vm_is_no_snapshot(small: SmallPool, method: str, more: list[Json]) -> None:
    small.write(small.idle_disk, 3)
    made = small.client.text(method, small.idle, "copied", *more)
    record = small.client.record("VM", made)
    (vbd,) = devices(small, made).values()

    assert (record["name_label"], record["is_a_snapshot"]) == ("copied", False)
    assert vbd["VDI"] != small.idle_disk
    assert small.client.call("VDI.get_cbt_enabled", str(vbd["VDI"])) is False
    assert small.disk(str(vbd["VDI"])).pread(3 * BLOCK + 17, 1) == b"!"


def test_a_vm_made_from_a_record_takes_what_it_knows(small: SmallPool) -> None:
    made = small.client.text("VM.create", {"name_label": "new", "memory_target": 5, "odd": 1})
    vbd: Json = {"VM": made, "VDI": NULL, "userdevice": "3", "type": "CD", "mode": "RO"}
    drive = small.client.text("VBD.create", vbd)

    assert small.client.call("VM.get_power_state", made) == "Halted"
    assert small.client.call("VBD.get_empty", drive) is True
    assert "3" not in small.client.texts("VM.get_allowed_VBD_devices", made)


def test_a_host_that_dies_halts_its_vms_and_drops_exports(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    attachment = small.pool.open_export(small.host1, small.export(taken))
    small.pool.control("crash-host", "xcp1")

    assert small.client.call("VM.get_power_state", small.web1) == "Halted"
    assert small.client.call("VDI.get_VBDs", taken) == []
    attachment.close()


def test_utilisation_follows_what_a_guest_writes(small: SmallPool) -> None:
    small.write(small.root, 1, 2, 3)
    records = small.client.call("VDI.get_all_records")

    assert isinstance(records, dict)
    record = records[small.root]
    assert isinstance(record, dict)
    assert record["physical_utilisation"] == 3 * BLOCK
