"""The fault table: what goes wrong around a sync, what its user sees, what becomes of the data.

Each row disturbs one real ``cbtfs sync`` of a VM that has a restore point already. Afterwards,
every time: all listed points verify; the next sync succeeds without a new full copy, and its point
equals the guest's disks; and nothing of ours is left in the pool but the bases.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cbtfs import units
from cbtfs.catalogue import Point
from cbtfs.copier import REQUEST

from . import faulted
from .faulted import LARGE, LITTLE, Run, Told, World, running_world

pytestmark = pytest.mark.timeout(180)

RETRIED = "retried"
"""The new point is as if nothing had happened."""

DEGRADED = "degraded"
"""The new point is right, and it is told what it costs, or lacks."""

STOPPED = "stopped"
"""No new image of the disk; the older points and what the next sync needs are not touched."""

Act = Callable[[World], object]
ActOnRun = Callable[[World, Run], object]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row of the table.

    Attributes:
        what: goes wrong.
        before: brings it about before the command is started.
        midway: brings it about when some bytes of the first disk are copied.
        meanwhile: is done while the command runs.
        after: puts right what is not a fault of the simulated pool.
        outcome: what becomes of the first disk.
        status: of the command.
        says: pattern of what the user reads on stderr.
        devices: disks of the new point, if not all.
        reason: why the first disk was not copied as an increment.
        proof: that it did go wrong, where nothing is said.
        silent: a host does not answer; the command is not to wait for a minute.
        next_method: how the next sync copies the first disk.
        resumed: the next sync goes on with the snapshot and the files of this one.
        where: shared: all hosts have the two disks; local: xcp2 has the only one; xfs: as shared,
            and the store has a file system of its own.
    """

    what: str
    outcome: str
    status: int = 0
    says: str = ""
    devices: list[str] | None = None
    reason: str = "changed"
    before: Act | None = None
    midway: ActOnRun | None = None
    meanwhile: ActOnRun | None = None
    after: Act | None = None
    proof: Callable[[World], bool] | None = None
    silent: bool = False
    next_method: str = "incremental"
    resumed: bool = False
    where: str = "shared"


def pool_set(*settings: str) -> Act:
    """Switch faults on."""
    return lambda world: [world.pool.set(*s.split("=", 1)) for s in settings]  # type: ignore[func-returns-value]


def control(command: str, *arguments: str) -> ActOnRun:
    """Do something to the pool."""
    return lambda world, _: world.pool.control(command, *arguments)


def silence_the_idle_host(world: World) -> None:
    """Have the host fall silent that is tried first; chance would choose between idle ones."""
    world.make_busy("xcp2")
    world.pool.set("nbd.silent", "xcp1")


def send(signum: signal.Signals) -> ActOnRun:
    """Send the command a signal."""
    return lambda _, run: run.process.send_signal(signum)


def dropped(count: int) -> Callable[[World], bool]:
    """Tell whether faults ended so many connections."""
    return lambda world: world.nbd_counter("dropped") == count


def called(method: str, *, times: int) -> Callable[[World], bool]:
    """Tell whether a call was made as often as that."""
    return lambda world: world.counter(f"rpc.{method}") == times


def connected_to(host: str) -> Callable[[World], bool]:
    """Tell whether a host served disks."""
    return lambda world: world.nbd_peak(host) > 0


def logged_in_again(world: World) -> bool:
    """Tell whether one login was not enough."""
    return world.counter("rpc.session.login_with_password") > 1


def turned_away(world: World) -> bool:
    """Tell whether a host closed a connection because all its places are taken."""
    return world.nbd_counter("turned_away") > 0


def give_places_back_once_turned_away(world: World, run: Run) -> None:
    run.until("a connection was turned away", lambda: turned_away(world))
    world.give_places_back()


def restart_xapi_silently(world: World, _: Run) -> None:
    world.pool.set("http.silent", "*")
    world.pool.control("restart-xapi")  # cuts the connections that are open


def renew_certificate_and_cut(world: World, _: Run) -> None:
    world.pool.control("renew-certificate", "xcp2")
    world.pool.control("drop-nbd")


def destroy_base(world: World) -> None:
    for ref, vdi in world.small.api.records("VDI").items():
        if vdi["type"] == "cbt_metadata":
            world.small.api.call("VDI.destroy", ref)


def detach_second_disk(world: World, _: Run) -> None:
    world.small.detach(world.disk("xvdb"))


