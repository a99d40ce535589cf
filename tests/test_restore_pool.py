"""``restore --to-sr`` and ``--in-place``: points back into a pool, over the real wires."""

import contextlib
import json
import random
import signal
import ssl
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from cbtfs import damage, inplace, owner, readback, units
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.inplace import InPlace, Safety
from cbtfs.inventory import VM, Inventory
from cbtfs.newdisks import Goal
from cbtfs.pool import Pool
from cbtfs.progress import SilentProgress
from cbtfs.store import Store

from . import bigdisks
from .commands import Shell, items, leftovers
from .program import Program, untouched_process
from .simulated import Failure
from .smallvm import Small, running_small

pytestmark = pytest.mark.timeout(120)

SIZES = (4 * units.MiB, 2 * units.MiB, 6 * units.MiB)
BLOCK = units.CBT_BLOCK


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    """A pool with the VM ``v``, whose second disk is empty; what a test makes, it removes."""
    with running_small(tmp_path_factory.mktemp("pool"), sizes=SIZES) as made:
        for device in ("xvda", "xvdc"):
            write(
                made, device, {offset: random.randbytes(BLOCK) for offset in (0, BLOCK, 5 * BLOCK)}
            )
        yield made


@pytest.fixture(scope="module")
def shell(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A store with one point of ``v``."""
    made = Shell(small.pool, tmp_path_factory.mktemp("stores") / "store")
    made.sync("v")
    return made


def write(small: Small, device: str, content: dict[int, bytes], vm: str = "v") -> None:
    """Write into a running guest's disk."""
    guest = small.pool.open_guest(vm, device)
    for offset, data in content.items():
        guest.pwrite(data, offset)
    guest.shutdown()


def content_of(small: Small, uuid: str) -> bytes:
    """Return what a VDI holds, as xapi's own export has it."""
    api = small.api
    context = ssl.create_default_context(cafile=str(small.pool.ca_file))
    url = f"{small.pool.host_url(0)}/export_raw_vdi?vdi={uuid}&session_id={api.session}"
    with urllib.request.urlopen(url, context=context) as answer:
        data: bytes = answer.read()
    return data


def patch(small: Small, vdi: object, content: dict[int, bytes]) -> None:
    """Write to a disk that nobody has attached."""
    parts = [struct.pack("<QI", at, len(data)) + data for at, data in content.items()]
    data = b"".join((*parts, bytes(12)))
    context = ssl.create_default_context(cafile=str(small.pool.ca_file))
    where = f"vdi={vdi}&chunked=true&session_id={small.api.session}"
    url = f"{small.pool.host_url(0)}/import_raw_vdi?{where}"
    request = urllib.request.Request(url, data=data, method="PUT")
    with urllib.request.urlopen(request, context=context) as answer:
        answer.read()


def new_disks(small: Small) -> dict[str, dict[str, object]]:
    """Return the records of the disks that no VM has, by uuid."""
    attached = {vbd["VDI"] for vbd in small.api.records("VBD").values()}
    return {
        str(vdi["uuid"]): vdi
        for ref, vdi in small.api.records("VDI").items()
        if vdi["managed"] and not vdi["is_a_snapshot"] and ref not in attached
        if vdi["type"] == "user" and "iso" not in str(vdi["name_label"])
    }


def sr_uuid(small: Small, name: str, number: int = 0) -> str:
    """Return the uuid of an SR of this name."""
    found = [str(sr["uuid"]) for sr in small.api.records("SR").values() if sr["name_label"] == name]
    return found[number]


def our_tasks(small: Small) -> list[str]:
    """Return the tasks that cbtfs made for handlers."""
    tasks = small.api.records("task").items()
    return [ref for ref, task in tasks if str(task["name_label"]).startswith("cbtfs")]


@pytest.fixture(autouse=True)
def tidy(small: Small) -> Iterator[None]:
    """Set faults back and remove what a test restored; dom0 must hold nothing, and no task stay."""
    yield
    for key in small.pool.faults():
        small.pool.set(key, "")
    left, tasks = leftovers(small.pool), our_tasks(small)
    for uuid in new_disks(small):
        small.api.call("VDI.destroy", small.api.text("VDI.get_by_uuid", uuid))
    assert (left.dom0_vbds, tasks) == ([], [])


@pytest.mark.parametrize("sr", [("Local storage", 1), ("Large blocks", 0)], ids=str)
def test_new_disks_equal_the_point_byte_for_byte(
    small: Small, shell: Shell, sr: tuple[str, int]
) -> None:
    # the second local SR is not seen by the master: it sends us on to the other host
    told = shell.json("restore", "v/latest", "--to-sr", sr_uuid(small, *sr), "--verify", "full")

    disks = items(told, "disks")
    assert [disk["device"] for disk in disks] == ["xvda", "xvdb", "xvdc"]
    assert [disk["bytes_sent"] for disk in disks] == [3 * BLOCK, 0, 3 * BLOCK]
    assert [disk["verified_bytes"] for disk in disks] == list(SIZES)
    for disk in disks:
        uuid = str(disk["vdi_uuid"])
        assert content_of(small, uuid) == shell.image("v", str(disk["device"])).read_bytes()
    made = new_disks(small)
    assert {vdi["name_label"] for vdi in made.values()} == {"v 0", "v 1", "v 2"}
    for vdi in made.values():
        assert "cbtfs:owner" not in str(vdi["other_config"])
        assert "v/2" in str(vdi["name_description"])


def test_one_disk_and_a_sample_of_it(small: Small, shell: Shell) -> None:
    done = shell.run("-q", "restore", "v/latest/xvdc", "--to-sr", "Shared NFS")

    (uuid,) = new_disks(small)
    assert uuid in done.stdout
    assert "192 KiB of 6 MiB" in done.stdout
    assert done.stderr == ""


def test_a_dry_run_makes_nothing(small: Small, shell: Shell) -> None:
    told = shell.json("restore", "v/latest", "--to-sr", "Shared NFS", "-n")

    assert [disk["bytes"] for disk in items(told, "disks")] == [3 * BLOCK, 0, 3 * BLOCK]
    assert new_disks(small) == {}


def test_an_sr_is_named_exactly(small: Small, shell: Shell) -> None:
    two = shell.run("restore", "v/latest", "--to-sr", "Local storage", status=2).stderr

    assert sr_uuid(small, "Local storage", 0) in two
    assert sr_uuid(small, "Local storage", 1) in two


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("http.upload_cut", "100K", "VDI_IO_ERROR"),
        ("xapi.fail", "import_raw_vdi:SR_BACKEND_FAILURE_46", "SR_BACKEND_FAILURE_46"),
        ("xapi.fail", "VDI.set_other_config:INTERNAL_ERROR", "INTERNAL_ERROR"),
        ("xapi.fail", "VDI.set_name_label:INTERNAL_ERROR", "INTERNAL_ERROR"),
    ],
)
def test_what_fails_leaves_nothing_in_the_pool(
    small: Small, shell: Shell, key: str, value: str, said: str
) -> None:
    small.pool.set(key, value)

    done = shell.run("restore", "v/latest", "--to-sr", "Shared NFS", status=1)

    assert said in done.stderr
    assert new_disks(small) == {}


