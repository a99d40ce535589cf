"""Operations: which may be done to a VDI now, and the lock that an SR puts on most of them.

One operation at a time on an SR. Who comes second is not told so: xapi retries for up to two
hours, so the call just takes long (xen-api, ocaml/xapi/helpers.ml, xapi_sr_operations.ml).
"""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from .failures import SimError
from .state import State, new_ref
from .values import Value

_RETRY = 0.02  # seconds; real hosts wait 1 to 20 s between tries

# Allowed while a host has the disk open (xapi_vdi.ml, check_operation_error).
_WHILE_ATTACHED = ("snapshot", "enable_cbt", "disable_cbt", "resize_online", "mirror", "update")
_WHILE_READ = ("clone", "copy")
_NEEDS_DISKS = ("snapshot", "clone", "copy", "resize", "resize_online", "destroy", "create")
_NOT_ON_METADATA = (
    "snapshot", "clone", "copy", "resize", "resize_online", "enable_cbt", "disable_cbt",
    "set_on_boot", "mirror", "generate_config", "force_unlock", "update",
)  # fmt: skip
_OF_CBT = ("enable_cbt", "disable_cbt", "data_destroy", "list_changed_blocks")

PRETTY_TYPES = {
    "system": "System",
    "user": "User",
    "ephemeral": "Ephemeral",
    "suspend": "Suspend",
    "crashdump": "Crashdump",
    "ha_statefile": "HA statefile",
    "metadata": "Metadata",
    "redo_log": "Redo log",
    "rrd": "RRD",
    "pvs_cache": "PVS cache",
    "cbt_metadata": "CBT metadata",
}
"""How errors name the type of a VDI (xen-api, ocaml/xapi/record_util.ml)."""


@contextmanager
def locked(
    state: State,
    sr: str,
    operation: str,
    *,
    vdi: str = "",
    cancelled: threading.Event | None = None,
) -> Generator[None]:
    """Hold an SR's lock for ``operation`` (``vdi_snapshot``), waiting as long as it takes."""
    state.sleep(state.faults.remaining("sr.lock"), cancelled=cancelled)
    with state.lock:
        lock = state.sr_locks.setdefault(sr, threading.Lock())
    while not lock.acquire(timeout=_RETRY):
        state.sleep(_RETRY, cancelled=cancelled)
    try:
        with _announced(state, sr, operation, vdi=vdi):
            state.sleep(state.faults.duration("sr.delay"), cancelled=cancelled)
            yield
    finally:
        lock.release()


def check(state: State, vdi: str, operation: str) -> None:
    """Return if ``operation`` may be done to a VDI now; the caller holds the state's lock.

    Raises:
        SimError: what xapi answers instead.
    """
    db = state.db
    sr = db.text("VDI", vdi, "SR")
    kind = db.text("VDI", vdi, "type")
    _check_sr(state, sr, operation)
    if not db.flag("VDI", vdi, "managed"):
        raise SimError("VDI_NOT_MANAGED", vdi)
    if db.flag("VDI", vdi, "missing") and operation not in ("forget", "destroy"):
        raise SimError("VDI_MISSING", sr, vdi)
    if kind == "cbt_metadata" and operation in _NOT_ON_METADATA:
        raise incompatible(state, vdi)
    _check_cbt(state, vdi, operation)
    _check_attached(state, vdi, operation)


def incompatible(state: State, vdi: str) -> SimError:
    """Return the failure of an operation that this type of VDI does not have."""
    kind = state.db.text("VDI", vdi, "type")
    return SimError("VDI_INCOMPATIBLE_TYPE", vdi, PRETTY_TYPES.get(kind, kind))


def attached(state: State, vdi: str) -> list[str]:
    """Return the VBDs through which a VDI is open."""
    vbds = state.db.refs("VDI", vdi, "VBDs")
    return [vbd for vbd in vbds if state.db.flag("VBD", vbd, "currently_attached")]


def refresh(state: State, vdi: str) -> None:
    """Bring a VDI's allowed operations up to date; the caller holds the state's lock.

    Those of change tracking are never among them, whatever can be done (CA-260245).
    """
    with state.lock:
        if not state.db.exists("VDI", vdi):
            return
        allowed: list[Value] = [name for name in _LISTED if _possible(state, vdi, name)]
        state.db.set("VDI", vdi, allowed_operations=allowed)


_LISTED = (
    "snapshot", "clone", "copy", "resize", "destroy", "forget", "update", "generate_config",
    "set_on_boot",
)  # fmt: skip


def _possible(state: State, vdi: str, operation: str) -> bool:
    try:
        check(state, vdi, operation)
    except SimError:
        return False
    return True


def allowed_on_sr(state: State, sr: str) -> list[Value]:
    """Return an SR's allowed operations while nothing is going on."""
    plugin = state.plugin(sr)
    found: list[Value] = ["scan", "update", "plug", "unplug", "forget", "pbd_create", "pbd_destroy"]
    if plugin.disks:
        found += ["destroy", "vdi_create", "vdi_introduce", "vdi_destroy", "vdi_resize"]
        found += ["vdi_clone", "vdi_snapshot", "vdi_mirror", "vdi_set_on_boot"]
    if plugin.cbt:
        found += [f"vdi_{name}" for name in _OF_CBT]
    return found


