"""A small VM whose sync is disturbed: its guest, the real command, and what is left afterwards."""

import contextlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import msgspec

from cbtfs import catalogue, cli, store as stores, units
from cbtfs.catalogue import DiskPoint, Point, Reference

from .commands import Leftovers, Shell, items, leftovers
from .nbdclient import NbdClient
from .program import untouched_process
from .simulated import Api, RunningPool, running_pool
from .smallvm import Small

LARGE, LITTLE = 48 * units.MiB, 2 * units.MiB
"""Sizes of disks: one takes some requests over each connection, the other a single one."""

STEP = 2 * units.MiB

NBD_ADDRESSES = ("127.0.0.12", "127.0.0.13")
PATIENCE = 60.0
"""Seconds after which a command that should do something is stuck, on a slow machine too."""

_IMPATIENT = Path(__file__).with_name("impatient.py")


@dataclass(frozen=True)
class Told:
    """How a sync ended, and what it told.

    Attributes:
        document: what it printed as JSON; {} if it did not come that far.
        said: all that it wrote to stderr.
    """

    status: int
    document: dict[str, object]
    said: str

    def disks(self) -> dict[str, dict[str, object]]:
        """Return what is told of each disk of the new point, by device."""
        (vm,) = items(self.document, "vms")
        return {str(disk["device"]): disk for disk in items(vm, "disks")}

    def methods(self) -> dict[str, str]:
        """Return how each disk was copied, by device."""
        return {device: str(disk["method"]) for device, disk in self.disks().items()}