def test_damage_ends_it_and_leaves_nothing(small: Small, shell: Shell) -> None:
    image = shell.image("v", "xvdc")
    original = image.read_bytes()
    with image.open("r+b") as file:
        file.seek(5 * BLOCK + 9)
        file.write(b"damage")
    try:
        done = shell.run("restore", "v/latest", "--to-sr", "Shared NFS", status=4)
    finally:
        image.write_bytes(original)

    assert f"bytes {5 * BLOCK} to {6 * BLOCK} differ" in done.stderr
    assert new_disks(small) == {}


def test_what_is_on_record_as_damaged_is_refused_unless_forced(small: Small, shell: Shell) -> None:
    record = shell.image("v", "xvda").resolve().with_name(damage.RECORD)
    found = damage.Disagreement(blocks=1, extents=(Extent(0, BLOCK),))  # which no digest tells
    with Folder.open(record.parent) as point:
        damage.record_pool(point, "xvda", found, unproven=iter, now="2026-11-23T08:00:00+00:00")
    try:
        refused = [
            shell.run("restore", "v/latest", *way, status=4).stderr
            for way in (["--to-sr", "Shared NFS"], ["--in-place", "-n"])
        ]
        none = new_disks(small)
        forced = shell.run("-q", "restore", "v/latest/xvda", "--to-sr", "Shared NFS", "--force")
    finally:
        record.unlink()

    assert all("/xvda is on record as damaged; cbtfs verify says where" in r for r in refused)
    assert none == {}
    assert forced.stderr.endswith("is on record as damaged, and restored all the same\n")
    assert len(new_disks(small)) == 1


def test_what_is_not_in_the_point_is_told(small: Small, shell: Shell) -> None:
    path = shell.image("v", "xvda").with_name("point.json")
    original = path.read_bytes()
    record = json.loads(original)
    record["failures"] = [{"device": "xvdd", "vdi_uuid": "v", "error": "lost"}]
    path.write_text(json.dumps(record))
    try:
        partial = shell.run("restore", "v/latest", "--to-sr", "Shared NFS", "-n").stderr
        path.write_text(json.dumps({**record, "disks": []}))
        without = shell.run("restore", "v/latest", "--to-sr", "Shared NFS", status=10).stderr
    finally:
        path.write_bytes(original)

    assert "/xvdd is not in this point: lost" in partial
    assert "has no disks" in without


