"""Growth: how much each restore point of a VM differs from the one before, from digests alone."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from cbtfs import difference, errors, units
from cbtfs.catalogue import DiskPoint, Point, VMHistory
from cbtfs.difference import DigestArray, NoDigests, Tally
from cbtfs.store import Store

from . import output
from .context import Globals
from .output import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Growth:
    """How much a disk of a point differs from what was there before.

    Attributes:
        since: time of the last point before that has the disk, "" if none has.
        tally: what differs; None if that cannot be told, as ``problem`` says.
    """

    point: Point
    disk: DiskPoint
    since: str
    tally: Tally | None
    problem: str = ""


def show(options: Globals, store: Store, label: str, history: VMHistory) -> list[str]:
    """Print the growth of a VM called ``label``; return what could not be told, in sentences."""
    with ExitStack() as stack:
        walk = _Walk(store, stack)
        rows = [row for point in history.points for row in walk.to(point)]
    if options.json:
        output.document({"vm": label, "vm_uuid": history.uuid, "points": _documents(history, rows)})
    else:
        _print(label, history, rows, per_disk=options.verbosity > 0)
    return [row.problem for row in rows if row.problem]


@dataclass(slots=True)
class _Last:
    """A disk as the last point that has it, of time ``time``, has it; None: that is damaged."""

    time: str
    disk: DiskPoint
    array: DigestArray | None


class _Walk:
    """Goes through the points of a VM, oldest first, with each digest array read once."""

    def __init__(self, store: Store, stack: ExitStack) -> None:
        self._store = store
        self._stack = stack
        self._known: dict[str, _Last] = {}  # by device

    def to(self, point: Point) -> list[_Growth]:
        """Return the growth of each disk of the next point."""
        before = [last.disk for last in self._known.values()]
        pairs = [p for p in difference.pairs(before, point.disks) if p.new is not None]
        olds = [self._known.pop(pair.old.device) if pair.old else None for pair in pairs]
        news = [pair.new for pair in pairs if pair.new is not None]
        return [self._grown(point, new, old) for new, old in zip(news, olds, strict=True)]

    def _grown(self, point: Point, disk: DiskPoint, old: _Last | None) -> _Growth:
        new = _Last(point.time, disk, None)
        self._known[disk.device] = new
        since = old.time if old else ""
        try:
            new.array = self._opened(point, disk)
            tally = _compared(old, new.array)
        except errors.ImageDamaged as exc:
            return _Growth(point=point, disk=disk, since=since, tally=None, problem=str(exc))
        finally:
            if old is not None and old.array is not None:
                old.array.close()
        return _Growth(point=point, disk=disk, since=since, tally=tally)

    def _opened(self, point: Point, disk: DiskPoint) -> DigestArray:
        with self._store.opened_point(point.vm_uuid, point.time) as folder:
            return self._stack.enter_context(DigestArray(folder, disk))


def _compared(old: _Last | None, new: DigestArray) -> Tally | None:
    """Return how ``new`` differs from ``old``; None if that is damaged."""
    tally = Tally()
    if old is not None and old.array is None:
        return None
    before = old.array if old is not None and old.array is not None else NoDigests()
    for extent in difference.between(before, new):
        tally.add(extent)
    return tally


def _print(label: str, history: VMHistory, rows: Sequence[_Growth], *, per_disk: bool) -> None:
    table = Table(["POINT", ">CHANGED", ">EXTENTS", ">SIZE", "SINCE"], flexible=(0,))
    for point in history.points:
        here = [row for row in rows if row.point is point]
        for part in [[row] for row in here] if per_disk else [here]:
            name = f"{label}/{point.time}" + (f"/{part[0].disk.device}" if per_disk else "")
            table.add(name, *_cells(part))
    table.print()


def _cells(rows: Sequence[_Growth]) -> list[str]:
    size = units.format_size(sum(row.disk.size for row in rows))
    since = ", ".join(dict.fromkeys(row.since or "(new)" for row in rows))
    if any(row.tally is None for row in rows):
        return ["?", "?", size, f"{since}; unknown, see the warning"]
    tallies = [row.tally for row in rows if row.tally is not None]
    changed = units.format_size(sum(tally.changed for tally in tallies))
    return [changed, str(sum(tally.extents for tally in tallies)), size, since]


def _documents(history: VMHistory, rows: Sequence[_Growth]) -> list[dict[str, object]]:
    return [
        {
            "time": point.time,
            "disks": [
                {
                    "device": row.disk.device,
                    "size": row.disk.size,
                    "since": row.since or None,
                    "changed": row.tally.changed if row.tally else None,
                    "count": row.tally.extents if row.tally else None,
                    "problem": row.problem,
                }
                for row in rows
                if row.point is point
            ],
        }
        for point in history.points
    ]
