"""Mount points: where a file system may be mounted, what is mounted there, and taking it away.

The kernel's own list, ``/proc/self/mountinfo`` (proc(5)), is asked rather than the directory: a
mount whose process died answers nothing but ENOTCONN, and stays like that until it is unmounted. An
empty directory in its place would let an ``rsync --delete`` wipe its target.
"""

import errno
import os
import re
import select
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import errors, units

TYPE = "fuse.cbtfs"
"""Type of our mounts in the kernel's list, and of ``mount -t``."""

PID_XATTR = "user.cbtfs.pid"
"""Extended attribute of a mount's root that names the process behind it."""

ANSWER_LIMIT = 10.0
"""Seconds that the process behind a mount gets to tell who it is."""

END_LIMIT = 300.0
"""Seconds that it gets, once unmounted, to close its connections and destroy its snapshots. If the
pool went silent while a snapshot is taken, it gives up after 200 s (measured)."""

READ_AHEAD = 8 * units.MiB
"""Bytes that the kernel reads ahead in our files, where it lets us say so. It asks for a MiB at a
time then, instead of 128 KiB."""

BACKGROUND = 1024
"""Requests of the kernel under way at a time for what nobody waits for yet, over all disks. By
default they are 12: those of disks that wait for a connection then keep the kernel from asking for
disks that have one. As many as 64 disks ask for at most."""

_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""What a mount answers whose process has died; the second to what was under way then."""

_MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of the kernel's list; ``source`` of ours is ``cbtfs#POOL``."""

    path: str
    type: str
    source: str


def mounts() -> list[Mounted]:
    """Return what is mounted, in the order in which it was: a later one hides an earlier."""
    found: list[Mounted] = []
    # not splitlines(): who may mount chooses paths, and only blanks, tabs and newlines are escaped
    for line in _MOUNTINFO.read_text(errors="surrogateescape").split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        kind, source = after.split(" ")[:2]
        found.append(Mounted(_unescape(before.split(" ")[4]), kind, _unescape(source)))
    return found


def find(path: Path) -> Mounted | None:
    """Return what is mounted at ``path`` now, or None."""
    return next((m for m in reversed(mounts()) if m.path == str(path)), None)


