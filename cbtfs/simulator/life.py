"""Start, stop and steer a simulated pool that runs as its own process.

The process holds a lock on ``DIR/lock`` as long as it lives: whether a pool runs is never guessed
from a process number.
"""

import contextlib
import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cbtfs import errors

from . import controlsocket, scenarios, server
from .server import Ports

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""How long a start or a stop may take, in seconds."""


def start(
    directory: Path | str, *, scenario: str = "default", ports: Ports | None = None,
    address: str = scenarios.FIRST_ADDRESS,
) -> Mapping[str, object]:  # fmt: skip
    """Start a pool in the background; return its status once it is usable.

    Args:
        directory: an empty or absent one gets ``scenario``; otherwise its pool goes on.
        scenario: ``default``, ``large``, ``huge``, ``speed`` or ``empty``.
        ports: HTTPS and NBD port; the last ones or free ones if not given.
        address: of the first host; the others follow it.

    Raises:
        UsageError: a pool runs there already, or there is no such scenario, or another there.
        CbtfsError: it did not start; no process is left.
    """
    place = Path(directory).absolute()
    server.check_scenario(place, scenario)
    place.mkdir(parents=True, exist_ok=True)
    if is_running(place):
        raise errors.UsageError(f"a simulated pool runs in {place} already")
    reading, writing = os.pipe()
    command = [
        *(sys.executable, "-m", "cbtfs.simulator", str(place), "--scenario", scenario),
        *("--background", "--ready", str(writing), "--address", address),
        *(("--https-port", str(ports.https), "--nbd-port", str(ports.nbd)) if ports else ()),
    ]
    try:
        with (place / "log").open("ab") as output:
            subprocess.run(
                command, check=True, pass_fds=[writing], stdin=subprocess.DEVNULL,
                stdout=output, stderr=output,
            )  # fmt: skip
        os.close(writing)
        writing = -1
        _await_ready(place, reading)
    except subprocess.CalledProcessError:
        raise errors.CbtfsError(f"the simulated pool does not start; see {place / 'log'}") from None
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    return status(place)


def run(
    directory: Path | str, *, scenario: str = "default", ports: Ports | None = None,
    address: str = scenarios.FIRST_ADDRESS, ready: int = -1,
) -> None:  # fmt: skip
    """Run a pool in this process until SIGTERM, SIGINT or `stop`; the process should end then.

    Args:
        directory: as for `start`.
        scenario: as for `start`.
        ports: as for `start`.
        address: as for `start`.
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


def stop(directory: Path | str) -> bool:
    """End the pool of ``directory`` and wait for it; return False if none ran.

    Raises:
        CbtfsError: it did not end.
    """
    place = Path(directory).absolute()
    if not is_running(place):
        return False
    pid = _pid(place)
    try:
        controlsocket.ask(place, "stop")
    except errors.CbtfsError:
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    if not _gone(place, PATIENCE):
        raise errors.CbtfsError(f"the simulated pool in {place} (process {pid}) does not end")
    return True


def status(directory: Path | str) -> Mapping[str, object]:
    """Return what runs in ``directory``: scenario, url, ports, hosts, faults, pid.

    Raises:
        NotFound: nothing.
    """
    place = Path(directory).absolute()
    told = msgspec.convert(controlsocket.ask(place, "status"), dict[str, object])
    return {"pid": _pid(place), **told}


def set_values(directory: Path | str, values: Mapping[str, str]) -> None:
    """Set faults of the running pool, such as ``nbd.delay`` to ``2ms``; "" sets one back.

    Raises:
        UsageError: no such key, or the value does not fit.
        NotFound: no pool runs there.
    """
    controlsocket.ask(Path(directory), "set", *(f"{key}={value}" for key, value in values.items()))


def control(directory: Path | str, command: str, *arguments: str) -> object:
    """Carry out a command of the simulator, such as ``counters`` or ``failover``.

    Raises:
        NotFound: no pool runs there.
        UsageError: no such command.
        CbtfsError: it failed.
    """
    return controlsocket.ask(Path(directory), command, *arguments)


def is_running(directory: Path | str) -> bool:
    """Return whether a pool runs in ``directory``."""
    try:
        with (Path(directory) / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


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


def _pid(place: Path) -> int:
    try:
        return int((place / "pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _tell(descriptor: int, text: str) -> None:
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.write(descriptor, text.encode())
        os.close(descriptor)


def _await_ready(place: Path, reading: int) -> None:
    """Wait for the word of the background process; without it, see that it is gone."""
    try:
        said = _read_word(reading)
    except BaseException:
        _end(place)
        raise
    if said == b"ready":
        return
    _end(place)
    reason = said.decode(errors="replace").strip() or f"see {place / 'log'}"
    raise errors.CbtfsError(f"the simulated pool does not start: {reason}")


def _read_word(reading: int) -> bytes:
    """Return what the background process says before it closes the pipe or `PATIENCE` ends."""
    said = b""
    deadline = time.monotonic() + PATIENCE
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reading], [], [], left)[0]:
            break
        piece = os.read(reading, 4096)
        if not piece:
            break
        said += piece
    return said


def _end(place: Path) -> None:
    pid = _pid(place)
    if pid and is_running(place):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _gone(place, 10)


def _gone(place: Path, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while is_running(place):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
