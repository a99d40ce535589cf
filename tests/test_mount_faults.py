"""The fault table of the mount: what goes wrong as a disk is read, what its reader sees, by when.

Each row disturbs a mount by the real command, whose snapshot somebody has begun to read. Afterwards
the pool is put in order and the mount ended, and nothing of ours is left in the pool.
"""

import errno
import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cbtfs import mountpoint, units

from .commands import leftovers
from .faulted import local_sr
from .simulated import Api, RunningPool, running_pool
from .smallvm import Small
from .test_mounted import User, kill

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(300)]

SIZE = 96 * units.MiB
FIRST = 4096
"""Bytes read before the fault; the kernel and we have read further ahead then."""

LATER = 64 * units.MiB
"""Where it is read during the fault: nothing of that has come yet."""

TIMEOUT = 6.0
"""Seconds after which the mount gives a read up, by its options."""

SLACK = 10.0
"""Seconds more that a busy machine may take."""

DATA = "the bytes"
"""The reader sees nothing but the delay."""


@dataclass
class Scene:
    """A mount with a file that is open, and what is behind it.

    Attributes:
        top: of the mount.
        snapshot: the reference of the snapshot VDI that is read.
        content: of the disk then.
        undo: puts the pool in order again, the last first.
    """

    user: User
    small: Small
    top: Path
    file: Path
    snapshot: str
    content: bytes
    undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def pool(self) -> RunningPool:
        return self.user.pool

    def set(self, key: str, value: str) -> None:
        """Switch a fault on, until the end of the row."""
        self.pool.set(key, value)
        self.undo.append(lambda: self.pool.set(key, ""))

    def kill_host(self, *hosts: str) -> None:
        self.pool.control("kill-host", *hosts)
        self.undo.append(lambda: self.pool.control("revive-host", *hosts))