def check(mountpoint: Path) -> Path:
    """Return the absolute path of a directory on which a file system can be mounted.

    Raises:
        MountError: it cannot; the text says what to do about it.
    """
    path = located(mountpoint)
    mounted = find(path)
    if mounted is not None and mounted.type == TYPE:
        is_dead = _ask(path).error in _DEAD
        state = "is what a dead cbtfs left" if is_dead else "is mounted already"
        raise errors.MountError(f"{path} {state}; run: cbtfs umount {path}")
    if mounted is not None:
        raise errors.MountError(f"{path} has {mounted.type} mounted on it; use another directory")
    try:
        with os.scandir(path) as entries:
            is_empty = next(entries, None) is None
    except OSError as error:
        raise errors.MountError(_why_not(path, error)) from error
    if not is_empty:
        raise errors.MountError(f"{path} is not empty and would be hidden; use an empty directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise errors.MountError(f"you may not write to {path}; use a directory of your own")
    return path


def tune(path: Path) -> bool:
    """Have the kernel read further ahead in the file system at ``path``; True if it agreed.

    That is root's to say (Documentation/ABI/testing/sysfs-class-bdi; filesystems/fuse.rst). Whoever
    calls has just asked ``path`` something, so that this does not wait for its own process.
    """
    try:
        device = read_further(path)
        with control() as connections:
            for name in ("max_background", "congestion_threshold"):
                (connections / str(os.minor(device)) / name).write_text(str(BACKGROUND))
    except (OSError, subprocess.CalledProcessError):  # another user than root, or a container
        return False
    return True


def read_further(path: Path) -> int:
    """Have the kernel read ``READ_AHEAD`` ahead in the file system at ``path``; return its device.

    Raises:
        OSError: it does not let us say so.
    """
    device = path.stat().st_dev
    ahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    ahead.write_text(str(READ_AHEAD // units.KiB))
    return device


@contextmanager
def control() -> Generator[Path]:
    """Yield where the kernel's connections to FUSE file systems are controlled.

    Where systemd has not mounted that, it is mounted for a moment in a place of our own.
    """
    usual = Path("/sys/fs/fuse/connections")
    if os.path.ismount(usual):
        yield usual
        return
    with tempfile.TemporaryDirectory(prefix="cbtfs-") as place:
        subprocess.run(["mount", "-t", "fusectl", "none", place], check=True, capture_output=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True, capture_output=True)


def check_fuse() -> None:
    """Raise MountError with the remedy if this machine or this user cannot mount with FUSE."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise errors.MountError(
            "/dev/fuse is missing or closed to you; run modprobe fuse as root, or give the"
            " container the device"
        )
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise errors.MountError("fusermount3 is not installed; install the package fuse3")


def umount(mountpoint: Path) -> None:
    """Unmount a cbtfs and wait until its process has cleaned up behind itself.

    Also takes away what a cbtfs that died left.

    Raises:
        MountError: it is no cbtfs, it is in use, or its process does not answer or does not end.
    """
    path = located(mountpoint)
    mounted = find(path)
    if mounted is None or mounted.type != TYPE:
        what = f"{mounted.type} is mounted on it" if mounted else "nothing is mounted on it"
        raise errors.MountError(f"{path} is no cbtfs: {what}")
    served = _ask(path)
    if served.is_silent:  # our own question, never answered, keeps it busy now
        raise errors.MountError(
            f"the process behind {path} does not answer; end it with kill -9, and run this again:"
            f" pgrep -af 'cbtfs.*mount.*{path.name}' shows its number"
        )
    pid = served.pid
    process = _open_process(pid) if pid else -1
    try:
        _unmount(path)
        if process >= 0:
            _await_end(process, pid)
    finally:
        if process >= 0:
            os.close(process)


def located(mountpoint: Path) -> Path:
    """Return the absolute path of a place, if possible without asking what is mounted there.

    A process that hangs never answers, and whoever asked then waits for as long.
    """
    path = mountpoint.absolute()
    if path.name != "..":
        path = path.parent.resolve() / path.name
        if find(path) is not None:
            return path
    return mountpoint.resolve()


def _unmount(path: Path) -> None:
    program = shutil.which("fusermount3")
    command = [program, "-u", "--"] if program else ["umount", "--"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split())
    if "busy" in said.lower():
        raise errors.MountError(
            f"{path} is in use; see by whom with: lsof {path} (a loop device: losetup -a)"
        )
    raise errors.MountError(f"{path} cannot be unmounted: {said}")


def _await_end(process: int, pid: int) -> None:
    """Wait until the process behind a descriptor of pidfd_open(2) has ended."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if not poll.poll(END_LIMIT * 1000):
        raise errors.MountError(
            f"unmounted, but process {pid} still runs after {units.format_duration(END_LIMIT)};"
            " its log says what it waits for"
        )


def _open_process(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:  # it has ended, or it is not visible from here
        return -1


@dataclass(slots=True)
class _Served:
    """Who serves a mount: ``pid``, 0 if that is not known; ``error`` is what it said instead.

    ``is_silent`` until it has said anything at all.
    """

    pid: int = 0
    error: int = 0
    is_silent: bool = True


def _ask(path: Path) -> _Served:
    """Ask a mount who serves it; the kernel never answers that by itself, as it does ``stat``."""
    served = _Served()

    def ask() -> None:
        try:
            value = os.getxattr(path, PID_XATTR)
            served.pid = int(value) if value.isdigit() else 0
        except OSError as error:
            served.error = error.errno or 0
        served.is_silent = False

    # a thread that can be left behind: of a process that hangs the answer never comes
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_LIMIT)
    return served


def _why_not(path: Path, error: OSError) -> str:
    reasons = {
        errno.ENOENT: f"{path} does not exist; make it with: mkdir -p {path}",
        errno.ENOTDIR: f"{path} is not a directory; use an empty one",
        errno.EACCES: f"you may not read {path}; use a directory of your own",
        errno.ENOTCONN: f"{path} is what a dead file system left; run: fusermount3 -u {path}",
    }
    return reasons.get(error.errno or 0, f"{path} cannot be used: {error.strerror}")


def _unescape(text: str) -> str:
    """Undo what proc(5) does to blanks: a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
