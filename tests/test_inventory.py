"""An inventory is what the pool says, minus what would be dangerous to believe."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors, inventory
from cbtfs.inventory import EPOCH, VBD, VDI, VM, Host, Inventory, Network, Pool

from .memory import a_disk, an_inventory

Fields = Mapping[str, object]


def uuid(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


def parse(**classes: Mapping[str, Fields]) -> Inventory:
    """Parse a pool of these records; a record without uuid gets one of its own."""
    numbers = iter(range(1_000_000))
    tables: dict[str, Mapping[str, Fields]] = {name: {} for name in inventory.CLASSES}
    tables["pool"] = {"p": {}}
    for name, records in classes.items():
        tables[name] = {ref: {"uuid": uuid(next(numbers))} | dict(r) for ref, r in records.items()}
    return inventory.parse({name: json.dumps(table).encode() for name, table in tables.items()})


# ── Parsing ──────────────────────────────────────────────────────────────────────────────────


def test_a_pool_is_parsed() -> None:
    fields = {"name_label": "prod", "master": "h1", "restrictions": {"restrict_cbt": "true"}}

    found = parse(pool={"p": {"uuid": uuid(1), **fields}}).pool

    assert found == Pool(
        uuid=uuid(1), name="prod", master_ref="h1", restrictions={"restrict_cbt": "true"}
    )


def test_a_host_is_parsed() -> None:
    fields = {"name_label": "xcp1", "address": "192.0.2.1", "hostname": "x", "enabled": False}

    found = parse(host={"h1": {"uuid": uuid(1), **fields}}).hosts

    assert found == {
        "h1": Host(
            ref="h1", uuid=uuid(1), name="xcp1", address="192.0.2.1", hostname="x", enabled=False
        )
    }


def test_a_vm_is_parsed() -> None:
    found = parse(
        VM={
            "v": {
                "name_label": "nightly",
                "power_state": "Halted",
                "is_a_template": True,
                "is_a_snapshot": True,
                "snapshot_of": "w",
                "snapshot_time": "20261122T020000Z",
                "VBDs": ["b"],
                "tags": ["gold"],
                "other_config": {"k": "v"},
                "resident_on": "OpaqueRef:NULL",
            }
        }
    ).vms["v"]

    assert (found.name, found.power_state, found.snapshot_of) == ("nightly", "Halted", "w")
    assert (found.is_a_template, found.is_a_snapshot, found.is_control_domain) == (
        True,
        True,
        False,
    )
    assert found.snapshot_time == datetime(2026, 11, 22, 2, tzinfo=UTC)
    assert (found.vbd_refs, found.tags, found.resident_on) == (("b",), frozenset({"gold"}), "")
    assert found.other_config == {"k": "v"}


def test_a_vdi_is_parsed() -> None:
    found = parse(
        VDI={
            "d": {
                "name_label": "root",
                "name_description": "boots",
                "SR": "s",
                "virtual_size": 1 << 44,
                "physical_utilisation": 4096,
                "type": "system",
                "managed": True,
                "missing": False,
                "is_a_snapshot": False,
                "snapshot_of": "OpaqueRef:NULL",
                "snapshot_time": "19700101T00:00:00Z",
                "cbt_enabled": True,
                "read_only": True,
                "sharable": True,
                "on_boot": "reset",
                "VBDs": ["b"],
                "tags": ["t"],
                "allowed_operations": ["snapshot", "unheard_of"],
                "is_tools_iso": False,
                "location": "here",
                "sm_config": {"vhd-parent": "x"},
            }
        }
    ).vdis["d"]

    assert (found.name, found.description, found.sr_ref) == ("root", "boots", "s")
    assert (found.size, found.used, found.type) == (1 << 44, 4096, "system")
    assert (found.snapshot_of, found.snapshot_time) == ("", EPOCH)
    assert (found.cbt_enabled, found.read_only, found.sharable) == (True, True, True)
    assert (found.on_boot, found.location) == ("reset", "here")
    assert (found.vbd_refs, found.tags) == (("b",), frozenset({"t"}))
    assert found.allowed_operations == {"snapshot", "unheard_of"}
    assert found.sm_config == {"vhd-parent": "x"}


def test_networks_and_interfaces_are_parsed() -> None:
    found = parse(
        network={"n": {"name_label": "backup", "purpose": ["nbd"]}},
        PIF={"i": {"network": "n", "host": "h", "IP": "192.0.2.1", "currently_attached": True}},
    )

    assert found.networks == {"n": Network(ref="n", name="backup", purpose=frozenset({"nbd"}))}
    pif = found.pifs["i"]
    assert (pif.network_ref, pif.host_ref, pif.ip, pif.currently_attached) == (
        "n",
        "h",
        "192.0.2.1",
        True,
    )


def test_an_sr_knows_the_hosts_that_have_it_attached() -> None:
    found = parse(
        host={"h1": {}, "h2": {}, "h3": {}},
        SR={"s": {"type": "nfs"}, "t": {}},
        PBD={
            "b2": {"host": "h2", "SR": "s", "currently_attached": True},
            "b1": {"host": "h1", "SR": "s", "currently_attached": True},
            "b3": {"host": "h3", "SR": "s", "currently_attached": False},
            "b4": {"host": "gone", "SR": "s", "currently_attached": True},
        },
    )

    assert found.srs["s"].host_refs == ("h1", "h2")
    assert found.srs["t"].host_refs == ()


def test_an_sr_tracks_changes_if_its_driver_does() -> None:
    found = parse(
        SR={"s": {"type": "nfs"}, "t": {"type": "iso"}, "u": {"type": "unknown"}},
        SM={
            "m": {"type": "nfs", "features": {"VDI_CONFIG_CBT": 1, "VDI_CREATE": 1}},
            "n": {"type": "iso", "features": {"VDI_CREATE": 1}},
        },
    )

    assert {ref: sr.cbt_capable for ref, sr in found.srs.items()} == {
        "s": True,
        "t": False,
        "u": False,
    }


def test_negative_sizes_are_none() -> None:
    found = parse(
        VDI={"d": {"virtual_size": -1, "physical_utilisation": -1}},
        SR={"s": {"physical_size": -1, "physical_utilisation": -1}},
    )

    assert (found.vdis["d"].size, found.vdis["d"].used) == (0, 0)
    assert (found.srs["s"].physical_size, found.srs["s"].physical_utilisation) == (0, 0)


def test_no_size_is_more_than_a_file_can_have() -> None:
    found = parse(VDI={"d": {"virtual_size": 1 << 70, "physical_utilisation": 1 << 80}})

    assert (found.vdis["d"].size, found.vdis["d"].used) == ((1 << 63) - 1, (1 << 63) - 1)


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("20261122T02:00:00Z", datetime(2026, 11, 22, 2, tzinfo=UTC)),
        ("2026-11-22T02:00:00Z", datetime(2026, 11, 22, 2, tzinfo=UTC)),
        ("20261122T04:00:00+02:00", datetime(2026, 11, 22, 2, tzinfo=UTC)),
        ("20261122T02:00:00", datetime(2026, 11, 22, 2, tzinfo=UTC)),
        ("", EPOCH),
        ("yesterday", EPOCH),
        ("00010101T00:00:00+14:00", EPOCH),
    ],
)
def test_times_are_utc_and_nonsense_is_the_epoch(text: str, when: datetime) -> None:
    assert parse(VDI={"d": {"snapshot_time": text}}).vdis["d"].snapshot_time == when


@pytest.mark.parametrize(
    ("device", "userdevice", "name"),
    [
        ("xvdb", "0", "xvdb"),
        ("", "0", "xvda"),
        ("", "25", "xvdz"),
        ("", "26", "xvdaa"),
        ("", "701", "xvdzz"),
        ("", "702", "xvdaaa"),
        ("", "hdc", "hdc"),
        ("../../etc", "1", "xvdb"),
        ("", "../x", "disk"),
        ("", "autodetect" * 9, "disk"),
        ("sda\n", "", "disk"),
        ("", "\u0663", "disk"),
    ],
)
def test_devices_are_safe_names(device: str, userdevice: str, name: str) -> None:
    found = parse(VBD={"b": {"device": device, "userdevice": userdevice}}).vbds["b"]

    assert (found.device, found.userdevice) == (name, userdevice)


@pytest.mark.parametrize("bad", ["", "../../etc", "x", uuid(1) + "\n", uuid(1)[:-1], "OpaqueRef:1"])
def test_a_record_without_a_proper_uuid_is_left_out_and_told(bad: str) -> None:
    found = parse(VDI={"a": {"uuid": bad, "name_label": "evil"}, "b": {}})

    assert list(found.vdis) == ["b"]
    assert len(found.problems) == 1
    assert "VDI" in found.problems[0]
    assert "'evil'" in found.problems[0]


def test_the_second_record_of_a_uuid_is_left_out_and_told() -> None:
    found = parse(VM={"b": {"uuid": uuid(7)}, "a": {"uuid": uuid(7).upper()}})

    assert list(found.vms) == ["a"]
    assert found.vms["a"].uuid == uuid(7)
    assert "the uuid of another" in found.problems[0]


@pytest.mark.parametrize("name", inventory.CLASSES)
def test_a_class_of_another_shape_or_none_is_refused(name: str) -> None:
    tables = dict.fromkeys(inventory.CLASSES, b"{}") | {"pool": b'{"p": {}}'}

    with pytest.raises(errors.PoolError, match=f" {name} records"):
        inventory.parse(tables | {name: b"[]"})
    del tables[name]
    with pytest.raises(errors.PoolError, match=f"no {name} records"):
        inventory.parse(tables)


def test_a_pool_without_itself_is_refused() -> None:
    with pytest.raises(errors.PoolError, match="no pool record"):
        parse(pool={})


# ── Asking ───────────────────────────────────────────────────────────────────────────────────


def test_live_vms_are_no_templates_snapshots_or_control_domains() -> None:
    found = parse(
        VM={
            "a": {"name_label": "b"},
            "b": {"name_label": "a"},
            "c": {"name_label": "a", "is_a_template": True},
            "d": {"name_label": "a", "is_a_snapshot": True},
            "e": {"name_label": "a", "is_control_domain": True},
        }
    )

    assert [vm.ref for vm in found.live_vms()] == ["b", "a"]


def machine(vbds: Mapping[str, Fields], vdis: Mapping[str, Fields]) -> Inventory:
    return parse(VM={"v": {"VBDs": [*vbds, "dangling"]}}, VBD=vbds, VDI=vdis)


def test_disks_of_a_vm_come_by_device() -> None:
    found = machine(
        {
            "b1": {"VDI": "d1", "userdevice": "1"},
            "b2": {"VDI": "d2", "userdevice": "0"},
            "b3": {"VDI": "d3", "userdevice": "26"},
        },
        {"d1": {}, "d2": {}, "d3": {}},
    )

    disks = found.disks_of(found.vms["v"])
    assert [(d.device, d.vbd.ref, d.vdi.ref) for d in disks] == [
        ("xvda", "b2", "d2"),
        ("xvdb", "b1", "d1"),
        ("xvdaa", "b3", "d3"),
    ]


@pytest.mark.parametrize(
    "vbd",
    [
        {"VDI": "d", "type": "CD"},
        {"VDI": "d", "empty": True},
        {"VDI": "OpaqueRef:NULL"},
        {"VDI": "gone"},
        {"VDI": "base"},
    ],
)
def test_other_drives_are_no_disks(vbd: Fields) -> None:
    found = machine({"b": vbd}, {"d": {}, "base": {"managed": False}})

    assert found.disks_of(found.vms["v"]) == []


def test_disks_of_one_device_are_told_apart() -> None:
    found = machine(
        {"b1": {"VDI": "d1"}, "b2": {"VDI": "d2"}, "b3": {"VDI": "d3", "userdevice": "0"}},
        {f"d{n}": {"uuid": uuid(n)} for n in (1, 2, 3)},
    )

    assert [d.device for d in found.disks_of(found.vms["v"])] == [
        "xvda",
        "disk~00000001",
        "disk~00000002",
    ]


def test_a_disk_that_is_there_twice_counts_once() -> None:
    found = machine({"b1": {"VDI": "d"}, "b2": {"VDI": "d", "userdevice": "1"}}, {"d": {}})

    assert [d.vbd.ref for d in found.disks_of(found.vms["v"])] == ["b1"]


def test_snapshots_come_by_time_and_only_if_they_are_some() -> None:
    found = parse(
        VDI={
            "live": {},
            "late": {"is_a_snapshot": True, "snapshot_of": "live", "snapshot_time": "20260102T00Z"},
            "early": {
                "is_a_snapshot": True,
                "snapshot_of": "live",
                "snapshot_time": "20260101T00Z",
            },
            "liar": {"is_a_snapshot": False, "snapshot_of": "live"},
            "orphan": {"is_a_snapshot": True, "snapshot_of": "OpaqueRef:NULL"},
        }
    )

    assert [vdi.ref for vdi in found.snapshots_of(found.vdis["live"])] == ["early", "late"]
    assert found.snapshots_of(found.vdis["late"]) == []


def test_snapshots_of_a_vm_come_by_time() -> None:
    found = parse(
        VM={
            "live": {},
            "s2": {"is_a_snapshot": True, "snapshot_of": "live", "snapshot_time": "20260102T00Z"},
            "s1": {"is_a_snapshot": True, "snapshot_of": "live", "snapshot_time": "20260101T00Z"},
        }
    )

    assert [vm.ref for vm in found.vm_snapshots_of(found.vms["live"])] == ["s1", "s2"]


def test_live_disks_are_managed_and_have_contents() -> None:
    found = parse(
        VDI={
            "b": {"name_label": "b"},
            "a": {"name_label": "a", "type": "system"},
            "base": {"managed": False},
            "snapshot": {"is_a_snapshot": True},
            "log": {"type": "cbt_metadata"},
        }
    )

    assert [vdi.ref for vdi in found.live_disks()] == ["a", "b"]


def test_detached_disks_belong_to_no_vm_or_template() -> None:
    found = parse(
        SR={"cds": {"content_type": "iso"}},
        VM={
            "v": {"VBDs": ["b1", "gone"]},
            "t": {"VBDs": ["b2"], "is_a_template": True},
            "dom0": {"VBDs": ["b3"], "is_control_domain": True},
            "s": {"VBDs": ["b4"], "is_a_snapshot": True, "is_a_template": True},
            "w": {"VBDs": ["b5"]},
        },
        VBD={
            "b1": {"VDI": "in-vm"},
            "b2": {"VDI": "in-template"},
            "b3": {"VDI": "being-read"},
            "b4": {"VDI": "in-snapshot"},
            "b5": {"VDI": "in-drive", "type": "CD"},
        },
        VDI={
            "in-vm": {},
            "in-template": {},
            "being-read": {"name_label": "1"},
            "in-snapshot": {"name_label": "2"},
            "in-drive": {"name_label": "3"},
            "image": {"SR": "cds"},
            "tools": {"is_tools_iso": True},
        },
    )

    assert [v.ref for v in found.detached_disks()] == ["being-read", "in-snapshot", "in-drive"]


@pytest.mark.parametrize(
    ("purposes", "answer"),
    [
        ([], ""),
        ([[]], ""),
        ([["insecure_nbd"]], "insecure_nbd"),
        ([["insecure_nbd"], ["nbd"]], "nbd"),
        ([["something"]], ""),
    ],
)
def test_the_best_purpose_of_any_network_counts(purposes: list[list[str]], answer: str) -> None:
    found = parse(network={str(n): {"purpose": p} for n, p in enumerate(purposes)})

    assert found.nbd_purpose == answer


def test_a_vdi_is_found_by_uuid() -> None:
    found = parse(VDI={"d": {"uuid": uuid(0xAB)}})

    assert found.vdi_by_uuid(uuid(0xAB).upper()).ref == "d"
    assert found.find_vdi(uuid(0xAB)) is found.vdis["d"]
    assert found.find_vdi("") is None
    with pytest.raises(errors.NotFound, match="no VDI"):
        found.vdi_by_uuid("x")


def test_a_vm_is_found_by_name_or_uuid() -> None:
    found = parse(VM={"v": {"uuid": uuid(7), "name_label": "web1"}})

    assert found.find_vm("web1") == found.find_vm(uuid(7)) == found.vms["v"]


@pytest.mark.parametrize("text", ["a\nb", "a\\x0ab", f"a_b~{uuid(7)[:8]}"])
def test_a_vm_is_found_by_its_name_as_it_is_printed(text: str) -> None:
    found = parse(VM={"v": {"uuid": uuid(7), "name_label": "a\nb"}})

    assert found.find_vm(text).ref == "v"


def test_snapshots_of_a_name_do_not_count() -> None:
    found = parse(
        VM={"v": {"name_label": "web1"}, "s": {"name_label": "web1", "is_a_snapshot": True}}
    )

    assert found.find_vm("web1").ref == "v"


def test_an_unknown_vm_is_not_found() -> None:
    with pytest.raises(errors.NotFound, match="'web1'"):
        parse().find_vm("web1")


def test_a_name_of_two_vms_is_refused_with_their_uuids() -> None:
    found = parse(VM={"v": {"name_label": "x"}, "w": {"name_label": "x"}})

    with pytest.raises(errors.UsageError) as caught:
        found.find_vm("x")
    assert all(vm.uuid in str(caught.value) for vm in found.vms.values())


# ── Hostile and large pools ──────────────────────────────────────────────────────────────────

refs = st.sampled_from(["a", "b", "c", "OpaqueRef:NULL", ""])
strings = st.text(alphabet=st.characters(categories=None), max_size=5)
records = st.fixed_dictionaries(
    {},
    optional={
        "uuid": st.sampled_from([uuid(1), uuid(2), "../x", ""]),
        "name_label": strings,
        "snapshot_of": refs,
        "is_a_snapshot": st.booleans(),
        "snapshot_time": strings,
        "SR": refs,
        "VDI": refs,
        "VM": refs,
        "host": refs,
        "VBDs": st.lists(refs, max_size=3),
        "device": strings,
        "userdevice": strings,
        "currently_attached": st.booleans(),
    },
)
tables_of_records = st.dictionaries(refs, records, max_size=3)


@given(st.fixed_dictionaries(dict.fromkeys(inventory.CLASSES, tables_of_records)))
def test_any_links_between_records_can_be_asked(tables: Mapping[str, Mapping[str, Fields]]) -> None:
    found = parse(**(dict(tables) | {"pool": {"p": {}}}))

    for vm in [*found.vms.values(), *found.live_vms()]:
        disks = found.disks_of(vm)
        assert len({disk.device for disk in disks}) == len(disks)
        assert all("/" not in disk.device and disk.device.isprintable() for disk in disks)
        assert vm not in found.vm_snapshots_of(vm) or vm.snapshot_of == vm.ref
    for vdi in found.vdis.values():
        assert found.vdi_by_uuid(vdi.uuid) is vdi
        assert all(s.is_a_snapshot for s in found.snapshots_of(vdi))
    assert {v.ref for v in found.detached_disks()} <= {v.ref for v in found.live_disks()}


def test_records_left_out_do_not_matter_to_those_that_stay() -> None:
    found = Inventory(pool=Pool(uuid="p"), vms={"v": VM(ref="v", uuid="u", vbd_refs=("b",))})
    lost = replace(
        found, vbds={"b": VBD(ref="b", vdi_ref="gone")}, vdis={"d": VDI(ref="d", uuid="")}
    )

    assert lost.disks_of(lost.vms["v"]) == []
    assert [vdi.ref for vdi in lost.detached_disks()] == ["d"]


def test_ten_thousand_disks_are_parsed_in_a_second() -> None:
    def table(fields: Fields) -> bytes:
        return json.dumps(
            {f"OpaqueRef:{n}": {"uuid": uuid(n), **fields} for n in range(10_000)}
        ).encode()

    maps: Fields = {"other_config": {"k": "v"}, "sm_config": {"k": "v"}, "xenstore_data": {}}
    tables = dict.fromkeys(inventory.CLASSES, b"{}") | {"pool": b'{"p": {}}'}
    tables["VDI"] = table({"name_label": "disk", "SR": "s", "virtual_size": 1 << 34, **maps})
    tables["VBD"] = table({"VM": "v", "VDI": "d", "userdevice": "0", **maps})

    start = time.process_time()
    found = inventory.parse(tables)

    assert time.process_time() - start < 1
    assert len(found.vdis) == len(found.vbds) == 10_000


# ── sharing ──────────────────────────────────────────────────────────────────────────────────────


def test_what_has_not_changed_is_shared_with_an_earlier_inventory() -> None:
    kept, changed = a_disk(1), a_disk(2)
    earlier = an_inventory(kept, changed, a_disk(3))
    now = an_inventory(a_disk(1), replace(changed, name="renamed"), a_disk(4))

    shared = now.sharing(earlier)

    assert shared == now
    assert shared.vdis[kept.ref] is kept
