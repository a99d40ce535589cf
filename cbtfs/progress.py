"""Progress: what a run has done so far, for people, programs and nobody.

A run calls the four methods of ``Progress`` from one thread; the views differ in what they tell:

============  =====================================================================
``bar``       one bar per disk while it is copied, for a terminal
``line``      one line per disk every 30 s, for a log
``json``      one JSON object per line (NDJSON), for programs
``silent``    nothing
============  =====================================================================

Rules of this file:

1. Names come from the pool and are hostile: control characters never reach a terminal.
2. Whoever reads the progress may go away; the run goes on.
"""

import json
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, Protocol, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress as RichProgress, TaskID, TextColumn

from . import units
from .catalogue import DiskPoint

Kind = Literal["bar", "line", "json", "silent"]

LINE_EVERY = 30.0
JSON_EVERY = 1.0

SCHEMA = 1
"""Version of the NDJSON events."""

WINDOW = 30.0
"""Seconds over which a rate is told: long enough to be calm, short enough to notice a stall."""

_SHORT = {"incremental": "inc", "compare": "cmp", "resume": "res"}


class Progress(Protocol):
    """Where a run tells what it does; a disk is called by its key, such as ``web1/xvda``."""

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """A disk is being copied; ``total`` bytes are to be read.

        Told again of the same disk, it begins anew: another method was needed.
        """
        ...

    def advanced(self, key: str, *, read: int, written: int) -> None:
        """So many more bytes were read and written."""
        ...

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """The disk is done, or failed with ``error``."""
        ...

    def message(self, text: str) -> None:
        """Something worth a line."""
        ...


def kind_for(stream: TextIO) -> Kind:
    """Return the view that suits ``stream``: bars on a terminal, lines elsewhere."""
    return "bar" if stream.isatty() else "line"


@contextmanager
def open_progress(kind: Kind, stream: TextIO) -> Generator[Progress]:
    """Give a view of the kind asked for on ``stream``; its bars go away with the block."""
    if kind == "bar":
        view = BarProgress(Console(file=stream, highlight=False))
        with view.bars:
            yield view
    elif kind == "line":
        yield LineProgress(stream)
    elif kind == "json":
        yield JsonProgress(stream)
    else:
        yield SilentProgress()


def summary(key: str, point: DiskPoint) -> str:
    """Return the line that remains of a disk, in bytes written to its image.

    ::

        web1/xvda  inc  1.2 GiB of 40 GiB in 14 s  (base 20261121T020000Z)
        web1/xvdb  full  3.1 GiB of 10 GiB in 1 m 02 s  (first)
        web1/xvdc  cmp  16 MiB of 10 GiB in 31 s  (base-lost, base 20261121T020000Z)
        web1/xvdd  res  512 MiB of 10 GiB in 4.1 s  (full, first)
    """
    written, size = (units.format_size(n) for n in (point.bytes_written, point.size))
    why = ", ".join(_why(point))
    return (
        f"{printable(key)}  {_short(point.method)}  {written} of {size}"
        f" in {units.format_duration(point.seconds)}" + (f"  ({why})" if why else "")
    )


def _why(point: DiskPoint) -> Generator[str]:
    """Yield what explains the method: how it began, why it is no increment, what it is based on."""
    began = point.resumed or point.method
    if point.resumed:
        yield _short(point.resumed)
    if point.reason and not (began == "incremental" and point.base):
        yield point.reason
    if point.base:
        yield f"base {point.base}"


def _short(method: str) -> str:
    return _SHORT.get(method, method)


