"""VDIs, VBDs and exports of the simulated pool: who may do what when, and what it leaves."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs.simulator.failures import SimError

from .smallpool import BLOCK, Failed, Json, MiB, SmallPool


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallPool]:
    pool = SmallPool(tmp_path)
    yield pool
    pool.pool.close()


def refused(small: SmallPool, code: str, params: list[str], method: str, *args: Json) -> None:
    with pytest.raises(Failed) as failed:
        small.client.call(method, *args)
    assert (failed.value.code, failed.value.params) == (code, params)


# ── enable and disable ───────────────────────────────────────────────────────────────────


def test_enable_and_disable_may_be_repeated(small: SmallPool) -> None:
    for _ in range(2):
        small.client.call("VDI.enable_cbt", small.root)
    for _ in range(2):
        small.client.call("VDI.disable_cbt", small.root)

    assert small.client.call("VDI.get_cbt_enabled", small.root) is False


def test_enabling_twice_does_not_break_the_chain(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    small.write(small.root, 4)
    small.client.call("VDI.enable_cbt", small.root)

    assert small.client.changed(base, small.snapshot(small.root)) == {4}


@pytest.mark.parametrize("method", ["VDI.enable_cbt", "VDI.disable_cbt"])
def test_tracking_cannot_be_switched_on(small: SmallPool, method: str) -> None:
    taken = small.snapshot(small.root)
    suspend = small.builder.add_vdi(small.shared, "s", size=MiB, fields={"type": "suspend"})
    reset = small.builder.add_vdi(small.shared, "r", size=MiB, fields={"on_boot": "reset"})
    plain = small.builder.add_vdi(small.plain, "p", size=MiB)

    refused(small, "OPERATION_NOT_ALLOWED", [f"VDI is a snapshot: {taken}"], method, taken)
    refused(small, "VDI_INCOMPATIBLE_TYPE", [suspend, "Suspend"], method, suspend)
    refused(small, "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", [], method, reset)
    refused(small, "SR_OPERATION_NOT_SUPPORTED", [small.plain], method, plain)
    refused(small, "SR_OPERATION_NOT_SUPPORTED", [small.tools], method, small.iso)


def test_a_raw_image_cannot_be_tracked(small: SmallPool) -> None:
    raw = small.builder.add_vdi(small.shared, "raw", size=MiB, raw=True)
    text = "Invalid VDI type [opterr=Raw VDI or snapshot not permitted]"

    refused(small, "SR_BACKEND_FAILURE_66", ["", text, ""], "VDI.enable_cbt", raw)


def test_the_licence_restricts_enabling_only(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    small.pool.faults.set("licence.restrict_cbt", "on")
    pool = small.client.record("pool", small.client.texts("pool.get_all")[0])

    assert pool["restrictions"] == {"restrict_cbt": "true", "restrict_nbd": "false"}
    refused(small, "LICENCE_RESTRICTION", ["CBT"], "VDI.enable_cbt", small.root)
    assert small.client.changed(base, small.snapshot(small.root)) == set()


def test_list_changed_blocks_without_tracking_sr(small: SmallPool) -> None:
    plain = small.builder.add_vdi(small.plain, "p", size=MiB)
    one, two = small.snapshot(plain), small.snapshot(plain)

    refused(small, "SR_OPERATION_NOT_SUPPORTED", [small.plain], "VDI.list_changed_blocks", one, two)


def test_operations_of_tracking_are_told_by_the_sr_not_the_vdi(small: SmallPool) -> None:
    names = {"enable_cbt", "disable_cbt", "data_destroy", "list_changed_blocks"}
    vdi = set(small.client.texts("VDI.get_allowed_operations", small.root))
    sr = set(small.client.texts("SR.get_allowed_operations", small.shared))

    assert "snapshot" in vdi
    assert not vdi & names
    assert {f"vdi_{name}" for name in names} <= sr
    assert not {f"vdi_{name}" for name in names} & set(
        small.client.texts("SR.get_allowed_operations", small.plain)
    )


def test_which_types_of_sr_track_changes_is_told_by_sm(small: SmallPool) -> None:
    found = small.client.call("SM.get_all_records")
    assert isinstance(found, dict)
    capable = set()
    for record in found.values():
        assert isinstance(record, dict)
        assert isinstance(record["features"], dict)
        if "VDI_CONFIG_CBT" in record["features"]:
            capable.add(record["type"])

    assert {"ext", "nfs", "lvm", "lvmoiscsi", "zfs"} <= capable
    assert not {"iso", "udev", "linstor", "cephfs"} & capable


# ── snapshots ────────────────────────────────────────────────────────────────────────────


def test_a_snapshot_copies_what_it_copies(small: SmallPool) -> None:
    small.client.call("VDI.add_to_other_config", small.root, "k", "v")
    small.client.call("VDI.add_tags", small.root, "gold")
    taken = small.snapshot(small.root)
    small.client.call("VDI.add_to_other_config", small.root, "later", "x")
    record = small.client.record("VDI", taken)

    assert record["is_a_snapshot"] is True
    assert record["snapshot_of"] == small.root
    assert record["snapshot_time"] != "19700101T00:00:00Z"
    assert record["cbt_enabled"] is True
    assert (record["name_label"], record["tags"]) == ("root", ["gold"])
    assert record["other_config"] == {"k": "v"}
    assert small.client.call("VDI.get_snapshots", small.root) == [taken]


def test_a_hidden_base_copy_appears_below_both(small: SmallPool) -> None:
    small.write(small.root, 1)
    taken = small.snapshot(small.root)
    base = small.client.text("VDI.get_parent", taken)
    record = small.client.record("VDI", base)

    assert small.client.call("VDI.get_parent", small.root) == base
    assert (record["name_label"], record["managed"]) == ("base copy", False)
    assert record["physical_utilisation"] == BLOCK
    assert small.client.record("VDI", taken)["sm_config"] == {"vhd-parent": record["uuid"]}
    refused(small, "VDI_NOT_MANAGED", [base], "VDI.destroy", base)
    refused(small, "VDI_NOT_MANAGED", [base], "VDI.data_destroy", base)


def test_base_copies_go_when_they_are_coalesced(small: SmallPool) -> None:
    small.write(small.root, 1)
    taken = small.snapshot(small.root)
    small.client.call("VDI.destroy", taken)

    records = small.client.call("VDI.get_all_records")
    assert isinstance(records, dict)
    assert not [r for r in records.values() if isinstance(r, dict) and not r["managed"]]
    assert small.client.call("VDI.get_parent", small.root) == "OpaqueRef:NULL"


def test_what_cannot_be_snapshotted(small: SmallPool) -> None:
    shared = small.builder.add_vdi(small.shared, "s", size=MiB, fields={"sharable": True})
    reset = small.builder.add_vdi(small.shared, "r", size=MiB, fields={"on_boot": "reset"})

    refused(small, "VDI_IS_SHARABLE", [shared], "VDI.snapshot", shared)
    refused(small, "VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION", [], "VDI.snapshot", reset)


def test_a_chain_of_30_takes_no_more_snapshots(small: SmallPool) -> None:
    small.pool.faults.set("sr.gc", "off")
    for number in range(29):
        small.write(small.root, number)
        small.snapshot(small.root)
    small.write(small.root, 40)

    text = "The snapshot chain is too long"
    refused(small, "SR_BACKEND_FAILURE_109", ["", text, ""], "VDI.snapshot", small.root)
    assert small.client.call("VDI.get_cbt_enabled", small.root) is True


def test_a_full_sr_takes_no_snapshots(small: SmallPool) -> None:
    small.pool.faults.set("sr.no_space", "shared")

    with pytest.raises(Failed, match="SR_BACKEND_FAILURE_44"):
        small.snapshot(small.root)


def test_on_boot_cannot_be_set_while_tracked(small: SmallPool) -> None:
    refused(
        small, "VDI_CBT_ENABLED", [small.idle_disk], "VDI.set_on_boot", small.idle_disk, "reset"
    )


# ── data_destroy and destroy ─────────────────────────────────────────────────────────────


def test_data_destroy_keeps_the_record_and_drops_the_contents(small: SmallPool) -> None:
    small.write(small.root, 1)
    taken = small.snapshot(small.root)
    before = small.client.record("VDI", taken)
    small.client.call("VDI.data_destroy", taken)
    after = small.client.record("VDI", taken)

    same = ("uuid", "cbt_enabled", "is_a_snapshot", "managed", "snapshot_of", "name_label")
    assert after["type"] == "cbt_metadata"
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    assert isinstance(after["other_config"], dict)
    content = "/No content: this is a cbt_metadata VDI/"
    assert after["other_config"]["content_id"] == content
    assert small.disk(taken).pread(BLOCK, BLOCK) == bytes(BLOCK)
    small.client.call("VDI.data_destroy", taken)


def test_data_destroy_is_refused_for_what_is_no_tracked_snapshot(small: SmallPool) -> None:
    untracked = small.builder.add_vdi(small.shared, "u", size=MiB)
    taken = small.snapshot(untracked)
    method = "VDI.data_destroy"

    told = f"VDI is not a snapshot: {small.root}"
    refused(small, "OPERATION_NOT_ALLOWED", [told], method, small.root)
    refused(small, "VDI_NO_CBT_METADATA", [taken], method, taken)
    refused(small, "SR_OPERATION_NOT_SUPPORTED", [small.tools], method, small.iso)


def test_data_destroy_is_refused_while_the_vm_snapshot_has_its_vbd(small: SmallPool) -> None:
    machine = small.client.text("VM.snapshot", small.web1, "x")
    vbd = small.client.texts("VM.get_VBDs", machine)[0]
    taken = small.client.text("VBD.get_VDI", vbd)

    refused(small, "VDI_IN_USE", [taken, "data_destroy"], "VDI.data_destroy", taken)
    assert small.client.call("VDI.get_type", taken) == "user"
    small.client.call("VM.destroy", machine)
    small.client.call("VDI.data_destroy", taken)


def test_data_destroy_shows_the_new_type_while_it_waits_and_takes_it_back(
    small: SmallPool,
) -> None:
    taken = small.snapshot(small.root)
    small.pool.faults.set("vdi.data_destroy_wait", "60s")
    attachment = small.pool.open_export(small.host1, small.export(taken))
    task = small.client.text("Async.VDI.data_destroy", taken)
    deadline = time.monotonic() + 5
    while small.client.call("VDI.get_type", taken) != "cbt_metadata":
        assert time.monotonic() < deadline
    assert small.disk(taken).leaf is not None
    attachment.close()
    while small.client.call("task.get_status", task) == "pending":
        assert time.monotonic() < deadline

    assert small.client.call("task.get_status", task) == "success"
    assert small.disk(taken).leaf is None


def test_a_failing_data_destroy_takes_the_type_back(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    small.pool.faults.set("sr.fail", "VDI.data_destroy:SR_BACKEND_FAILURE_80::gone wrong:")

    with pytest.raises(Failed, match="SR_BACKEND_FAILURE_80"):
        small.client.call("VDI.data_destroy", taken)

    assert small.client.call("VDI.get_type", taken) == "user"
    assert small.disk(taken).leaf is not None


def test_metadata_can_do_little(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    small.client.call("VDI.data_destroy", taken)
    wrong = [taken, "CBT metadata"]
    null = "OpaqueRef:NULL"

    for method, *params in (
        ("VDI.snapshot",),
        ("VDI.clone",),
        ("VDI.copy", null, null, null),
        ("VDI.resize", 128 * MiB),
        ("VDI.get_nbd_info",),
    ):
        refused(small, "VDI_INCOMPATIBLE_TYPE", wrong, str(method), taken, *params)
    vbd: Json = {"VM": small.idle, "VDI": taken, "userdevice": "7", "type": "Disk", "mode": "RO"}
    refused(small, "VDI_INCOMPATIBLE_TYPE", wrong, "VBD.create", vbd)
    with pytest.raises(SimError, match="VDI_INCOMPATIBLE_TYPE"):
        small.pool.open_export(small.host1, small.export(taken))
    with pytest.raises(Failed, match="SR_BACKEND_FAILURE"):
        small.client.call("VDI.update", taken)
    small.client.call("VDI.destroy", taken)


def test_what_is_attached_cannot_be_destroyed_resized_or_copied(small: SmallPool) -> None:
    refused(small, "VDI_IN_USE", [small.root, "destroy"], "VDI.destroy", small.root)
    refused(small, "VDI_IN_USE", [small.root, "resize"], "VDI.resize", small.root, 128 * MiB)
    refused(small, "VDI_IN_USE", [small.root, "clone"], "VDI.clone", small.root)
    small.client.call("VDI.resize_online", small.root, 128 * MiB)
    assert small.client.call("VDI.get_virtual_size", small.root) == 128 * MiB


def test_an_unplugged_vbd_goes_with_its_disk(small: SmallPool) -> None:
    small.client.call("VDI.destroy", small.idle_disk)

    assert small.client.call("VM.get_VBDs", small.idle) == []


def test_sizes_are_rounded_up_as_the_sr_does_and_never_shrink(small: SmallPool) -> None:
    record: Json = {
        "SR": small.shared,
        "virtual_size": 3 * MiB + 1,
        "type": "user",
        "sharable": False,
        "read_only": False,
        "other_config": {},
        "name_label": "made",
    }
    made = small.client.text("VDI.create", record)

    assert small.client.call("VDI.get_virtual_size", made) == 4 * MiB
    text = "VDI Invalid size [opterr=shrinking not allowed]"
    refused(small, "SR_BACKEND_FAILURE_79", ["", text, ""], "VDI.resize", made, 2 * MiB)
    assert isinstance(record, dict)
    refused(
        small,
        "FIELD_TYPE_ERROR",
        ["type"],
        "VDI.create",
        {k: v for k, v in record.items() if k != "type"},
    )


def test_forget_and_scan_bring_a_snapshot_back_without_its_origin(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    uuid = small.uuid(taken)
    small.client.call("VDI.forget", taken)
    small.client.call("SR.scan", small.shared)

    found = small.client.text("VDI.get_by_uuid", uuid)
    assert found != taken
    assert small.client.call("VDI.get_snapshot_of", found) == "OpaqueRef:NULL"


# ── SRs ──────────────────────────────────────────────────────────────────────────────────


def test_an_sr_without_attached_pbd_does_nothing(small: SmallPool) -> None:
    lone = small.builder.add_vdi(small.local, "lone", size=MiB)
    pbd = small.client.texts("SR.get_PBDs", small.local)[0]
    small.client.call("PBD.unplug", pbd)

    refused(small, "SR_NOT_ATTACHED", [small.local], "VDI.snapshot", lone)
    with small.pool.lock:
        small.pool.db.destroy("PBD", pbd)
    refused(small, "SR_HAS_NO_PBDS", [small.local], "VDI.snapshot", lone)


def test_a_second_operation_on_an_sr_waits(small: SmallPool) -> None:
    small.pool.faults.set("sr.delay", "0.1")
    first = small.client.text("Async.VDI.snapshot", small.root)
    deadline = time.monotonic() + 5
    while not small.client.call("SR.get_current_operations", small.shared):
        assert time.monotonic() < deadline
    assert small.client.call("SR.get_allowed_operations", small.shared) == []

    small.snapshot(small.data)

    assert small.client.call("task.get_status", first) == "success"
    assert small.client.texts("SR.get_allowed_operations", small.shared)


def test_an_sr_can_be_locked_by_somebody_else(small: SmallPool) -> None:
    small.pool.faults.set("sr.lock", "0.05")
    before = time.monotonic()

    small.snapshot(small.root)
    small.snapshot(small.root)

    assert 0.04 <= time.monotonic() - before < 5


# ── exports and attachments ──────────────────────────────────────────────────────────────


def test_an_export_has_a_vbd_of_that_hosts_dom0_while_it_is_open(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    with small.pool.open_export(small.host2, small.export(taken)) as attachment:
        vbds = small.client.texts("VDI.get_VBDs", taken)
        record = small.client.record("VBD", vbds[0])
        buffer = bytearray(512)
        attachment.pread_into(0, memoryview(buffer))
        assert attachment.size == 64 * MiB
        refused(small, "VDI_IN_USE", [taken, "destroy"], "VDI.destroy", taken)

    dom0 = small.pool.db.text("host", small.host2, "control_domain")
    assert (record["VM"], record["mode"], record["currently_attached"]) == (dom0, "RO", True)
    assert small.client.call("VDI.get_VBDs", taken) == []
    assert small.pool.counts()[f"read.{small.uuid(taken)}"] == 512


@pytest.mark.parametrize(
    "name", ["", "/", "/no-uuid?session_id=SESSION", "/UUID", "/UUID?session_id=OpaqueRef:x"]
)
def test_a_bad_export_name_opens_nothing(small: SmallPool, name: str) -> None:
    name = name.replace("SESSION", small.client.session).replace("UUID", small.uuid(small.root))

    with pytest.raises(SimError):
        small.pool.open_export(small.host1, name)
    assert len(small.client.texts("VDI.get_VBDs", small.root)) == 1


def test_an_export_outlives_its_session_but_its_name_does_not(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    name = small.export(taken)
    with small.pool.open_export(small.host1, name) as attachment:
        small.client.call("session.logout")
        attachment.pread_into(0, memoryview(bytearray(512)))
    with pytest.raises(SimError, match="SESSION_INVALID"):
        small.pool.open_export(small.host1, name)


def test_a_host_that_does_not_see_the_sr_opens_nothing(small: SmallPool) -> None:
    lone = small.builder.add_vdi(small.local, "lone", size=MiB)

    with pytest.raises(SimError, match="SR_NOT_ATTACHED"):
        small.pool.open_export(small.host2, small.export(lone))
    small.pool.open_export(small.host1, small.export(lone)).close()


def test_a_live_disk_opens_on_the_host_of_its_writer_only(small: SmallPool) -> None:
    with pytest.raises(SimError, match="not detached cleanly"):
        small.pool.open_export(small.host2, small.export(small.root))
    small.pool.open_export(small.host1, small.export(small.root)).close()


def test_an_open_export_of_a_halted_vms_disk_blocks_its_start_elsewhere(small: SmallPool) -> None:
    with small.pool.open_export(small.host1, small.export(small.idle_disk)):
        with pytest.raises(Failed, match="SR_BACKEND_FAILURE_46"):
            small.client.call("VM.start", small.idle, False, False)
    assert small.client.call("VM.get_power_state", small.idle) == "Halted"
    small.client.call("VM.start", small.idle, False, False)


def test_two_plugs_of_a_vdi_at_a_time_race(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    small.pool.faults.set("nbd.attach_delay", "1")
    opened: list[bool] = []

    def connect() -> None:
        small.pool.open_export(small.host1, small.export(taken)).close()
        opened.append(True)

    thread = threading.Thread(target=connect)
    thread.start()
    deadline = time.monotonic() + 5
    while not small.pool.plugging[taken]:
        assert time.monotonic() < deadline
    with pytest.raises(SimError, match="VDI_IN_USE"):
        small.pool.open_export(small.host2, small.export(taken))
    thread.join()

    assert opened == [True]
    assert small.client.call("VDI.get_VBDs", taken) == []


def test_a_vbd_stays_for_the_delay_and_list_changed_blocks_waits(small: SmallPool) -> None:
    base, newer = small.snapshot(small.root), small.snapshot(small.root)
    small.pool.faults.set("nbd.detach_delay", "0.1")
    attachment = small.pool.open_export(small.host1, small.export(newer))
    thread = threading.Thread(target=attachment.close)
    thread.start()
    deadline = time.monotonic() + 5
    vbd = small.client.texts("VDI.get_VBDs", newer)[0]
    while not small.client.call("VBD.get_current_operations", vbd):
        assert time.monotonic() < deadline

    assert small.client.changed(base, newer) == set()
    thread.join()
    assert small.client.call("VDI.get_VBDs", newer) == []


def test_a_leaked_vbd_stays_until_somebody_unplugs_it(small: SmallPool) -> None:
    taken = small.snapshot(small.root)
    small.pool.faults.set("nbd.leak", "on")
    small.pool.open_export(small.host1, small.export(taken)).close()
    (vbd,) = small.client.texts("VDI.get_VBDs", taken)

    refused(small, "VDI_IN_USE", [taken, "data_destroy"], "VDI.data_destroy", taken)
    small.client.call("VBD.unplug", vbd)
    refused(small, "DEVICE_ALREADY_DETACHED", [vbd], "VBD.unplug", vbd)
    small.client.call("VBD.destroy", vbd)
    small.client.call("VDI.data_destroy", taken)


def test_an_import_counts_as_writing(small: SmallPool) -> None:
    base = small.snapshot(small.idle_disk)
    client = small.client
    with small.pool.http_attach(small.host1, client.session, small.idle_disk, write=True) as a:
        a.disk.write(5 * BLOCK, b"x")
        with pytest.raises(SimError, match="VDI_IN_USE"):
            small.pool.http_attach(small.host1, client.session, small.idle_disk, write=True)

    assert client.changed(base, small.snapshot(small.idle_disk)) == {5}


# ── where to read ────────────────────────────────────────────────────────────────────────


def nbd_info(small: SmallPool, vdi: str) -> list[tuple[str, str]]:
    found = small.client.call("VDI.get_nbd_info", vdi)
    assert isinstance(found, list)
    rows = [row for row in found if isinstance(row, dict)]
    assert all(row["exportname"] == small.export(vdi) for row in rows)
    assert all(row["port"] == small.pool.nbd_port for row in rows)
    return [(str(row["address"]), str(row["subject"])) for row in rows]


def test_nbd_info_lists_each_address_of_each_host_that_sees_the_sr(small: SmallPool) -> None:
    lone = small.builder.add_vdi(small.local, "lone", size=MiB)
    small.pool.set_certificate(small.host1, "PEM", subject="xcp1.sim")

    assert nbd_info(small, small.root) == [
        ("127.0.0.12", "xcp1.sim"),
        ("fd00::12/64", "xcp1.sim"),
        ("127.0.0.13", "xcp2"),
    ]
    assert nbd_info(small, lone) == [("127.0.0.12", "xcp1.sim"), ("fd00::12/64", "xcp1.sim")]
    assert small.client.call("host.get_server_certificate", small.host1) == "PEM"


def test_nbd_info_has_ports_as_strings_in_xml(small: SmallPool) -> None:
    answer = small.client.xml("VDI.get_nbd_info", small.client.session, small.root)["Value"]

    assert isinstance(answer, list)
    assert answer[0]["port"] == "10809"


def test_nbd_info_is_empty_without_purpose_or_plugged_interface(small: SmallPool) -> None:
    small.client.call("network.remove_purpose", small.network, "nbd")
    assert nbd_info(small, small.root) == []
    assert small.pool.nbd_mode() == ""

    small.client.call("network.add_purpose", small.network, "insecure_nbd")
    assert small.pool.nbd_mode() == "insecure_nbd"
    with small.pool.lock:
        for pif in small.pool.db.refs("network", small.network, "PIFs"):
            small.pool.db.set("PIF", pif, currently_attached=False)
    assert nbd_info(small, small.root) == []


def test_insecure_nbd_has_a_certificate_too(small: SmallPool) -> None:
    small.pool.set_certificate(small.host1, "PEM", subject="xcp1.sim")
    small.client.call("network.remove_purpose", small.network, "nbd")
    small.client.call("network.add_purpose", small.network, "insecure_nbd")

    found = small.client.call("VDI.get_nbd_info", small.root)
    assert isinstance(found, list)
    assert isinstance(found[0], dict)
    assert found[0]["cert"] == "PEM"


def test_purposes_do_not_mix(small: SmallPool) -> None:
    other = small.client.texts("network.get_by_name_label", "management")[0]
    wrong = ["insecure_nbd", "nbd"]

    for network in (other, small.network):
        refused(
            small,
            "NETWORK_INCOMPATIBLE_PURPOSES",
            wrong,
            "network.add_purpose",
            network,
            "insecure_nbd",
        )


def test_nbd_info_fails_when_a_host_cannot_be_asked(small: SmallPool) -> None:
    small.pool.faults.set("host.down", "xcp2")

    refused(small, "CANNOT_CONTACT_HOST", [small.host2], "VDI.get_nbd_info", small.root)
