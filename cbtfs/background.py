"""Background: a command that goes on after its terminal has its prompt back.

::

    cbtfs mount DIR      starts ──>  cbtfs mount -f DIR     the same program in its own session
         │                                │
         │ waits   <──── one byte ────  ready               or the pipe ends, because it failed
         │                                │
      exit 0                           goes on, its messages now in a log file

Until it is ready the child's messages appear where its parent's do, so an error reads as if there
were no child; and its exit status becomes the parent's. systemd is told in the same moment.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import platformdirs

from . import errors
from .signals import HeldBack

READY_FD = "CBTFS_READY_FD"
"""Environment variable that gives the child the pipe on which it tells that it is ready."""

LOG_FILE = "CBTFS_LOG_FILE"
"""Environment variable that gives the child the file for its messages once it is ready."""


def start_background(argv: Sequence[str], *, log_file: Path | None = None) -> int:
    """Run ``python -m cbtfs ARGV`` in the background; return 0 as soon as it is ready to be used.

    If it ends before that, return its exit status; what it had to say is on stderr then. Whatever
    ends the wait, such as a signal to this process, ends the child as well.

    Args:
        argv: a command that stays in the foreground and calls ``announce_ready``.
        log_file: where its messages go once it is ready, by default ``default_log_file()``.
    """
    read_end, write_end = os.pipe()
    log = log_file or default_log_file()
    held = HeldBack()
    try:
        os.set_inheritable(write_end, True)
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "cbtfs", *argv],
            {**os.environ, READY_FD: str(write_end), LOG_FILE: str(log)},
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
            setsid=True,
        )
        ours, write_end = write_end, -1
        os.close(ours)
        return _await_ready(pid, read_end, held)
    finally:
        held.release()
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


def announce_ready() -> None:
    """Tell whoever started this process that it can be used now.

    In the background, standard output and error then go to the log file and the working directory
    is left, so that neither the terminal nor a file system is held.
    """
    _notify("READY=1")
    ready_fd = os.environ.pop(READY_FD, "")
    if not ready_fd:
        return
    log_file = Path(os.environ.pop(LOG_FILE, os.devnull))
    log = _open_log(log_file)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.chdir("/")
    with suppress(OSError):  # nobody waits any more
        os.write(int(ready_fd), b"1")
    os.close(int(ready_fd))


def announce_end() -> None:
    """Tell systemd, if it is there, that this process is about to end."""
    _notify("STOPPING=1")


def default_log_file() -> Path:
    """Return where the messages of a process in the background go."""
    if os.geteuid() == 0:
        return Path("/var/log/cbtfs.log")
    return Path(platformdirs.user_log_dir("cbtfs")) / "cbtfs.log"


def _await_ready(pid: int, pipe: int, held: HeldBack) -> int:
    try:
        held.release()
        if os.read(pipe, 1):
            return 0
        _, status = os.waitpid(pid, 0)
    except BaseException as exc:  # KeyboardInterrupt, or what a handler of SIGTERM raises
        asked = signal.SIGINT if isinstance(exc, KeyboardInterrupt) else signal.SIGTERM
        os.kill(pid, asked)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 128 + asked:  # interrupted, and it has said so
            return code
        if isinstance(exc, KeyboardInterrupt):
            raise errors.Interrupted(signal.SIGINT) from None
        raise
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # a signal, as a shell has it
        return 128 - code
    return code or 1  # it ended well, but before it was of any use


def _open_log(path: Path) -> int:
    """Return a descriptor for messages; for want of a file, one that drops them."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def _notify(state: str) -> None:
    """Send ``state`` to systemd (sd_notify(3)) if it started this process."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        name = f"\0{address[1:]}" if address[0] == "@" else address  # @: an abstract socket
        channel.sendto(state.encode(), name)