class Run:
    """A ``cbtfs sync`` under way."""

    def __init__(self, command: list[str], *, env: dict[str, str], scratch: Path) -> None:
        self._out, self._err = scratch / "stdout", scratch / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(command, env=env, stdout=out, stderr=err)

    def said(self) -> str:
        """Return what it has written to stderr so far."""
        return self._err.read_text()

    def until(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait until ``happened``; fail if the command ends before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"no sign that {what}:\n{self.said()}"
            time.sleep(0.01)

    def until_copying(self, *, finished: int, read: int) -> None:
        """Wait until a disk is in mid-copy.

        Args:
            finished: other disks that are finished by then.
            read: bytes of it that are copied, at least; not all of them are.
        """

        def copying() -> bool:
            said = self.said()
            last = self._progress(said)
            return said.count('"disk_finished"') == finished and read <= last[0] < last[1]

        self.until("it was in mid-copy", copying)

    def _progress(self, said: str) -> tuple[int, int]:
        """Return the bytes read and to be read of a disk, as told last."""
        lines = [line for line in said.splitlines(keepends=True) if line.endswith("}\n")]
        events = [json.loads(line) for line in lines if '"event": "progress"' in line]
        return (events[-1]["read"], events[-1]["total"]) if events else (0, 0)

    def ended(self) -> Told:
        """Wait for the end."""
        status = self.process.wait(PATIENCE)
        printed = self._out.read_text()
        return Told(status, json.loads(printed) if printed else {}, self.said())

    def kill(self) -> None:
        """End it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@dataclass
class World:
    """A pool with one running VM, ``v``, and a store that has a restore point of it.

    Attributes:
        sizes: of its disks in bytes, by device.
        sound: whether nothing that is left of a test disturbs the next one.
        held: sockets by which somebody else takes places at the hosts.
    """

    small: Small
    shell: Shell
    scratch: Path
    sizes: dict[str, int]
    sound: bool = True
    held: list[socket.socket] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    @property
    def pool(self) -> RunningPool:
        """The pool."""
        return self.small.pool

    def disk(self, device: str) -> str:
        """Return the ref of a disk."""
        return self.small.disk(f"v {list(self.sizes).index(device)}")

    # ── the guest ────────────────────────────────────────────────────────────────────────────

    def write(self) -> None:
        """Let the guest write all of its disks."""
        for device, size in self.sizes.items():
            guest = self.pool.open_guest("v", device)
            for at in range(0, size, STEP):
                guest.pwrite(self.rng.randbytes(STEP), at)
            guest.shutdown()

    def content(self, device: str) -> bytes:
        """Return what the guest reads."""
        guest = self.pool.open_guest("v", device)
        steps = range(0, self.sizes[device], STEP)
        found = b"".join(bytes(guest.pread(STEP, at)) for at in steps)
        guest.shutdown()
        return found

    # ── the command ──────────────────────────────────────────────────────────────────────────

    def begin(self, *options: str, impatient: bool = False) -> Run:
        """Begin a sync; ``impatient`` with hosts that are silent."""
        command = self.shell.command("--json", "sync", "--vm", "v", *options)
        if impatient:
            command[:3] = [sys.executable, str(_IMPATIENT)]
        # the script's folder would come first on the path, and not the one that is tested
        env = self.shell.env() | {"PYTHONPATH": str(_IMPATIENT.parent.parent)}
        return Run(command, env=env, scratch=self.scratch)

    def sync(self) -> str:
        """Sync without a fault, and fail unless that succeeds; return what was said.

        The same command in this process: to start one takes as long as all else that it does.
        """
        streams = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)]
        with (
            untouched_process(),
            mock.patch.dict(os.environ, self.shell.env()),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
        ):
            status = cli.main(self.shell.command("--json", "sync", "--vm", "v")[3:])
        said = str(streams[1].buffer.getvalue(), "utf-8")
        assert status == 0, said
        return said

    # ── what is left ─────────────────────────────────────────────────────────────────────────

    def points(self) -> list[Point]:
        """Return the restore points, oldest first, after every one of them was verified."""
        return points_of(self.shell.store)

    def forget_old_points(self) -> None:
        """Remove all points but the latest by hand, as a user may."""
        for folder in self.shell.store.glob("*/2*Z"):
            if folder.name != (folder.parent / "latest").resolve().name:
                shutil.rmtree(folder)

    def assert_equals_guest(self, point: Point, *, devices: list[str]) -> None:
        """Compare the images of ``point`` with what the guest reads now."""
        assert [disk.device for disk in point.disks] == devices
        for disk in point.disks:
            image = self.shell.store / point.vm_uuid / point.time / disk.file
            assert image.read_bytes() == self.content(disk.device), disk.device

    def partial_points(self) -> list[Path]:
        """Return what the store has of points that are not finished."""
        return list(self.shell.store.glob("*/.partial*"))

    def assert_only_bases_left(self) -> None:
        """Fail if the pool has more of ours than one base for each disk, or the store a stage."""
        left = leftovers(self.pool)
        assert sorted(left.bases) == sorted(map(self.disk, self.sizes))
        assert left == Leftovers(left.bases, [], [], [], [])
        assert not self.partial_points()

    # ── other people ─────────────────────────────────────────────────────────────────────────

    def take_all_places(self) -> None:
        """Let somebody else have every NBD connection that the hosts serve."""
        for address in NBD_ADDRESSES:
            for _ in range(16):
                client = NbdClient(address, self.pool.nbd_port)
                self.held.append(client.connection)
                client.hello()

    def make_busy(self, host: str) -> None:
        """Let another process hold a place at ``host``, so that the other one is tried first."""
        uuid = self.small.api.text("host.get_uuid", self.small.api.named("host", host))
        busy = socket.socket(socket.AF_UNIX)
        self.held.append(busy)
        busy.bind(f"\0cbtfs/place/{uuid}:{self.pool.nbd_port}/0")

    def give_places_back(self) -> None:
        """Let somebody else go."""
        while self.held:
            self.held.pop().close()

    def put_in_order(self) -> None:
        """Switch all faults off, bring back whoever is down, and trust the hosts that there are."""
        pems = [self.pool.certificate(host).read_text() for host in ("xcp1", "xcp2")]
        self.pool.ca_file.write_text("".join(pems))
        for key in self.pool.faults():
            self.pool.set(key, "")
        self.give_places_back()
        self.pool.control("revive-host", "xcp1", "xcp2")
        self.pool.control("failover", "xcp1")
        self.small.api.login()

    def bytes_served(self) -> int:
        """Return how many bytes of disks the hosts have sent since the counters were reset."""
        return bytes_served(self.pool)

    def counter(self, name: str) -> int:
        """Return one of the pool's counters."""
        return int(str(self._counters().get(name, 0)))

    def nbd_counter(self, name: str) -> int:
        """Return one of the counters of the NBD servers."""
        return int(str(self._nbd()[name]))

    def nbd_peak(self, host: str) -> int:
        """Return how many NBD connections a host had at a time."""
        return msgspec.convert(self._nbd()["peak"], dict[str, int]).get(host, 0)

    def _nbd(self) -> dict[str, object]:
        return msgspec.convert(self._counters()["nbd"], dict[str, object])

    def _counters(self) -> dict[str, object]:
        return counters_of(self.pool)


def points_of(directory: Path) -> list[Point]:
    """Return the restore points of a store, oldest first, after every one of them was verified."""
    with stores.open_store(directory, create=False) as store:
        histories = store.catalogue().vms.values()
        assert not store.problems
        for history in histories:
            for point in history.points:
                assert not store.verify(Reference(history, point)).damaged, point.time
        return [point for history in histories for point in history.points]


def counters_of(pool: RunningPool) -> dict[str, object]:
    """Return what the pool has counted since the counters were reset."""
    return msgspec.convert(pool.control("counters"), dict[str, object])


def bytes_served(pool: RunningPool) -> int:
    """Return how many bytes of disks the hosts have sent since the counters were reset."""
    counted = counters_of(pool).items()
    return sum(int(str(count)) for name, count in counted if name.startswith("read."))


@contextlib.contextmanager
def running_world(
    directory: Path, *, sizes: Sequence[int], only_host: str = "", store: Path | None = None
) -> Iterator[World]:
    """Run a pool in ``directory``, which is made, with a VM that has a first restore point.

    Args:
        directory: also for what the commands print and learn.
        sizes: of the VM's disks in bytes, multiples of 2 MiB.
        only_host: that has the disks; "" for all.
        store: directory to make the store in.
    """
    directory.mkdir(parents=True)
    with running_pool(directory / "pool", "empty") as pool:
        api = Api(pool).login()
        vm = api.text("VM.create", {"name_label": "v", "name_description": ""})
        small = Small(pool, api, vm)
        sr = local_sr(api, only_host) if only_host else ""
        for number, size in enumerate(sizes):
            small.add_disk(f"v {number}", number, size=size, sr=sr)
        api.call("VM.start", vm, False, False)
        named = {f"xvd{letter}": size for letter, size in zip("abc", sizes, strict=False)}
        world = World(small, Shell(pool, store or directory / "store"), directory, named)
        world.write()
        world.sync()
        try:
            yield world
        finally:
            world.give_places_back()


def local_sr(api: Api, host: str) -> str:
    """Return the ref of the SR that only this host has."""
    ref = api.named("host", host)
    (sr,) = (
        str(pbd["SR"])
        for pbd in api.records("PBD").values()
        if pbd["host"] == ref and api.text("SR.get_name_label", str(pbd["SR"])) == "Local storage"
    )
    return sr


def move_latest_to(world: World, moment: str) -> None:
    """Make it look as if the latest point had been made at ``moment``, ``20990101T000000Z``."""
    (latest,) = world.shell.store.glob("*/latest")
    folder = latest.resolve()
    point = catalogue.decode((folder / "point.json").read_bytes())
    changed = json.loads(catalogue.encode(point)) | {"time": moment}
    (folder / "point.json").write_text(json.dumps(changed))
    folder.rename(folder.with_name(moment))
    latest.unlink()
    latest.symlink_to(moment)


def disk_of(point: Point, device: str) -> DiskPoint:
    """Return a disk that the point must have."""
    found = point.disk(device)
    assert found is not None
    return found
