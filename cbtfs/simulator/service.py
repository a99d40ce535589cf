"""The process of a simulated pool: from its lock to its last thread; `life` starts and ends it."""

import contextlib
import fcntl
import os
import signal
from pathlib import Path

from cbtfs import errors

from . import controlsocket, memory, server
from .memory import Ports


def run(
    directory: Path | str, *, scenario: str = "default", ports: Ports | None = None,
    address: str = memory.FIRST_ADDRESS, ready: int = -1,
) -> None:  # fmt: skip
    """Run a pool in this process until SIGTERM, SIGINT or `life.stop`; the process should end then.

    Args:
        directory: as for `life.start`.
        scenario: as for `life.start`.
        ports: as for `life.start`.
        address: as for `life.start`.
        ready: a descriptor told ``ready`` once the pool is usable; closed. -1 for none.

    Raises:
        UsageError: a pool runs there already.
        CbtfsError: it cannot start.
    """
    place = Path(directory).absolute()
    place.mkdir(parents=True, exist_ok=True)
    _lock(place)
    simulator = server.open_simulator(place, scenario=scenario, ports=ports, address=address)

    def end(_signum: int, _frame: object) -> None:
        simulator.stopping.set()

    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, end)
        _tell(ready, "ready")
        while not simulator.stopping.wait(3600):
            pass
    finally:
        simulator.close()
        for name in (controlsocket.NAME, "pid"):
            (place / name).unlink(missing_ok=True)


def _lock(place: Path) -> None:
    """Hold the directory's lock until this process ends, and say which process that is.

    The lock is never given back by hand: whoever finds it free may rely on the process being gone.
    """
    lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise errors.UsageError(f"a simulated pool runs in {place} already") from None
    (place / "pid").write_text(f"{os.getpid()}\n", encoding="ascii")


def _tell(descriptor: int, text: str) -> None:
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.write(descriptor, text.encode())
        os.close(descriptor)
