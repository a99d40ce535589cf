"""Large sparse disks in a simulated pool, and what a sync of one costs: bytes, calls, memory, time.

Used by ``test_increment_cost`` and by ``contrib/bench/increment``.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from cbtfs import catalogue, owner, store as stores, units
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.owner import Owned
from cbtfs.simulator.builder import Builder
from cbtfs.simulator.memory import FIRST_ADDRESS
from cbtfs.simulator.pool import SimulatedPool
from cbtfs.simulator.topology import build_topology
from cbtfs.simulator.values import Value

from .commands import Shell
from .simulated import Api, RunningPool, running_pool

BLOCK = units.CBT_BLOCK

_POLLS = "rpc.task.get_status"
"""Asked until a task is done: how often is a matter of time."""


@dataclass(frozen=True)
class Cost:
    """What one sync of a disk cost.

    Attributes:
        served: bytes of disks that the hosts sent, as they counted them.
        calls: how often each call was made, as the pool counted it; without the polling of tasks.
        rss: the most memory that the command had, in bytes.
        seconds: of the whole command.
        cpu: processor seconds of the command, without those of the pool.
        disk: the record of the new point.
    """

    served: int
    calls: Mapping[str, int]
    rss: int
    seconds: float
    cpu: float
    disk: DiskPoint


@contextmanager
def running(directory: Path, sizes: Mapping[str, int]) -> Iterator[RunningPool]:
    """Run a pool in ``directory`` that has a VM with one empty disk for each name in ``sizes``."""
    directory.mkdir()
    pool = SimulatedPool(directory)
    builder = Builder(pool, seed="big")
    topology = build_topology(builder, address=FIRST_ADDRESS)
    for name, size in sizes.items():
        vm = builder.add_vm(name, running_on=topology.hosts[0])
        # a VHD ends at 2 TiB
        kind: Value = {"image-format": "qcow2"} if size > 2 * units.TiB else {}
        fields = {"sm_config": kind}
        vdi = builder.add_vdi(topology.shared, name, size=size, cbt=True, fields=fields)
        builder.add_vbd(vm, vdi, userdevice="0")
        builder.start(vm)
    pool.close()
    with running_pool(directory) as started:
        yield started


def seed(shell: Shell, name: str) -> None:
    """Make the first restore point of a VM whose disk is empty, without reading the disk.

    It is made by the store's own means, after a snapshot taken and tagged as a sync does it. The
    block allocation of an image larger than 2 TiB cannot be asked for, so a sync would have to
    read all of it, which takes hours.
    """
    api = Api(shell.pool).login()
    vm, vdi = api.named("VM", name), _disk(api, name)
    allocated = msgspec.convert(shell.pool.control("volume", vdi), dict[str, int | str | bool])
    assert allocated["allocated"] == 0
    vm_uuid, size = api.text("VM.get_uuid", vm), int(api.text("VDI.get_virtual_size", vdi))
    moment = catalogue.format_time(datetime(2026, 1, 1, tzinfo=UTC))
    with (
        stores.open_store(shell.store) as store,
        store.lock(vm_uuid),
        store.stage(vm_uuid, time=moment) as stage,
    ):
        tag = Owned(self_uuid="", role="base", store=store.uuid, vm=vm_uuid, point=moment)
        snapshot = _metadata_snapshot(api, vm, owner.run_name(moment, "0" * 16), tag)
        image = stage.new_image("xvda.raw", size=size)
        root = image.finish()
        image.close()
        disk = DiskPoint(
            device="xvda",
            file="xvda.raw",
            digests="xvda.b3",
            digest_root=root,
            vdi_uuid=api.text("VDI.get_uuid", vdi),
            size=size,
            snapshot_uuid=snapshot,
            cbt=True,
            reason="first",
        )
        stage.commit(Point(time=moment, vm_uuid=vm_uuid, vm_name=name, disks=(disk,)))


def _disk(api: Api, name: str) -> str:
    (vdi,) = (
        ref
        for ref, record in api.records("VDI").items()
        if record["name_label"] == name and record["managed"] and not record["is_a_snapshot"]
    )
    return vdi


def _metadata_snapshot(api: Api, vm: str, name: str, tag: Owned) -> str:
    """Take a snapshot that keeps its metadata only; return the uuid of its disk."""
    snapshot = api.text("VM.snapshot", vm, name)
    (vbd,) = (ref for ref, record in api.records("VBD").items() if record["VM"] == snapshot)
    vdi = api.text("VBD.get_VDI", vbd)
    uuid = api.text("VDI.get_uuid", vdi)
    own = owner.write_owner(msgspec.structs.replace(tag, self_uuid=uuid))
    api.call("VDI.add_to_other_config", vdi, owner.TAG_OWNER, own)
    api.call("VM.destroy", snapshot)
    api.call("VDI.data_destroy", vdi)
    return uuid


def write_scattered(
    pool: RunningPool, name: str, *, size: int, blocks: int, rng: random.Random
) -> dict[int, bytes]:
    """Let the guest write so many random blocks; return what it wrote, by offset."""
    guest = pool.open_guest(name, "xvda")
    written: dict[int, bytes] = {}
    for block in rng.sample(range(size // BLOCK), blocks):
        data = rng.randbytes(BLOCK)
        guest.pwrite(data, block * BLOCK)
        written[block * BLOCK] = data
    guest.shutdown()
    return written


def sync(shell: Shell, name: str) -> Cost:
    """Sync a VM by the real command; return what that cost."""
    spent = measured(shell, "-q", "sync", "--vm", name)
    if spent.status:
        sys.exit(f"cbtfs sync: exit {spent.status}: {spent.err}")
    point = (shell.store / "by-name" / name / "latest" / "point.json").read_bytes()
    return Cost(
        served=spent.counted("read."),
        calls={k: n for k, n in spent.counts.items() if k.startswith("rpc.") and k != _POLLS},
        rss=spent.rss,
        seconds=spent.seconds,
        cpu=spent.cpu,
        disk=catalogue.decode(point).disks[0],
    )


@dataclass(frozen=True)
class Spent:
    """How a command ended, and what it cost; ``counts`` are the pool's, as for ``Cost``."""

    status: int
    out: str
    err: str
    counts: Mapping[str, int]
    rss: int
    seconds: float
    cpu: float

    def counted(self, prefix: str) -> int:
        """Return the sum of the counts whose names begin so."""
        return sum(count for key, count in self.counts.items() if key.startswith(prefix))


