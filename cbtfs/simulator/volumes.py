"""Volumes: VDIs as records and contents at once, kept in step.

Everything here is done under an SR's operation lock by its callers (``vdis``, ``vms``); the
state's lock is taken inside, around each step.
"""

import uuid as uuids
from collections.abc import Mapping
from typing import NamedTuple

from . import attachments, failures, operations
from .disk import Disk
from .failures import SimError
from .layers import BLOCK
from .methods import known
from .state import State, new_ref, new_uuid
from .values import EPOCH, NULL, Timestamp, Value

_COPIED = ("name_label", "name_description", "type", "read_only", "on_boot", "allow_caching")
_COPIED_MAPS = ("other_config", "xenstore_data")
_NO_CONTENT = "/No content: this is a cbt_metadata VDI/"
_LOG_FILE = 4 << 20  # bytes; on LVM a log is a volume of 4 MiB (sm, drivers/LVHDSR.py)


class Names(NamedTuple):
    """Of a new VDI: its ref and uuid, and the uuid of the hidden VDI that may come with it."""

    ref: str
    uuid: str
    hidden: str

    @classmethod
    def random(cls) -> "Names":
        """Return names that nothing has."""
        return cls(new_ref(), new_uuid(), new_uuid())


def add(
    state: State, sr: str, values: Mapping[str, Value], *, ref: str = "", uuid: str = ""
) -> str:
    """Make an empty VDI and return its ref; ``virtual_size`` is rounded up as the SR does.

    Raises:
        SimError: the SR is full, or the size is none.
    """
    with state.lock:
        geometry = state.geometry[sr]
        size = round_up(state, sr, int(str(values["virtual_size"])))
        check_space(state, sr)
        made = uuid or new_uuid()
        state.storage.create(made, size=size, sector=geometry.sector)
        record = {**_defaults(state, sr, made), **values, "virtual_size": size}
        vdi = state.db.create("VDI", ref or new_ref(), record)
        operations.refresh(state, vdi)
        return vdi