def printable(text: str) -> str:
    """Return ``text`` on one line, with whatever could steer a terminal replaced by ``?``."""
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass(slots=True)
class _Disk:
    """A disk under way; times are those of the clock."""

    method: str
    reason: str
    total: int
    begun: float
    told: float
    read: int = 0
    written: int = 0
    marks: deque[tuple[float, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.marks = deque([(self.begun, 0)])

    def count(self, now: float, *, read: int, written: int) -> None:
        """Add so many bytes, and remember once a second how far it was."""
        self.read += read
        self.written += written
        if now - self.marks[-1][0] >= 1:
            self.marks.append((now, self.read))
        while len(self.marks) > 1 and now - self.marks[1][0] >= WINDOW:
            self.marks.popleft()

    def rate(self, now: float) -> float:
        """Bytes read in a second, lately."""
        since, before = self.marks[0]
        return (self.read - before) / (now - since) if now > since else 0.0

    def left(self, now: float) -> float | None:
        """Seconds that it will take; None while nobody knows."""
        rate = self.rate(now)
        return max(self.total - self.read, 0) / rate if rate else None

    def pace(self, now: float) -> str:
        """Rate and time left, for people."""
        left = self.left(now)
        told = "" if left is None else f", {units.format_duration(left)} left"
        return f"{units.format_rate(self.rate(now))}{told}"


class SilentProgress:
    """Tells nobody."""

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """Do nothing."""

    def advanced(self, key: str, *, read: int, written: int) -> None:
        """Do nothing."""

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


class _Periodic:
    """Keeps account of the disks, and lets a view speak of each once in ``every`` seconds."""

    def __init__(self, stream: TextIO, *, every: float, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._every = every
        self._clock = clock
        self._disks: dict[str, _Disk] = {}

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """Begin to count."""
        now = self._clock()
        self._disks[key] = _Disk(method, reason, total, begun=now, told=now)

    def advanced(self, key: str, *, read: int, written: int) -> None:
        """Count, and say so if it is time."""
        disk = self._disks.get(key)
        if disk is None:
            return
        now = self._clock()
        disk.count(now, read=read, written=written)
        if now - disk.told >= self._every:
            disk.told = now
            self._tell(key, disk, now)

    def _tell(self, key: str, disk: _Disk, now: float) -> None:
        raise NotImplementedError

    def _print(self, line: str) -> None:
        with suppress(OSError, ValueError):  # the reader is gone; the run is not
            self._stream.write(f"{line}\n")
            self._stream.flush()


class LineProgress(_Periodic):
    """Writes a line per disk every ``every`` seconds, and errors at once."""

    def __init__(
        self,
        stream: TextIO,
        *,
        every: float = LINE_EVERY,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(stream, every=every, clock=clock)

    def _tell(self, key: str, disk: _Disk, now: float) -> None:
        read, total, written = (units.format_size(n) for n in (disk.read, disk.total, disk.written))
        self._print(
            f"{printable(key)}  {_short(disk.method)}  {read} of {total} read,"
            f" {written} written, {disk.pace(now)}"
        )

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """Tell the error, if it is one."""
        self._disks.pop(key, None)
        if error:
            self._print(f"{printable(key)}  failed: {printable(error)}")

    def message(self, text: str) -> None:
        """Write ``text`` as a line."""
        self._print(printable(text))


class JsonProgress(_Periodic):
    """Writes events as NDJSON; ``progress`` at most once in ``every`` seconds for each disk."""

    def __init__(
        self,
        stream: TextIO,
        *,
        every: float = JSON_EVERY,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(stream, every=every, clock=clock)

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """Write ``disk_started``."""
        super().disk_started(key, method=method, reason=reason, total=total)
        self._event("disk_started", disk=key, method=method, reason=reason, total=total)

    def _tell(self, key: str, disk: _Disk, now: float) -> None:
        left = disk.left(now)
        self._event(
            "progress",
            disk=key,
            method=disk.method,
            read=disk.read,
            written=disk.written,
            total=disk.total,
            seconds=round(now - disk.begun, 3),
            rate=round(disk.rate(now)),
            left=None if left is None else round(left, 1),
        )

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """Write ``disk_finished`` or ``disk_failed``."""
        self._disks.pop(key, None)
        if point is None:
            self._event("disk_failed", disk=key, error=error)
            return
        self._event(
            "disk_finished",
            disk=key,
            method=point.method,
            reason=point.reason,
            detail=point.detail,
            resumed=point.resumed,
            base=point.base,
            size=point.size,
            read=point.bytes_read,
            written=point.bytes_written,
            blocks_sampled=point.blocks_sampled,
            blocks_mismatched=point.blocks_mismatched,
            seconds=point.seconds,
        )

    def message(self, text: str) -> None:
        """Write ``message``."""
        self._event("message", text=text)

    def _event(self, event: str, **fields: str | float | None) -> None:
        # json escapes control characters and, by default, everything that is not ASCII
        self._print(json.dumps({"schema": SCHEMA, "event": event, **fields}))


class BarProgress:
    """Shows one bar per disk on a terminal, as far as it is read, with the bytes written.

    Attributes:
        bars: the display; enter it to show the bars.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = monotonic) -> None:
        self.bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._clock = clock
        self._disks: dict[str, tuple[TaskID, _Disk]] = {}

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """Add a bar."""
        now = self._clock()
        self._remove(key)
        what = escape(f"{printable(key)}  {_short(method)}")
        task = self.bars.add_task(what, total=total, figures=escape(f"({reason})"))
        self._disks[key] = task, _Disk(method, reason, total, begun=now, told=now)

    def advanced(self, key: str, *, read: int, written: int) -> None:
        """Advance its bar."""
        if key not in self._disks:
            return
        task, disk = self._disks[key]
        now = self._clock()
        disk.count(now, read=read, written=written)
        figures = f"{units.format_size(disk.written)} written, {disk.pace(now)}"
        self.bars.update(task, completed=disk.read, figures=figures)

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """Take the bar away; tell the error, if it is one."""
        self._remove(key)
        if error:
            self.message(f"{key}  failed: {error}")

    def _remove(self, key: str) -> None:
        task, _ = self._disks.pop(key, (None, None))
        if task is not None:
            self.bars.remove_task(task)

    def message(self, text: str) -> None:
        """Write ``text`` above the bars."""
        self.bars.console.print(printable(text), markup=False, soft_wrap=True)
