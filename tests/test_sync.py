"""Sync through the real command: guests write, and every point equals what they wrote."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs import image, units

from .commands import Leftovers, Shell, guest_content, items, leftovers, number
from .simulated import Api, RunningPool, running_pool

pytestmark = pytest.mark.timeout(180)

DISKS = ("xvda", "xvdb")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[RunningPool]:
    with running_pool(tmp_path / "pool") as running:
        yield running


@pytest.fixture
def shell(pool: RunningPool, tmp_path: Path) -> Shell:
    return Shell(pool, tmp_path / "store")


def write(pool: RunningPool, device: str, offset: int, data: bytes) -> None:
    guest = pool.open_guest("web1", device)
    guest.pwrite(data, offset)
    guest.shutdown()


def live_vdis(pool: RunningPool, vm: str) -> dict[str, str]:
    """Return ref by device of a VM's disks."""
    api = Api(pool).login()
    ref = next(
        ref
        for ref, record in api.records("VM").items()
        if record["name_label"] == vm and not record["is_a_snapshot"]
    )
    return {
        str(vbd["device"]): str(vbd["VDI"])
        for vbd in api.records("VBD").values()
        if vbd["VM"] == ref and vbd["type"] == "Disk"
    }


def log_since_base(pool: RunningPool, shell: Shell, device: str) -> tuple[int, int]:
    """Return extents and bytes of the pool's own log from the latest point to the live disk."""
    point = json.loads((shell.store / "by-name/web1/latest/point.json").read_text())
    (base,) = (d["snapshot_uuid"] for d in point["disks"] if d["device"] == device)
    live = Api(pool).login().text("VDI.get_uuid", live_vdis(pool, "web1")[device])
    log = pool.control("changed-log", base, live)
    assert isinstance(log, dict)
    assert "error" not in log, log
    return len(log["extents"]), log["bytes"]


def assert_equal_to_guest(pool: RunningPool, shell: Shell, scratch: Path) -> None:
    for device in DISKS:
        content = guest_content(pool, "web1", device, scratch / "guest.raw")
        assert shell.image("web1", device).read_bytes() == content, device


def assert_only_bases_left(pool: RunningPool, *, disks: set[str]) -> None:
    left = leftovers(pool)
    assert sorted(left.bases) == sorted(disks)
    assert left == Leftovers(left.bases, [], [], [], [])


def test_two_syncs_with_a_guest_writing_between(
    pool: RunningPool, any_dir: Path, tmp_path: Path
) -> None:
    shell = Shell(pool, any_dir / "store")
    first = shell.sync("web1")
    assert_equal_to_guest(pool, shell, tmp_path)
    assert {disk["method"] for disk in first.values()} == {"full"}
    before = shell.image("web1", "xvda").resolve()
    kept = before.read_bytes()

    filesystem = tmp_path / "ext4.img"
    with filesystem.open("wb") as file:
        file.truncate(64 * units.MiB)
    subprocess.run(["mkfs.ext4", "-q", filesystem], check=True)
    guest_writes(pool, filesystem)
    expected = {device: log_since_base(pool, shell, device) for device in DISKS}
    second = shell.sync("web1")

    assert_equal_to_guest(pool, shell, tmp_path)
    assert before.read_bytes() == kept
    assert {disk["method"] for disk in second.values()} == {"incremental"}
    for device, (extents, changed) in expected.items():
        told = second[device]
        assert (told["extents"], told["bytes_changed"]) == (extents, changed), device
        compared = number(told, "blocks_sampled") * units.CBT_BLOCK
        assert number(told, "bytes_read") - compared == changed
    shell.run("verify")
    assert_only_bases_left(pool, disks=set(live_vdis(pool, "web1").values()))


