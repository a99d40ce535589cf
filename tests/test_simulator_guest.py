"""The guests' sockets: whoever writes there is the guest, as nbdcopy and nbdinfo see it."""

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest

from .simulated import Api, RunningPool, running_pool

KiB = 1 << 10
MiB = 1 << 20


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("sim") / "pool") as running:
        yield running


@pytest.fixture
def api(pool: RunningPool) -> Api:
    return Api(pool).login()


def disk_of(api: Api, vm: str, userdevice: str) -> str:
    """Return the live VDI of a VM's device."""
    records = api.records("VM")
    vms = [ref for ref, r in records.items() if r["name_label"] == vm and not r["is_a_snapshot"]]
    return next(
        str(record["VDI"])
        for record in api.records("VBD").values()
        if record["VM"] == vms[0] and record["userdevice"] == userdevice
    )


def changed_blocks(api: Api, base: str, vdi: str) -> set[int]:
    """Return the numbers of the 64 KiB blocks that the pool calls changed."""
    bitmap = base64.b64decode(api.text("VDI.list_changed_blocks", base, vdi))
    return {
        8 * place + bit
        for place, byte in enumerate(bitmap)
        for bit in range(8)
        if byte & (0x80 >> bit)
    }


def test_there_is_a_socket_for_each_disk_of_a_running_vm(pool: RunningPool) -> None:
    found = pool.control("sockets")

    assert isinstance(found, list)
    guest = pool.directory / "guest"
    names = {str(Path(path).relative_to(guest)) for path in found}
    assert {"web1/xvda.sock", "web1/xvdb.sock", "db1/xvda.sock", "app1/xvdd.sock"} <= names
    assert not any(name.startswith("mail") or name == "web1/xvdd.sock" for name in names)


def test_nbdinfo_sees_a_writable_disk(pool: RunningPool) -> None:
    done = subprocess.run(
        ["nbdinfo", pool.guest("web1", "xvdb")], capture_output=True, text=True, check=True
    )

    assert "export-size: 268435456" in done.stdout
    assert "is_read_only: false" in done.stdout
    assert "can_trim: true" in done.stdout


def test_what_is_written_is_read(pool: RunningPool) -> None:
    disk = pool.open_guest("app1", "xvda")

    disk.pwrite(b"hello" * 1000, 12345)

    assert disk.pread(5000, 12345) == b"hello" * 1000
    disk.shutdown()


def test_a_write_beyond_the_end_is_refused(pool: RunningPool) -> None:
    disk = pool.open_guest("app1", "xvdc")
    disk.set_strict_mode(0)

    with pytest.raises(nbd.Error):
        disk.pwrite(bytes(4096), 16 * MiB - 512)
    disk.shutdown()


def test_writes_set_bits_and_discards_do_not(pool: RunningPool, api: Api) -> None:
    vdi = disk_of(api, "db1", "0")
    disk = pool.open_guest("db1", "xvda")
    base = api.text("VDI.snapshot", vdi, {})
    same = disk.pread(4 * KiB, 2 * MiB)

    disk.pwrite(b"x", 3 * 64 * KiB + 5)
    disk.pwrite(b"y" * 2, 10 * 64 * KiB - 1)  # two blocks
    disk.pwrite(same, 2 * MiB)  # identical
    disk.trim(MiB, 100 * MiB)
    disk.zero(64 * KiB, 50 * 64 * KiB)

    disk.shutdown()
    after = api.text("VDI.snapshot", vdi, {})
    assert changed_blocks(api, base, after) == {3, 9, 10, 32, 50}


def test_the_socket_survives_a_snapshot(pool: RunningPool, api: Api) -> None:
    disk = pool.open_guest("app1", "xvdb")
    disk.pwrite(b"before", 0)
    vdi = disk_of(api, "app1", "1")

    api.call("VDI.snapshot", vdi, {})
    disk.pwrite(b"behind", 0)

    assert disk.pread(6, 0) == b"behind"
    disk.shutdown()


def test_a_stopped_vm_has_no_sockets(pool: RunningPool, api: Api) -> None:
    vm = next(ref for ref, r in api.records("VM").items() if r["name_label"] == "app1")
    socket = pool.guest_socket("app1", "xvda")
    assert socket.exists()

    api.call("VM.hard_shutdown", vm)
    pool.control("sockets")
    assert not socket.parent.exists()

    api.call("VM.start", vm, False, False)
    assert pool.guest_socket("app1", "xvda").exists()


def test_nbdcopy_writes_a_whole_disk(pool: RunningPool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.write(b"start")
        file.truncate(16 * MiB)

    subprocess.run(["nbdcopy", image, pool.guest("app1", "xvdd")], check=True)

    disk = pool.open_guest("app1", "xvdd")
    assert disk.pread(16 * MiB, 0) == image.read_bytes()
    disk.shutdown()
