"""VDI: the calls on disks (xen-api, ocaml/xapi/xapi_vdi.ml, message_forwarding.ml)."""

import base64
from collections.abc import Generator
from contextlib import contextmanager

from . import attachments, changelog, nbdinfo, operations, volumes
from .changelog import ChangeLog
from .failures import SimError, storage
from .methods import Call, known, method
from .state import State
from .values import Value

_REQUIRED = ("SR", "virtual_size", "type", "sharable", "read_only", "other_config")
_GIVEN = (
    "name_label", "name_description", "SR", "virtual_size", "type", "sharable", "read_only",
    "other_config", "xenstore_data", "sm_config", "tags",
)  # fmt: skip
_LARGEST_VHD = 2040 << 30  # bytes


@method("VDI.create", "map args")
def create(call: Call) -> Value:
    """Make an empty VDI."""
    given = call.mapping("args")
    for name in _REQUIRED:
        if name not in given:
            raise SimError("FIELD_TYPE_ERROR", name)
    sr = str(given["SR"])
    with call.state.lock:
        call.state.db.record("SR", sr)
        if not call.state.plugin(sr).disks:
            raise SimError("SR_OPERATION_NOT_SUPPORTED", sr)
        if not call.state.db.refs("SR", sr, "PBDs"):
            raise SimError("SR_HAS_NO_PBDS", sr)
        vhd = call.state.geometry[sr].granularity == changelog.BLOCK * 32
        if vhd and int(str(given["virtual_size"])) > _LARGEST_VHD:
            detail = "VDI size must be between 1 MB and 2088960 MB"
            raise storage(79, "VDI Invalid size", detail=detail)
    with operations.locked(call.state, sr, "vdi_create", cancelled=call.cancelled):
        return volumes.add(call.state, sr, {k: v for k, v in given.items() if k in _GIVEN})


@method("VDI.snapshot", "VDI vdi", "map driver_params?")
def snapshot(call: Call) -> Value:
    """Take a snapshot."""
    return take_snapshot(call, call.text("vdi"))


def take_snapshot(call: Call, vdi: str) -> str:
    """Take a snapshot of a VDI under its SR's lock, and return its ref."""
    with exclusive(call, vdi, "snapshot"):
        child = volumes.snapshot(call.state, vdi)
    _refresh(call.state, vdi, child)
    return child


@method("VDI.clone", "VDI vdi", "map driver_params?")
def clone(call: Call) -> Value:
    """Make a writable copy that shares contents."""
    return take_clone(call, call.text("vdi"))


def take_clone(call: Call, vdi: str) -> str:
    """Clone a VDI under its SR's lock, and return the clone's ref."""
    with exclusive(call, vdi, "clone"):
        child = volumes.clone(call.state, vdi)
    _refresh(call.state, vdi, child)
    return child


@method("VDI.copy", "VDI vdi", "ref sr", "ref base_vdi?", "ref into_vdi?")
def copy(call: Call) -> Value:
    """Copy all contents; not under the SR's lock."""
    state, vdi = call.state, call.text("vdi")
    into, base, sr = call.text("into_vdi"), call.text("base_vdi"), call.text("sr")
    with state.lock:
        operations.check(state, vdi, "copy")
        if known(into):
            operations.check(state, into, "destroy")
            sr = state.db.text("VDI", into, "SR")
        if not known(sr):
            sr = state.db.text("VDI", vdi, "SR")
        state.db.record("SR", sr)
    return volumes.copy(state, vdi, sr=sr, base=base, into=into)


@method("VDI.destroy", "VDI self")
def destroy(call: Call) -> Value:
    """Remove a VDI."""
    with exclusive(call, call.text("self"), "destroy"):
        volumes.destroy(call.state, call.text("self"))
    return ""


@method("VDI.forget", "VDI self")
def forget(call: Call) -> Value:
    """Remove a VDI's record; SR.scan finds it again, without what only the record knew."""
    state, vdi = call.state, call.text("self")
    with state.lock:
        operations.check(state, vdi, "forget")
        uuid, sr = state.db.text("VDI", vdi, "uuid"), state.db.text("VDI", vdi, "SR")
        state.forgotten[uuid] = sr
        for vbd in state.db.refs("VDI", vdi, "VBDs"):
            state.db.destroy("VBD", vbd)
        state.db.destroy("VDI", vdi)
    return ""


