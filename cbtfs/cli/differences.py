"""Differences: what ``diff`` tells of disks that were compared, as a table or as JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cbtfs import difference, errors, units
from cbtfs.catalogue import Catalogue, DiskPoint, Reference
from cbtfs.difference import Pair, Tally
from cbtfs.extents import Extent

from . import output, points
from .output import Table

SHOWN = 100
"""Extents of a disk that are shown to people."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared: a point, or a VM as it is now.

    Attributes:
        name: how people write it.
        disks: those that are meant.
        is_one: whether that is one disk, by its name.
        vm_uuid: of the VM; ``vdi-`` and a uuid for a disk without one.
        time: of the point, "" for now.
    """

    name: str
    disks: Sequence[DiskPoint]
    vm_uuid: str
    time: str = ""
    is_one: bool = False

    def document(self) -> dict[str, object]:
        """Return what JSON says of it."""
        return {"point": self.name, "vm_uuid": self.vm_uuid, "time": self.time or None}


@dataclass(frozen=True, slots=True)
class Sides:
    """The two sides, and which disks of theirs belong together."""

    old: Side
    new: Side
    pairs: Sequence[Pair]

    def only_in(self, pair: Pair) -> str:
        """Return which side alone has the disk of ``pair``; "" if both do."""
        if pair.old is not None and pair.new is not None:
            return ""
        return (self.new if pair.old is None else self.old).name


def side(catalogue: Catalogue, reference: Reference) -> Side:
    """Return the side that a point is, or one disk of it."""
    point, disk = reference.point, reference.disk
    name = f"{points.label(catalogue, reference.history)}/{point.time}"
    disks = point.disks if disk is None else (disk,)
    return Side(name, disks, point.vm_uuid, point.time, is_one=disk is not None)


def paired(old: Side, new: Side) -> Sides:
    """Return which disks of two sides belong together; two that were named do."""
    if old.is_one and new.is_one:
        return Sides(old, new, [Pair(old.disks[0], new.disks[0])])
    pairs = difference.pairs(old.disks, new.disks)
    if old.is_one:
        pairs = [pair for pair in pairs if pair.old is not None]
    if new.is_one:
        pairs = [pair for pair in pairs if pair.new is not None]
    return Sides(old, new, pairs)


class View(Protocol):
    """Where the disks are told of, one after the other."""

    problems: list[str]
    """Why disks could not be compared, because their digests are damaged."""

    def add(
        self,
        pair: Pair,
        found: Iterable[Extent],
        *,
        how: str = "",
        failure: errors.CbtfsError | None = None,
    ) -> None:
        """Tell of a disk.

        Args:
            pair: the disk.
            found: what differs; may raise ImageDamaged.
            how: how that is known, if not from digests alone.
            failure: why it is not known.
        """
        ...

    def end(self) -> None:
        """Tell that this was all."""
        ...


def view(sides: Sides, *, as_json: bool, verbose: bool) -> View:
    """Return what tells people or programs of ``sides``; ``verbose``: where each disk differs."""
    if as_json:
        return _JsonView(sides)
    return _TableView(sides, limit=SHOWN if verbose or len(sides.pairs) == 1 else 0)


# ── for people ───────────────────────────────────────────────────────────────────────────────


class _TableView:
    """A table, and where each disk differs: the first ``limit`` extents of it."""

    def __init__(self, sides: Sides, *, limit: int) -> None:
        self.problems: list[str] = []
        self._sides = sides
        self._limit = limit
        self._table = Table(["DISK", ">CHANGED", ">EXTENTS", ">SIZE", "NOTE"], flexible=(0,))
        self._details: list[str] = []

    def add(
        self,
        pair: Pair,
        found: Iterable[Extent],
        *,
        how: str = "",
        failure: errors.CbtfsError | None = None,
    ) -> None:
        """Add a row."""
        only_in = self._sides.only_in(pair)
        if only_in:
            self._table.add(pair.device, "-", "-", _size(pair), f"only in {only_in}")
            return
        kept = _Kept(limit=self._limit)
        failure = _told(found, kept, self.problems, failure)
        if failure is not None:
            is_damage = isinstance(failure, errors.ImageDamaged)
            note = "damaged, see the warning" if is_damage else "not compared, see the error"
            self._table.add(pair.device, "?", "?", _size(pair), note)
            return
        changed, count = units.format_size(kept.tally.changed), str(kept.tally.extents)
        self._table.add(pair.device, changed, count, _size(pair), _noted(pair, how))
        self._details += [f"{output.safe(pair.device)}  {line}" for line in kept.lines()]

    def end(self) -> None:
        """Print all of it."""
        output.line(output.safe(f"{self._sides.old.name} -> {self._sides.new.name}"))
        self._table.print()
        if self._details:
            output.line("\n".join(self._details))


@dataclass(slots=True)
class _Kept:
    """What differs on one disk; the first ``limit`` extents are kept."""

    limit: int
    tally: Tally = field(default_factory=Tally)
    kept: list[Extent] = field(default_factory=list[Extent])

    def add(self, extent: Extent) -> None:
        """Count one more extent."""
        self.tally.add(extent)
        if len(self.kept) < self.limit:
            self.kept.append(extent)

    def lines(self) -> Iterator[str]:
        """Yield a line for each extent that is kept."""
        for extent in self.kept:
            yield f"bytes {extent.start} to {extent.stop}"
        rest = self.tally.extents - len(self.kept)
        if self.kept and rest:
            yield f"and {rest} more places; --json lists them"


class _Counter(Protocol):
    def add(self, extent: Extent) -> None: ...


def _told(
    found: Iterable[Extent],
    counter: _Counter,
    problems: list[str],
    failure: errors.CbtfsError | None,
) -> errors.CbtfsError | None:
    """Tell ``counter`` all extents; return why that is impossible, or ``failure``."""
    try:
        for extent in found:
            counter.add(extent)
    except errors.ImageDamaged as exc:
        failure = exc
    if isinstance(failure, errors.ImageDamaged):
        problems.append(str(failure))
    return failure


def _size(pair: Pair) -> str:
    sizes = [d.size for d in (pair.old, pair.new) if d is not None]
    return " -> ".join(units.format_size(s) for s in dict.fromkeys(sizes))


def _noted(pair: Pair, how: str) -> str:
    """Return what is to be noted of two disks that are compared."""
    notes: list[str] = []
    if pair.old is not None and pair.new is not None:
        if pair.old.device != pair.new.device:
            notes.append(f"was {pair.old.device}")
        if pair.old.vdi_uuid != pair.new.vdi_uuid:
            notes.append("another VDI")
    return ", ".join([*notes, *([how] if how else [])])


# ── for programs ─────────────────────────────────────────────────────────────────────────────


class _JsonView:
    """One document, printed piece by piece: a disk may have millions of extents."""

    def __init__(self, sides: Sides) -> None:
        self.problems: list[str] = []
        self._count = 0
        old, new = sides.old.document(), sides.new.document()
        head = {"schema": output.SCHEMA, "old": old, "new": new}
        output.line(_encoded(head)[:-1] + ', "disks": [')

    def add(
        self,
        pair: Pair,
        found: Iterable[Extent],
        *,
        how: str = "",
        failure: errors.CbtfsError | None = None,
    ) -> None:
        """Print a disk."""
        comma = "," if self._count else ""
        self._count += 1
        output.line(comma + _encoded(_pair_document(pair))[:-1] + ', "extents": [')
        printed = _Printed()
        failure = _told(found, printed, self.problems, failure)
        tally = printed.tally
        totals: dict[str, object] = {
            "changed": tally.changed,
            "count": tally.extents,
            "compared": how or None,
            "problem": str(failure) if failure is not None else "",
        }
        output.line("], " + _encoded(totals)[1:])

    def end(self) -> None:
        """Print the end."""
        output.line("]}")


class _Printed:
    """Prints each extent."""

    def __init__(self) -> None:
        self.tally = Tally()

    def add(self, extent: Extent) -> None:
        """Print one more."""
        output.line(f"{',' if self.tally.extents else ''}[{extent.start}, {extent.stop}]")
        self.tally.add(extent)


def _pair_document(pair: Pair) -> dict[str, object]:
    def side(disk: DiskPoint | None) -> dict[str, object] | None:
        if disk is None:
            return None
        return {"device": disk.device, "vdi_uuid": disk.vdi_uuid, "size": disk.size}

    return {"device": pair.device, "old": side(pair.old), "new": side(pair.new)}


def _encoded(content: Mapping[str, object]) -> str:
    return json.dumps(content)