def measured(shell: Shell, *arguments: str) -> Spent:
    """Run the real command; return what that cost."""
    shell.pool.control("reset-counters")
    with tempfile.NamedTemporaryFile("r") as costs:
        # GNU time starts the command from a process so small that it does not count as its memory
        timed = ["/usr/bin/time", "-q", "-o", costs.name, "-f", "%M %U %S"]
        command = [*timed, *shell.command(*arguments)]
        begun = time.monotonic()
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=shell.env())
        seconds = time.monotonic() - begun
        memory, user, system = costs.read().split()
    counted = msgspec.convert(shell.pool.control("counters"), dict[str, object])
    return Spent(
        done.returncode,
        done.stdout,
        done.stderr,
        {name: count for name, count in counted.items() if isinstance(count, int)},
        rss=int(memory) * units.KiB,
        seconds=seconds,
        cpu=float(user) + float(system),
    )


def holds(image: Path, content: Mapping[int, bytes]) -> bool:
    """Tell whether an image has this content at these offsets, and is sparse elsewhere."""
    fd = os.open(image, os.O_RDONLY)
    try:
        stored = os.fstat(fd).st_blocks * 512
        right = all(os.pread(fd, len(data), offset) == data for offset, data in content.items())
    finally:
        os.close(fd)
    # the file system may join what is near, and keeps its own records
    return right and stored < 2 * sum(map(len, content.values())) + 16 * units.MiB
