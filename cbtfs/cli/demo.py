"""``demo``: the guided tour. Real commands, their real output, on a simulated pool.

Everything happens in one directory, and whatever way the tour ends, nothing stays mounted and no
process is left.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from cbtfs import errors, image, mountpoint
from cbtfs.simulator import life

from . import output

STORE_SIZE = 4 << 30
"""Size in bytes of the (sparse) XFS image for the store, where reflinks need one."""

GUEST_WRITES = 3 << 20
"""Bytes that the guest writes between the two syncs."""

PARTITION = 1 << 20
"""Where the first partition of web1's first disk begins, in bytes."""


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("demo", epilog="Example: cbtfs demo /var/tmp/tour")(demo)


def demo(
    directory: Annotated[
        str | None,
        typer.Argument(metavar="DIR", help="Keep the files here; default: a temporary directory."),
    ] = None,
) -> None:
    """Show the main job on a simulated pool: mount, copy, sync, write, sync again."""
    with _place(directory) as place, Tour.on(place) as tour:
        tour.intro()
        tour.pool()
        if tour.can_mount():
            tour.mount()
        tour.first_sync()
        tour.second_sync()
        tour.sharing()
        tour.check()
    _farewell(directory)


@contextmanager
def _place(directory: str | None) -> Generator[Path]:
    """Yield the directory of the tour; a temporary one is removed at the end."""
    if directory is not None:
        place = Path(directory).absolute()
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise errors.UsageError(f"{place} is not empty; give the demo a directory of its own")
        yield place
        return
    place = Path(tempfile.mkdtemp(prefix="cbtfs-demo-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@dataclass
class Tour:
    """The steps of the tour and what must be undone after it.

    Args:
        place: an empty directory.
        cleanup: what to do at the end, last first.
    """

    place: Path
    cleanup: ExitStack
    step: int = 0
    environ: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    @contextmanager
    def on(cls, place: Path) -> Generator["Tour"]:
        """Yield a tour in ``place``; on exit everything it started is stopped."""
        with ExitStack() as cleanup:
            tour = cls(place, cleanup)
            tour.environ = tour._environment()
            try:
                yield tour
            finally:
                for signum in (signal.SIGINT, signal.SIGTERM):  # to stop now would leave mounts
                    signal.signal(signum, signal.SIG_IGN)

    # ── The steps ────────────────────────────────────────────────────────────────────────────

    def intro(self) -> None:
        """Say what this is, and make the store's directory."""
        self.title("cbtfs: a pool's disks as files, backups that are files too")
        self.say(
            f"Everything below happens in {self.place}, on a simulated pool that speaks the wires",
            "of a real one: XenAPI over HTTPS, NBD over TLS. Lines with a $ are commands you can type;",
            f"cbtfs is {Path(sys.argv[0]).absolute()}.",
        )
        for name in ("store", "mnt"):
            (self.place / name).mkdir()
        self._make_reflinks_possible()
        self.say("So that no command has to name configuration and store:")
        for name in ("CBTFS_CONFIG", "CBTFS_STORE"):
            output.line(f"$ export {name}={shlex.quote(self.environ[name])}")

    def pool(self) -> None:
        """Start the pool and list it."""
        self.title("A pool")
        self.say("Two hosts, shared and local storage, running and halted VMs:")
        self.cleanup.callback(life.stop, self.place / "pool")
        self.cbtfs("sim", "start", str(self.place / "pool"))
        self.say("What do some of its VMs have, and what would the next sync do?")
        self.cbtfs("ls", "--vm", "web1", "--vm", "db1", "--vm", "app1")

    def can_mount(self) -> bool:
        """Tell whether FUSE works here; if not, say what helps."""
        try:
            mountpoint.check_fuse()
        except errors.MountError as exc:
            self.say(f"The mount is left out: {exc}.")
            return False
        return True

    def mount(self) -> None:
        """Mount the pool, look around, copy the disk of a running VM."""
        self.title("Every disk is a file")
        mnt, copy = str(self.place / "mnt"), str(self.place / "copy.raw")
        self.cleanup.callback(self._unmount)
        self.cbtfs("mount", mnt)
        self.run("ls", "-l", f"{mnt}/by-vm/web1")
        self.say("A disk of a running VM, read at one instant (a temporary snapshot, gone later):")
        disk = f"{mnt}/by-vm/web1/xvdb.raw"
        self.run("cp", "--sparse=always", disk, copy)
        self.say("The copy equals the disk, and takes only what is used:")
        self.run("cmp", copy, disk)
        self.run("ls", "-lsh", copy)
        self.say("Without any copy: the files in the first partition of the other disk.")
        other = f"{mnt}/by-vm/web1/xvda.raw"
        self.run("debugfs", "-R", "ls -l /", f"{other}?offset={PARTITION}")
        self.say("Done with the mount; this also waits until its snapshots are gone.")
        self.cbtfs("umount", mnt)

    def first_sync(self) -> None:
        """Make the first restore point."""
        self.title("The first restore point: a full copy of what is used")
        self.cbtfs("sync", "--vm", "web1")
        self.say("It is a directory with complete raw images; cbtfs is not needed to read them:")
        self.run("ls", "-lsh", f"{self.place}/store/by-name/web1/latest/")

    def second_sync(self) -> None:
        """Write as the guest does, and sync what changed."""
        self.title("The guest writes, the second restore point copies only that")
        written = self.place / "written.raw"
        written.write_bytes(os.urandom(GUEST_WRITES))
        socket = f"{self.place}/pool/guest/web1/xvdb.sock"
        self.say("Be the guest: write 3 MiB to the second disk of the running VM.")
        self.run("nbdcopy", str(written), f"nbd+unix:///?socket={socket}")
        if image.reflink_supported(self.place / "store"):
            self.say("Space in use before the second sync:")
            self._used()
        self.say("What would sync do now? And then do it.")
        self.cbtfs("sync", "--vm", "web1", "-n")
        self.cbtfs("sync", "--vm", "web1")
        self.say("The new image has what the guest wrote; the older restore point does not.")
        points = f"{self.place}/store/by-name/web1"
        self.run("cmp", "-n", str(GUEST_WRITES), str(written), f"{points}/latest/xvdb.raw")

    def sharing(self) -> None:
        """Show that unchanged blocks are stored once."""
        self.title("Two complete images, unchanged blocks stored once")
        store = self.place / "store"
        if not image.reflink_supported(store):
            self.say(
                "Not here: this file system has no reflinks, so each point takes its full size."
            )
            return
        self.say(
            "Two restore points of all disks, each complete; the disk has given, compared with before:"
        )
        self._used()
        self.say("The kernel's own word, extent by extent:")
        newest = f"{store}/by-name/web1/latest/xvda.raw"
        self.shell(f"filefrag -v {shlex.quote(newest)} | head -n 8")

    def check(self) -> None:
        """List and verify the points, and stop."""
        self.title("What is there, and is it undamaged?")
        self.cbtfs("list")
        self.cbtfs("verify")
        self.say("The pool keeps one small change log per disk, the base of the next increment:")
        self.cbtfs("ls", "--vm", "web1")
        self.cbtfs("sim", "stop", str(self.place / "pool"))

    def _used(self) -> None:
        self.run("df", "-BM", "--output=used,avail,target", str(self.place / "store"))

    # ── Speaking and running ─────────────────────────────────────────────────────────────────

    def title(self, text: str) -> None:
        """Begin a step."""
        heading = f"{self.step}. {text}" if self.step else text
        self.step += 1
        bold, plain = ("\x1b[1m", "\x1b[0m") if output.coloured(sys.stdout) else ("", "")
        output.line(f"\n{bold}── {heading} {'─' * max(3, 88 - len(heading))}{plain}\n")

    def say(self, *lines: str) -> None:
        """Print lines of the story."""
        for text in lines:
            output.line(text)

    def cbtfs(self, *arguments: str) -> None:
        """Run a cbtfs command as the user would."""
        self._run(
            [sys.executable, "-m", "cbtfs", *arguments], shown=shlex.join(("cbtfs", *arguments))
        )

    def run(self, *command: str) -> None:
        """Run another program."""
        self._run(list(command), shown=shlex.join(command))

    def shell(self, text: str) -> None:
        """Run a line of shell."""
        self._run(["sh", "-c", text], shown=text)

    def _run(self, command: list[str], *, shown: str) -> None:
        output.line(f"$ {shown}")
        sys.stdout.flush()
        try:
            done = subprocess.run(command, env=self.environ, stdin=subprocess.DEVNULL, check=False)
        except OSError as exc:
            raise errors.CbtfsError(f"{command[0]} cannot be run: {exc.strerror}") from None
        if done.returncode:
            raise errors.CbtfsError(f"the demo stopped: status {done.returncode} from: {shown}")
        output.line()

    # ── Surroundings ─────────────────────────────────────────────────────────────────────────

    def _environment(self) -> dict[str, str]:
        """Return the environment without the user's own pool, and with ours."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CBTFS_")}
        ours: Mapping[str, str] = {
            "CBTFS_CONFIG": str(self.place / "pool" / "cbtfs.toml"),
            "CBTFS_STORE": str(self.place / "store"),
            "STATE_DIRECTORY": str(self.place / "state"),
            "LOGS_DIRECTORY": str(self.place),
            "DEBUGFS_PAGER": "cat",
        }
        return {**kept, **ours}

    def _make_reflinks_possible(self) -> None:
        """Mount an XFS image as the store if the file system has no reflinks and root asks."""
        store = self.place / "store"
        if image.reflink_supported(store):
            return
        why = self._mount_xfs(store)
        if why:
            self.say(
                f"No reflinks here ({why}): it works, but each restore point takes full space."
            )

    def _mount_xfs(self, store: Path) -> str:
        """Return "" if ``store`` is now an XFS, else why not."""
        if os.geteuid() != 0:
            return "an XFS image to mount needs root"
        if shutil.which("mkfs.xfs") is None:
            return "mkfs.xfs is missing; install xfsprogs"
        disk = self.place / "store.xfs"
        with disk.open("wb") as file:
            file.truncate(STORE_SIZE)
        for command in (
            ["mkfs.xfs", "-q", str(disk)],
            ["mount", "-o", "loop", str(disk), str(store)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return (done.stderr.strip().splitlines() or [f"{command[0]} failed"])[-1]
        self.cleanup.callback(subprocess.run, ["umount", str(store)], check=False)
        self.say("The store is an XFS image, because XFS shares unchanged blocks (reflinks):")
        output.line(
            f"$ truncate -s 4G {disk} && mkfs.xfs -q {disk} && mount -o loop {disk} {store}\n"
        )
        return ""

    def _unmount(self) -> None:
        """Take away the mount if it is still there."""
        mnt = self.place / "mnt"
        mounted = mountpoint.find(mnt.resolve())
        if mounted is None:
            return
        try:
            mountpoint.umount(mnt)
        except errors.MountError:
            subprocess.run(["umount", "-l", str(mnt)], check=False)


def _farewell(directory: str | None) -> None:
    output.line("\nThat was all: nothing is mounted and no process is left.")
    if directory is not None:
        output.line(f"The files are in {output.safe(directory)}.")
    output.line("To go on by yourself:")
    output.line("$ cbtfs sim start /tmp/pool && export CBTFS_CONFIG=/tmp/pool/cbtfs.toml")
    output.line("$ cbtfs ls")