Act = Callable[[Scene], object]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row of the table.

    Attributes:
        what: goes wrong.
        act: brings it about.
        sees: what a reader of the rest of the disk gets: ``DATA``, or an errno.
        within: seconds in which that is so.
        disk: 0 is on storage that all hosts have, 1 on that of xcp2 only.
        options: of the mount.
        log: what the mount's log says of it.
        names: whether the names of the tree are still there.
    """

    what: str
    act: Act
    sees: str | int
    within: float = SLACK
    disk: int = 0
    options: str = ""
    log: str = ""
    names: bool = True


def set_to(key: str, value: str) -> Act:
    return lambda scene: scene.set(key, value)


def control(command: str, *arguments: str) -> Act:
    return lambda scene: scene.pool.control(command, *arguments)


def both(*acts: Act) -> Act:
    return lambda scene: [act(scene) for act in acts]


def kill_hosts(*hosts: str) -> Act:
    return lambda scene: scene.kill_host(*hosts)


def fail_over(scene: Scene) -> None:
    scene.pool.control("failover", "xcp2")
    scene.undo.append(lambda: scene.pool.control("failover", "xcp1"))


def destroy_snapshot(scene: Scene) -> None:
    """Destroy what is being read, as soon as the pool lets us."""
    api = Api(scene.pool).login()
    scene.pool.control("drop-nbd")
    deadline = time.monotonic() + 30
    while True:
        try:
            api.call("VDI.destroy", scene.snapshot)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def rename(scene: Scene) -> None:
    Api(scene.pool).login().call("VDI.set_name_label", scene.snapshot, "another name")


def kill_mount(scene: Scene) -> None:
    kill(scene.user.pid)


TABLE = [
    Fault(
        what="an NBD connection ends in the middle of an answer, again and again",
        act=both(set_to("nbd.drop_after", "5M"), set_to("nbd.drop_count", "4")),
        sees=DATA,
        within=30,
    ),
    Fault(
        what="all NBD connections are cut",
        act=control("drop-nbd"),
        sees=DATA,
    ),
    Fault(
        what="NBD servers fall silent",
        act=set_to("nbd.delay", "1h"),
        sees=errno.EIO,
        within=TIMEOUT + SLACK,
        log="no answer from the pool within 6.0 s",
    ),
    Fault(
        what="new NBD connections are met with silence, and the old ones are cut",
        act=both(set_to("nbd.silent", "*"), control("drop-nbd")),
        sees=errno.EIO,
        within=TIMEOUT + SLACK,
        log="no answer from the pool within 6.0 s",
    ),
    Fault(
        what="a host dies, another one has the disk",
        act=kill_hosts("xcp2"),
        sees=DATA,
    ),
    Fault(
        what="the only host that has the disk dies",
        act=kill_hosts("xcp2"),
        disk=1,
        sees=errno.EIO,
        within=TIMEOUT + SLACK,
    ),
    Fault(
        what="no host can attach the disk any more, and the connections are cut",
        act=both(set_to("nbd.attach_fail", "*"), control("drop-nbd")),
        sees=errno.EIO,
        within=TIMEOUT + SLACK,
    ),
    Fault(
        what="xapi restarts",
        act=control("restart-xapi"),
        sees=DATA,
    ),
    Fault(
        what="xapi restarts, and the NBD connections are cut",
        act=both(control("restart-xapi"), control("drop-nbd")),
        sees=DATA,
        within=30,
    ),
    Fault(
        what="xapi is silent",
        act=both(set_to("http.silent", "*"), control("restart-xapi")),
        sees=DATA,
    ),
    Fault(
        what="another host becomes the master",
        act=fail_over,
        sees=DATA,
    ),
    Fault(
        what="another host becomes the master, and the NBD connections are cut",
        act=both(fail_over, control("drop-nbd")),
        sees=DATA,
        within=30,
    ),
    Fault(
        what="sessions expire, and the NBD connections are cut",
        act=both(control("expire-sessions"), control("drop-nbd")),
        sees=DATA,
    ),
    Fault(
        what="the snapshot is destroyed while it is open",
        act=destroy_snapshot,
        sees=errno.EIO,
        within=TIMEOUT + SLACK,
    ),
    Fault(
        what="the disk is renamed",
        act=rename,
        sees=DATA,
    ),
    Fault(
        what="the mount is killed",
        act=kill_mount,
        sees=errno.ENOTCONN,
        names=False,
    ),
    Fault(
        what="the whole pool dies",
        act=both(set_to("http.reset", "*"), kill_hosts("xcp1", "xcp2")),
        sees=errno.EIO,
        within=TIMEOUT + SLACK,
    ),
    Fault(
        what="there is no memory to keep anything",
        act=lambda _: None,
        options="cache=0",
        sees=DATA,
    ),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with running_pool(tmp_path_factory.mktemp("sim") / "pool", "empty") as pool:
        api = Api(pool).login()
        vm = api.text("VM.create", {"name_label": "v", "name_description": ""})
        made = Small(pool, api, vm)
        made.add_disk("v 0", 0, size=SIZE)
        made.add_disk("v 1", 1, size=SIZE, sr=local_sr(api, "xcp2"))
        api.call("VM.start", vm, False, False)
        rng = random.Random(4)
        for device in ("xvda", "xvdb"):
            guest = pool.open_guest("v", device)
            for at in range(0, SIZE, 8 * units.MiB):
                guest.pwrite(rng.randbytes(8 * units.MiB), at)
            guest.shutdown()
        yield made


def content(small: Small, device: str) -> bytes:
    """Return what a guest sees on a disk."""
    guest = small.pool.open_guest("v", device)
    try:
        return b"".join(
            bytes(guest.pread(8 * units.MiB, at)) for at in range(0, SIZE, 8 * units.MiB)
        )
    finally:
        guest.shutdown()


@contextmanager
def scene_of(fault: Fault, small: Small, home: Path) -> Generator[Scene]:
    """Mount, and on exit put everything in order; then nothing of ours is left."""
    user = User(small.pool, home)
    api = Api(small.pool).login()
    small = Small(small.pool, api, small.vm)  # sessions end here now and then
    snapshot = api.text("VDI.snapshot", small.disk(f"v {fault.disk}"), {})
    file = user.top / f"by-uuid/{api.text('VDI.get_uuid', snapshot)}.raw"
    user.top.mkdir()
    options = f"timeout={TIMEOUT:.0f}s,linger=1s,{fault.options}"
    assert user.cbtfs("mount", "-o", options, user.top).returncode == 0
    scene = Scene(
        user, small, user.top, file, snapshot, content(small, ("xvda", "xvdb")[fault.disk])
    )
    try:
        yield scene
    finally:
        for undo in reversed(scene.undo):
            undo()
        begun = time.monotonic()
        done = user.cbtfs("umount", user.top)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 60
    assert mountpoint.find(user.top) is None
    assert_nothing_left(small)


@pytest.mark.parametrize("fault", TABLE, ids=[fault.what for fault in TABLE])
def test_fault(fault: Fault, small: Small, tmp_path: Path) -> None:
    with scene_of(fault, small, tmp_path) as scene, opened(scene.file) as fd:
        assert read(fd, 0, FIRST) == scene.content[:FIRST]
        fault.act(scene)

        begun = time.monotonic()
        seen = read(fd, LATER, SIZE - LATER)
        took = time.monotonic() - begun

        assert seen == (scene.content[LATER:] if fault.sees == DATA else fault.sees)
        assert took < fault.within
        if fault.names:
            assert (scene.top / "by-vm/v").is_dir()
            assert (scene.top / "by-vm/v/vm.json").read_text()
    assert fault.log in scene.user.log.read_text()


@contextmanager
def opened(path: Path) -> Generator[int]:
    """Open a file; closing it may fail, as it does where a mount has died."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def read(fd: int, at: int, length: int) -> bytes | int:
    """Read part of a file; return it, or the errno of the first read that fails."""
    found = bytearray()
    while len(found) < length:
        try:
            piece = os.pread(fd, length - len(found), at + len(found))
        except OSError as error:
            return error.errno or -1
        assert piece
        found += piece
    return bytes(found)


def assert_nothing_left(small: Small) -> None:
    """See that nothing of ours is in the pool, once it had time to notice that we are gone."""
    deadline = time.monotonic() + 30
    while (left := leftovers(small.pool)).snapshots or left.dom0_vbds or left.tasks:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert left.bases == left.snapshot_vms == []


def test_a_mount_is_ended_while_the_whole_pool_is_dead(small: Small, tmp_path: Path) -> None:
    user = User(small.pool, tmp_path)
    user.top.mkdir()
    assert user.cbtfs("mount", "-o", f"timeout={TIMEOUT:.0f}s", user.top).returncode == 0
    with (user.top / "by-vm/v/xvda.raw").open("rb", buffering=0) as file:
        assert file.read(FIRST)
    small.pool.set("http.reset", "*")
    small.pool.control("kill-host", "xcp1", "xcp2")
    try:
        begun = time.monotonic()
        done = user.cbtfs("umount", user.top)
        took = time.monotonic() - begun
    finally:
        small.pool.set("http.reset", "")
        small.pool.control("revive-host", "xcp1", "xcp2")

    assert mountpoint.find(user.top) is None
    assert took < 150, done.stderr
    # what it could not remove is removed by the next one
    assert user.cbtfs("mount", user.top).returncode == 0
    assert user.cbtfs("umount", user.top).returncode == 0
    assert_nothing_left(small)
