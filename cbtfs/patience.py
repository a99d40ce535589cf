"""Patience: how long a request of the kernel waits, by the clock and by the life of who asked.

A process that waits for an answer cannot die before it has one (unless the kernel reads ahead for
it), and pyfuse3 does not pass on that the kernel wants to interrupt a request. So we look ourselves
whether it was killed. Of a file that was handed to another process only the one who opened it is
known.
"""

import errno
import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from . import errors, units

WATCH_INTERVAL = 1.0
"""Seconds between two looks at whether the process behind a slow request was killed."""


class TooSlow(errors.ExportError):
    """What a request waited for did not come in time."""


@dataclass(slots=True, eq=False)
class _Wait:
    """A request under way: cancelled by its deadline, or because its process was killed."""

    pid: int
    since: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    killed: bool = False


class Patience:
    """The requests of one mount that wait for something."""

    def __init__(self) -> None:
        self._waits: set[_Wait] = set()

    @contextmanager
    def bounded(self, pid: int, limit: float) -> Generator[None]:
        """Bound what the body waits for, in seconds and by the life of process ``pid``.

        Raises:
            TooSlow: the time is over.
            Denied: EINTR, the process was killed.
        """
        wait = _Wait(pid, trio.current_time())
        wait.scope.deadline = wait.since + limit
        self._waits.add(wait)
        try:
            with wait.scope:
                yield
        finally:
            self._waits.discard(wait)
        if wait.killed:
            raise errors.Denied(f"process {pid} was killed", errno=errno.EINTR)
        if wait.scope.cancelled_caught:
            raise TooSlow(f"no answer from the pool within {units.format_duration(limit)}")

    async def watch(self) -> None:
        """End the requests of killed processes, for ever."""
        while True:
            await trio.sleep(WATCH_INTERVAL)
            slow = trio.current_time() - WATCH_INTERVAL
            for wait in [w for w in self._waits if w.since < slow and is_killed(w.pid)]:
                wait.killed = True
                wait.scope.cancel()


def is_killed(pid: int) -> bool:
    """Tell whether a process has a SIGKILL waiting for it (proc(5): SigPnd, ShdPnd)."""
    try:
        # bytes: the process chose its name, which is in there too
        lines = Path(f"/proc/{pid}/status").read_bytes().split(b"\n")
    except OSError:
        return False  # gone, or not visible from here
    pending = [int(line.split()[1], 16) for line in lines if line[:6] in {b"SigPnd", b"ShdPnd"}]
    return any(mask >> (signal.SIGKILL - 1) & 1 for mask in pending)
