"""The contents of simulated disks: what the distribution's own tools say of them."""

import shutil
import subprocess
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest

from cbtfs.simulator import default_scenario, filesystem, lvm, partitions

MiB = 1 << 20
SEED = uuid.UUID(int=7)


def write(path: Path, pieces: Iterable[tuple[int, bytes]], *, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path


def tool(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_ext4_is_clean_and_holds_the_files(tmp_path: Path) -> None:
    image = tmp_path / "fs"
    tree: dict[str, bytes | str] = {
        "etc/name": b"x\n",
        "big.bin": filesystem.noise("b", 3 * MiB),
        "link": "etc/name",
    }

    filesystem.make_ext4(image, size=32 * MiB, label="test", seed=SEED, tree=tree)

    tool("/usr/sbin/e2fsck", "-fn", image)
    tool("/usr/sbin/debugfs", "-R", f"dump /big.bin {tmp_path}/out", image)
    assert (tmp_path / "out").read_bytes() == tree["big.bin"]


def test_ext4_is_the_same_each_time(tmp_path: Path) -> None:
    tree: dict[str, bytes | str] = {"a/b": b"content", "c": b""}
    filesystem.make_ext4(tmp_path / "one", size=32 * MiB, label="t", seed=SEED, tree=tree)
    second = time.time()
    while int(time.time()) == int(second):  # files get another ctime
        (tmp_path / "touched").touch()

    filesystem.make_ext4(tmp_path / "two", size=32 * MiB, label="t", seed=SEED, tree=tree)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_mbr_has_one_partition(tmp_path: Path) -> None:
    image = write(tmp_path / "disk", partitions.mbr(size=64 * MiB, disk_id=1), size=64 * MiB)

    table = tool("/usr/sbin/sfdisk", "--dump", image)

    assert "label: dos" in table
    assert "start=        2048, size=      129024, type=83" in table


def test_gpt_verifies(tmp_path: Path) -> None:
    image = write(tmp_path / "disk", partitions.gpt(size=64 * MiB, seed=SEED), size=64 * MiB)

    assert "No errors detected" in tool("/usr/sbin/sfdisk", "--verify", image)
    assert "start=        2048, size=      126976" in tool("/usr/sbin/sfdisk", "--dump", image)


def test_lvm_reads_the_volume_group(tmp_path: Path) -> None:
    if shutil.which("pvck") is None:
        pytest.skip("needs pvck of the package lvm2")
    pieces = lvm.physical_volume(
        size=256 * MiB, group="vg", volumes=[lvm.LogicalVolume("one", 2, 3)], seed=SEED, created=0
    )
    image = write(tmp_path / "disk", pieces, size=256 * MiB)

    headers = tool("pvck", "--dump", "headers", image)

    assert "vgname vg seqno 2" in headers
    assert "should" not in headers  # what pvck says of a wrong checksum


def test_noise_depends_on_its_seed_alone() -> None:
    assert filesystem.noise("a", 1000) == filesystem.noise("a", 1000)
    assert filesystem.noise("a", 1000) != filesystem.noise("b", 1000)


def test_hostile_names_are_all_different() -> None:
    assert len(set(default_scenario.HOSTILE_NAMES)) == len(default_scenario.HOSTILE_NAMES)
