"""Inventory: hosts, SRs, VMs, VDIs of a pool as frozen records, parsed once at the door.

xapi answers with maps of strings; ``parse`` turns the JSON of ten classes into the records below
and nothing of the maps travels further in. The pool's word is hostile input:

1. A reference may dangle: look it up with ``.get`` and expect None.
2. ``snapshot_of`` proves nothing, not even that the VDI is a snapshot: ask ``is_a_snapshot``
   (VM.revert re-points it; Xen Orchestra met live VDIs that had it).
3. Names hold anything but lone surrogates, which become ``_``. Uuids and device names are safe as
   file names, because a record with another uuid is left out and told in ``Inventory.problems``.
4. A null reference is "", an unset time is ``EPOCH``, a negative size is 0, and one of more than 63
   bits the largest that a file can have.

Sizes are in bytes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from . import conversion, errors, names, rawrecords
from .owner import TAG_OWNER, Owned, read_owner, write_owner
from .records import EPOCH, PIF, READABLE_TYPES, SR, VBD, VDI, VM, Disk, Host, Network, Pool

__all__ = [
    "CLASSES",
    "EPOCH",
    "PIF",
    "READABLE_TYPES",
    "SR",
    "TAG_OWNER",
    "VBD",
    "VDI",
    "VM",
    "Assembler",
    "Disk",
    "Host",
    "Inventory",
    "Network",
    "Owned",
    "Pool",
    "parse",
    "read_owner",
    "write_owner",
]

CLASSES = ("pool", "host", "SR", "PBD", "SM", "VM", "VBD", "VDI", "network", "PIF")
"""The classes whose records ``parse`` needs."""

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


# ── The inventory ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All that cbtfs knows of a pool at one moment; the mappings go from reference to record.

    ``problems`` has a sentence for every record that had to be left out.
    """

    pool: Pool
    hosts: Mapping[str, Host] = field(default_factory=dict[str, Host])
    srs: Mapping[str, SR] = field(default_factory=dict[str, SR])
    vms: Mapping[str, VM] = field(default_factory=dict[str, VM])
    vbds: Mapping[str, VBD] = field(default_factory=dict[str, VBD])
    vdis: Mapping[str, VDI] = field(default_factory=dict[str, VDI])
    networks: Mapping[str, Network] = field(default_factory=dict[str, Network])
    pifs: Mapping[str, PIF] = field(default_factory=dict[str, PIF])
    problems: tuple[str, ...] = ()

    def sharing(self, earlier: "Inventory") -> "Inventory":
        """Return an equal inventory with the records of ``earlier`` where nothing has changed.

        Of a pool of 10,000 disks that is 35 MiB less for each inventory that is alive.
        """
        return replace(
            self,
            vms=_shared(self.vms, earlier.vms),
            vbds=_shared(self.vbds, earlier.vbds),
            vdis=_shared(self.vdis, earlier.vdis),
        )

    def live_vms(self) -> list[VM]:
        """Return the VMs that are no template, snapshot or control domain, by name and uuid."""
        found = (
            vm
            for vm in self.vms.values()
            if not (vm.is_a_template or vm.is_a_snapshot or vm.is_control_domain)
        )
        return sorted(found, key=lambda vm: (vm.name, vm.uuid))

    def disks_of(self, vm: VM) -> list[Disk]:
        """Return the disks of ``vm`` by device: no CDs, no empty drives, only managed VDIs.

        Should two have one device name, both get digits of their uuids, as files in the mount do.
        A VDI that is there twice counts once.
        """
        found: dict[str, tuple[VBD, VDI]] = {}
        for ref in vm.vbd_refs:
            vbd = self.vbds.get(ref)
            vdi = self.vdis.get(vbd.vdi_ref) if vbd else None
            if vbd and vdi and vbd.type == "Disk" and not vbd.empty and vdi.managed:
                found.setdefault(vdi.uuid, (vbd, vdi))
        devices = names.safe_names([(uuid, vbd.device) for uuid, (vbd, _) in found.items()])
        disks = [Disk(devices[uuid], vbd, vdi) for uuid, (vbd, vdi) in found.items()]
        return sorted(disks, key=lambda disk: (len(disk.device), disk.device))

    def snapshots_of(self, vdi: VDI) -> list[VDI]:
        """Return the snapshots of ``vdi``, oldest first, those without data among them."""
        return list(self._vdi_snapshots.get(vdi.ref, ()))

    def vm_snapshots_of(self, vm: VM) -> list[VM]:
        """Return the snapshots of ``vm``, oldest first."""
        return list(self._vm_snapshots.get(vm.ref, ()))

    def live_disks(self) -> list[VDI]:
        """Return the managed user and system VDIs that are no snapshots, by name and uuid."""
        found = (
            vdi
            for vdi in self.vdis.values()
            if vdi.managed and not vdi.is_a_snapshot and vdi.type in READABLE_TYPES
        )
        return sorted(found, key=lambda vdi: (vdi.name, vdi.uuid))

    def detached_disks(self) -> list[VDI]:
        """Return the live disks that no VM or template has as a disk; images for CDs don't count.

        A VBD of a control domain does not attach a disk: it is somebody reading it.
        """
        held = {
            vbd.vdi_ref
            for vm in self.vms.values()
            if not (vm.is_a_snapshot or vm.is_control_domain)
            for vbd in map(self.vbds.get, vm.vbd_refs)
            if vbd is not None and vbd.type == "Disk"
        }
        return [v for v in self.live_disks() if v.ref not in held and not self.is_cd_image(v)]

    def is_cd_image(self, vdi: VDI) -> bool:
        """Tell whether ``vdi`` is an image for CD drives."""
        sr = self.srs.get(vdi.sr_ref)
        return vdi.is_tools_iso or (sr is not None and sr.content_type == "iso")

    @property
    def nbd_purpose(self) -> str:
        """``nbd`` if some network serves NBD over TLS, else ``insecure_nbd`` if one does, or ""."""
        purposes = {purpose for network in self.networks.values() for purpose in network.purpose}
        return next((p for p in ("nbd", "insecure_nbd") if p in purposes), "")

    def vdi_by_uuid(self, uuid: str) -> VDI:
        """Return the VDI with this uuid.

        Raises:
            NotFound: the pool has none.
        """
        vdi = self.find_vdi(uuid)
        if vdi is None:
            raise errors.NotFound(f"pool {self.pool.name!r} has no VDI with the uuid {uuid!r}")
        return vdi

    def find_vdi(self, uuid: str) -> VDI | None:
        """Return the VDI with this uuid, or None if the pool has none."""
        return self._vdis_by_uuid.get(uuid.lower())

    def find_vm(self, name_or_uuid: str) -> VM:
        """Return the live VM with this uuid, or with this name if only one has it.

        Raises:
            NotFound: there is none.
            UsageError: the name is not unique; the text lists the uuids.
        """
        live = self.live_vms()
        found = [vm for vm in live if vm.uuid == name_or_uuid.lower()]
        found = found or [vm for vm in live if vm.name == name_or_uuid]
        found = found or [vm for vm in live if name_or_uuid in names.spellings(vm.name, vm.uuid)]
        if not found:
            raise errors.NotFound(f"pool {self.pool.name!r} has no VM called {name_or_uuid!r}")
        if len(found) > 1:
            uuids = ", ".join(vm.uuid for vm in found)
            raise errors.UsageError(
                f"{len(found)} VMs are called {name_or_uuid!r}; use a uuid: {uuids}"
            )
        return found[0]

    @cached_property
    def _vdis_by_uuid(self) -> dict[str, VDI]:
        return {vdi.uuid: vdi for vdi in self.vdis.values()}

    @cached_property
    def _vdi_snapshots(self) -> dict[str, list[VDI]]:
        return _by_origin(self.vdis.values())

    @cached_property
    def _vm_snapshots(self) -> dict[str, list[VM]]:
        return _by_origin(self.vms.values())