def test_a_vm_that_was_finished_without_an_answer_is_told_and_stays(
    small: Small, shell: Shell
) -> None:
    small.pool.set("xapi.fail_after", "VM.remove_from_other_config*1:INTERNAL_ERROR")

    done = shell.run("restore", "v/latest", "--to-sr", "Shared NFS", "--vm-name", "made", status=1)

    small.pool.set("xapi.fail_after", "")
    ref = small.api.named("VM", "made")
    uuid = small.api.text("VM.get_uuid", ref)
    assert f"the VM is made all the same, {uuid}" in done.stderr
    shell.run("clean")
    assert new_disks(small) == {}
    small.api.call("VM.destroy", ref)
    assert len(new_disks(small)) == 3
    for disk in new_disks(small):
        small.api.call("VDI.destroy", small.api.text("VDI.get_by_uuid", disk))


def test_a_pool_that_keeps_something_else_is_noticed(small: Small, shell: Shell) -> None:
    small.pool.set("http.upload_flip", "70000")

    done = shell.run(
        "restore", "v/latest/xvda", "--to-sr", "Shared NFS", "--verify", "full", status=1
    )

    assert "holds something else" in done.stderr
    assert new_disks(small) == {}


@contextlib.contextmanager
def stalled(small: Small, shell: Shell) -> Iterator[subprocess.Popen[str]]:
    """Run a restore that gets stuck after the first bytes of its disks."""
    small.pool.set("http.upload_stall", "100K")
    command = shell.command("restore", "v/latest", "--to-sr", "Shared NFS")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=shell.env()) as running:
        until = time.monotonic() + 60
        while len(leftovers(small.pool).dom0_vbds) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        yield running


def test_an_interrupted_one_destroys_what_it_made(small: Small, shell: Shell) -> None:
    with stalled(small, shell) as running:
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)

    assert running.returncode == 130
    assert "nothing of it is left in the pool" in told
    assert new_disks(small) == {}


def test_a_killed_one_leaves_disks_that_clean_removes(small: Small, shell: Shell) -> None:
    with stalled(small, shell) as running:
        running.kill()
        running.communicate(timeout=60)

    left = new_disks(small)
    assert len(left) == 3
    for uuid, vdi in left.items():
        config = vdi["other_config"]
        assert isinstance(config, dict)
        tag = owner.read_owner(config, uuid)
        assert tag is not None
        assert (tag.role, tag.pid) == ("restored", running.pid)
        assert owner.time_of_run(str(vdi["name_label"]))
    shell.run("clean")
    assert new_disks(small) == {}


@pytest.mark.reflink
def test_of_sixteen_tebibytes_only_data_travels(tmp_path: Path, reflink_dir: Path) -> None:
    size = 16 * units.TiB
    with bigdisks.running(tmp_path / "pool", {"big": size}) as pool:
        shell = Shell(pool, reflink_dir / "store")  # where files can be so large
        bigdisks.seed(shell, "big")
        bigdisks.write_scattered(pool, "big", size=size, blocks=20, rng=random.Random(1))
        bigdisks.sync(shell, "big")

        told = shell.json("restore", "big/latest", "--to-sr", "ZFS")

        (disk,) = items(told, "disks")
        assert (disk["size"], disk["bytes_sent"]) == (size, 20 * BLOCK)
        # all that has data, and some that has none
        assert disk["verified_bytes"] == (20 + readback.SAMPLE_OF_ZEROS) * BLOCK
        uuid = str(disk["vdi_uuid"])
        volume = pool.control("volume", uuid)
        assert isinstance(volume, dict)
        assert volume["allocated"] == 20 * BLOCK


# ── --vm-name ────────────────────────────────────────────────────────────────────────────────

HOSTILE = "../../a/b <x>&amp;\n\u202e☃ \"'"

KEPT = (
    "name_description", "VCPUs_max", "VCPUs_at_startup", "memory_static_max", "memory_static_min",
    "memory_dynamic_max", "memory_dynamic_min", "platform", "HVM_boot_params", "PV_args", "tags",
)  # fmt: skip