def attach_second_disk(world: World) -> None:
    world.small.attach(world.disk("xvdb"), 1)


def switch_tracking_off(*settings: str) -> Act:
    """Switch change tracking of all disks off, and faults on."""

    def act(world: World) -> None:
        for device in world.sizes:
            world.small.api.call("VDI.disable_cbt", world.disk(device))
        pool_set(*settings)(world)

    return act


def mount_point(world: World) -> Path:
    """Return where the store's own file system is."""
    return world.shell.store.parent


def fill_store(world: World) -> None:
    free = os.statvfs(mount_point(world))
    with (mount_point(world) / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - units.MiB)


def make_room_in_store(world: World) -> None:
    (mount_point(world) / "ballast").unlink()


def remount(mode: str) -> Act:
    """Make the store's file system read-only, or writable again."""
    return lambda world: subprocess.run(
        ["mount", "-o", f"remount,{mode}", mount_point(world)], check=True
    )


def tear_store_out(world: World, _: Run) -> None:
    subprocess.run(["xfs_io", "-x", "-c", "shutdown", mount_point(world)], check=True)


def put_store_back(world: World) -> None:
    where = mount_point(world)
    subprocess.run(["umount", where], check=True)
    subprocess.run(["mount", "-o", "loop", where.with_name("xfs.img"), where], check=True)


def move_point_to_the_future(world: World) -> None:
    faulted.move_latest_to(world, "20990101T000000Z")


# ── The table ────────────────────────────────────────────────────────────────────────────────

NBD = [
    Fault(
        what="NBD connections end between two requests",
        before=pool_set("nbd.close_after=1", "nbd.drop_count=3"),
        proof=dropped(3),
        outcome=RETRIED,
    ),
    Fault(
        what="NBD connections end in the middle of an answer",
        before=pool_set("nbd.drop_after=1300K", "nbd.drop_count=3"),
        proof=dropped(3),
        outcome=RETRIED,
    ),
    Fault(
        what="all NBD connections are cut in mid-copy",
        midway=control("drop-nbd"),
        outcome=RETRIED,
    ),
    Fault(
        what="a host cannot read the disk beyond 10 MiB: it promises an answer and hangs up",
        before=pool_set("nbd.fail_read_at=10M"),
        outcome=STOPPED,
        status=3,
        devices=["xvdb"],
        says=r"v/xvda  failed: 127\.0\.0\.1[23]:\d+: .*disconnected",
    ),
    Fault(
        what="an NBD server accepts and is silent, the other host is well",
        before=silence_the_idle_host,
        silent=True,
        outcome=RETRIED,
        says=r"127\.0\.0\.12:\d+ did not get ready within 2 s; trying again",
    ),
    Fault(
        what="all NBD servers accept and are silent",
        before=pool_set("nbd.silent=*"),
        silent=True,
        outcome=STOPPED,
        status=1,
        says=r"did not get ready within 2 s; what xapi-nbd wrote to that host's log says why",
    ),
    Fault(
        what="a host goes silent in mid-copy",
        midway=lambda world, _: world.pool.set("nbd.delay", "1h"),
        silent=True,
        outcome=STOPPED,
        status=3,
        devices=["xvdb"],
        says=r"127\.0\.0\.1[23]:\d+: no answer for 1 s",
    ),
    Fault(
        what="somebody else has all NBD places of all hosts",
        before=World.take_all_places,
        proof=turned_away,
        outcome=STOPPED,
        status=1,
        says=r"127\.0\.0\.1[23]:\d+: hung up before TLS",
    ),
    Fault(
        what="somebody else has all NBD places, and gives them back while sync tries",
        before=World.take_all_places,
        meanwhile=give_places_back_once_turned_away,
        outcome=RETRIED,
        says=r"hung up before TLS; trying again",
    ),
]