@method("VDI.update", "VDI vdi")
def update(call: Call) -> Value:
    """Refresh a VDI's record; fails on metadata (CA-273981)."""
    state, vdi = call.state, call.text("vdi")
    with state.lock:
        if state.db.text("VDI", vdi, "type") == "cbt_metadata":
            raise storage(65, "Failed to load VDI", detail="no such VHD")
        volumes.measure(state, vdi)
    return ""


@method("VDI.resize", "VDI vdi", "int size")
def resize(call: Call) -> Value:
    """Grow a VDI that nobody has open."""
    return _resize(call, "resize")


@method("VDI.resize_online", "VDI vdi", "int size")
def resize_online(call: Call) -> Value:
    """Grow a VDI, open or not."""
    return _resize(call, "resize_online")


def _resize(call: Call, operation: str) -> Value:
    state, vdi = call.state, call.text("vdi")
    with exclusive(call, vdi, operation):
        with state.lock:
            uuid, sr = state.db.text("VDI", vdi, "uuid"), state.db.text("VDI", vdi, "SR")
            size = volumes.round_up(state, sr, call.number("size"))
            volumes.check_space(state, sr)
            track = not state.faults.hits("cbt.resize_fail", uuid)
            state.storage.resize(uuid, size, track=track)
            state.db.set("VDI", vdi, virtual_size=size)
            if not track and state.db.flag("VDI", vdi, "cbt_enabled"):
                attachments.lose_tracking(state, vdi, message="VDI_CBT_RESIZE_FAILED")
    return ""


@method("VDI.enable_cbt", "VDI self")
def enable_cbt(call: Call) -> Value:
    """Start to track changes; without effect where they are tracked."""
    state, vdi = call.state, call.text("self")
    if state.faults.flag("licence.restrict_cbt"):
        raise SimError("LICENCE_RESTRICTION", "CBT")
    with exclusive(call, vdi, "enable_cbt"):
        with state.lock:
            if state.db.mapping("VDI", vdi, "sm_config").get("type") == "raw":
                detail = "Raw VDI or snapshot not permitted"
                raise storage(66, "Invalid VDI type", detail=detail)
            if not state.db.flag("VDI", vdi, "cbt_enabled"):
                vbds = operations.attached(state, vdi)
                active = any(state.db.text("VBD", vbd, "mode") == "RW" for vbd in vbds)
                uuid = state.db.text("VDI", vdi, "uuid")
                state.storage.enable_cbt(uuid, active=active)
                state.db.set("VDI", vdi, cbt_enabled=True)
    return ""


@method("VDI.disable_cbt", "VDI self")
def disable_cbt(call: Call) -> Value:
    """Stop tracking; snapshots keep their logs, and go on saying cbt_enabled."""
    state, vdi = call.state, call.text("self")
    with exclusive(call, vdi, "disable_cbt"):
        with state.lock:
            state.storage.disable_cbt(state.db.text("VDI", vdi, "uuid"))
            state.db.set("VDI", vdi, cbt_enabled=False)
    return ""


@method("VDI.data_destroy", "VDI self")
def data_destroy(call: Call) -> Value:
    """Turn a snapshot into metadata: the type changes first, and back if it fails."""
    state, vdi = call.state, call.text("self")
    with state.lock:
        metadata = state.db.text("VDI", vdi, "type") == "cbt_metadata"
        if metadata and state.db.flag("VDI", vdi, "is_a_snapshot"):
            return ""
    with exclusive(call, vdi, "data_destroy"):
        with state.lock:
            before = state.db.text("VDI", vdi, "type")
            state.db.set("VDI", vdi, type="cbt_metadata")
            operations.refresh(state, vdi)
        try:
            wait = state.faults.duration("vdi.data_destroy_wait")
            if not operations.wait_until_gone(state, vdi, seconds=wait):
                raise SimError("VDI_IN_USE", vdi, "data_destroy")
            state.faults.check("VDI.data_destroy", key="sr.fail")
            volumes.data_destroy(state, vdi)
        except Exception:
            with state.lock:
                state.db.set("VDI", vdi, type=before)
                operations.refresh(state, vdi)
            raise
    return ""