def add_vm(small: Small, name: str, *, disks: int) -> str:
    """Make a halted VM with disks of odd sizes in no order, two network cards and a CD drive."""
    api = small.api
    memory = dict.fromkeys(("memory_static_max", "memory_dynamic_max"), str(3 << 30))
    record = {
        "name_label": name,
        "name_description": "<&> \u202e",
        "VCPUs_max": "7",
        "VCPUs_at_startup": "3",
        "platform": {"viridian": "true", "a<b": "&"},
        "HVM_boot_params": {"order": "cdn"},
        "tags": ["gold"],
        **memory,
    }
    vm = api.text("VM.create", record)
    zfs = api.named("SR", "ZFS")
    made = replace(small, vm=vm)
    for number in (3, 0, *(n for n in range(1, 13) if n != 3))[:disks]:
        made.add_disk(f"{name} {number}", number, size=2 * units.MiB + number * 4096, sr=zfs)
    network = next(iter(api.records("network")))
    for device, mac in (("0", "02:00:00:00:00:0a"), ("2", "02:00:00:00:00:0b")):
        card = {"VM": vm, "network": network, "device": device, "MAC": mac, "MTU": "1400"}
        api.call("VIF.create", {**card, "other_config": {"ethtool-gso": "off"}})
    drive: dict[str, object] = {"VM": vm, "VDI": "OpaqueRef:NULL", "userdevice": "20", "type": "CD"}
    api.call("VBD.create", {**drive, "mode": "RO", "empty": True})
    return vm


def devices_of(small: Small, vm: str, kind: str) -> dict[str, dict[str, object]]:
    """Return a VM's VBDs or VIFs by device number."""
    place = "userdevice" if kind == "VBD" else "device"
    found = [record for record in small.api.records(kind).values() if record["VM"] == vm]
    return {str(record[place]): record for record in found}


def remove_vm(small: Small, vm: str) -> None:
    """Destroy a VM and its disks."""
    disks = [v["VDI"] for v in devices_of(small, vm, "VBD").values() if v["type"] == "Disk"]
    small.api.call("VM.destroy", vm)
    for vdi in disks:
        small.api.call("VDI.destroy", vdi)


def test_a_vm_with_ten_disks_comes_back_as_it_was(small: Small, shell: Shell) -> None:
    api = small.api
    vm = add_vm(small, HOSTILE, disks=10)
    old, cards = api.call("VM.get_record", vm), devices_of(small, vm, "VIF")
    drives = devices_of(small, vm, "VBD")
    assert isinstance(old, dict)
    for number in (0, 3, 9):
        data = random.randbytes(BLOCK + 512 * number)
        patch(small, drives[str(number)]["VDI"], {number * 4096: data})
    shell.json("sync", "--vm", str(old["uuid"]))
    folder = shell.store / str(old["uuid"]) / "latest"
    remove_vm(small, vm)

    told = shell.json("restore", f"{old['uuid']}/latest", "--to-sr", "ZFS", "--vm-name", "new <&>")

    made = told["vm"]
    assert isinstance(made, dict)
    new = api.text("VM.get_by_uuid", made["uuid"])
    record = api.call("VM.get_record", new)
    assert isinstance(record, dict)
    assert record["name_label"] == "new <&>"
    assert {key: record[key] for key in KEPT} == {key: old[key] for key in KEPT}
    assert "cbtfs:owner" not in str(record["other_config"])
    places = devices_of(small, new, "VBD")
    assert {k: v["type"] for k, v in places.items()} == {k: v["type"] for k, v in drives.items()}
    for number in range(10):
        uuid = api.text("VDI.get_uuid", places[str(number)]["VDI"])
        device = next(str(d["device"]) for d in items(told, "disks") if d["vdi_uuid"] == uuid)
        assert content_of(small, uuid) == (folder / f"{device}.raw").read_bytes()
        assert api.text("VDI.get_name_label", places[str(number)]["VDI"]) == f"{HOSTILE} {number}"
    again = devices_of(small, new, "VIF")
    for device, card in cards.items():
        same = ("MAC", "MTU", "network", "other_config", "locking_mode")
        assert {key: again[device][key] for key in same} == {key: card[key] for key in same}
    remove_vm(small, new)


def test_a_second_vm_gets_other_addresses(small: Small, shell: Shell) -> None:
    vm = add_vm(small, "twin", disks=1)
    shell.json("sync", "--vm", "twin")

    done = shell.run("restore", "twin/latest", "--to-sr", "Shared NFS", "--vm-name", "copy")

    assert "network card 0 has a new address" in done.stderr
    new = small.api.named("VM", "copy")
    macs = {str(v["MAC"]) for v in devices_of(small, new, "VIF").values()}
    assert len(macs) == 2
    assert macs.isdisjoint({"02:00:00:00:00:0a", "02:00:00:00:00:0b"})
    remove_vm(small, new)
    remove_vm(small, vm)


