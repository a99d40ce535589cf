"""Process: who made something - a process of one machine, told apart from later ones.

A process number comes back after a while, and all of them after a reboot. So a process is named by
its machine, the machine's boot, its number, and when it began; only then "is it still running?"
has an answer that holds.
"""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One process; ``starttime`` is in clock ticks since boot (proc(5), field 22 of stat)."""

    host: str
    boot: str
    pid: int
    starttime: int

    def is_dead(self) -> bool:
        """Tell whether it certainly runs no more; False where that cannot be known from here.

        Of another machine nothing can be known. The same machine under another boot id is the
        same name after a reboot - or a container, which shares the boot id but not the name.
        """
        if self.host != socket.gethostname():
            return False
        if self.boot != boot_id():
            return True
        return _starttime(self.pid) != self.starttime


def this_process() -> Process:
    """Return the process that runs this."""
    pid = os.getpid()
    return Process(socket.gethostname(), boot_id(), pid, _starttime(pid))


def boot_id() -> str:
    """Return what names this boot of the machine (proc(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _starttime(pid: int) -> int:
    """Return when process ``pid`` began, 0 if there is none, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    # the name of the program, in parentheses, may itself hold spaces, parentheses and no UTF-8
    state, *fields = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(fields[18])