HOSTS = [
    Fault(
        what="a host dies in mid-copy, another one has the disk",
        midway=control("kill-host", "xcp2"),
        proof=connected_to("xcp2"),
        outcome=RETRIED,
    ),
    Fault(
        what="the only host that has the disk dies in mid-copy",
        where="local",
        midway=control("kill-host", "xcp2"),
        outcome=STOPPED,
        status=1,
        says=r"127\.0\.0\.13:\d+: Connection refused",
        next_method="resume",
        resumed=True,
    ),
    Fault(
        what="another host becomes the master in mid-copy",
        midway=control("failover", "xcp2"),
        proof=logged_in_again,
        outcome=RETRIED,
    ),
    Fault(
        what="the session expires in mid-copy",
        midway=control("expire-sessions"),
        proof=logged_in_again,
        outcome=RETRIED,
    ),
    Fault(
        what="xapi restarts in mid-copy",
        midway=control("restart-xapi"),
        proof=logged_in_again,
        outcome=RETRIED,
    ),
    Fault(
        what="xapi accepts and is silent",
        before=pool_set("http.silent=*"),
        silent=True,
        outcome=STOPPED,
        status=13,
        says=r"no host of the pool answers: 127\.0\.0\.2 .*; try again later",
    ),
    Fault(
        what="xapi goes silent in mid-copy",
        midway=restart_xapi_silently,
        silent=True,
        outcome=DEGRADED,
        says=r"could not remove .* from the pool: no host of the pool answers",
    ),
    Fault(
        what="the certificate of a host is renewed in mid-copy, and its connections end",
        midway=renew_certificate_and_cut,
        outcome=RETRIED,
    ),
    Fault(
        what="the certificate of the master is renewed in mid-copy",
        midway=control("renew-certificate", "xcp1"),
        outcome=DEGRADED,
        says=r"could not remove snapshot .*: 127\.0\.0\.2 no longer shows the certificate it showed",
    ),
]

SNAPSHOTS = [
    Fault(
        what="the pool refuses the snapshot: the chain is too long",
        before=pool_set(
            "xapi.fail=VM.snapshot:SR_BACKEND_FAILURE_109::The snapshot chain is too long:"
        ),
        outcome=STOPPED,
        status=1,
        says=r"VM\.snapshot: xapi answered SR_BACKEND_FAILURE_109 \(The snapshot chain is too long\)",
    ),
    Fault(
        what="the pool refuses the snapshot: the SR is full",
        before=pool_set("sr.no_space=*"),
        outcome=STOPPED,
        status=1,
        says=r"VM\.snapshot: xapi answered SR_BACKEND_FAILURE_44 \(.*space",
    ),
    Fault(
        what="the user's role does not allow snapshots",
        before=pool_set("xapi.fail=VM.snapshot:RBAC_PERMISSION_DENIED:vm.snapshot"),
        outcome=STOPPED,
        status=1,
        says=r"VM\.snapshot: xapi answered RBAC_PERMISSION_DENIED \(vm\.snapshot\)",
    ),
    Fault(
        what="the base's snapshot is destroyed by somebody",
        before=destroy_base,
        outcome=DEGRADED,
        reason="base-lost",
    ),
    Fault(
        what="the data of the new snapshot cannot be removed at first",
        before=pool_set("xapi.fail=VDI.data_destroy*2:VDI_IN_USE:OpaqueRef:x:destroy"),
        proof=called("Async.VDI.data_destroy", times=2 + 2),
        outcome=RETRIED,
    ),
    Fault(
        what="the data of the new snapshot cannot be removed",
        before=pool_set("xapi.fail=VDI.data_destroy:SR_BACKEND_FAILURE_82::Failed to delete:"),
        outcome=DEGRADED,
        says=r"could not remove the data of snapshot .* from the pool: VDI\.data_destroy: xapi"
        r" answered SR_BACKEND_FAILURE_82",
    ),
]

CHANGES = [
    Fault(
        what="the licence does not allow change tracking, and it is off",
        before=switch_tracking_off("licence.restrict_cbt=on"),
        outcome=DEGRADED,
        reason="cbt-unsupported",
        next_method="compare",  # it is switched on again only then
    ),
    Fault(
        what="the user's role does not allow to switch change tracking on, and it is off",
        before=switch_tracking_off(
            "xapi.fail=VDI.enable_cbt:RBAC_PERMISSION_DENIED:vdi.enable_cbt"
        ),
        outcome=DEGRADED,
        reason="cbt-off",
        says=r"changes of xvda are not tracked, so each sync reads all of it: VDI\.enable_cbt: xapi"
        r" answered RBAC_PERMISSION_DENIED",
        next_method="compare",
    ),
    Fault(
        what="change tracking breaks as the snapshot is taken",
        before=pool_set("cbt.snapshot_fail=*"),
        outcome=DEGRADED,
        reason="base-lost",
        next_method="compare",  # of a snapshot without tracking nothing later is an increment
    ),
    *(
        Fault(
            what=f"the bitmap is malformed: {how}",
            before=pool_set(f"cbt.garble={how}"),
            outcome=DEGRADED,
            reason="cbt-mismatch",
        )
        for how in ("short", "long", "base64")
    ),
    *(
        Fault(
            what=f"VDI.list_changed_blocks fails with {code}",
            before=pool_set(f"xapi.fail=VDI.list_changed_blocks:{code}::whatever:"),
            outcome=DEGRADED,
            reason=reason,
        )
        for code, reason in [
            ("SR_BACKEND_FAILURE_459", "cbt-mismatch"),
            ("SR_BACKEND_FAILURE_460", "base-lost"),
            ("SR_BACKEND_FAILURE_46", "base-lost"),
            ("VDI_NO_CBT_METADATA", "cbt-off"),
        ]
    ),
    Fault(
        what="VDI.list_changed_blocks finds the disk in use, once",
        before=pool_set("xapi.fail=VDI.list_changed_blocks*1:VDI_IN_USE:OpaqueRef:x:cbt"),
        proof=called("Async.VDI.list_changed_blocks", times=2 + 1),
        outcome=RETRIED,
    ),
]

