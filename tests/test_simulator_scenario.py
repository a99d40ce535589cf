"""What the scenarios hold, judged by the tools that a restore would use."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtfs import errors
from cbtfs.simulator import default_scenario, partitions, scenarios
from cbtfs.simulator.filesystem import Tree
from cbtfs.simulator.lvm import LogicalVolume
from cbtfs.simulator.pool import SimulatedPool
from cbtfs.simulator.values import Record

KiB = 1 << 10
MiB = 1 << 20


def build(directory: Path, scenario: str) -> SimulatedPool:
    pool = SimulatedPool(directory)
    scenarios.build(pool, scenario)
    return pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedPool]:
    pool = build(tmp_path_factory.mktemp("default") / "pool", "default")
    yield pool
    pool.close()


def vdis(pool: SimulatedPool, name: str) -> list[tuple[str, Record]]:
    """Return (ref, record) of the VDIs of that name, snapshots after the live one."""
    found = [(r, v) for r, v in pool.db.records("VDI").items() if v["name_label"] == name]
    return sorted(found, key=lambda item: (bool(item[1]["is_a_snapshot"]), str(item[1]["uuid"])))


def save(pool: SimulatedPool, ref: str, path: Path, *, start: int = 0, size: int = 0) -> Path:
    """Write a part of a disk to a sparse file."""
    disk = pool.disk(ref)
    size = size or disk.size - start
    with path.open("wb") as file:
        file.truncate(size)
        for begin, end in disk.allocated():
            begin, end = max(begin, start), min(end, start + size)
            for offset in range(begin, end, MiB):
                file.seek(offset - start)
                file.write(disk.pread(offset, min(MiB, end - offset)))
    return path


def check_files(image: Path, expected: Tree, target: Path) -> None:
    """Assert that a file system is clean and holds exactly those files."""
    subprocess.run(["/usr/sbin/e2fsck", "-fn", image], check=True, capture_output=True)
    target.mkdir()
    subprocess.run(
        ["/usr/sbin/debugfs", "-R", f"rdump / {target}", image], check=True, capture_output=True
    )
    found = {
        str(path.relative_to(target)): path.readlink().as_posix()
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in target.rglob("*")
        if path.is_symlink() or path.is_file()
    }
    assert found == {
        path: content if isinstance(content, str) else hashlib.sha256(content).hexdigest()
        for path, content in expected.items()
    }


def test_web1_boots_from_an_mbr_with_ext4(pool: SimulatedPool, tmp_path: Path) -> None:
    live = vdis(pool, "web1 root")[0][0]
    disk = save(pool, live, tmp_path / "disk")
    table = subprocess.run(
        ["/usr/sbin/sfdisk", "--dump", disk], capture_output=True, text=True, check=True
    )
    partition = save(pool, live, tmp_path / "partition", start=partitions.ALIGNMENT)

    assert "start=        2048, size=     1046528, type=83" in table.stdout
    check_files(partition, default_scenario.web1_files(2), tmp_path / "files")


def test_the_first_snapshot_of_web1_is_from_before_its_upgrade(
    pool: SimulatedPool, tmp_path: Path
) -> None:
    (_, *snapshots) = vdis(pool, "web1 root")
    first = min(snapshots, key=lambda item: str(item[1]["snapshot_time"]))[0]
    partition = save(pool, first, tmp_path / "partition", start=partitions.ALIGNMENT)

    assert len(snapshots) == 2
    check_files(partition, default_scenario.web1_files(1), tmp_path / "files")


def test_web1_keeps_data_on_a_gpt(pool: SimulatedPool, tmp_path: Path) -> None:
    live = vdis(pool, "web1 data")[0][0]
    disk = save(pool, live, tmp_path / "disk")
    verdict = subprocess.run(
        ["/usr/sbin/sfdisk", "--verify", disk], capture_output=True, text=True, check=True
    )
    size = partitions.partition_size(256 * MiB, table="gpt")
    partition = save(pool, live, tmp_path / "partition", start=partitions.ALIGNMENT, size=size)

    assert "No errors detected" in verdict.stdout
    check_files(partition, default_scenario.web1_data_files(), tmp_path / "files")


@pytest.mark.parametrize("volume", default_scenario.VOLUMES, ids=lambda volume: volume.name)
def test_db1_has_ext4_in_logical_volumes(
    pool: SimulatedPool, tmp_path: Path, volume: LogicalVolume
) -> None:
    live = vdis(pool, "db1 disk")[0][0]
    image = save(pool, live, tmp_path / "lv", start=volume.offset, size=volume.size)

    check_files(image, default_scenario.db1_files(volume.name), tmp_path / "files")


def test_sizes_that_are_no_multiple_of_2_mib(pool: SimulatedPool) -> None:
    sizes = {int(str(vdi["virtual_size"])) for vdi in pool.db.records("VDI").values()}

    assert default_scenario.ODD_SIZE in sizes
    assert default_scenario.ODD_SIZE % (64 * KiB) != 0


def test_one_of_everything(pool: SimulatedPool) -> None:
    all_vdis = list(pool.db.records("VDI").values())
    vms = list(pool.db.records("VM").values())
    pbds = list(pool.db.records("PBD").values())

    assert {str(vm["power_state"]) for vm in vms} == {"Running", "Halted"}
    assert any(vm["is_a_template"] and not vm["is_a_snapshot"] for vm in vms)
    assert any(not vdi["managed"] for vdi in all_vdis)
    assert any(vdi["is_tools_iso"] for vdi in all_vdis)
    assert any(vdi["sharable"] and len(_list(vdi["VBDs"])) == 2 for vdi in all_vdis)
    assert any(vdi["managed"] and not _list(vdi["VBDs"]) for vdi in all_vdis)
    assert any(vdi["on_boot"] == "reset" for vdi in all_vdis)
    assert any('"type": "raw"' in json.dumps(vdi["sm_config"]) for vdi in all_vdis)
    assert {pbd["currently_attached"] for pbd in pbds} == {True, False}
    assert any(vbd["type"] == "CD" for vbd in pool.db.records("VBD").values())


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def test_names_that_are_a_trap_and_twins(pool: SimulatedPool) -> None:
    names = [str(vm["name_label"]) for vm in pool.db.records("VM").values()]

    assert set(default_scenario.HOSTILE_NAMES) <= set(names)
    assert names.count("twin") == 2
    assert any(len(name.encode()) > 255 for name in names)


def test_large_has_10_000_disks_in_500_vms(tmp_path: Path) -> None:
    pool = build(tmp_path / "pool", "large")

    assert len(pool.db.records("VDI")) == 10_000
    assert sum(not vm["is_control_domain"] for vm in pool.db.records("VM").values()) == 500


def test_huge_is_16_tib_and_sparse(tmp_path: Path) -> None:
    pool = build(tmp_path / "pool", "huge")
    ((ref, _),) = vdis(pool, "huge disk")
    disk = pool.disk(ref)

    assert disk.size == 16 << 40
    assert sum(stop - start for start, stop in disk.allocated()) == 4 * MiB
    assert disk.pread(disk.size - 16, 16) != bytes(16)


def test_no_two_blocks_of_the_speed_scenario_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenarios, "BENCH_SIZE", 32 * MiB)
    pool = build(tmp_path / "pool", "speed")
    ((ref, _),) = vdis(pool, "bench disk")
    data = pool.disk(ref).pread(0, 32 * MiB)

    blocks = {data[offset : offset + 4096] for offset in range(0, len(data), 4096)}

    assert len(blocks) == 32 * MiB // 4096


def test_an_unknown_scenario_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="'big'"):
        build(tmp_path / "pool", "big")
