"""VM metadata as xapi exports it: a tar with ``ova.xml``, and a new VM made from one.

``ova.xml`` is one XML-RPC value: a struct with ``version`` and ``objects``, each object a struct of
class, id and the record as ``snapshot``; references inside are ids such as ``Ref:3`` (xen-api,
ocaml/xapi/export.ml and importexport.ml).
"""

import io
import tarfile
import uuid
import xmlrpc.client
from collections.abc import Iterator, Mapping, Sequence
from typing import cast
from xml.parsers.expat import ExpatError

from . import fields, values
from .failures import SimError
from .pool import SimulatedPool
from .values import NULL, Record, Timestamp, Value

VERSION: dict[str, Value] = {
    "hostname": "localhost",
    "date": "2026-08-21",
    "product_version": "8.3.0",
    "product_brand": "XCP-ng",
    "build_number": "cloud",
    "xapi_major": "1",
    "xapi_minor": "20",
    "export_vsn": "2",
}
_EPOCH = 1_760_000_000  # the tar's time: an export of equal records is equal


def export(pool: SimulatedPool, vms: Sequence[str], *, snapshots: bool) -> bytes:
    """Return the tar for ``vms`` (refs), with their snapshots if ``snapshots``.

    Raises:
        SimError: HANDLE_INVALID.
    """
    with pool.lock:
        objects = list(_reachable(pool, vms, snapshots=snapshots))
        names = {ref: f"Ref:{number}" for number, (_, ref) in enumerate(objects)}
        described: list[Value] = [
            {
                "class": kind,
                "id": names[ref],
                "snapshot": _renamed(pool.db.record(kind, ref), names),
            }
            for kind, ref in objects
        ]
    text = values.xml({"version": VERSION, "objects": described})
    return _tar({"ova.xml": text.encode()})


def read(archive: bytes) -> list[tuple[str, str, Record]]:
    """Return (class, id, record) of the objects in an exported tar.

    Raises:
        SimError: IMPORT_ERROR.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            member = tar.extractfile("ova.xml")
            text = member.read().decode() if member else ""
        (content,), _ = xmlrpc.client.loads(
            f"<params><param>{text}</param></params>", use_builtin_types=False
        )
        objects: list[tuple[str, str, Record]] = []
        if isinstance(content, dict):
            for item in content["objects"]:
                kind = str(item["class"])
                objects.append((kind, str(item["id"]), _typed(kind, item["snapshot"])))
    except (tarfile.TarError, KeyError, ExpatError, UnicodeDecodeError, TypeError) as exc:
        raise SimError("IMPORT_ERROR", f"not an export: {exc}") from None
    return objects


def import_vms(
    pool: SimulatedPool, objects: Sequence[tuple[str, str, Record]], *,
    disks: Mapping[str, str], restore: bool, dry_run: bool,
) -> list[str]:  # fmt: skip
    """Create the VMs that ``objects`` describe; return their refs.

    Args:
        pool: where.
        objects: from `read`.
        disks: uuid in the export → uuid of the VDI to use instead.
        restore: keep uuids and addresses of network cards.
        dry_run: only check.

    Raises:
        SimError: VDI_LOCATION_MISSING, DUPLICATE_VM, UUID_INVALID.
    """
    with pool.lock:
        importer = _Importer(pool, objects, disks=disks, restore=restore)
        importer.check()
        return [] if dry_run else importer.create()


class _Importer:
    """One import: what each id of the export becomes."""

    def __init__(
        self, pool: SimulatedPool, objects: Sequence[tuple[str, str, Record]], *,
        disks: Mapping[str, str], restore: bool,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._objects = objects
        self._disks = disks
        self._restore = restore
        self._refs: dict[str, str] = {}

    def check(self) -> None:
        """Find everything that must exist; raise SimError for what does not."""
        srs = {key: str(record["uuid"]) for key, record in self._of("SR")}
        needed = self._needed()
        for key, record in self._of("VDI"):
            wanted = self._disks.get(str(record["uuid"]), str(record["uuid"]))
            try:
                self._refs[key] = self._pool.db.by_uuid("VDI", wanted)
            except SimError:
                if key in needed:
                    sr = srs.get(str(record["SR"]), "")
                    location = str(record["location"])
                    raise SimError("VDI_LOCATION_MISSING", sr, location) from None
        for key, record in self._of("network"):
            self._refs[key] = self._network(record)
        if self._restore:
            taken = {str(r["uuid"]): ref for ref, r in self._pool.db.records("VM").items()}
            for _, record in self._of("VM"):
                if str(record["uuid"]) in taken:
                    raise SimError("DUPLICATE_VM", taken[str(record["uuid"])])

    def create(self) -> list[str]:
        """Create VMs, then their VBDs and VIFs; return the VMs' refs."""
        vms = self._of("VM")
        for key, _ in vms:
            self._refs[key] = _new_ref()
        for key, record in vms:
            kept = ("snapshot_of", "parent")
            self._add("VM", key, record, {name: self._ref(record[name]) for name in kept})
        for key, record in self._of("VBD"):
            disk = self._ref(record["VDI"])
            gone = {"empty": disk == NULL, "currently_attached": False}
            self._add("VBD", key, record, {"VM": self._ref(record["VM"]), "VDI": disk, **gone})
        for key, record in self._of("VIF"):
            links = {name: self._ref(record[name]) for name in ("VM", "network")}
            self._add("VIF", key, record, {**links, "currently_attached": False})
        return [self._refs[key] for key, _ in vms]

    def _add(self, kind: str, key: str, record: Record, changes: Mapping[str, Value]) -> None:
        fresh: Record = dict(record)
        for name, value in fresh.items():
            # what pointed to objects of the old pool points nowhere, and sets of refs fill again
            if isinstance(value, str) and value.startswith(("Ref:", "OpaqueRef:")):
                fresh[name] = NULL
            elif isinstance(value, list) and any(str(v).startswith("Ref:") for v in value):
                fresh[name] = []
        if not self._restore:
            fresh["uuid"] = str(uuid.uuid4())
            if kind == "VIF":
                fresh["MAC"] = "02:" + ":".join(f"{byte:02x}" for byte in uuid.uuid4().bytes[:5])
        if kind == "VM":
            fresh.update(power_state="Halted", domid=-1)
        fresh.update(changes)
        ref = self._refs.setdefault(key, _new_ref())
        self._pool.db.create(kind, ref, fresh)

    def _needed(self) -> set[str]:
        """Return the ids of VDIs without which the import fails: those of disks."""
        return {str(record["VDI"]) for _, record in self._of("VBD") if record["type"] == "Disk"}

    def _network(self, record: Record) -> str:
        """Return the network of the same name, else of the same bridge."""
        networks = self._pool.db.records("network")
        for name in ("name_label", "bridge"):
            for ref, candidate in networks.items():
                if candidate[name] == record[name]:
                    return ref
        return NULL

    def _of(self, kind: str) -> list[tuple[str, Record]]:
        return [(key, record) for found, key, record in self._objects if found == kind]

    def _ref(self, value: Value) -> str:
        return self._refs.get(str(value), NULL)


