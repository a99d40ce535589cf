"""A laboratory for histories: one simulated pool and one open session for thousands of syncs.

The pool runs as a process of its own; ``Pool`` and its session live in a trio loop in a thread, so
that tests that are not async can sync in a fraction of a second. What other people do to the pool
goes through the simulator's control socket, a call each; what guests do, through their disks' NBD
sockets.
"""

import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import pytest
import trio

from cbtfs import copier, diskcopy, logbook, tasks
from cbtfs.nbd import Timeouts
from cbtfs.pool import Pool

from .pools import opened
from .simulated import Failure, RunningPool, running_pool

T = TypeVar("T")

Record = dict[str, object]

HOST = "xcp1"
PATIENT = Timeouts(connect=30.0, request=30.0, close=30.0)
QUICK = (
    (tasks, "_POLL_FIRST", 0.004),  # seconds; the simulated pool's tasks take milliseconds
    (copier, "REQUEST", 256 << 10),  # bytes; so that even a small disk takes several
    (copier, "DEPTH", 2),  # batches; so that something of a small disk is on record when it stops
    (logbook, "FLUSH_BYTES", 512 << 10),  # bytes; so that there is something to go on with
    (diskcopy, "WORTH_ASKING", 3 << 20),  # bytes; so that some disks' allocation is asked for
)
"""What is made small, as the disks are, that the same things happen to them as to large ones."""


class Loop:
    """A trio loop in a thread, with an open pool."""

    def __init__(self, simulated: RunningPool) -> None:
        self._simulated = simulated
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trio", daemon=True)
        self._token: trio.lowlevel.TrioToken | None = None
        self._pool: Pool | None = None
        self._end: trio.Event | None = None

    def __enter__(self) -> "Loop":
        self._thread.start()
        assert self._ready.wait(60)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None and self._end is not None and self._thread.is_alive():
            self._token.run_sync_soon(self._end.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    def run(self, work: Callable[[Pool], Awaitable[T]]) -> T:
        """Return what ``work`` does with the pool, carried out in the loop."""
        assert self._pool is not None
        return trio.from_thread.run(work, self._pool, trio_token=self._token)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:
            self._failure = exc
        finally:
            self._ready.set()

    async def _main(self) -> None:
        async with opened(self._simulated, timeouts=PATIENT) as pool:
            self._pool, self._end = pool, trio.Event()
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await self._end.wait()


class Interrupter(trio.abc.Instrument):
    """Cancels what runs below a task when it has made so many steps, wherever it then is.

    Attributes:
        armed: counting; a step is what a task does between two checkpoints.
    """

    def __init__(self, *, steps: int, armed: bool) -> None:
        self.armed = armed
        self._left = steps
        self._scope = trio.CancelScope()
        self._root: trio.lowlevel.Task | None = None

    async def run(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """Return what ``work`` does, None if it was cancelled."""
        self._root = trio.lowlevel.current_task()
        with self._scope:
            trio.lowlevel.add_instrument(self)
            try:
                return await work()
            finally:
                trio.lowlevel.remove_instrument(self)
        return None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Count, and cancel when it is time."""
        if not self.armed or not self._is_below(task):
            return
        if self._left == 0:
            self._scope.cancel()
        self._left -= 1

    def _is_below(self, task: trio.lowlevel.Task | None) -> bool:
        while task is not None and task is not self._root:
            task = task.parent_nursery.parent_task if task.parent_nursery else None
        return task is not None


@dataclass(frozen=True)
class Lab:
    """The pool, the loop, and a directory for stores where clones share blocks, if any does."""

    pool: RunningPool
    loop: Loop
    directory: Path

    def call(self, method: str, *params: object) -> object:
        """Carry out a call of the API as somebody with all rights; raise `Failure`."""
        answer = self.pool.control("call", method, *map(json.dumps, params))
        if isinstance(answer, dict) and list(answer) == ["error"]:
            raise Failure([str(part) for part in answer["error"]])
        return answer

    def text(self, method: str, *params: object) -> str:
        """Call for a string or a reference."""
        value = self.call(method, *params)
        assert isinstance(value, str)
        return value

    def records(self, kind: str) -> dict[str, Record]:
        """Return all records of a class."""
        return cast(dict[str, Record], self.call(f"{kind}.get_all_records"))

    def write(self, vm: str, device: str, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Be the guest: write pieces of data to a disk of a running VM, offset first."""
        guest = self.pool.open_guest(vm, device)
        for offset, data in pieces:
            guest.pwrite(data, offset)
        guest.shutdown()

    def settle(self) -> None:
        """Return when the pool does nothing more of what it was asked for."""
        deadline = time.monotonic() + 60
        while any(task["status"] == "pending" for task in self.records("task").values()):
            assert time.monotonic() < deadline, "the pool is busy for ever"


@contextmanager
def open_lab(directory: Path, *, stores: Path) -> Iterator[Lab]:
    """Run a pool without VMs in ``directory``, and open it."""
    with pytest.MonkeyPatch.context() as patched, running_pool(directory, "empty") as pool:
        for module, name, value in QUICK:
            patched.setattr(module, name, value)
        pool.set("vdi.data_destroy_wait", "100ms")
        with Loop(pool) as loop:
            yield Lab(pool, loop, stores)
