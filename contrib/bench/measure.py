"""Running a command and telling what it cost; medians, ratios, and what bounds a figure."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
CPUS = os.cpu_count() or 1


@dataclass
class Run:
    """One run of one client.

    Attributes:
        seconds: from start to exit.
        cpu: processor seconds of the client's process.
        server_cpu: processor seconds of the server's process, 0 where it is not looked at.
        rss: the most memory the client had, in bytes.
        busy: processors that were busy meanwhile, with everything on the machine.
        copying: seconds of the copying alone, where the client says so.
        reader_cpu: processor seconds of those who read from the client, where it is a mount.
    """

    seconds: float
    cpu: float
    server_cpu: float
    rss: int
    busy: float
    copying: float | None = None
    reader_cpu: float | None = None


@dataclass
class Series:
    """The runs of one client on one server."""

    runs: list[Run] = field(default_factory=list[Run])

    def median(self, name: str = "seconds") -> float:
        """Return the median of one figure of the runs."""
        return statistics.median(getattr(run, name) for run in self.runs)

    def medians(self) -> Run:
        """Return the median of each figure, as if it were a run."""
        names = [one.name for one in fields(Run) if getattr(self.runs[0], one.name) is not None]
        return Run(**{name: self.median(name) for name in names})

    def as_json(self) -> dict[str, object]:
        """Return runs and medians."""
        names = ["seconds", "cpu", "server_cpu", "rss", "busy"]
        names += [n for n in ("copying", "reader_cpu") if getattr(self.runs[0], n) is not None]
        median = {name: round(self.median(name), 3) for name in names}
        return {"median": median, "runs": [asdict(run) for run in self.runs]}


def timed(command: Sequence[str | Path], *, server: int = 0) -> tuple[Run, str]:
    """Run ``command``, which must succeed; return what it cost and what it printed.

    Args:
        command: the client.
        server: process whose processor time is noted too.
    """
    os.sync()  # what was removed, or written before, is nobody's burden
    with tempfile.NamedTemporaryFile("r") as costs:
        # GNU time starts it from a process so small that it does not count as its memory
        whole = ["/usr/bin/time", "-q", "-o", costs.name, "-f", "%U %S %M", *command]
        served = spent(server)
        busy, begun = all_spent(), time.monotonic()
        done = subprocess.run(whole, check=False, capture_output=True, text=True)
        seconds = time.monotonic() - begun
        busy, served = all_spent() - busy, spent(server) - served
        if done.returncode:
            sys.exit(f"{command[0]}: exit {done.returncode}: {done.stderr}")
        user, system, memory = costs.read().split()
    run = Run(
        seconds=round(seconds, 3),
        cpu=round(float(user) + float(system), 2),
        server_cpu=round(served, 2),
        rss=int(memory) * 1024,
        busy=round(busy / seconds, 2),
    )
    return run, done.stdout


def spent(pid: int) -> float:
    """Return the processor seconds of a process, 0 of process 0."""
    if not pid:
        return 0.0
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / _TICK


def peak_memory(pid: int) -> int:
    """Return the most memory that a process had, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    sys.exit(f"process {pid} has ended")


def all_spent() -> float:
    """Return the processor seconds that the machine has worked."""
    user, nice, system, _idle, _wait, irq, soft, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + soft + steal) / _TICK


def bound(busy: float, *, serial: bool) -> str:
    """Say what bounds a figure during which ``busy`` processors worked."""
    told = f"{busy:.1f} of {CPUS} processors busy, client and server together"
    if busy > 0.85 * CPUS:
        return f"the processors ({told})"
    if serial:
        return f"the server, one request at a time on each connection ({told})"
    return f"waiting for the disk or for each other ({told})"


class Say:
    """Prints for people, to stderr where stdout is for programs."""

    def __init__(self, *, quiet: bool) -> None:
        self.file = sys.stderr if quiet else sys.stdout

    def __call__(self, text: str) -> None:
        """Print a line at once."""
        print(text, file=self.file, flush=True)