def _new_ref() -> str:
    return f"OpaqueRef:{uuid.uuid4()}"


def _reachable(
    pool: SimulatedPool, vms: Sequence[str], *, snapshots: bool
) -> Iterator[tuple[str, str]]:
    """Yield (class, ref) of the VMs and of what they are made of, each once."""
    db = pool.db
    wanted = [*vms]
    for vm in vms:
        if snapshots:
            wanted += db.refs("VM", vm, "snapshots")
    seen: dict[tuple[str, str], None] = dict.fromkeys(("VM", vm) for vm in wanted)
    for vm in wanted:
        db.record("VM", vm)
        seen.update(dict.fromkeys(("VBD", vbd) for vbd in db.refs("VM", vm, "VBDs")))
        seen.update(dict.fromkeys(("VIF", vif) for vif in db.refs("VM", vm, "VIFs")))
    links = (("VBD", "VDI", "VDI"), ("VDI", "SR", "SR"), ("VIF", "network", "network"))
    for kind, name, target in links:
        for ref in [ref for found, ref in seen if found == kind]:
            pointed = db.text(kind, ref, name)
            if db.exists(target, pointed):
                seen[target, pointed] = None
    yield from seen


def _renamed(record: Record, names: Mapping[str, str]) -> Record:
    def renamed(value: Value) -> Value:
        if isinstance(value, str) and value.startswith("OpaqueRef:"):
            return names.get(value, NULL)
        if isinstance(value, list):
            return [names.get(str(v), v) for v in value if str(v) in names or not _is_ref(v)]
        return value

    return {name: renamed(value) for name, value in record.items()}


def _is_ref(value: Value) -> bool:
    return isinstance(value, str) and value.startswith("OpaqueRef:")


def _typed(kind: str, record: object) -> Record:
    """Return a parsed record with the datamodel's types; unknown fields are left out."""
    known = fields.CLASSES.get(kind, {})
    items = cast(Mapping[str, object], record).items()
    return {name: _value(known[name].type, value) for name, value in items if name in known}


def _value(kind: str, value: object) -> Value:
    match value:
        case xmlrpc.client.DateTime():
            return Timestamp(str(value))
        case bool() | int() | float():
            return value
        case str():
            return int(value) if kind == "int" else value
        case list():
            return [_value("", item) for item in cast(list[object], value)]
        case dict():
            items = cast(Mapping[str, object], value).items()
            return {name: _value("", item) for name, item in items}
        case _:
            raise SimError("IMPORT_ERROR", f"unexpected {type(value).__name__}")


def _tar(files: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), _EPOCH
            tar.addfile(info, io.BytesIO(data))
    return target.getvalue()