@pytest.mark.parametrize(
    "call",
    [
        "import_metadata",
        "VM.set_other_config",
        "VBD.create",
        "VDI.set_name_label",
        "VM.set_name_label",
        "VM.remove_from_other_config",
    ],
)
def test_what_fails_of_a_vm_leaves_neither_vm_nor_disks(
    small: Small, shell: Shell, call: str
) -> None:
    vms = set(small.api.records("VM"))
    small.pool.set("xapi.fail", f"{call}:INTERNAL_ERROR:no")
    try:
        wanted = ("--to-sr", "Shared NFS", "--vm-name", "new")
        done = shell.run("restore", "v/latest", *wanted, status=1)
    finally:
        small.pool.set("xapi.fail", "")

    assert "INTERNAL_ERROR" in done.stderr
    assert set(small.api.records("VM")) == vms
    assert new_disks(small) == {}


def test_a_vm_needs_a_whole_point_and_its_metadata(small: Small, shell: Shell) -> None:
    wanted = ("--to-sr", "Shared NFS", "--vm-name", "new")

    one = shell.run("restore", "v/latest/xvda", *wanted, status=2)
    xml = shell.image("v", "xvda").parent / "vm.xml"
    xml.rename(xml.with_name("aside"))
    none = shell.run("restore", "v/latest", *wanted, status=1)
    xml.with_name("aside").rename(xml)

    assert "a whole point" in one.stderr
    assert "has no vm.xml" in none.stderr
    unset = shell.run("restore", "v/latest", *wanted[:3], "", status=2)
    assert "--vm-name is empty" in unset.stderr


# ── --in-place ───────────────────────────────────────────────────────────────────────────────

LARGE = 32 * units.MiB


@pytest.fixture
def own(small: Small, tmp_path: Path) -> Shell:
    """A store of one test."""
    return Shell(small.pool, tmp_path / "store")


@pytest.fixture
def cbtfs(
    capsys: pytest.CaptureFixture[str], own: Shell, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Program]:
    """The command in this process, for that store."""
    monkeypatch.setenv("XDG_STATE_HOME", str(own.store.parent / "state"))
    with untouched_process():
        yield Program(capsys, *own.command()[3:])


@contextlib.contextmanager
def halted(small: Small, sr: str = "Shared NFS") -> Iterator[Small]:
    """Make the halted VM ``p`` with a disk of 32 MiB and one of 2 MiB."""
    vm = small.api.text("VM.create", {"name_label": "p", "name_description": ""})
    made = replace(small, vm=vm)
    ref = small.api.text("SR.get_by_uuid", sr_uuid(small, sr))
    large = made.add_disk("p 0", 0, size=LARGE, sr=ref)
    made.add_disk("p 1", 1, size=2 * units.MiB, sr=ref)
    patch(small, large, blocks(*range(40), *range(300, 340), 511))
    try:
        yield made
    finally:
        for ref, record in small.api.records("VM").items():
            if (
                record["name_label"] == "p"
                or record["snapshot_of"] == vm
                or "p/2" in str(record["name_label"])
            ):
                small.api.call("VM.destroy", ref)
        for ref, vdi in small.api.records("VDI").items():
            if str(vdi["name_label"]).startswith("p ") and vdi["managed"]:
                small.api.call("VDI.destroy", ref)


def blocks(*numbers: int) -> dict[int, bytes]:
    """Return random content for these blocks, by offset."""
    return {number * BLOCK: random.randbytes(BLOCK) for number in numbers}


def content(small: Small, name: str = "p 0") -> bytes:
    """Return what the live disk of this name holds."""
    return content_of(small, small.uuid(name))


def safety_snapshots(small: Small) -> list[str]:
    """Return the uuids of the snapshots of ``p`` that a restore took."""
    return [
        str(vm["uuid"])
        for vm in small.api.records("VM").values()
        if vm["is_a_snapshot"] and str(vm["name_label"]).startswith("cbtfs before restore of p/")
    ]


@pytest.mark.parametrize("sr", ["Shared NFS", "Linstor"])
def test_only_what_differs_is_written_and_the_snapshot_leads_back(
    small: Small, own: Shell, sr: str
) -> None:
    with halted(small, sr) as p:
        own.json("sync", "--vm", "p")
        point = content(small)
        # ten blocks are otherwise: one of them new, one without data now; one is as it was
        changes = blocks(3, 4, 5, 301, 302, 400, 510, 511) | {BLOCK * 310: bytes(2 * BLOCK)}
        patch(p, p.disk("p 0"), {**changes, 7 * BLOCK: point[7 * BLOCK : 8 * BLOCK]})
        before = content(small)
        theirs = {"start": "in repair", "pause": "true"}
        p.api.call("VM.set_blocked_operations", p.vm, theirs)

        planned = own.json("restore", "p/latest", "--in-place", "-n")
        assert (content(small), safety_snapshots(small)) == (before, [])
        told = own.json("restore", "p/latest", "--in-place")

        assert [disk["bytes"] for disk in items(planned, "disks")] == [10 * BLOCK, 0]
        assert [disk["bytes_sent"] for disk in items(told, "disks")] == [10 * BLOCK, 0]
        assert (content(small), blocks_on(p)) == (point, theirs)
        assert safety_snapshots(small) == [told["safety_snapshot"]]
        snapshot = small.api.text("VM.get_by_uuid", told["safety_snapshot"])
        assert "cbtfs" not in str(small.api.call("VM.get_other_config", snapshot))
        small.api.call("VM.revert", snapshot)
        assert content(small) == before