class _Record(Protocol):
    @property
    def ref(self) -> str: ...


_K = TypeVar("_K", bound=_Record)


def _shared(records: Mapping[str, _K], earlier: Mapping[str, _K]) -> dict[str, _K]:
    same: list[_K] = []
    for ref, record in records.items():
        before = earlier.get(ref)
        same.append(before if before is not None and before == record else record)
    return {record.ref: record for record in same}


class _Snapshot(Protocol):
    @property
    def uuid(self) -> str: ...
    @property
    def is_a_snapshot(self) -> bool: ...
    @property
    def snapshot_of(self) -> str: ...
    @property
    def snapshot_time(self) -> datetime: ...


_S = TypeVar("_S", bound=_Snapshot)


def _by_origin(records: Iterable[_S]) -> dict[str, list[_S]]:
    """Return the snapshots among ``records`` by what they were taken of, oldest first."""
    found: dict[str, list[_S]] = {}
    for record in sorted(records, key=lambda r: (r.snapshot_time, r.uuid)):
        if record.is_a_snapshot and record.snapshot_of:
            found.setdefault(record.snapshot_of, []).append(record)
    return found


# ── Parsing ──────────────────────────────────────────────────────────────────────────────────


def parse(tables: Mapping[str, bytes]) -> Inventory:
    """Return the inventory that ``tables`` describe.

    Args:
        tables: for each of ``CLASSES`` the JSON of its map from reference to record.

    Raises:
        PoolError: a class is missing or its JSON has another shape; the text names the class.
    """
    for name in CLASSES:
        if name not in tables:
            raise errors.PoolError(f"the pool sent no {name} records")
    return Assembler().assemble({name: rawrecords.READERS[name](tables[name]) for name in CLASSES})