@contextmanager
def _announced(state: State, sr: str, operation: str, *, vdi: str) -> Generator[None]:
    """Show an operation in the records: nothing else is allowed on the SR meanwhile."""
    key = new_ref()
    with state.lock:
        state.db.set("SR", sr, current_operations={key: operation}, allowed_operations=[])
        if vdi and state.db.exists("VDI", vdi):
            name = operation.removeprefix("vdi_")
            state.db.set("VDI", vdi, current_operations={key: name})
    try:
        yield
    finally:
        with state.lock:
            allowed = allowed_on_sr(state, sr)
            state.db.set("SR", sr, current_operations={}, allowed_operations=allowed)
            if vdi and state.db.exists("VDI", vdi):
                state.db.set("VDI", vdi, current_operations={})


def _check_sr(state: State, sr: str, operation: str) -> None:
    plugin = state.plugin(sr)
    if not state.db.refs("SR", sr, "PBDs"):
        raise SimError("SR_HAS_NO_PBDS", sr)
    if not any(state.sees_sr(host, sr) for host in state.db.records("host")):
        raise SimError("SR_NOT_ATTACHED", sr)
    if operation == "data_destroy" and state.db.text("SR", sr, "type") == "udev":
        return
    if operation in _OF_CBT and not plugin.cbt:
        raise SimError("SR_OPERATION_NOT_SUPPORTED", sr)
    if operation in _NEEDS_DISKS and not plugin.disks:
        raise SimError("SR_OPERATION_NOT_SUPPORTED", sr)


def _check_cbt(state: State, vdi: str, operation: str) -> None:
    db = state.db
    if operation in ("enable_cbt", "disable_cbt"):
        if db.flag("VDI", vdi, "is_a_snapshot"):
            raise SimError("OPERATION_NOT_ALLOWED", f"VDI is a snapshot: {vdi}")
        if db.text("VDI", vdi, "type") not in ("user", "system"):
            raise incompatible(state, vdi)
        _check_on_boot(state, vdi)
    elif operation == "snapshot":
        if db.flag("VDI", vdi, "sharable"):
            raise SimError("VDI_IS_SHARABLE", vdi)
        _check_on_boot(state, vdi)
    elif operation == "data_destroy":
        _check_data_destroy(state, vdi)
    elif operation in ("set_on_boot", "migrate") and db.flag("VDI", vdi, "cbt_enabled"):
        raise SimError("VDI_CBT_ENABLED", vdi)


def _check_data_destroy(state: State, vdi: str) -> None:
    if not state.db.flag("VDI", vdi, "is_a_snapshot"):
        raise SimError("OPERATION_NOT_ALLOWED", f"VDI is not a snapshot: {vdi}")
    if not state.db.flag("VDI", vdi, "cbt_enabled"):
        raise SimError("VDI_NO_CBT_METADATA", vdi)
    if state.db.text("SR", state.db.text("VDI", vdi, "SR"), "type") == "udev":
        raise SimError("VDI_IS_A_PHYSICAL_DEVICE", vdi)


def _check_on_boot(state: State, vdi: str) -> None:
    if state.db.text("VDI", vdi, "on_boot") == "reset":
        raise SimError("VDI_ON_BOOT_MODE_INCOMPATIBLE_WITH_OPERATION")


def _check_attached(state: State, vdi: str, operation: str) -> None:
    if operation in _WHILE_ATTACHED or operation == "data_destroy":
        return
    vbds = attached(state, vdi)
    if operation in _WHILE_READ:
        vbds = [vbd for vbd in vbds if state.db.text("VBD", vbd, "mode") == "RW"]
    if operation == "list_changed_blocks":
        vbds = [vbd for vbd in vbds if not _of_snapshot(state, vbd)]
    if vbds:
        raise SimError("VDI_IN_USE", vdi, operation)


def _of_snapshot(state: State, vbd: str) -> bool:
    """Say whether a VBD belongs to a snapshot; a checkpoint's count as attached for ever."""
    vm = state.db.text("VBD", vbd, "VM")
    return state.db.exists("VM", vm) and state.db.flag("VM", vm, "is_a_snapshot")


def settled(state: State, vdi: str, *, cancelled: threading.Event | None = None) -> None:
    """Wait until no VBD of a VDI is being plugged or unplugged.

    xapi answers OTHER_OPERATION_IN_PROGRESS inside, and retries that itself.
    """
    while True:
        with state.lock:
            if not state.db.exists("VDI", vdi):
                return
            vbds = state.db.refs("VDI", vdi, "VBDs")
            if not any(state.db.mapping("VBD", vbd, "current_operations") for vbd in vbds):
                return
        state.sleep(_RETRY, cancelled=cancelled)


def wait_until_gone(state: State, vdi: str, *, seconds: float) -> bool:
    """Wait up to ``seconds`` until a VDI has no VBD at all; return whether that came true."""
    deadline = time.monotonic() + seconds
    while True:
        with state.lock:
            if not state.db.refs("VDI", vdi, "VBDs"):
                return True
        if time.monotonic() >= deadline:
            return False
        state.sleep(min(_RETRY, seconds))
