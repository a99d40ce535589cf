"""Database: the records of a pool, their back references, and what changed since when.

Rules of this file:

1. Whoever reads or writes holds ``lock``; a record handed out is the record itself, not a
   copy, and is changed through ``set`` only.
2. Every change has a number, the generation. ``changes_since`` lists objects, not events: of
   several changes to one object a reader sees the last (xen-api, ocaml/xapi/xapi_event.ml).
3. A back reference (``SR.VDIs``) follows its forward one (``VDI.SR``) by the table ``BACK``.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from . import fields
from .failures import SimError
from .values import NULL, Record, Timestamp, Value

BACK: dict[tuple[str, str], tuple[str, str]] = {
    ("VDI", "SR"): ("SR", "VDIs"),
    ("VDI", "snapshot_of"): ("VDI", "snapshots"),
    ("VBD", "VDI"): ("VDI", "VBDs"),
    ("VBD", "VM"): ("VM", "VBDs"),
    ("VIF", "VM"): ("VM", "VIFs"),
    ("VIF", "network"): ("network", "VIFs"),
    ("PBD", "SR"): ("SR", "PBDs"),
    ("PBD", "host"): ("host", "PBDs"),
    ("PIF", "network"): ("network", "PIFs"),
    ("PIF", "host"): ("host", "PIFs"),
    ("VM", "snapshot_of"): ("VM", "snapshots"),
    ("VM", "parent"): ("VM", "children"),
    ("VM", "resident_on"): ("host", "resident_VMs"),
}
"""(class, reference field) → (class, set) that holds the refs of those who point there."""

VOLATILE = ("session", "task")
"""Classes that a restart of xapi forgets."""


@dataclass(frozen=True)
class Change:
    """An object that was added, modified or deleted; ``operation`` is add, mod or del."""

    generation: int
    kind: str
    ref: str
    operation: str


class Database:
    """All records of a pool.

    Attributes:
        lock: held by whoever reads or writes.
        changed: notified at every change, on ``lock``.
        generation: number of the last change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.generation = 1
        self._tables: dict[str, dict[str, Record]] = {name: {} for name in fields.CLASSES}
        self._uuids: dict[tuple[str, str], str] = {}
        self._created: dict[str, int] = {}
        self._modified: dict[tuple[str, str], int] = {}
        self._deleted: list[tuple[int, int, str, str]] = []
        self._encoded: dict[str, tuple[int, str]] = {}
        self._touched: dict[str, int] = dict.fromkeys(fields.CLASSES, 1)

    # ── reading ──────────────────────────────────────────────────────────────────────────

    def records(self, kind: str) -> Mapping[str, Record]:
        """Return all records of a class by ref."""
        return self._tables[kind]

    def record(self, kind: str, ref: str) -> Record:
        """Return the record of ``ref``.

        Raises:
            SimError: HANDLE_INVALID.
        """
        found = self._tables[kind].get(ref)
        if found is None:
            raise SimError("HANDLE_INVALID", kind, ref)
        return found

    def fields(self, kind: str) -> set[str]:
        """Return the names of a class's fields."""
        return set(fields.CLASSES[kind])

    def exists(self, kind: str, ref: str) -> bool:
        """Return whether ``ref`` is an object of that class."""
        return ref in self._tables[kind]

    def text(self, kind: str, ref: str, name: str) -> str:
        """Return a field that holds a string or a reference."""
        return str(self.record(kind, ref)[name])

    def number(self, kind: str, ref: str, name: str) -> int:
        """Return a field that holds a number."""
        value = self.record(kind, ref)[name]
        return int(value) if isinstance(value, int | float) else 0

    def flag(self, kind: str, ref: str, name: str) -> bool:
        """Return a field that holds a truth value."""
        return bool(self.record(kind, ref)[name])

    def refs(self, kind: str, ref: str, name: str) -> list[str]:
        """Return a set of strings or references, as a new list."""
        value = self.record(kind, ref)[name]
        return [str(item) for item in value] if isinstance(value, list) else []

    def mapping(self, kind: str, ref: str, name: str) -> dict[str, Value]:
        """Return a map, as a new dict."""
        value = self.record(kind, ref)[name]
        return dict(value) if isinstance(value, dict) else {}

    def by_uuid(self, kind: str, uuid: str) -> str:
        """Return the ref of a uuid.

        Raises:
            SimError: UUID_INVALID.
        """
        ref = self._uuids.get((kind, uuid))
        if ref is None:
            raise SimError("UUID_INVALID", kind, uuid)
        return ref

    def has_uuid(self, kind: str, uuid: str) -> bool:
        """Return whether an object of that class has this uuid."""
        return (kind, uuid) in self._uuids

    def only(self, kind: str) -> str:
        """Return the ref of the one object of a class, such as the pool."""
        return next(iter(self._tables[kind]), NULL)

    def json(self, kind: str) -> str:
        """Return all records of a class as JSON, by ref; kept until one changes."""
        generation, text = self._encoded.get(kind, (0, ""))
        if generation != self._touched[kind]:
            text = json.dumps(self._tables[kind], check_circular=False)
            self._encoded[kind] = (self._touched[kind], text)
        return text

    # ── writing ──────────────────────────────────────────────────────────────────────────

    def create(self, kind: str, ref: str, values: Mapping[str, Value]) -> str:
        """Add an object; fields that are not given have their default.

        Raises:
            KeyError: ``values`` names a field the class does not have.
        """
        record = fields.empty_record(kind)
        for name, value in values.items():
            if name not in record:
                raise KeyError(f"{kind} has no field {name}")
            record[name] = value
        self._tables[kind][ref] = record
        self._uuids[kind, str(record["uuid"])] = ref
        self._created[ref] = self._note(kind, ref)
        for (source, name), target in BACK.items():
            if source == kind:
                self._point(target, str(record[name]), ref)
        return ref

    def set(self, kind: str, ref: str, /, **values: Value) -> None:
        """Change fields of an object; nothing happens where they have these values.

        Raises:
            SimError: HANDLE_INVALID.
        """
        record = self.record(kind, ref)
        for name, value in values.items():
            before = record[name]
            if before == value:
                continue
            record[name] = value
            self._note(kind, ref)
            target = BACK.get((kind, name))
            if target is not None:
                self._unpoint(target, str(before), ref)
                self._point(target, str(value), ref)

    def destroy(self, kind: str, ref: str) -> None:
        """Remove an object; references to it stay, pointing nowhere, as in xapi.

        Raises:
            SimError: HANDLE_INVALID.
        """
        record = self.record(kind, ref)
        for (source, name), target in BACK.items():
            if source == kind:
                self._unpoint(target, str(record[name]), ref)
        del self._tables[kind][ref]
        self._uuids.pop((kind, str(record["uuid"])), None)
        created = self._created.pop(ref, 0)
        generation = self._note(kind, ref)
        del self._modified[kind, ref]
        self._deleted.append((generation, created, kind, ref))
        del self._deleted[:-100_000]

    def changes_since(self, generation: int) -> Iterator[Change]:
        """Yield what is different from ``generation``, one change per object, newest first."""
        for (kind, ref), number in reversed(self._modified.items()):
            if number <= generation:
                break
            operation = "add" if self._created[ref] > generation else "mod"
            yield Change(number, kind, ref, operation)
        for number, created, kind, ref in reversed(self._deleted):
            if number <= generation:
                break
            if created <= generation:
                yield Change(number, kind, ref, "del")

    def restart(self) -> None:
        """Forget what a restart of xapi forgets; generations start anew, old tokens are void."""
        for kind in VOLATILE:
            for ref in list(self._tables[kind]):
                self.destroy(kind, ref)
        self.generation = 1
        self._deleted = []
        for kind, ref in list(self._modified):
            self._created[ref] = self._note(kind, ref)
        self._touched = dict.fromkeys(self._touched, self.generation)

    # ── keeping it ───────────────────────────────────────────────────────────────────────

    def dump(self) -> dict[str, dict[str, Record]]:
        """Return what survives a restart, as JSON can hold it."""
        return {kind: table for kind, table in self._tables.items() if kind not in VOLATILE}

    def restore(self, dump: Mapping[str, Mapping[str, Record]]) -> None:
        """Become what ``dump`` gave."""
        for kind, table in dump.items():
            times = [f.name for f in fields.CLASSES[kind].values() if f.type == "datetime"]
            for ref, record in table.items():
                for name in times:
                    record[name] = Timestamp(str(record[name]))
                self._tables[kind][ref] = record
                self._uuids[kind, str(record["uuid"])] = ref
                self._created[ref] = self._note(kind, ref)

    def _note(self, kind: str, ref: str) -> int:
        self.generation += 1
        self._touched[kind] = self.generation
        self._modified.pop((kind, ref), None)
        self._modified[kind, ref] = self.generation
        self.changed.notify_all()
        return self.generation

    def _point(self, target: tuple[str, str], owner: str, ref: str) -> None:
        kind, name = target
        record = self._tables[kind].get(owner)
        if record is not None:
            listed = record[name]
            if isinstance(listed, list):
                listed.append(ref)
            self._note(kind, owner)

    def _unpoint(self, target: tuple[str, str], owner: str, ref: str) -> None:
        kind, name = target
        record = self._tables[kind].get(owner)
        if record is not None:
            listed = record[name]
            if isinstance(listed, list) and ref in listed:
                record[name] = [item for item in listed if item != ref]
                self._note(kind, owner)