def round_up(state: State, sr: str, size: int) -> int:
    """Return the size that an SR makes of ``size``, in bytes.

    Raises:
        SimError: fault 79.
    """
    if size <= 0:
        raise failures.storage(79, "VDI Invalid size", detail="VDI size must be positive")
    unit = state.geometry[sr].granularity
    return -(-size // unit) * unit


def check_space(state: State, sr: str) -> None:
    """Return if an SR has space left.

    Raises:
        SimError: fault 44.
    """
    names = state.db.text("SR", sr, "uuid"), state.db.text("SR", sr, "name_label")
    if state.faults.hits("sr.no_space", *names):
        raise SimError("SR_BACKEND_FAILURE_44", "", "There is insufficient space", "")


def snapshot(
    state: State, vdi: str, *, names: Names | None = None, at: Timestamp | None = None
) -> str:
    """Take a snapshot and return its ref.

    Tracking may get lost on the way; then the snapshot is there all the same.

    Raises:
        SimError: fault 109 or 44.
    """
    with state.lock:
        db, live = state.db, state.db.text("VDI", vdi, "uuid")
        check_space(state, db.text("VDI", vdi, "SR"))
        tracked = db.flag("VDI", vdi, "cbt_enabled")
        track = not state.faults.hits("cbt.snapshot_fail", live)
        ref, made, hidden = names or Names.random()
        active = any(db.text("VBD", v, "mode") == "RW" for v in operations.attached(state, vdi))
        state.storage.snapshot(live, made, hidden=hidden, active=active, track=track)
        values = _copy_of(state, vdi, made)
        values |= {
            "is_a_snapshot": True,
            "snapshot_of": vdi,
            "snapshot_time": at or Timestamp.now(),
            "cbt_enabled": tracked and track,
            "tags": [*db.refs("VDI", vdi, "tags")],
        }
        child = db.create("VDI", ref, values)
        if tracked and not track:
            attachments.lose_tracking(state, vdi, message="VDI_CBT_SNAPSHOT_FAILED")
        follow_chain(state, db.text("VDI", vdi, "SR"))
        state.count("vdi.snapshots")
        return child


def clone(state: State, vdi: str) -> str:
    """Make a writable copy that shares contents, without tracking, and return its ref.

    Raises:
        SimError: fault 109 or 44.
    """
    with state.lock:
        check_space(state, state.db.text("VDI", vdi, "SR"))
        ref, made, hidden = Names.random()
        state.storage.clone(state.db.text("VDI", vdi, "uuid"), made, hidden=hidden)
        child = state.db.create("VDI", ref, _copy_of(state, vdi, made))
        follow_chain(state, state.db.text("VDI", vdi, "SR"))
        return child


def copy(state: State, vdi: str, *, sr: str, base: str = NULL, into: str = NULL) -> str:
    """Copy contents into a new VDI of ``sr``, or into ``into``; return its ref.

    Args:
        state: the pool.
        vdi: to read.
        sr: to make the copy on, if ``into`` is null.
        base: what ``into`` holds already: only the difference is written.
        into: an existing VDI, or null.
    """
    with state.lock:
        source = disk_of(state, vdi)
        target = into
        if not known(into):
            size: Value = source.size
            values = _copy_of(state, vdi, "") | {"virtual_size": size, "SR": sr}
            values = {k: v for k, v in values.items() if k not in ("uuid", "location", "parent")}
            target = add(state, sr, values)
        other = disk_of(state, target)
        old = disk_of(state, base) if known(base) else None
    wanted = list(source.differences(old) if old is not None else source.allocated())
    if old is None and known(into):
        wanted = sorted({*wanted, *other.allocated()})
    for start, stop in wanted:
        for offset in range(start, min(stop, source.size), 1 << 20):
            length = min(1 << 20, stop - offset, source.size - offset)
            other.write(offset, source.pread(offset, length))
    return target


def destroy(state: State, vdi: str) -> None:
    """Remove a VDI, its contents and its unplugged VBDs; its log goes into the next newer.

    Merging layers may take long: the records are free meanwhile, the SR is locked.
    """
    with state.lock:
        uuid, sr = state.db.text("VDI", vdi, "uuid"), state.db.text("VDI", vdi, "SR")
        for vbd in state.db.refs("VDI", vdi, "VBDs"):
            state.db.destroy("VBD", vbd)
        state.db.destroy("VDI", vdi)
    state.storage.coalesce = state.faults.flag("sr.gc")
    state.storage.destroy(uuid)
    with state.lock:
        follow_chain(state, sr)


def data_destroy(state: State, vdi: str) -> None:
    """Remove a snapshot's contents, keep its record and its log."""
    with state.lock:
        uuid, sr = state.db.text("VDI", vdi, "uuid"), state.db.text("VDI", vdi, "SR")
    state.storage.coalesce = state.faults.flag("sr.gc")
    state.storage.data_destroy(uuid)
    with state.lock:
        db = state.db
        for vbd in db.refs("VDI", vdi, "VBDs"):
            db.destroy("VBD", vbd)
        config = db.mapping("VDI", vdi, "other_config") | {"content_id": _NO_CONTENT}
        db.set("VDI", vdi, other_config=config, physical_utilisation=_LOG_FILE)
        follow_chain(state, sr)
        operations.refresh(state, vdi)


def follow_chain(state: State, sr: str) -> None:
    """Bring hidden VDIs, parents and utilisations in the records up to date."""
    rearranged = state.storage.rearranged()
    db = state.db
    for uuid in rearranged.gone:
        if db.has_uuid("VDI", uuid):
            db.destroy("VDI", db.by_uuid("VDI", uuid))
    for uuid in rearranged.moved:
        if uuid in state.storage.hidden and not db.has_uuid("VDI", uuid):
            values = _defaults(state, sr, uuid) | {"name_label": "base copy", "managed": False}
            db.create("VDI", f"OpaqueRef:{uuids.uuid5(uuids.NAMESPACE_OID, uuid)}", values)
    for uuid in rearranged.moved:
        if db.has_uuid("VDI", uuid):
            _follow(state, db.by_uuid("VDI", uuid), uuid)


def measure(state: State, vdi: str) -> None:
    """Bring a VDI's utilisation up to date; a metadata VDI's is that of its log."""
    db = state.db
    disk = state.storage.disks.get(db.text("VDI", vdi, "uuid"))
    if disk is None or disk.leaf is None:
        return
    is_thick = state.plugin(db.text("VDI", vdi, "SR")).thick
    is_whole = is_thick and not db.flag("VDI", vdi, "is_a_snapshot")
    db.set("VDI", vdi, physical_utilisation=disk.size if is_whole else disk.utilisation())


def measure_sr(state: State, sr: str) -> None:
    """Bring an SR's sums up to date."""
    db = state.db
    used = size = 0
    for vdi in db.refs("SR", sr, "VDIs"):
        used += db.number("VDI", vdi, "physical_utilisation")
        size += db.number("VDI", vdi, "virtual_size")
    db.set("SR", sr, physical_utilisation=used, virtual_allocation=size)


def measure_open(state: State) -> None:
    """Bring the utilisation of disks that guests may be writing to up to date."""
    for record in list(state.db.records("VBD").values()):
        vdi = str(record["VDI"])
        if record["currently_attached"] and record["mode"] == "RW" and known(vdi):
            measure(state, vdi)


def introduce(state: State, sr: str, uuid: str) -> str:
    """Make a record for a VDI that is on an SR but not in the pool's records."""
    disk = state.storage.disks[uuid]
    values = _defaults(state, sr, uuid) | {
        "virtual_size": disk.size,
        "cbt_enabled": uuid in state.storage.logs,
    }
    vdi = state.db.create("VDI", new_ref(), values)
    _follow(state, vdi, uuid)
    operations.refresh(state, vdi)
    return vdi


def _follow(state: State, vdi: str, uuid: str) -> None:
    db = state.db
    parent = state.storage.parent(uuid)
    config = db.mapping("VDI", vdi, "sm_config")
    config.pop("vhd-parent", None)
    above = NULL
    if parent:
        config["vhd-parent"] = parent
        above = db.by_uuid("VDI", parent) if db.has_uuid("VDI", parent) else NULL
    db.set("VDI", vdi, sm_config=config, parent=above)
    layer = state.storage.hidden.get(uuid)
    if layer is None:
        measure(state, vdi)
        return
    used = layer.blocks() * BLOCK
    db.set("VDI", vdi, physical_utilisation=used, virtual_size=layer.size)


def disk_of(state: State, vdi: str) -> Disk:
    """Return the contents of a VDI."""
    return state.storage.disks[state.db.text("VDI", vdi, "uuid")]


def _defaults(state: State, sr: str, uuid: str) -> dict[str, Value]:
    return {
        "uuid": uuid,
        "SR": sr,
        "type": "user",
        "location": uuid,
        "managed": True,
        "snapshot_time": EPOCH,
        "on_boot": "persist",
        "virtual_size": 0,
    }


def _copy_of(state: State, vdi: str, uuid: str) -> dict[str, Value]:
    record = state.db.record("VDI", vdi)
    values = _defaults(state, str(record["SR"]), uuid)
    values["virtual_size"] = record["virtual_size"]
    values |= {name: record[name] for name in _COPIED}
    values |= {name: state.db.mapping("VDI", vdi, name) for name in _COPIED_MAPS}
    return values
