"""Start, stop and steer a simulated pool that runs as its own process.

The clients' half: nothing of the pool itself is imported here, which would cost every command of
cbtfs its start. The process runs `service`.

The process holds a lock on ``DIR/lock`` as long as it lives: whether a pool runs is never guessed
from a process number.
"""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import msgspec

from cbtfs import errors

from . import controlsocket, memory
from .memory import Ports

PATIENCE = 60.0
"""How long a start or a stop may take, in seconds."""


def start(
    directory: Path | str, *, scenario: str = "default", ports: Ports | None = None,
    address: str = memory.FIRST_ADDRESS,
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
    place = _prepared(directory, scenario)
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


def become(directory: Path | str, *, scenario: str = "default") -> NoReturn:
    """Turn this process into the pool of ``directory``, in the foreground.

    Raises:
        UsageError: as for `start`.
    """
    place = _prepared(directory, scenario)
    sys.stdout.flush()
    sys.stderr.flush()
    words = ["-m", "cbtfs.simulator", "--scenario", scenario, "--", str(place)]
    os.execv(sys.executable, [sys.executable, *words])


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


def _prepared(directory: Path | str, scenario: str) -> Path:
    """Return the directory, there and free for a start with ``scenario``."""
    place = Path(directory).absolute()
    memory.check_scenario(place, scenario)
    place.mkdir(parents=True, exist_ok=True)
    if is_running(place):
        raise errors.UsageError(f"a simulated pool runs in {place} already")
    return place


def _pid(place: Path) -> int:
    try:
        return int((place / "pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


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