class Assembler:
    """Makes inventories of records, each with what is as before from the one before.

    A record that is the same object as last time is not converted again, so that of 10,000 disks
    only the few that changed cost something.
    """

    def __init__(self) -> None:
        self._vms = _Converted(conversion.vm)
        self._vbds = _Converted(conversion.vbd)
        self._vdis = _Converted(conversion.vdi)

    def assemble(self, tables: Mapping[str, Mapping[str, rawrecords.Record]]) -> Inventory:
        """Return the inventory of these records.

        Args:
            tables: for each of ``CLASSES`` its records by reference.

        Raises:
            PoolError: there is no pool record.
        """
        problems: list[str] = []
        hosts = _unique(_table(tables, "host", rawrecords.HostRecord), "host", problems)
        srs = _unique(_table(tables, "SR", rawrecords.SRRecord), "SR", problems)
        vms = _unique(_table(tables, "VM", rawrecords.VMRecord), "VM", problems)
        vdis = _unique(_table(tables, "VDI", rawrecords.VDIRecord), "VDI", problems)
        vbds = _table(tables, "VBD", rawrecords.VBDRecord)
        networks = _table(tables, "network", rawrecords.NetworkRecord)
        pifs = _table(tables, "PIF", rawrecords.PIFRecord)
        pbds = _table(tables, "PBD", rawrecords.PBDRecord)
        attached = conversion.attached_hosts(pbds.values(), hosts)
        drivers = _table(tables, "SM", rawrecords.SMRecord)
        tracking = conversion.tracking_types(drivers.values())
        return Inventory(
            pool=_pool(_table(tables, "pool", rawrecords.PoolRecord)),
            hosts={ref: conversion.host(ref, raw) for ref, raw in hosts.items()},
            srs={ref: conversion.sr(ref, raw, attached, tracking) for ref, raw in srs.items()},
            vms=self._vms.convert(vms),
            vbds=self._vbds.convert(vbds),
            vdis=self._vdis.convert(vdis),
            networks={ref: conversion.network(ref, raw) for ref, raw in networks.items()},
            pifs={ref: conversion.pif(ref, raw) for ref, raw in pifs.items()},
            problems=tuple(problems),
        )


_R = TypeVar("_R", bound=rawrecords.Record)
_C = TypeVar("_C")


class _Converted(Generic[_R, _C]):
    """The records of one class as they were converted last."""

    def __init__(self, convert: Callable[[str, _R], _C]) -> None:
        self._convert = convert
        self._known: dict[str, tuple[_R, _C]] = {}

    def convert(self, table: Mapping[str, _R]) -> dict[str, _C]:
        """Return the records of ``table`` as ours."""
        found: dict[str, tuple[_R, _C]] = {}
        for ref, raw in table.items():
            before = self._known.get(ref)
            same = before is not None and before[0] is raw
            found[ref] = before if before and same else (raw, self._convert(ref, raw))
        self._known = found
        return {ref: record for ref, (_, record) in found.items()}


def _table(
    tables: Mapping[str, Mapping[str, rawrecords.Record]], name: str, shape: type[_R]
) -> dict[str, _R]:
    """Return the records of one class in the order of references, so that order tells nothing."""
    table = tables[name]
    return {ref: raw for ref, raw in sorted(table.items()) if isinstance(raw, shape)}


def _unique(table: Mapping[str, _R], name: str, problems: list[str]) -> dict[str, _R]:
    """Return the records that have a good uuid of their own.

    Uuids become names of files and directories, so one that is none, or a second of its kind, must
    not come in.
    """
    seen: set[str] = set()
    good: dict[str, _R] = {}
    for ref, raw in table.items():
        uuid = raw.uuid.lower()
        if uuid in seen or not _UUID.fullmatch(uuid):
            what = "the uuid of another" if uuid in seen else f"no uuid but {raw.uuid[:40]!r}"
            problems.append(f"left out a {name} that has {what}: {raw.name_label[:40]!r}")
            continue
        seen.add(uuid)
        good[ref] = raw
    return good


def _pool(table: Mapping[str, rawrecords.PoolRecord]) -> Pool:
    for raw in table.values():
        return conversion.pool(raw)
    raise errors.PoolError("the pool sent no pool record")