def guest_writes(pool: RunningPool, filesystem: Path) -> None:
    """Write as guests do: mkfs, scattered small writes, the same again, zeros, a trim."""
    rng = random.Random(4)
    subprocess.run(["nbdcopy", filesystem, pool.guest("web1", "xvdb")], check=True)
    guest = pool.open_guest("web1", "xvda")
    for _ in range(200):
        offset = rng.randrange(512 * units.MiB // 4096) * 4096
        guest.pwrite(rng.randbytes(4096), offset)
    same = bytes(guest.pread(units.MiB, 8 * units.MiB))
    guest.pwrite(same, 8 * units.MiB)
    guest.zero(3 * units.MiB, 20 * units.MiB)
    guest.shutdown()


def test_a_grown_disk_grows_in_the_next_point(
    pool: RunningPool, any_dir: Path, tmp_path: Path
) -> None:
    shell = Shell(pool, any_dir / "store")
    shell.sync("web1")
    api = Api(pool).login()
    vdi = live_vdis(pool, "web1")["xvdb"]
    vm = api.named("VM", "web1")
    api.call("VM.hard_shutdown", vm)
    api.call("VDI.resize", vdi, str(300 * units.MiB))
    api.call("VM.start", vm, False, False)
    write(pool, "xvdb", 299 * units.MiB, b"the end")
    expected = log_since_base(pool, shell, "xvdb")

    told = shell.sync("web1")

    assert told["xvdb"]["method"] == "incremental"
    assert (told["xvdb"]["extents"], told["xvdb"]["bytes_changed"]) == expected
    assert number(told["xvdb"], "size") == 300 * units.MiB
    assert_equal_to_guest(pool, shell, tmp_path)
    shell.run("verify")


def test_unchanged_extents_are_shared_on_xfs(
    pool: RunningPool, reflink_dir: Path, tmp_path: Path
) -> None:
    shell = Shell(pool, reflink_dir / "store")
    shell.sync("web1")
    write(pool, "xvda", 64 * units.MiB, random.Random(5).randbytes(units.MiB))
    used = disk_used(reflink_dir)

    shell.sync("web1")

    added = disk_used(reflink_dir) - used
    extents = subprocess.run(
        ["filefrag", "-v", shell.image("web1", "xvda")], check=True, capture_output=True, text=True
    ).stdout
    assert "shared" in extents
    assert added < 4 * units.MiB, units.format_size(added)


def test_without_reflinks_it_says_what_that_costs(pool: RunningPool, tmp_path: Path) -> None:
    if image.reflink_supported(tmp_path):
        pytest.skip("the usual file system has reflinks: nothing is copied")
    shell = Shell(pool, tmp_path / "store")
    shell.sync("db1")

    told = shell.run("sync", "--vm", "db1").stderr

    assert "cannot share blocks" in told
    assert "11.6 MiB of the last image were copied" in told


def disk_used(path: Path) -> int:
    subprocess.run(["sync", "-f", path], check=True)
    told = subprocess.run(
        ["df", "-B1", "--output=used", path], check=True, capture_output=True, text=True
    ).stdout
    return int(told.split()[-1])


def test_nothing_changed_reads_only_the_sample(pool: RunningPool, shell: Shell) -> None:
    shell.sync("web1")

    told = shell.sync("web1")

    for disk in told.values():
        assert number(disk, "bytes_changed") == number(disk, "bytes_written") == 0
        compared = number(disk, "blocks_sampled")
        assert number(disk, "bytes_read") == compared * units.CBT_BLOCK
        assert compared >= 64


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ("base destroyed", "base-lost"),
        ("disabled and enabled", "base-lost"),
        ("disabled", "cbt-off"),
        ("reverted", "moved"),
        ("crash", "cbt-off"),
    ],
)
def test_a_broken_chain_is_a_comparison_with_its_reason(
    pool: RunningPool, shell: Shell, tmp_path: Path, event: str, reason: str
) -> None:
    api = Api(pool).login()
    snapshot = api.text("VM.snapshot", api.named("VM", "web1"), "somebody else's")
    shell.sync("web1")
    write(pool, "xvda", 5 * units.MiB, b"changed")
    breakers = {
        "base destroyed": lambda: destroy_bases(api),
        "disabled and enabled": lambda: toggle(pool, api, "VDI.disable_cbt", "VDI.enable_cbt"),
        "disabled": lambda: toggle(pool, api, "VDI.disable_cbt"),
        "reverted": lambda: revert(api, snapshot),
        "crash": lambda: crash(pool, api),
    }
    breakers[event]()

    told = shell.sync("web1")

    assert {disk["method"] for disk in told.values()} == {"compare"}
    assert {disk["reason"] for disk in told.values()} == {reason}
    assert_equal_to_guest(pool, shell, tmp_path)
    assert_only_bases_left(pool, disks=set(live_vdis(pool, "web1").values()))
    assert {d["method"] for d in shell.sync("web1").values()} == {"incremental"}