PEOPLE = [
    Fault(
        what="SIGINT in mid-copy",
        midway=send(signal.SIGINT),
        outcome=STOPPED,
        status=130,
        says=r"interrupted; nothing half-written is listed, the next sync goes on from where",
        next_method="resume",
        resumed=True,
    ),
    Fault(
        what="SIGTERM in mid-copy",
        midway=send(signal.SIGTERM),
        outcome=STOPPED,
        status=143,
        says=r"interrupted; nothing half-written is listed, the next sync goes on from where",
        next_method="resume",
        resumed=True,
    ),
    Fault(
        what="SIGKILL in mid-copy",
        midway=send(signal.SIGKILL),
        outcome=STOPPED,
        status=-signal.SIGKILL,
        resumed=True,  # with the disk that was finished; of the other nothing was on record yet
    ),
    Fault(
        what="a disk is detached in mid-copy",
        midway=detach_second_disk,
        outcome=RETRIED,
        after=attach_second_disk,
    ),
    Fault(
        what="the clock steps back behind the latest point",
        before=move_point_to_the_future,
        outcome=RETRIED,
    ),
]

STORE = [
    Fault(
        what="the file system of the store becomes full at a write",
        where="xfs",
        before=fill_store,
        after=make_room_in_store,
        outcome=STOPPED,
        status=1,
        says=r"xvda\.raw: no space left",
    ),
    Fault(
        what="the file system of the store is read-only",
        where="xfs",
        before=remount("ro"),
        after=remount("rw"),
        outcome=STOPPED,
        status=1,
        says=r"its file system is read-only; .* remount it read-write",
    ),
    Fault(
        what="the file system of the store goes away in mid-copy",
        where="xfs",
        midway=tear_store_out,
        after=put_store_back,
        outcome=STOPPED,
        status=1,
        says=r"xvda\.raw: the disk below it failed",
    ),
]

FAULTS = NBD + HOSTS + SNAPSHOTS + CHANGES + PEOPLE + STORE


# ── How a row is carried out ─────────────────────────────────────────────────────────────────


@dataclass
class Worlds:
    """The pools that rows disturb; each goes on with the next row, unless a row failed."""

    directory: Path
    made: int = 0
    known: dict[str, World] = field(default_factory=dict)
    ends: dict[str, ExitStack] = field(default_factory=dict)

    def take(self, where: str) -> World:
        """Return a pool for a row: a new one if there is none yet, or the last is spoilt."""
        if where not in self.known or not self.known[where].sound:
            self.made += 1
            end = self.ends.setdefault(where, ExitStack())
            end.close()
            self.known[where] = self.run(where, end)
        world = self.known[where]
        world.sound = False  # until its row is through
        return world

    def run(self, where: str, end: ExitStack) -> World:
        folder = self.directory / f"{where}{self.made}"
        if where == "local":
            return end.enter_context(running_world(folder, sizes=[LARGE], only_host="xcp2"))
        store = end.enter_context(own_filesystem(folder)) / "store" if where == "xfs" else None
        world = running_world(folder, sizes=[LARGE, LITTLE], store=store)
        return end.enter_context(world)

    def close(self) -> None:
        for end in self.ends.values():
            end.close()


