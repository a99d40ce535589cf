"""Replica: the records of a pool, kept in step with it by its events.

::

    tables of a batch ── take the place of everything
    its events        ── add, mod: of a record;  del: remove one

Of several changes to an object xapi tells only the last, with the record as it is now. So an event
that comes twice, or for a record that is here already, does no harm; one that is missed does, which
is why ``lacks`` compares the number of records with what the pool says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from . import rawrecords
from .inventory import CLASSES, Assembler, Inventory
from .rawrecords import Record

_NAMES = {name.lower(): name for name in CLASSES}


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to an object.

    Attributes:
        kind: its class, in any case: events have ``vdi`` where everything else has ``VDI``.
        operation: ``add``, ``mod`` or ``del``.
        ref: its reference.
        record: JSON of its record, b"" if it is gone.
    """

    kind: str
    operation: str
    ref: str
    record: bytes | memoryview = b""


@dataclass(frozen=True, slots=True)
class Batch:
    """Events in the order in which they happened.

    Attributes:
        events: may tell of what the tables have already.
        tables: all records of ``inventory.CLASSES``, if the batch is a complete one; else None.
        counts: how many objects the pool has by class, where it told.
    """

    events: Sequence[Event]
    tables: Mapping[str, Mapping[str, Record]] | None = None
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


class Replica:
    """The records of ``inventory.CLASSES``; one thread at a time may use it."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, Record]] = {name: {} for name in CLASSES}
        self._assembler = Assembler()

    def __repr__(self) -> str:
        return f"<Replica of {sum(map(len, self._tables.values()))} records>"

    def apply(self, batch: Batch) -> bool:
        """Take in what happened; return whether anything is different that we look at.

        Raises:
            PoolError: a record cannot be understood; nothing of the batch was taken in.
        """
        decoded = [
            (_NAMES[event.kind.lower()], event.ref, _decoded(event))
            for event in batch.events
            if event.kind.lower() in _NAMES
        ]
        before = self._tables
        found = before if batch.tables is None else batch.tables
        self._tables = {name: _shared(found[name], before[name]) for name in CLASSES}
        for name, ref, record in decoded:
            known = before[name].get(ref)
            if record is None:
                self._tables[name].pop(ref, None)
            else:
                self._tables[name][ref] = _same(record, known)
        return self._tables != before

    def lacks(self, batch: Batch) -> bool:
        """Tell whether an event was missed: the pool has more or fewer objects after ``batch``."""
        told = {_NAMES.get(kind.lower(), ""): count for kind, count in batch.counts.items()}
        return any(told.get(name, len(table)) != len(table) for name, table in self._tables.items())

    def inventory(self) -> Inventory:
        """Return what the records say.

        Raises:
            PoolError: there is no pool record.
        """
        return self._assembler.assemble(self._tables)


def _shared(table: Mapping[str, Record], before: Mapping[str, Record]) -> dict[str, Record]:
    if table is before:
        return dict(table)
    return {ref: _same(record, before.get(ref)) for ref, record in table.items()}


def _same(record: Record, known: Record | None) -> Record:
    """Return ``known`` if it is equal: the same object is not converted again."""
    return known if known is not None and known == record else record


def _decoded(event: Event) -> Record | None:
    if event.operation == "del":
        return None
    name = _NAMES[event.kind.lower()]
    return rawrecords.decode_record(event.record, rawrecords.SHAPES[name], name=name)
