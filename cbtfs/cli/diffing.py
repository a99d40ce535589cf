"""``diff``: what changed between two restore points, or from each point of a VM to the next."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import typer

from cbtfs import difference, errors, units
from cbtfs.catalogue import Catalogue, DiskPoint, Reference, VMHistory
from cbtfs.difference import DigestArray, Pair, Tally
from cbtfs.extents import Extent
from cbtfs.store import Store

from . import context as contexts, growth, output, points
from .context import Globals
from .output import Table

DAMAGED = 4
"""Exit status when digests are not as committed."""

SHOWN = 100
"""Extents of a disk that are shown to people."""


def register(app: typer.Typer) -> None:
    """Add the verb of this module to ``app``."""
    app.command("diff", epilog="Example: cbtfs diff web1/latest~1 web1/latest")(diff)


def diff(
    context: typer.Context,
    a: Annotated[
        str, typer.Argument(metavar="A", help="VM/TIME or VM/TIME/DISK; without B also VM.")
    ],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="What A is compared with.")] = None,
) -> None:
    """Show which bytes differ between two restore points, in blocks of 64 KiB.

    Without B: how much each point of a VM differs from the one before. Only digests are read.
    """
    options = contexts.of(context)
    with contexts.opened_store(options) as store:
        catalogue = contexts.catalogue_of(store)
        history = _vm(catalogue, a) if b is None else None
        if history is not None:
            problems = growth.show(options, store, points.label(catalogue, history), history)
        else:
            sides = _sides(catalogue, a, b)
            problems = _show_difference(options, store, sides)
    for problem in problems:
        contexts.warn(problem)
    if problems:
        raise typer.Exit(DAMAGED)


def _vm(catalogue: Catalogue, text: str) -> VMHistory | None:
    """Return the VM that ``text`` names, None if it is the name of a point."""
    try:
        return catalogue.find(text)
    except errors.NotFound:
        if "/" not in text:
            raise
        return None


# ── two points ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Side:
    """A point to compare, or one disk of it; ``name`` is how people write it."""

    name: str
    reference: Reference

    @property
    def disks(self) -> tuple[DiskPoint, ...]:
        """The disks that are meant."""
        disk = self.reference.disk
        return (disk,) if disk is not None else self.reference.point.disks

    def document(self) -> dict[str, object]:
        """Return what JSON says of it."""
        point = self.reference.point
        return {"point": self.name, "vm_uuid": point.vm_uuid, "time": point.time}


@dataclass(frozen=True, slots=True)
class _Sides:
    """The two points, and which disks of theirs belong together."""

    old: _Side
    new: _Side
    pairs: list[Pair]


def _sides(catalogue: Catalogue, a: str, b: str | None) -> _Sides:
    one = catalogue.resolve(a)
    if b is None:
        old, new = _side(catalogue, _before(one)), _side(catalogue, one)
    else:
        old, new = _side(catalogue, one), _side(catalogue, catalogue.resolve(b))
    if old.reference.disk is not None and new.reference.disk is not None:
        return _Sides(old, new, [Pair(old.reference.disk, new.reference.disk)])
    pairs = difference.pairs(old.disks, new.disks)
    if old.reference.disk is not None:
        pairs = [pair for pair in pairs if pair.old is not None]
    if new.reference.disk is not None:
        pairs = [pair for pair in pairs if pair.new is not None]
    return _Sides(old, new, pairs)


def _before(reference: Reference) -> Reference:
    earlier = [p for p in reference.history.points if p.time < reference.point.time]
    if not earlier:
        raise errors.NotFound(
            f"{reference.history.name} has no restore point before {reference.point.time}; name two"
        )
    return Reference(reference.history, earlier[-1])


def _side(catalogue: Catalogue, reference: Reference) -> _Side:
    return _Side(f"{points.label(catalogue, reference.history)}/{reference.point.time}", reference)


def _show_difference(options: Globals, store: Store, sides: _Sides) -> list[str]:
    if options.json:
        return _print_document(store, sides)
    one = len(sides.pairs) == 1
    return _print_table(store, sides, with_extents=one or options.verbosity > 0)


def _print_table(store: Store, sides: _Sides, *, with_extents: bool) -> list[str]:
    output.line(output.safe(f"{sides.old.name} -> {sides.new.name}"))
    table = Table(["DISK", ">CHANGED", ">EXTENTS", ">SIZE", "NOTE"], flexible=(0,))
    problems: list[str] = []
    details: list[str] = []
    for pair in sides.pairs:
        found = _Found(limit=SHOWN if with_extents else 0)
        if pair.old is None or pair.new is None:
            table.add(pair.device, "-", "-", _size(pair), _only_in(sides, pair))
            continue
        problem = _scan(store, sides, pair, found.add)
        if problem:
            problems.append(problem)
            table.add(pair.device, "?", "?", _size(pair), "damaged, see the warning")
            continue
        changed = units.format_size(found.tally.changed)
        table.add(pair.device, changed, str(found.tally.extents), _size(pair), _noted(pair))
        details += [f"{output.safe(pair.device)}  {line}" for line in found.lines()]
    table.print()
    if details:
        output.line("\n".join(details))
    return problems


def _scan(store: Store, sides: _Sides, pair: Pair, told: Callable[[Extent], None]) -> str:
    """Tell all extents that differ; return why that is impossible, "" if it is not."""
    if pair.old is None or pair.new is None:
        return ""
    try:
        with (
            _opened(store, sides.old, pair.old) as old,
            _opened(store, sides.new, pair.new) as new,
        ):
            for extent in difference.between(old, new):
                told(extent)
    except errors.ImageDamaged as exc:
        return str(exc)
    return ""


def _opened(store: Store, side: _Side, disk: DiskPoint) -> DigestArray:
    point = side.reference.point
    with store.opened_point(point.vm_uuid, point.time) as folder:
        return DigestArray(folder, disk)


@dataclass(slots=True)
class _Found:
    """What differs on one disk; the first ``limit`` extents are kept."""

    limit: int
    tally: Tally = field(default_factory=Tally)
    kept: list[Extent] = field(default_factory=list[Extent])

    def add(self, extent: Extent) -> None:
        self.tally.add(extent)
        if len(self.kept) < self.limit:
            self.kept.append(extent)

    def lines(self) -> Iterator[str]:
        for extent in self.kept:
            yield f"bytes {extent.start} to {extent.stop}"
        rest = self.tally.extents - len(self.kept)
        if self.kept and rest:
            yield f"and {rest} more places; --json lists them"


def _size(pair: Pair) -> str:
    sizes = [d.size for d in (pair.old, pair.new) if d is not None]
    return " -> ".join(units.format_size(s) for s in dict.fromkeys(sizes))


def _only_in(sides: _Sides, pair: Pair) -> str:
    return f"only in {(sides.new if pair.old is None else sides.old).name}"


def _noted(pair: Pair) -> str:
    """Return what is to be noted of two disks that are compared."""
    if pair.old is None or pair.new is None:
        return ""
    notes: list[str] = []
    if pair.old.device != pair.new.device:
        notes.append(f"was {pair.old.device}")
    if pair.old.vdi_uuid != pair.new.vdi_uuid:
        notes.append("another VDI")
    return ", ".join(notes)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────


def _print_document(store: Store, sides: _Sides) -> list[str]:
    """Print the document piece by piece: a disk may have millions of extents."""
    problems: list[str] = []
    head = {"schema": output.SCHEMA, "old": sides.old.document(), "new": sides.new.document()}
    output.line(_encoded(head)[:-1] + ', "disks": [')
    for number, pair in enumerate(sides.pairs):
        output.line(
            ("," if number else "") + _encoded(_pair_document(pair))[:-1] + ', "extents": ['
        )
        tally = Tally()
        problem = _scan(store, sides, pair, partial(_print_extent, tally))
        if problem:
            problems.append(problem)
        totals = {"changed": tally.changed, "count": tally.extents, "problem": problem}
        output.line("], " + _encoded(totals)[1:])
    output.line("]}")
    return problems


def _print_extent(tally: Tally, extent: Extent) -> None:
    output.line(f"{',' if tally.extents else ''}[{extent.start}, {extent.stop}]")
    tally.add(extent)


def _pair_document(pair: Pair) -> dict[str, object]:
    def side(disk: DiskPoint | None) -> dict[str, object] | None:
        if disk is None:
            return None
        return {"device": disk.device, "vdi_uuid": disk.vdi_uuid, "size": disk.size}

    return {"device": pair.device, "old": side(pair.old), "new": side(pair.new)}


def _encoded(content: Mapping[str, object]) -> str:
    return json.dumps(content)