def test_an_older_point_differs_in_what_changed_before_and_since_the_latest(
    small: Small, own: Shell
) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        point = content(small)
        patch(p, p.disk("p 0"), blocks(1, 2, 350))
        time.sleep(1)  # a point's name has seconds
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(2, 450))
        small.pool.control("reset-counters")

        told = own.json("restore", "p/latest~1", "--in-place", "--verify", "full")

        assert [disk["bytes_sent"] for disk in items(told, "disks")] == [4 * BLOCK, 0]
        assert [disk["verified_bytes"] for disk in items(told, "disks")] == [LARGE, 2 * units.MiB]
        assert content(small) == point


def test_blocks_that_the_change_tracking_lacks_are_found_as_it_is_read_back(
    small: Small, cbtfs: Program
) -> None:
    with halted(small) as p:
        cbtfs.json("sync", "--vm", "p")
        point = content(small)
        patch(p, p.disk("p 0"), blocks(1, 2, 3, 400))
        small.pool.set("cbt.drop_bits", "2")

        done = cbtfs("--json", "restore", "p/latest", "--in-place", "--verify", "full")

        assert done.status == 0
        assert content(small) == point
        assert "the pool's change tracking lacks blocks" in done.err
        told = items(done.document(), "disks")
        assert [disk["bytes_sent"] for disk in told] == [4 * BLOCK, 0]
        assert blocks_on(p) == {}


def test_an_interrupted_one_is_finished_by_another_run(small: Small, own: Shell) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        point = content(small)
        patch(p, p.disk("p 0"), blocks(*range(38)))
        before = content(small)

        small.pool.set("http.upload_cut", "1100K")
        failed = own.run("restore", "p/latest", "--in-place", status=1)
        half = content(small)
        again = own.run("restore", "p/latest", "--in-place", status=1)
        small.pool.set("http.upload_cut", "")
        told = own.json("restore", "p/latest", "--in-place")

        (snapshot,) = safety_snapshots(small)
        assert f"xe snapshot-revert snapshot-uuid={snapshot}" in failed.stderr
        assert "is kept from the run before" in again.stderr
        assert half not in (before, point)
        assert told["safety_snapshot"] == snapshot
        assert content(small) == point
        # that restore is done: the next one is of another state, and has a snapshot of its own
        assert own.json("restore", "p/latest", "--in-place")["safety_snapshot"] != snapshot
        assert len(safety_snapshots(small)) == 2
        small.api.call("VM.revert", small.api.text("VM.get_by_uuid", snapshot))
        assert content(small) == before


def test_what_is_not_as_it_was_is_not_written_over(small: Small, own: Shell) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        small.api.call("VM.start", p.vm, False, False)
        running = own.run("restore", "p/latest", "--in-place", status=1)
        small.api.call("VM.hard_shutdown", p.vm)
        small.api.call("VDI.resize", p.disk("p 1"), str(4 * units.MiB))
        grown = own.run("restore", "p/latest", "--in-place", status=1)
        (vbd,) = (r for r, v in small.api.records("VBD").items() if v["VDI"] == p.disk("p 0"))
        small.api.call("VBD.destroy", vbd)
        detached = own.run("restore", "p/latest/xvda", "--in-place", status=1)

        assert "is running" in running.stderr
        assert "xe vm-shutdown" in running.stderr
        assert "had 2097152 when the restore point was made" in grown.stderr
        assert "no disk of VM 'p' any more" in detached.stderr
        assert safety_snapshots(small) == []


def blocks_on(p: Small) -> dict[str, str]:
    """Return what of a VM is blocked, and why."""
    blocked = p.api.call("VM.get_blocked_operations", p.vm)
    assert isinstance(blocked, dict)
    return {str(key): str(reason) for key, reason in blocked.items()}


