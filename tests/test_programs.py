"""Programs that people use on disks, unmodified, on live disks and snapshots of a mounted pool.

Many run at the same time, each on a file at random, and every one must get what nbdcopy reads from
the simulated pool itself. ``contrib/soak/programs`` runs 64 at once for as long as wanted.
"""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from cbtfs import units

from .simulated import Api, RunningPool, running_pool
from .test_mounted import SNAPSHOT, User, as_list, loop_device, plugged, run, temporary_snapshots

AT_ONCE = int(os.environ.get("CBTFS_PROGRAMS", "12"))
MINUTES = float(os.environ.get("CBTFS_MINUTES", "0"))

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(600 + 120 * MINUTES)]

LARGEST = 160 * units.MiB
"""Larger disks are left to the tests of one program at a time, but for one with a file system."""

_MAPPED = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as seen:
    print(hashlib.sha256(seen).hexdigest())
"""


@dataclass(frozen=True)
class Disk:
    """A file of the mount, and what it must hold."""

    file: Path
    size: int
    digest: str
    copy: Path

    def holds(self, path: Path) -> bool:
        """Tell whether a copy is right."""
        return path.stat().st_size == self.size and digest_of(path) == self.digest


Program = Callable[[Disk, Path], bool]


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def by_sha256sum(disk: Disk, _: Path) -> bool:
    return run("sha256sum", disk.file).split()[0] == disk.digest


def by_mmap(disk: Disk, _: Path) -> bool:
    return run(sys.executable, "-c", _MAPPED, disk.file).strip() == disk.digest


def by_cp(disk: Disk, work: Path) -> bool:
    run("cp", "--sparse=always", disk.file, work / "copy")
    return disk.holds(work / "copy")


def by_dd(disk: Disk, work: Path) -> bool:
    run("dd", f"if={disk.file}", f"of={work}/copy", "bs=1M", "iflag=direct", "conv=sparse")
    return disk.holds(work / "copy")


def by_rsync(disk: Disk, work: Path) -> bool:
    run("rsync", "-cL", "--sparse", disk.file, work / "copy")
    return disk.holds(work / "copy")


def by_tar(disk: Disk, work: Path) -> bool:
    run("tar", "-C", disk.file.parent, "-h", "-S", "-cf", work / "a.tar", disk.file.name)
    run("tar", "-C", work, "-xf", work / "a.tar")
    return disk.holds(work / disk.file.name)


def by_cmp(disk: Disk, _: Path) -> bool:
    return run("cmp", disk.file, disk.copy) == ""


def by_qemu_img(disk: Disk, work: Path) -> bool:
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.file, work / "a.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk.file, work / "a.qcow2")
    return "identical" in run("qemu-img", "compare", "-F", "qcow2", disk.copy, work / "a.qcow2")


def by_qemu_nbd(disk: Disk, work: Path) -> bool:
    # no path of a socket may be longer than 107 bytes
    socket = Path(f"/tmp/cbtfs-{os.getpid()}-{work.name}.sock")
    server = subprocess.Popen(["qemu-nbd", "-r", "-f", "raw", "-k", socket, disk.file])
    try:
        while not socket.exists():
            assert server.poll() is None
            time.sleep(0.01)
        run("nbdcopy", f"nbd+unix:///?socket={socket}", work / "copy")
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)
    return disk.holds(work / "copy")


def by_borg(disk: Disk, work: Path) -> bool:
    told = {"BORG_BASE_DIR": str(work), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
    words = ["env", *(f"{key}={value}" for key, value in told.items()), "borg"]
    run(*words, "init", "-e", "none", work / "repository")
    run(*words, "create", "--read-special", f"{work}/repository::a", disk.file)
    with (work / "copy").open("wb") as copy:
        command = [*words, "extract", "--stdout", f"{work}/repository::a"]
        subprocess.run(command, check=True, stdout=copy, cwd=work)
    return disk.holds(work / "copy")


def by_restic(disk: Disk, work: Path) -> bool:
    repository = str(work / "repository")
    words = ["env", "RESTIC_PASSWORD=x", "restic", "--no-cache", "-q", "-r", repository]
    run(*words, "init")
    run(*words, "backup", disk.file)
    with (work / "copy").open("wb") as copy:
        subprocess.run([*words, "dump", "latest", disk.file], check=True, stdout=copy)
    return disk.holds(work / "copy")


def by_loop(disk: Disk, work: Path) -> bool:
    """Check a disk's file system, mount it, and compare its files with their digests."""
    (work / "inside").mkdir()
    with loop_device(disk.file) as device:
        run("fsck.ext4", "-n", "-f", f"{device}p1")
        run("mount", "-o", "ro,noload", f"{device}p1", work / "inside")
        try:
            run("env", "--chdir", work / "inside", "sha256sum", "--quiet", "-c", "SHA256SUMS")
        finally:
            run("umount", work / "inside")
    return True


