"""Fault points: every call that changes a directory is counted, and the N-th of them goes wrong.

``Points.install`` puts itself in front of all functions by which cbtfs can change a file: those of
``os``, ``fcntl.ioctl``, and what it calls in the C library. Calls that do not concern the
directory, by path or by descriptor, pass unseen. The others are written to the trace, in their
order, whichever thread makes them::

    3 mkdir /store/by-name
    4 pwrite /store/0f4f…/.lock

so the trace tells how many points there are, and where a run was hit. Calls to the pool can be
counted with them, where a kill is all that may happen.
"""

import ctypes
import errno
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar, cast

Mode = Literal[
    "count",  # nothing happens
    "kill",  # SIGKILL in place of the call, which is to say: after the call before it
    "half",  # of the bytes of a write the first half, then SIGKILL
    "int",  # SIGINT, and the call is made
    "eio",  # the call fails
    "eio-on",  # it fails, and so does all that follows: the disk is gone
    "enospc",
    "enospc-on",  # a write is cut short, then all that may need space fails: the disk is full
]

WRITES = frozenset({"write", "pwrite"})

_FIRST = {
    "write", "pwrite", "writev", "pwritev", "fsync", "fdatasync", "ftruncate", "posix_fallocate",
    "open", "mkdir", "unlink", "remove", "rmdir", "truncate", "mknod", "chmod", "utime", "setxattr",
}  # fmt: skip
_SECOND = {"rename", "replace", "link", "symlink", "copy_file_range", "splice"}
_WHAT_CHANGES = dict.fromkeys(_FIRST, 0) | dict.fromkeys(_SECOND, 1)
"""Function of ``os``: which argument is the file, a path or a descriptor."""

_OF_LIBRARY = frozenset({"fallocate", "sync_file_range", "renameat2"})
_GIVE_BACK = frozenset({"unlink", "remove", "rmdir"})
"""What a full disk still does."""

_SHORT = -1

P = ParamSpec("P")
R = TypeVar("R")


class Points:
    """Counts the calls that change what is below ``root``, and spoils the ``at``-th.

    Args:
        root: the directory; it may not exist yet.
        mode: what happens to it.
        at: number of the call, from 1, among those whose line in the trace has ``match`` in it.
        match: "" for any.
        trace: file to write the calls to, outside of ``root``.
    """

    def __init__(
        self, root: Path, *, mode: Mode, at: int, match: str = "", trace: Path = Path(os.devnull)
    ) -> None:
        self.count = 0
        self._root = str(root)
        self._mode = mode
        self._at = at
        self._match = match
        self._matched = 0
        self._broken = False
        self._lock = threading.Lock()  # covers all of the above
        self._open, self._write = os.open, os.write
        self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def install(self) -> None:
        """Stand in front of the functions, until the process ends."""
        for name in _WHAT_CHANGES:
            setattr(os, name, self.before(name, getattr(os, name)))
        setattr(fcntl, "ioctl", self.before("ioctl", fcntl.ioctl))  # noqa: B010 - overloaded
        for module in [m for name, m in sys.modules.items() if name.startswith("cbtfs.")]:
            for name, value in list(vars(module).items()):
                if isinstance(value, ctypes.CDLL):
                    setattr(module, name, _Library(self))

    def before(self, name: str, call: Callable[P, R]) -> Callable[P, R]:
        """Return ``call``, known as ``name``, with this in front of it."""

        def guarded(*arguments: P.args, **options: P.kwargs) -> R:
            path = self._changes(name, arguments, options)
            error = self._next(name, path, arguments) if path else 0
            if error == _SHORT:
                return cast(R, self._write_half(arguments))
            if error:
                raise OSError(error, os.strerror(error), path)
            return call(*arguments, **options)

        return guarded

    def call(self, method: str) -> None:
        """Count a call to the pool, or its answer, as one that changes something."""
        self._next("call", method, ())

    # ── What happens ─────────────────────────────────────────────────────────────────────────

    def _next(self, name: str, path: str, arguments: tuple[object, ...]) -> int:
        """Count a call; return the error it is to fail with, or 0, or ``_SHORT``."""
        with self._lock:
            self.count += 1
            line = f"{self.count} {name} {path}\n"
            self._write(self._trace, line.encode(errors="surrogateescape"))
            if self._broken:
                return self._error_from_now_on(name)
            if self._match not in line:
                return 0
            self._matched += 1
            return self._spoil(name, arguments) if self._matched == self._at else 0

    def _spoil(self, name: str, arguments: tuple[object, ...]) -> int:
        if self._mode == "count":
            return 0
        if self._mode == "half" and name in WRITES:
            self._write_half(arguments)
        if self._mode == "int":
            os.kill(os.getpid(), signal.SIGINT)
            return 0
        if self._mode in {"kill", "half"}:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()  # with the lock: no other call begins while the signal is on its way
        self._broken = self._mode.endswith("-on")
        if self._mode == "enospc-on" and name in WRITES:
            return _SHORT
        return errno.EIO if self._mode.startswith("eio") else errno.ENOSPC

    def _error_from_now_on(self, name: str) -> int:
        if self._mode == "eio-on":
            return errno.EIO
        return 0 if name in _GIVE_BACK else errno.ENOSPC

    def _write_half(self, arguments: tuple[object, ...]) -> int:
        fd, data, *offset = arguments
        assert isinstance(fd, int)
        half = memoryview(cast(bytes, data)).cast("B")
        half = half[: len(half) // 2]
        if offset:
            # another descriptor: the one given may want whole pages (O_DIRECT)
            fd = self._open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
            os.lseek(fd, cast(int, offset[0]), os.SEEK_SET)
        return self._write(fd, half)

    # ── Whether it concerns us ───────────────────────────────────────────────────────────────

    def _changes(self, name: str, arguments: tuple[object, ...], options: dict[str, object]) -> str:
        """Return the path that a call changes, "" if that is not below the root."""
        if name == "open":
            flags = arguments[1]
            assert isinstance(flags, int)
            if not flags & os.O_CREAT and flags & os.O_TMPFILE != os.O_TMPFILE:
                return ""
        path = arguments[_WHAT_CHANGES.get(name, 0)]
        if isinstance(path, int):
            return self._below_root(_path_of(path))
        assert isinstance(path, str | bytes | Path)
        folder_fd = options.get("dst_dir_fd", options.get("dir_fd"))
        start = _path_of(folder_fd) if isinstance(folder_fd, int) else os.getcwd()  # noqa: PTH109
        return self._below_root(os.path.join(start, os.fsdecode(path)))  # noqa: PTH118 - as given

    def _below_root(self, path: str) -> str:
        return path if f"{path}/".startswith(f"{self._root}/") else ""


class _Library:
    """The C library, with ``points`` in front of what changes files."""

    def __init__(self, points: Points) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._points = points

    def __getattr__(self, name: str) -> Callable[[], int]:
        call: Callable[[], int] = getattr(self._library, name)
        return _as_in_c(self._points.before(name, call)) if name in _OF_LIBRARY else call


def _as_in_c(call: Callable[P, int]) -> Callable[P, int]:
    """Return ``call``, but with -1 and errno in place of an exception."""

    def told(*arguments: P.args, **options: P.kwargs) -> int:
        try:
            return call(*arguments, **options)
        except OSError as exc:
            ctypes.set_errno(exc.errno or 0)
            return -1

    return told


def _path_of(fd: int) -> str:
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""  # closed: the call itself will say so