@contextlib.contextmanager
def running(shell: Shell, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command at the same time."""
    command = shell.command(*arguments)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=shell.env()) as process:
        try:
            yield process
        finally:
            process.kill()


def await_true(condition: Callable[[], object]) -> None:
    """Wait until something comes true."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_vm_does_not_start_while_its_disks_are_written_over(small: Small, own: Shell) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(*range(38)))
        small.pool.set("http.upload_stall", "100K")
        with running(own, "restore", "p/latest", "--in-place") as restore:
            await_true(lambda: leftovers(small.pool).dom0_vbds and len(blocks_on(p)) == 2)
            host = next(iter(p.api.records("host")))
            refused = pytest.raises(Failure, match=r"OPERATION_BLOCKED .*cbtfs is writing")
            with refused:
                p.api.call("VM.start", p.vm, False, False)
            with refused:
                p.api.call("VM.start_on", p.vm, host, False, False)
            second = own.run("restore", "p/latest", "--in-place", status=11)
            at_work = own.json("clean")
            restore.send_signal(signal.SIGINT)
            _, told = restore.communicate(timeout=60)
        small.pool.set("http.upload_stall", "")

        assert f"process {restore.pid}" in second.stderr
        assert f"process {restore.pid} is at work" in str(at_work["left"])
        assert restore.returncode == 130
        assert "half restored and cannot be started" in told
        assert blocks_on(p).keys() == {"start", "start_on"}


def test_who_lets_a_half_restored_vm_live_gets_another_snapshot(small: Small, own: Shell) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(*range(38)))
        small.pool.set("http.upload_cut", "1100K")
        own.run("restore", "p/latest", "--in-place", status=1)
        small.pool.set("http.upload_cut", "")

        one = own.run("restore", "p/latest/xvda", "--in-place", status=1)
        kept = own.run("clean").stdout
        assert len(blocks_on(p)) == 2
        planned = own.json("sync", "--vm", "p", "-n")
        failed = own.run("-q", "sync", "--vm", "p", status=1)
        by_itself = own.run("-q", "sync", "--vdi", p.uuid("p 0"), status=1)
        assert "block on starting" in own.run("clean", "--unblock").stdout
        assert blocks_on(p) == {}
        p.api.call("VM.start", p.vm, False, False)
        write(p, "xvda", blocks(1), vm="p")
        p.api.call("VM.hard_shutdown", p.vm)
        again = own.run("restore", "p/latest", "--in-place")
        assert "is not of all of its disks" in one.stderr
        assert "let it start as it is with --unblock" in " ".join(kept.split())
        (half,) = items(planned, "vms")
        assert items(half, "disks") == []
        assert {"half restored" in str(disk["error"]) for disk in items(half, "failures")} == {True}
        assert "half restored" in failed.stderr
        assert "half restored" in by_itself.stderr
        assert "may have changed since it was taken" in again.stderr
        assert len(safety_snapshots(small)) == 2


def test_what_has_not_written_blocks_nothing_and_needs_no_other_snapshot(
    small: Small, own: Shell
) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(3))
        small.pool.set("xapi.fail", "VDI.get_nbd_info:INTERNAL_ERROR")

        own.run("restore", "p/latest", "--in-place", status=1)

        small.pool.set("xapi.fail", "")
        assert blocks_on(p) == {}
        (snapshot,) = safety_snapshots(small)
        assert own.json("restore", "p/latest", "--in-place")["safety_snapshot"] == snapshot


def test_a_vm_that_was_started_meanwhile_is_not_written_over(small: Small, own: Shell) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(3))
        before = content(small)
        small.pool.set("xapi.delay", "VM.add_to_blocked_operations:0.5s")
        with running(own, "restore", "p/latest", "--in-place") as restore:
            await_true(lambda: safety_snapshots(small))
            p.api.call("VM.start", p.vm, False, False)
            _, told = restore.communicate(timeout=60)
        small.pool.set("xapi.delay", "")
        p.api.call("VM.hard_shutdown", p.vm)

        assert restore.returncode == 1
        assert "was started just now" in told
        assert (content(small), blocks_on(p)) == (before, {})


def test_a_snapshot_is_only_kept_if_none_of_the_disks_has_changed_since(
    small: Small, own: Shell
) -> None:
    """Who goes back to it goes back with all disks, restored or not."""
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(3))
        small.pool.set("xapi.fail", "VM.add_to_blocked_operations:INTERNAL_ERROR")
        own.run("restore", "p/latest/xvda", "--in-place", status=1)
        small.pool.set("xapi.fail", "")
        patch(p, p.disk("p 1"), blocks(5))

        again = own.run("restore", "p/latest/xvda", "--in-place")

        assert "may have changed since it was taken" in again.stderr
        assert len(safety_snapshots(small)) == 2