PROGRAMS: dict[str, Program] = {
    "sha256sum": by_sha256sum,
    "python3": by_mmap,
    "cp": by_cp,
    "dd": by_dd,
    "rsync": by_rsync,
    "tar": by_tar,
    "cmp": by_cmp,
    "qemu-img": by_qemu_img,
    "qemu-nbd": by_qemu_nbd,
    "borg": by_borg,
    "restic": by_restic,
    "losetup": by_loop,
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPool]:
    with running_pool(tmp_path_factory.mktemp("sim") / "pool") as pool:
        yield pool


def copied(pool: RunningPool, ref: str, place: Path) -> None:
    """Copy a VDI by nbdcopy from the first host, whose certificate has this address."""
    told = as_list(Api(pool).login().call("VDI.get_nbd_info", ref))
    first = msgspec.convert(told[0], dict[str, object])
    export = str(first["exportname"]).replace("?", "%3F")
    uri = f"nbds://127.0.0.2:{pool.nbd_port}/{export}?tls-certificates={pool.tls_directory()}"
    run("nbdcopy", uri, place)


def disks_of(pool: RunningPool, top: Path, place: Path) -> list[Disk]:
    """Return the smaller disks of a pool, and last one with a file system."""
    place.mkdir()
    found: list[Disk] = []
    wanted = (top / SNAPSHOT).resolve().stem
    for ref, vdi in Api(pool).login().records("VDI").items():
        uuid, size = str(vdi["uuid"]), int(str(vdi["virtual_size"]))
        file, copy = top / f"by-uuid/{uuid}.raw", place / uuid
        if not file.exists() or (size > LARGEST and uuid != wanted):
            continue
        if not vdi["is_a_snapshot"] and "snapshot" not in as_list(vdi["allowed_operations"]):
            continue  # it can only be read as it is at one instant
        try:
            copied(pool, ref, copy)
        except subprocess.CalledProcessError:
            continue  # on storage that this host does not export, or a guest writes to it
        found.append(Disk(file, size, digest_of(copy), copy))
    return sorted(found, key=lambda disk: disk.file.stem == wanted)


def test_programs_at_the_same_time(pool: RunningPool, tmp_path: Path) -> None:
    rng = random.Random(5)
    known = {name: program for name, program in PROGRAMS.items() if shutil.which(name)}
    ran: Counter[str] = Counter()
    user = User(pool, tmp_path)
    until = time.monotonic() + 60 * MINUTES
    with user.mounted("linger=1s") as top:
        *small, large = disks_of(pool, top, tmp_path / "copies")

        def work(number: int) -> None:
            names = list(known)
            while True:
                name = names[(number + ran.total()) % len(names)]
                disk = large if name == "losetup" else rng.choice(small)
                place = tmp_path / f"work{number}-{ran.total()}"
                place.mkdir()
                assert known[name](disk, place), (name, disk)
                shutil.rmtree(place)
                ran[name] += 1
                if time.monotonic() >= until:
                    return

        with ThreadPoolExecutor(AT_ONCE) as workers:
            list(workers.map(work, range(AT_ONCE)))
    print(dict(ran), "missing:", sorted(PROGRAMS.keys() - known.keys()))  # noqa: T201 - for soak
    assert ran.total() >= AT_ONCE
    assert temporary_snapshots(pool) == []
    assert plugged(pool) == []
