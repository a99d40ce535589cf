"""Distrust: a pool that forgets blocks which were written is found out as often as is promised.

25 VMs with 8 disks of 512 blocks each: one sync is 200 independent trials. Of each disk the guest
writes 5 random blocks, and the pool's bitmap names none of them. The sample is 64 blocks, so it
hits one of the 5 with a chance of a half.
"""

import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from cbtfs import extents, sample, sparse, units
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.sample import Sample
from cbtfs.simulator.builder import Builder
from cbtfs.simulator.memory import FIRST_ADDRESS
from cbtfs.simulator.pool import SimulatedPool
from cbtfs.simulator.topology import build_topology

from .commands import Shell, items
from .faulted import bytes_served, points_of
from .simulated import RunningPool, running_pool

pytestmark = pytest.mark.timeout(600)

NAMES = tuple(f"v{number:02d}" for number in range(25))
DEVICES = tuple(f"xvd{letter}" for letter in "abcdefgh")
TRIALS = len(NAMES) * len(DEVICES)

BLOCK = units.CBT_BLOCK
BLOCKS = 512
WRITTEN = 5
SAMPLED = Sample(share=0.01, at_most=None).count(BLOCKS)

READ_ALONG = 2.0
"""How many times the sample is compared at most: what lies between two of its blocks comes along
where that saves a request, and is not wasted."""

JOBS = """
[job.all]
vms = ["*"]
verify_sample = "1%"
[job.one]
vms = ["v00"]
verify_sample = "1%"
[job.credulous]
vms = ["v01"]
verify_sample = "0%"
"""


