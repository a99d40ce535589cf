"""The verbs on a simulated pool, as a user calls them, with their JSON and their statuses."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from .program import Program, untouched_process
from .simulated import RunningPool, running_pool


class Disk(msgspec.Struct):
    device: str
    uuid: str
    name: str
    size: int
    cbt: str
    last_point: str | None
    next: dict[str, str] | None


class VM(msgspec.Struct):
    name: str
    uuid: str
    disks: list[Disk]


class Synced(msgspec.Struct):
    device: str
    method: str
    reason: str
    base: str | None
    size: int
    extents: int | None
    bytes_changed: int | None
    resumed: str | None = None


class SyncedVM(msgspec.Struct):
    vm: str
    disks: list[Synced]
    point: str | None = None
    state: str = ""
    error: str | None = None
    failures: list[dict[str, str]] = []
    resumes: str | None = None


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("pool")) as running:
        yield running


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("CBTFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    with untouched_process():
        yield


@pytest.fixture
def cbtfs(
    capsys: pytest.CaptureFixture[str], pool: RunningPool, environment: None, tmp_path: Path
) -> Program:
    return Program(capsys, "--config", str(pool.config), "--store", str(tmp_path / "store"))


def synced(document: dict[str, object]) -> list[SyncedVM]:
    return msgspec.convert(document["vms"], list[SyncedVM])


def vms(document: dict[str, object]) -> dict[str, VM]:
    return {vm.name: vm for vm in msgspec.convert(document["vms"], list[VM])}


# ── What a pool has ──


def test_ls_shows_disks_with_size_tracking_and_next_step(cbtfs: Program) -> None:
    [_, line, *_] = cbtfs("ls", "--vm", "web1").out.splitlines()

    assert line.split() == [
        *("web1/xvda", "web1", "root", "512", "MiB", "0", "B", "on", "2", "-"),
        *("full", "(first)"),
    ]


def test_ls_says_where_changes_cannot_be_tracked(cbtfs: Program) -> None:
    disks = vms(cbtfs.json("ls"))["app1"].disks

    assert {disk.device: disk.cbt for disk in disks} == {
        "xvda": "on",
        "xvdb": "on",
        "xvdc": "none",  # its SR
        "xvdd": "none",  # a raw image
    }


def test_ls_json_has_hostile_names_exactly(cbtfs: Program) -> None:
    found = vms(cbtfs.json("ls"))

    assert "../../etc" in found
    assert any("\x9b" in name for name in found)
    assert found["web1"].disks[0].size == 512 << 20


def test_ls_prints_no_control_character_of_a_name(cbtfs: Program) -> None:
    printed = cbtfs("ls").out

    assert all(line.isprintable() for line in printed.splitlines())


def test_twins_are_told_apart_by_digits_that_can_be_typed(cbtfs: Program) -> None:
    _, *lines = cbtfs("ls", "--vm", "twin").out.splitlines()
    labels = [line.partition("/")[0] for line in lines]

    assert len(set(labels)) == 2
    for label in labels:
        assert re.fullmatch("twin~[0-9a-f]{8}", label)
        assert cbtfs("sync", "--vm", label).out.startswith("twin/xvda  full  ")
        assert cbtfs("verify", f"{label}/latest").status == 0


def test_ls_of_a_vm_that_is_not_there_is_status_10(cbtfs: Program) -> None:
    result = cbtfs("ls", "--vm", "nothing")

    assert result.status == 10
    assert "nothing" in result.err


def test_info_shows_one_disk_in_full(cbtfs: Program) -> None:
    uuid = vms(cbtfs.json("ls"))["web1"].disks[0].uuid

    by_device, by_uuid = cbtfs("info", "web1/xvda"), cbtfs("info", uuid)

    assert by_device == by_uuid
    assert f"uuid:         {uuid}\n" in by_device.out
    assert "size:         512 MiB (536870912)\n" in by_device.out
    assert "next sync:    full: no restore point has this disk yet\n" in by_device.out


def test_info_of_a_snapshot_says_what_it_is_of(cbtfs: Program) -> None:
    live = cbtfs.json("info", "web1/xvda")["vdi"]
    assert isinstance(live, dict)
    snapshot = str(live["snapshots"][0]["uuid"])

    shown = cbtfs.json("info", snapshot)["vdi"]

    assert isinstance(shown, dict)
    assert shown["snapshot_of"] == live["uuid"]


def test_doctor_finds_the_pool_in_order(cbtfs: Program) -> None:
    result = cbtfs("doctor")

    assert result.status == 0
    assert "ok    NBD: served with TLS" in result.out


# ── Who is refused ──


def test_wrong_password_is_status_12(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pool: RunningPool,
    environment: None,
    tmp_path: Path,
) -> None:
    (tmp_path / "wrong").write_text("wrong")
    monkeypatch.setenv("CBTFS_PASSWORD_FILE", str(tmp_path / "wrong"))

    result = Program(capsys, "-q", "--config", str(pool.config))("ls")

    assert (result.status, result.out, result.err.count("\n")) == (12, "", 1)


def test_wrong_fingerprint_is_status_12_for_every_verb(
    cbtfs: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CBTFS_FINGERPRINT", f"sha256:{'ab' * 32}")

    assert cbtfs("ls").status == 12
    assert cbtfs("sync", "--vm", "web1").status == 12
    assert cbtfs("doctor").status == 12


def test_pool_where_nobody_answers_is_status_13(
    cbtfs: Program, monkeypatch: pytest.MonkeyPatch, pool: RunningPool
) -> None:
    monkeypatch.setenv("CBTFS_URL", "https://127.0.0.2:1")
    monkeypatch.setenv("CBTFS_PASSWORD_FILE", str(pool.directory / "password"))

    result = cbtfs("ls")

    assert (result.status, result.out, result.err.count("\n")) == (13, "", 1)


# ── Restore points ──


def test_dry_run_changes_nothing_in_store_and_pool(
    cbtfs: Program, pool: RunningPool, tmp_path: Path
) -> None:
    before = cbtfs.json("ls")

    [plan] = synced(cbtfs.json("sync", "--vm", "db1", "-n"))

    assert [(disk.method, disk.reason) for disk in plan.disks] == [("full", "first")]
    assert not (tmp_path / "store").exists()
    assert cbtfs.json("ls") == before


def test_sync_list_and_verify_tell_the_same_story(cbtfs: Program, pool: RunningPool) -> None:
    [first] = synced(cbtfs.json("sync", "--vm", "app1"))
    guest = pool.open_guest("app1", "xvda") if (pool.directory / "guest/app1").exists() else None
    if guest is not None:
        guest.pwrite(b"x" * 4096, 1 << 20)
        guest.shutdown()
    [second] = synced(cbtfs.json("sync", "--vm", "app1"))

    assert (first.state, second.state) == ("complete", "complete")
    assert {disk.method for disk in first.disks} == {"full"}
    assert next(d for d in second.disks if d.device == "xvda").base == first.point
    assert str(first.point) in cbtfs("list", "--vm", "app1").out
    assert cbtfs("verify").status == 0
    assert vms(cbtfs.json("ls", "--vm", "app1"))["app1"].disks[0].last_point == second.point


def test_damage_is_status_4_and_says_where(cbtfs: Program, tmp_path: Path) -> None:
    [done] = synced(cbtfs.json("sync", "--vm", "app1"))
    disk = tmp_path / "store" / "by-name" / "app1" / str(done.point) / "xvda.raw"
    with disk.open("r+b") as file:
        file.seek(128 << 10)
        file.write(b"damage")

    result = cbtfs("verify", "app1/latest/xvda")

    assert result.status == 4
    assert "app1/" in result.out
    assert "DAMAGED: 1 blocks differ" in result.out
    assert "  damaged: bytes 131072 to 196608\n" in result.out


def test_vm_without_a_disk_to_copy_is_left_out_with_the_reason(cbtfs: Program) -> None:
    result = cbtfs("sync", "--vm", "kiosk", "--vm", "app1")

    assert result.status == 0
    assert "kiosk/xvda left out: xapi takes no snapshot of a disk that is reset" in result.err
    assert "app1/xvda" in result.out


def test_nothing_but_a_vm_without_a_disk_to_copy_is_a_failure(cbtfs: Program) -> None:
    assert cbtfs("sync", "--vm", "kiosk").status == 1


def test_one_name_that_is_not_there_does_not_stop_the_others(cbtfs: Program) -> None:
    result = cbtfs("sync", "--vm", "gone", "--vm", "app1", "--vm", "tag:none")

    assert result.status == 3
    assert result.err.count("no VM called 'gone'") == 1
    assert "app1/xvda" in result.out


@pytest.fixture
def bad_and_good(
    capsys: pytest.CaptureFixture[str], pool: RunningPool, environment: None, tmp_path: Path
) -> Program:
    """The command with two jobs, of a VM that is not there and of one that is."""
    path = tmp_path / "cbtfs.toml"
    jobs = '[job.bad]\npool = "sim"\nvms = ["gone"]\n[job.good]\npool = "sim"\nvms = ["app1"]\n'
    path.write_text(pool.config.read_text() + jobs)
    return Program(capsys, "--config", str(path), "--store", str(tmp_path / "store"))


def test_a_job_that_fails_does_not_stop_the_others(bad_and_good: Program) -> None:
    result = bad_and_good("--json", "sync", "bad", "good")

    assert result.status == 3
    told = synced(msgspec.json.decode(result.out, type=dict[str, object]))
    assert [vm.point is not None for vm in told] == [False, True]


def test_a_dry_run_plans_what_the_run_would_do_in_spite_of_what_is_not_there(
    bad_and_good: Program,
) -> None:
    for selected in (("bad", "good"), ("--vm", "gone", "--vm", "app1")):
        result = bad_and_good("sync", "-n", *selected)
        assert result.status == 3
        assert result.err.count("no VM called 'gone'") == 1
        assert "app1/xvda" in result.out
    assert bad_and_good("sync", "-n", "--vm", "gone", "--vm", "lost").status == 10


def test_a_point_that_cannot_be_listed_is_damage(cbtfs: Program, tmp_path: Path) -> None:
    cbtfs("sync", "--vm", "app1")
    cbtfs("sync", "--vm", "app1")
    latest = (tmp_path / "store" / "by-name" / "app1" / "latest").resolve()
    (latest / "xvdb.raw").unlink()

    everything, one, newest = (
        cbtfs("verify", *points) for points in ([], [f"app1/{latest.name}"], ["app1/latest"])
    )

    for result in (everything, one, newest):
        assert result.status == 4
        assert f"app1/{latest.name}  DAMAGED: xvdb.raw is missing" in result.out
    assert "app1/xvda" not in newest.out
    assert cbtfs("verify", "app1/latest~0").status == 0
    [line] = [text for text in cbtfs("list").out.splitlines() if latest.name in text]
    assert line.endswith("damaged, see the warning")


def test_storage_without_tracking_costs_comparisons_from_the_second_point_on(
    cbtfs: Program,
) -> None:
    cbtfs("sync", "--vm", "app1")
    [foretold] = synced(cbtfs.json("sync", "--vm", "app1", "-n"))

    [done] = synced(cbtfs.json("sync", "--vm", "app1"))

    methods = {disk.device: (disk.method, disk.reason) for disk in done.disks}
    assert methods["xvdc"] == methods["xvdd"] == ("compare", "cbt-unsupported")
    assert methods == {disk.device: (disk.method, disk.reason) for disk in foretold.disks}


def test_an_image_found_damaged_is_nothing_that_the_next_sync_builds_on(
    cbtfs: Program, tmp_path: Path
) -> None:
    [first] = synced(cbtfs.json("sync", "--vm", "app1"))
    cbtfs("sync", "--vm", "app1")
    image = tmp_path / "store" / "by-name" / "app1" / "latest" / "xvda.raw"
    with image.open("r+b") as file:
        file.write(b"damage")
    assert cbtfs("verify", "app1/latest/xvda").status == 4

    disk = vms(cbtfs.json("ls", "--vm", "app1"))["app1"].disks[0]
    [done] = synced(cbtfs.json("sync", "--vm", "app1"))

    assert disk.next is not None
    assert (disk.next["method"], disk.next["reason"]) == ("compare", "base-damaged")
    copied = done.disks[0]
    assert (copied.method, copied.reason, copied.base) == ("compare", "base-damaged", first.point)
    assert cbtfs("verify", "app1/latest").status == 0


def test_a_vm_that_another_run_works_on_is_status_11_which_names_the_run(
    cbtfs: Program, tmp_path: Path
) -> None:
    cbtfs("sync", "--vm", "app1")
    (lock,) = (tmp_path / "store").glob("*-*/.lock")
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = cbtfs("sync", "--vm", "app1", "--lock-wait", "10ms")

    assert result.status == 11
    assert "cbtfs: app1: " in result.err
    assert "is locked by " in result.err


def test_the_error_of_each_disk_is_in_the_document_of_a_vm_without_a_point(
    cbtfs: Program, pool: RunningPool
) -> None:
    pool.set("nbd.attach_fail", "*")
    try:
        result = cbtfs("--json", "sync", "--vm", "app1")
    finally:
        pool.set("nbd.attach_fail", "")

    (vm,) = msgspec.convert(result.document()["vms"], list[SyncedVM])
    assert (result.status, vm.state, vm.point) == (1, "failed", None)
    assert {failure["device"] for failure in vm.failures} == {"xvda", "xvdb", "xvdc", "xvdd"}
    assert all(failure["error"] for failure in vm.failures)


def test_disk_without_a_vm_is_synced_by_its_uuid(cbtfs: Program) -> None:
    detached = msgspec.convert(cbtfs.json("ls")["detached"], list[Disk])

    [done] = synced(cbtfs.json("sync", "--vdi", detached[0].uuid))

    assert [disk.device for disk in done.disks] == ["disk"]


def test_point_that_is_not_there_is_status_10(cbtfs: Program) -> None:
    cbtfs("sync", "--vm", "app1")

    assert cbtfs("verify", "app1/1999").status == 10
    assert cbtfs("list", "--vm", "nothing").status == 10


def test_job_of_the_configuration_names_pool_store_and_vms(
    capsys: pytest.CaptureFixture[str], pool: RunningPool, environment: None, tmp_path: Path
) -> None:
    path = tmp_path / "cbtfs.toml"
    job = '[store.other]\npath = "other"\n[job.a]\npool = "sim"\nstore = "other"\n'
    job += 'vms = ["app*"]\nexclude_disks = ["xvdb", "app1 raw"]\n'
    path.write_text(pool.config.read_text() + job)

    [done] = synced(Program(capsys, "--config", str(path)).json("sync", "a"))

    assert [disk.device for disk in done.disks] == ["xvda", "xvdc"]
    assert (tmp_path / "other" / "by-name" / "app1" / str(done.point)).is_dir()


def test_interrupted_sync_ends_with_130_and_leaves_no_point(
    pool: RunningPool, environment: None, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    pool.set("nbd.delay", "1s")
    try:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cbtfs", "--config", str(pool.config)),
                *("--store", str(store), "sync", "--vm", "mail", "--json-progress"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        process.stderr.readline()  # the first disk has begun
        process.send_signal(2)
        _, said = process.communicate()
    finally:
        pool.set("nbd.delay", "")

    assert process.returncode == 130
    assert "cbtfs: interrupted" in said
    assert not list(store.glob("*/2*"))


def interrupt_after(size: int, pool: RunningPool, store: Path, *verb: str) -> None:
    """Interrupt a sync once it has read ``size`` bytes of a disk."""
    command = [sys.executable, "-m", "cbtfs", "--config", str(pool.config), "--store", str(store)]
    with subprocess.Popen(
        [*command, *verb, "--json-progress"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            event = json.loads(line)
            if event["event"] == "progress" and event["read"] >= size:
                break
        pool.set("nbd.delay", "2s")  # it shall not end meanwhile
        process.send_signal(2)
        process.communicate()


@pytest.mark.timeout(120)
def test_a_sync_after_an_interrupted_one_is_foretold_to_go_on_and_does(
    cbtfs: Program, pool: RunningPool, tmp_path: Path
) -> None:
    pool.set("nbd.delay", "500ms")
    try:
        interrupt_after(16 << 20, pool, tmp_path / "store", "sync", "--vm", "web1")
    finally:
        pool.set("nbd.delay", "")
    (partial,) = (tmp_path / "store").glob("*/.partial-*")

    listed = vms(cbtfs.json("ls", "--vm", "web1"))["web1"].disks
    [foretold] = synced(cbtfs.json("sync", "--vm", "web1", "-n"))
    [done] = synced(cbtfs.json("sync", "--vm", "web1"))

    assert {disk.next["method"] for disk in listed if disk.next} == {"resume"}
    assert {disk.method for disk in foretold.disks} == {"resume"}
    assert f".partial-{foretold.resumes}" == f".partial-{done.point}" == partial.name
    assert {(disk.method, disk.resumed, disk.reason) for disk in done.disks} == {
        ("resume", "full", "first")
    }
    assert cbtfs("verify", "web1/latest").status == 0


# ── The mount ──


@pytest.mark.fuse
def test_mount_returns_when_usable_and_umount_when_all_is_gone(
    cbtfs: Program, pool: RunningPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse")
    monkeypatch.setenv("LOGS_DIRECTORY", str(tmp_path))
    mnt = tmp_path / "mnt"
    mnt.mkdir()

    assert cbtfs("mount", str(mnt)).status == 0
    try:
        names = {path.name for path in (mnt / "by-vm" / "web1").iterdir()}
    finally:
        status = cbtfs("umount", str(mnt)).status

    assert {"xvda.raw", "xvdb.raw", "snapshots", "vm.json"} <= names
    assert (status, list(mnt.iterdir())) == (0, [])


def test_mount_that_fails_in_the_background_tells_its_status(
    cbtfs: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CBTFS_FINGERPRINT", f"sha256:{'ab' * 32}")

    assert cbtfs("mount", str(tmp_path)).status == 12


def test_umount_of_what_is_no_mount_says_so(cbtfs: Program, tmp_path: Path) -> None:
    result = cbtfs("umount", str(tmp_path))

    assert result.status == 1
    assert "nothing is mounted on it" in result.err