def test_half_restored_disks_are_missing_from_the_next_point_until_the_vm_may_start(
    small: Small, own: Shell
) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(*range(38)))
        small.pool.set("http.upload_cut", "1100K")
        left = own.run("-q", "restore", "p/latest/xvda", "--in-place", status=1)
        small.pool.set("http.upload_cut", "")

        told = own.json("sync", "--vm", "p", status=3)
        p.api.call("VM.remove_from_blocked_operations", p.vm, "start")
        later = own.json("sync", "--vm", "p")

        assert "half restored and cannot be started" in left.stderr
        (vm,) = items(told, "vms")
        assert vm["state"] == "partial"
        assert [disk["device"] for disk in items(vm, "failures")] == ["xvda"]
        assert [vm["state"] for vm in items(later, "vms")] == ["complete"]
        assert "was let start" in own.run("clean").stdout
        assert blocks_on(p) == {}


def test_a_sync_that_planned_before_a_restore_copies_nothing_half_written(
    small: Small, own: Shell, tmp_path: Path
) -> None:
    other = replace(own, store=tmp_path / "other")
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        patch(p, p.disk("p 0"), blocks(*range(38)))
        small.pool.set("xapi.delay", "VM.snapshot:6")
        small.pool.set("http.upload_stall", "100K")
        with running(other, "sync", "--vm", "p") as sync:
            await_true(lambda: list(other.store.glob("*/.partial-*")))
            time.sleep(0.5)  # it has planned, and waits for its snapshot
            small.pool.set("xapi.delay", "")
            with running(own, "restore", "p/latest/xvda", "--in-place") as restore:
                _, told = sync.communicate(timeout=60)
                busy = own.run("sync", "--vm", "p", status=11)
                restore.send_signal(signal.SIGINT)
                restore.communicate(timeout=60)
        small.pool.set("http.upload_stall", "")

        assert sync.returncode == 3, told
        assert "half restored" in told
        assert f"{restore.pid}" in busy.stderr


def test_without_its_snapshot_there_is_no_way_back_and_none_is_promised(
    small: Small, own: Shell
) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        point = content(small)
        patch(p, p.disk("p 0"), blocks(*range(38)))
        small.pool.set("http.upload_cut", "1100K")
        own.run("restore", "p/latest", "--in-place", status=1)
        small.pool.set("http.upload_cut", "")
        (uuid,) = safety_snapshots(small)
        p.api.call("VM.destroy", p.api.text("VM.get_by_uuid", uuid))

        done = own.run("--json", "restore", "p/latest", "--in-place")

        assert content(small) == point
        assert "snapshot-revert" not in done.stdout + done.stderr
        assert "was removed" in done.stderr
        assert json.loads(done.stdout)["safety_snapshot"] is None
        assert blocks_on(p) == {}


@pytest.mark.parametrize("call", ["VM.set_name_label", "VM.remove_from_blocked_operations"])
def test_a_failure_at_the_very_end_says_that_all_is_written(
    small: Small, own: Shell, call: str
) -> None:
    with halted(small) as p:
        own.json("sync", "--vm", "p")
        point = content(small)
        patch(p, p.disk("p 0"), blocks(3))
        small.pool.set("xapi.fail", f"{call}:INTERNAL_ERROR")

        done = own.run("restore", "p/latest", "--in-place", status=1)

        small.pool.set("xapi.fail", "")
        assert content(small) == point
        assert "all is written, but p cannot be started yet" in done.stderr
        own.run("clean", "--unblock")
        assert blocks_on(p) == {}


def test_a_vm_that_stays_blocked_as_the_pool_is_silent_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def silent(*arguments: object, **more: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(inplace, "_PATIENCE", 0.01)
    pool = cast(Pool, SimpleNamespace(vms=SimpleNamespace(unblock=silent)))
    nothing = (cast(Store, None), cast(Goal, None), cast(Inventory, None))
    run = InPlace(pool, *nothing, SilentProgress())
    vm = cast(VM, SimpleNamespace(ref="OpaqueRef:v", name="v"))

    trio.run(run._give_up, vm, Safety("", ""), owner.Block(self_uuid="v", role=owner.RESTORING))

    assert run.left == [
        "v stays blocked until cbtfs clean --unblock: the pool did not answer in time"
    ]


def test_what_a_control_domain_has_attached_for_ever_is_named(
    small: Small, cbtfs: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    with halted(small):
        cbtfs.json("sync", "--vm", "p")
        small.pool.set("nbd.leak", "on")
        cbtfs.json("verify", "--against-pool")  # and the host keeps the disk
        small.pool.set("nbd.leak", "")
        uuids = [small.api.text("VBD.get_uuid", v) for v in leftovers(small.pool).dom0_vbds]
        monkeypatch.setattr(inplace, "IN_USE_PAUSES", ())

        result = cbtfs("restore", "p/latest", "--in-place")

        for vbd in leftovers(small.pool).dom0_vbds:
            small.api.call("VBD.unplug", vbd)
            small.api.call("VBD.destroy", vbd)
        assert result.status == 1
        assert uuids
        assert all(f"xe vbd-unplug uuid={uuid}" in result.err for uuid in uuids)