@dataclass(frozen=True)
class Lab:
    """The pool, and a store with a restore point of every VM.

    Attributes:
        written: what the guests have written, by VM, device and block; the rest is zero.
    """

    pool: RunningPool
    shell: Shell
    rng: random.Random
    written: dict[tuple[str, str], dict[int, bytes]] = field(default_factory=dict)

    def write(self, name: str) -> None:
        """Let a guest write the same number of random blocks on each of its disks."""
        for device in DEVICES:
            guest = self.pool.open_guest(name, device)
            for block in self.rng.sample(range(BLOCKS), WRITTEN):
                data = self.rng.randbytes(BLOCK)
                guest.pwrite(data, block * BLOCK)
                self.written.setdefault((name, device), {})[block] = data
            guest.shutdown()

    def equals_guest(self, name: str, device: str) -> bool:
        """Tell whether the latest image is what the guest would read now."""
        content = dict(self.written[name, device])
        with self.shell.image(name, device).open("rb") as image:
            assert os.fstat(image.fileno()).st_size == BLOCKS * BLOCK
            held = sparse.data_extents(image.fileno(), size=BLOCKS * BLOCK)
            for start, stop in extents.split(held, size=BLOCK):
                expected = content.pop(start // BLOCK, bytes(BLOCK))
                if os.pread(image.fileno(), stop - start, start) != expected:
                    return False
        return not content

    def latest(self) -> dict[str, Point]:
        """Return the latest point of each VM; all points were verified."""
        return {point.vm_name: point for point in points_of(self.shell.store)}


@dataclass(frozen=True)
class Lied:
    """What one sync of all VMs made of the lies, and what it told."""

    lab: Lab
    points: dict[str, Point]
    document: dict[str, object]
    said: str

    def disks(self) -> Iterator[tuple[str, DiskPoint]]:
        """Yield each disk with the name of its VM."""
        for name, point in self.points.items():
            for disk in point.disks:
                yield name, disk

    def found(self) -> list[tuple[str, DiskPoint]]:
        """Return the disks whose lie was found."""
        return [(name, disk) for name, disk in self.disks() if disk.blocks_mismatched]

    def missed(self) -> list[tuple[str, DiskPoint]]:
        """Return the disks whose lie was not found."""
        return [(name, disk) for name, disk in self.disks() if not disk.blocks_mismatched]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("distrust")
    build(directory / "pool")
    with running_pool(directory / "pool") as pool:
        pool.config.write_text(pool.config.read_text() + JOBS)
        made = Lab(pool, Shell(pool, directory / "store"), random.Random(11))
        made.shell.run("sync", "all")
        yield made


def build(directory: Path) -> None:
    """Make the pool's state in ``directory``."""
    directory.mkdir()
    pool = SimulatedPool(directory)
    builder = Builder(pool, seed="distrust")
    topology = build_topology(builder, address=FIRST_ADDRESS)
    for number, name in enumerate(NAMES):
        vm = builder.add_vm(name, running_on=topology.hosts[number % 2])
        for position, device in enumerate(DEVICES):
            size = BLOCKS * BLOCK
            vdi = builder.add_vdi(topology.shared, f"{name} {device}", size=size, cbt=True)
            builder.add_vbd(vm, vdi, userdevice=str(position))
        builder.start(vm)
    pool.close()


@dataclass(frozen=True)
class Idle:
    """What a sync of the VM ``v00`` did after the guest had written nothing."""

    served: int
    disks: tuple[DiskPoint, ...]


@pytest.fixture(scope="module")
def idle(lab: Lab) -> Idle:
    lab.pool.control("reset-counters")
    lab.shell.run("sync", "one")
    return Idle(bytes_served(lab.pool), lab.latest()["v00"].disks)


@pytest.fixture(scope="module")
def lied(lab: Lab, idle: Idle) -> Lied:  # idle: before anybody lied
    """All VMs, each of whose disks the pool has lied about."""
    for name in NAMES:
        lab.write(name)
    lab.pool.set("cbt.drop_bits", str(WRITTEN))
    done = lab.shell.run("-q", "--json", "sync", "all")
    lab.pool.set("cbt.drop_bits", "")
    return Lied(
        lab, lab.latest(), msgspec.json.decode(done.stdout, type=dict[str, object]), done.stderr
    )


# ── The promise ──────────────────────────────────────────────────────────────────────────────


def test_lies_are_found_at_the_rate_that_the_sample_promises(lied: Lied) -> None:
    found = len(lied.found())

    promised = sample.chance(unchanged=BLOCKS, wrong=WRITTEN, sampled=SAMPLED)
    most = max(disk.blocks_sampled for _, disk in lied.missed())
    possible = sample.chance(unchanged=BLOCKS, wrong=WRITTEN, sampled=most)
    assert 0.4 < promised < 0.6
    assert TRIALS * promised - 4 * sigma(promised) <= found
    assert found <= TRIALS * possible + 4 * sigma(possible)


def sigma(probability: float) -> float:
    """Return the standard deviation of the number of hits in all trials."""
    return math.sqrt(TRIALS * probability * (1 - probability))


def test_each_disk_is_sampled_as_said(lied: Lied) -> None:
    for _, disk in lied.missed():
        assert SAMPLED <= disk.blocks_sampled <= READ_ALONG * SAMPLED


def test_what_was_found_is_repaired_by_comparing(lied: Lied) -> None:
    for name, disk in lied.found():
        assert (disk.method, disk.reason) == ("compare", "cbt-mismatch")
        assert lied.lab.equals_guest(name, disk.device), (name, disk.device)


def test_what_was_missed_is_wrong_and_looks_like_any_increment(lied: Lied) -> None:
    for name, disk in lied.missed():
        assert (disk.method, disk.reason) == ("incremental", "changed")
        assert not lied.lab.equals_guest(name, disk.device), (name, disk.device)


# ── Telling ──────────────────────────────────────────────────────────────────────────────────


def test_the_point_tells_of_each_disk_that_was_found(lied: Lied) -> None:
    for name, point in lied.points.items():
        devices = [disk.device for vm, disk in lied.found() if vm == name]
        assert sorted(text.partition(":")[0] for text in point.warnings) == devices
        assert all("list of changed blocks was wrong" in text for text in point.warnings)


def test_json_tells_of_each_disk_that_was_found(lied: Lied) -> None:
    told = {
        (str(vm["vm"]), str(disk["device"]))
        for vm in items(lied.document, "vms")
        for disk in items(vm, "disks")
        if disk["blocks_mismatched"]
    }

    assert told == {(name, disk.device) for name, disk in lied.found()}


def test_even_a_quiet_sync_tells_of_each_disk_that_was_found(lied: Lied) -> None:
    for name, disk in lied.found():
        assert f"{name}/{disk.device}: the pool's list of changed blocks was wrong" in lied.said


# ── What it costs ────────────────────────────────────────────────────────────────────────────


def test_nothing_is_read_but_what_is_said_to_be_sampled(idle: Idle) -> None:
    assert idle.served == sum(disk.blocks_sampled for disk in idle.disks) * BLOCK
    for disk in idle.disks:
        assert SAMPLED <= disk.blocks_sampled <= READ_ALONG * SAMPLED


@pytest.mark.usefixtures("lied")
def test_a_sample_of_nothing_finds_nothing_and_reads_nothing(lab: Lab) -> None:
    lab.write("v01")
    lab.pool.set("cbt.drop_bits", str(WRITTEN))
    lab.pool.control("reset-counters")

    done = lab.shell.run("sync", "credulous")

    lab.pool.set("cbt.drop_bits", "")
    assert "wrong" not in done.stderr
    assert bytes_served(lab.pool) == 0
    for disk in lab.latest()["v01"].disks:
        assert (disk.method, disk.blocks_sampled) == ("incremental", 0)