def destroy_bases(api: Api) -> None:
    for ref, record in api.records("VDI").items():
        if record["type"] == "cbt_metadata":
            api.call("VDI.destroy", ref)


def toggle(pool: RunningPool, api: Api, *methods: str) -> None:
    for vdi in live_vdis(pool, "web1").values():
        for method in methods:
            api.call(method, vdi)


def revert(api: Api, snapshot: str) -> None:
    api.call("VM.revert", snapshot)
    api.call("VM.start", api.named("VM", "web1"), False, False)


def crash(pool: RunningPool, api: Api) -> None:
    pool.control("crash-vm", "web1")
    api.call("VM.start", api.named("VM", "web1"), False, False)


def test_syncs_every_kind_of_disk_of_a_vm(pool: RunningPool, shell: Shell) -> None:
    told = shell.sync("app1")

    assert {device: disk["reason"] for device, disk in told.items()} == {
        "xvda": "first",
        "xvdb": "first",
        "xvdc": "first",
        "xvdd": "first",
    }
    shell.run("verify")
    again = shell.sync("app1")
    assert [again[d]["method"] for d in ("xvda", "xvdb")] == ["incremental"] * 2
    assert {again[d]["reason"] for d in ("xvdc", "xvdd")} == {"cbt-unsupported"}
    left = leftovers(pool)
    assert (left.snapshots, left.snapshot_vms, left.dom0_vbds) == ([], [], [])


def test_a_disk_without_vm_is_synced_by_uuid(pool: RunningPool, shell: Shell) -> None:
    uuid = "354704ef-ad35-5d6a-8c25-4ab7ce0b55b6"

    (told,) = items(shell.json("sync", "--vdi", uuid), "vms")

    assert told["uuid"] == f"vdi-{uuid}"
    assert items(told, "disks")[0]["device"] == "disk"
    shell.run("verify")
    (again,) = items(shell.json("sync", "--vdi", uuid), "vms")
    assert items(again, "disks")[0]["method"] == "incremental"


def test_a_dry_run_changes_nothing(pool: RunningPool, shell: Shell) -> None:
    before = Api(pool).login().records("VDI")

    (told,) = items(shell.json("sync", "--vm", "web1", "-n"), "vms")

    assert {disk["reason"] for disk in items(told, "disks")} == {"first"}
    assert not shell.store.exists()
    assert Api(pool).login().records("VDI") == before


def test_a_snapshot_that_the_pool_refuses_leaves_nothing(pool: RunningPool, shell: Shell) -> None:
    pool.set("xapi.fail", "VM.snapshot:SR_BACKEND_FAILURE_109")

    done = shell.run("sync", "--vm", "web1", status=1)

    assert "SR_BACKEND_FAILURE_109" in done.stderr
    assert items(shell.json("list"), "vms") == []
    assert not list(shell.store.glob("*/.partial*"))
    pool.set("xapi.fail", "")
    assert_only_bases_left(pool, disks=set())


def test_other_peoples_snapshots_stay(pool: RunningPool, shell: Shell) -> None:
    api = Api(pool).login()
    api.call("VM.snapshot", api.named("VM", "web1"), "nightly of somebody else")
    before = {r for r, v in api.records("VDI").items() if v["is_a_snapshot"]}

    shell.sync("web1")
    shell.sync("web1")

    assert before <= set(api.records("VDI"))