@contextmanager
def own_filesystem(folder: Path) -> Iterator[Path]:
    """Mount a small file system with reflinks beside ``folder``."""
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("needs root and xfsprogs to give the store a file system of its own")
    where = folder.with_name(f"{folder.name}-store") / "mounted"
    where.mkdir(parents=True)
    disk = where.with_name("xfs.img")
    with disk.open("wb") as file:
        file.truncate(320 * units.MiB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True)
    if subprocess.run(["mount", "-o", "loop", disk, where], check=False).returncode:
        pytest.skip("the kernel cannot mount an XFS image")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)
        disk.unlink()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    with closing(Worlds(tmp_path_factory.mktemp("worlds"))) as made:
        yield made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_fault(fault: Fault, worlds: Worlds) -> None:
    world = worlds.take(fault.where)
    world.forget_old_points()
    world.write()
    world.pool.control("reset-counters")
    if fault.before:
        fault.before(world)
    points = world.points()

    told = disturbed(world, fault)

    assert told.status == fault.status, told.said
    assert re.search(fault.says, told.said), told.said
    assert "Traceback" not in told.said
    assert "OpaqueRef" not in told.said  # a session, above all
    assert fault.proof is None or fault.proof(world)
    new = world.points()[len(points) :]
    assert_outcome(world, fault, told, new)
    world.put_in_order()
    assert_next_sync_is_good(world, fault)
    world.sound = True


def disturbed(world: World, fault: Fault) -> Told:
    """Run the command with the fault of this row."""
    options = ["--json-progress"] if fault.midway else []
    if fault.midway:
        world.pool.set("nbd.trickle", "200ms")
    run = world.begin(*options, impatient=fault.silent)
    try:
        if fault.midway:
            some = 3 * REQUEST if fault.resumed else 1  # so that the first piece is among them
            run.until_copying(finished=len(world.sizes) - 1, read=some)
            fault.midway(world, run)
        if fault.meanwhile:
            fault.meanwhile(world, run)
        world.pool.set("nbd.trickle", "")  # the rest may be quick
        told = run.ended()
    finally:
        run.kill()
    if fault.after:
        fault.after(world)
    return told


def assert_outcome(world: World, fault: Fault, told: Told, new: list[Point]) -> None:
    if not new:
        assert fault.outcome == STOPPED
        assert told.status
        return
    (point,) = new
    world.assert_equals_guest(point, devices=fault.devices or list(world.sizes))
    if fault.outcome == STOPPED:
        assert point.disk("xvda") is None
        return
    disk = faulted.disk_of(point, "xvda")
    assert disk.reason == fault.reason
    assert (disk.method == "incremental") == (fault.reason == "changed")


def assert_next_sync_is_good(world: World, fault: Fault) -> None:
    """Sync once more: it builds on the last good point, and leaves everything tidy."""
    begun = [path.name.removeprefix(".partial-") for path in world.partial_points()]
    world.pool.control("reset-counters")

    said = world.sync()

    point = world.points()[-1]
    assert faulted.disk_of(point, "xvda").method == fault.next_method
    assert {disk.method for disk in point.disks} <= {"incremental", fault.next_method}
    assert ([point.time] == begun) is fault.resumed
    if fault.next_method == "resume":
        assert world.bytes_served() < world.sizes["xvda"], said
    world.assert_equals_guest(point, devices=list(world.sizes))
    world.assert_only_bases_left()


# ── What cannot be put right ─────────────────────────────────────────────────────────────────


def test_a_vm_that_is_removed_in_mid_copy_has_its_point_all_the_same(tmp_path: Path) -> None:
    with running_world(tmp_path / "world", sizes=[LARGE]) as world:
        world.write()
        content = world.content("xvda")
        world.pool.set("nbd.trickle", "200ms")
        run = world.begin("--json-progress")
        run.until_copying(finished=0, read=1)
        remove_vm(world)
        world.pool.set("nbd.trickle", "")

        told = run.ended()

        assert told.status == 0, told.said
        assert "the VM's metadata could not be saved" in told.said
        *_, point = world.points()
        image = world.shell.store / point.vm_uuid / point.time / "xvda.raw"
        assert image.read_bytes() == content
        gone = world.begin().ended()
        assert gone.status == 10, gone.said
        assert len(world.points()) == 2


def remove_vm(world: World) -> None:
    disk = world.disk("xvda")
    world.small.api.call("VM.hard_shutdown", world.small.vm)
    world.small.api.call("VDI.destroy", disk)
    world.small.api.call("VM.destroy", world.small.vm)