@method("VDI.list_changed_blocks", "VDI vdi_from", "VDI vdi_to")
def list_changed_blocks(call: Call) -> Value:
    """Return the bitmap of what was written after the first up to the second, base64."""
    state, older, newer = call.state, call.text("vdi_from"), call.text("vdi_to")
    with exclusive(call, newer, "list_changed_blocks"):
        with state.lock:
            uuid = state.db.text("VDI", older, "uuid")
            sr = state.db.text("VDI", newer, "SR")
            if state.db.text("VDI", older, "SR") != sr:
                where = state.db.text("SR", sr, "uuid")
                raise SimError("INTERNAL_ERROR", f"Storage_error ([S(No_VDI);S({where}/{uuid})])")
            log = state.storage.changed(uuid, state.db.text("VDI", newer, "uuid"))
        return _encode(state, log)


@method("VDI.get_nbd_info", "VDI self", has_async=False)
def get_nbd_info(call: Call) -> Value:
    """Return where a VDI can be read over NBD."""
    with call.state.lock:
        return nbdinfo.records(call.state, call.text("self"), session=call.session)


@method("VDI.set_on_boot", "VDI self", "text value")
def set_on_boot(call: Call) -> Value:
    """Say whether a VDI is reset when its VM starts."""
    state, vdi = call.state, call.text("self")
    with exclusive(call, vdi, "set_on_boot"):
        with state.lock:
            state.db.set("VDI", vdi, on_boot=call.text("value"))
    return ""


@method("VDI.pool_migrate", "VDI vdi", "SR sr", "map options")
def pool_migrate(call: Call) -> Value:
    """Move a VDI to another SR: it gets another uuid; refused while changes are tracked."""
    state, vdi, sr = call.state, call.text("vdi"), call.text("sr")
    with state.lock:
        operations.check(state, vdi, "migrate")
    moved = volumes.copy(state, vdi, sr=sr)
    with state.lock:
        take_over(state, vdi, moved)
        volumes.destroy(state, vdi)
        operations.refresh(state, moved)
    return moved


def take_over(state: State, old: str, new: str) -> None:
    """Point the VBDs and the snapshots of ``old`` to ``new``."""
    for vbd in state.db.refs("VDI", old, "VBDs"):
        state.db.set("VBD", vbd, VDI=new)
    for snapshot_vdi in state.db.refs("VDI", old, "snapshots"):
        state.db.set("VDI", snapshot_vdi, snapshot_of=new)


@contextmanager
def exclusive(call: Call, vdi: str, operation: str) -> Generator[None]:
    """Hold the lock of a VDI's SR for an operation that may be done now.

    Raises:
        SimError: it may not; HANDLE_INVALID if the VDI went while waiting.
    """
    state = call.state
    operations.settled(state, vdi, cancelled=call.cancelled)
    with state.lock:
        operations.check(state, vdi, operation)
        sr = state.db.text("VDI", vdi, "SR")
    name = f"vdi_{operation.removesuffix('_online')}"
    with operations.locked(state, sr, name, vdi=vdi, cancelled=call.cancelled):
        operations.settled(state, vdi, cancelled=call.cancelled)
        with state.lock:
            operations.check(state, vdi, operation)
        yield


def _refresh(state: State, *vdis: str) -> None:
    for vdi in vdis:
        operations.refresh(state, vdi)


def _encode(state: State, log: ChangeLog) -> str:
    dropped = state.faults.count("cbt.drop_bits")
    bitmap = changelog.encode(log.without(dropped) if dropped else log)
    match state.faults.text("cbt.garble"):
        case "short":
            bitmap = bitmap[: len(bitmap) // 2]
        case "long":
            bitmap += bytes(8)
        case "base64":
            return "*" + base64.b64encode(bitmap).decode()[1:]
        case _:
            pass
    return base64.b64encode(bitmap).decode()
