"""Attachments: VDIs opened by virtual machines and by control domains, as VBDs.

While a control domain has a VDI open its VBD is there for all to see, and blocks what a VBD
blocks. It appears before an NBD client is told the size, and goes before the socket is closed
(xen-api, ocaml/nbd/src/main.ml, cleanup.ml).
"""

import contextlib
import threading
from urllib.parse import parse_qs, urlsplit

from . import failures, operations, sessions
from .disk import Disk
from .failures import SimError
from .methods import known
from .state import State, new_ref, new_uuid
from .values import Value


class Attachment:
    """A VDI open in a host's dom0; ``close`` unplugs it (after nbd.detach_delay).

    Attributes:
        vdi_ref: of the VDI.
        vdi_uuid: of the VDI.
        disk: its contents.
        size: its size when it was opened, in bytes.
        sector: its sector size, in bytes.
    """

    def __init__(self, state: State, vbd: str, *, vdi: str) -> None:
        self._state = state
        self._vbd = vbd
        self._closing = threading.Lock()
        self._open = True
        self.vdi_ref = vdi
        self.vdi_uuid = state.db.text("VDI", vdi, "uuid")
        self.disk: Disk = state.storage.disks[self.vdi_uuid]
        self.size = self.disk.size
        self.sector = self.disk.sector

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def pread_into(self, offset: int, view: memoryview) -> None:
        """Read as ``disk`` does, and count the bytes."""
        self.disk.pread_into(offset, view)
        self._state.count(f"read.{self.vdi_uuid}", len(view))

    def write(self, offset: int, data: memoryview) -> None:
        """Write as ``disk`` does, and count the bytes."""
        self.disk.write(offset, data)
        self._state.count(f"write.{self.vdi_uuid}", len(data))

    def close(self) -> None:
        """Unplug and destroy the VBD; again without effect."""
        with self._closing:
            if not self._open:
                return
            self._open = False
            if not self._state.faults.flag("nbd.leak"):
                _release(self._state, self._vbd)


def open_export(state: State, host: str, exportname: str) -> Attachment:
    """Open what an NBD export name (``/UUID?session_id=REF``) stands for.

    Raises:
        SimError: anything is wrong; the NBD server closes without a word.
    """
    parts = urlsplit(exportname)
    session = parse_qs(parts.query).get("session_id", [""])[0]
    sessions.check(state, session)
    with state.lock:
        vdi = state.db.by_uuid("VDI", parts.path.strip("/"))
    state.count(f"nbd.exports.{parts.path.strip('/')}")
    return open_in_dom0(state, host, vdi, mode="RO")


def open_in_dom0(state: State, host: str, vdi: str, *, mode: str) -> Attachment:
    """Create and plug a VBD of a host's control domain.

    Raises:
        SimError: what VBD.create or VBD.plug fails with.
    """
    with state.lock:
        uuid = state.db.text("VDI", vdi, "uuid")
        if state.faults.hits("nbd.attach_fail", uuid):
            raise SimError("SR_BACKEND_FAILURE_453", "", "tapdisk experienced an error", "")
        vbd = create(
            state,
            {
                "VM": state.dom0(host),
                "VDI": vdi,
                "userdevice": "autodetect",
                "type": "Disk",
                "mode": mode,
                "unpluggable": True,
            },
        )
    try:
        plug(state, vbd, delay=state.faults.duration("nbd.attach_delay"))
    except SimError:
        with state.lock:
            state.db.destroy("VBD", vbd)
            operations.refresh(state, vdi)
        raise
    return Attachment(state, vbd, vdi=vdi)


def create(state: State, values: dict[str, Value], *, ref: str = "", uuid: str = "") -> str:
    """Add a VBD and return its ref; the caller holds the state's lock.

    Raises:
        SimError: VDI_INCOMPATIBLE_TYPE, VDI_NOT_MANAGED, INVALID_VALUE.
    """
    db = state.db
    vm, vdi = str(values["VM"]), str(values["VDI"])
    if known(vdi):
        if db.text("VDI", vdi, "type") == "cbt_metadata":
            raise operations.incompatible(state, vdi)
        if not db.flag("VDI", vdi, "managed"):
            raise SimError("VDI_NOT_MANAGED", vdi)
    free = free_devices(state, vm)
    place = str(values.get("userdevice", "autodetect"))
    if place == "autodetect":
        place = free[0] if free else ""
    if place not in free:
        raise SimError("INVALID_VALUE", "userdevice", place)
    made: dict[str, Value] = {
        "bootable": False,
        "unpluggable": True,
        **values,
        "uuid": uuid or new_uuid(),
        "userdevice": place,
        "empty": not known(vdi),
        "allowed_operations": ["attach"],
    }
    return db.create("VBD", ref or new_ref(), made)


def free_devices(state: State, vm: str) -> list[str]:
    """Return the user device numbers that a VM has left, as strings."""
    db = state.db
    taken = {db.text("VBD", vbd, "userdevice") for vbd in db.refs("VM", vm, "VBDs")}
    most = 4096 if db.flag("VM", vm, "is_control_domain") else 255
    return [str(n) for n in range(most) if str(n) not in taken]


def plug(state: State, vbd: str, *, delay: float = 0.0) -> None:
    """Open the VDI of a VBD on the host where its VM runs.

    Raises:
        SimError: DEVICE_ALREADY_ATTACHED, VM_BAD_POWER_STATE, SR_NOT_ATTACHED, VDI_IN_USE,
            SR_BACKEND_FAILURE_46.
    """
    with state.lock:
        vdi = state.db.text("VBD", vbd, "VDI")
        _check_plug(state, vbd)
        if known(vdi):
            if state.plugging[vdi] and state.faults.flag("nbd.race"):
                raise SimError("VDI_IN_USE", vdi, "attach")
            _check_modes(state, vbd, vdi)
        state.plugging[vdi] += 1
        state.db.set("VBD", vbd, current_operations={new_ref(): "plug"})
    try:
        state.sleep(delay)
        with state.lock:
            _attach(state, vbd, vdi)
    finally:
        with state.lock:
            state.plugging[vdi] -= 1
            state.db.set("VBD", vbd, current_operations={})


def unplug(state: State, vbd: str, *, delay: float = 0.0, crashed: bool = False) -> None:
    """Close the VDI of a VBD.

    Raises:
        SimError: DEVICE_ALREADY_DETACHED.
    """
    with state.lock:
        if not state.db.flag("VBD", vbd, "currently_attached"):
            raise SimError("DEVICE_ALREADY_DETACHED", vbd)
        state.db.set("VBD", vbd, current_operations={new_ref(): "unplug"})
    try:
        state.sleep(delay)
    finally:
        with state.lock:
            state.db.set("VBD", vbd, current_operations={})
            detach(state, vbd, crashed=crashed)


def detach(state: State, vbd: str, *, crashed: bool = False) -> None:
    """Mark a VBD detached, and close the disk when its last writer goes."""
    db = state.db
    vdi = db.text("VBD", vbd, "VDI")
    db.set("VBD", vbd, currently_attached=False, allowed_operations=["attach"])
    if not known(vdi) or not db.exists("VDI", vdi):
        return
    if db.text("VBD", vbd, "mode") == "RW" and not _writers(state, vdi):
        state.storage.deactivate(db.text("VDI", vdi, "uuid"), crashed=crashed)
    _note_hosts(state, vdi)


def host_of(state: State, vbd: str) -> str:
    """Return the ref of the host where a VBD's VM runs."""
    return state.db.text("VM", state.db.text("VBD", vbd, "VM"), "resident_on")


def _release(state: State, vbd: str) -> None:
    with contextlib.suppress(SimError):  # somebody else unplugged it, or the pool closes
        unplug(state, vbd, delay=state.faults.duration("nbd.detach_delay"))
    with state.lock:
        if state.db.exists("VBD", vbd):
            vdi = state.db.text("VBD", vbd, "VDI")
            state.db.destroy("VBD", vbd)
            operations.refresh(state, vdi)


def _check_plug(state: State, vbd: str) -> None:
    db = state.db
    vm, vdi = db.text("VBD", vbd, "VM"), db.text("VBD", vbd, "VDI")
    if db.flag("VBD", vbd, "currently_attached"):
        raise SimError("DEVICE_ALREADY_ATTACHED", vbd)
    host = db.text("VM", vm, "resident_on")
    if known(host) and state.faults.hits("host.down", state.host_name(host)):
        raise SimError("CANNOT_CONTACT_HOST", host)
    if not known(host):
        power = db.text("VM", vm, "power_state").lower()
        raise SimError("VM_BAD_POWER_STATE", vm, "running", power)
    if known(vdi) and not state.sees_sr(host, db.text("VDI", vdi, "SR")):
        raise SimError("SR_NOT_ATTACHED", db.text("VDI", vdi, "SR"))


def _check_modes(state: State, vbd: str, vdi: str) -> None:
    """Refuse what SM refuses: a disk open for writing on one host, and open on another."""
    db = state.db
    host, mode = host_of(state, vbd), db.text("VBD", vbd, "mode")
    for other in operations.attached(state, vdi):
        both_write = mode == "RW" == db.text("VBD", other, "mode")
        if both_write and not db.flag("VDI", vdi, "sharable"):
            raise SimError("VDI_IN_USE", vdi, "attach")
        one_writes = "RW" in (mode, db.text("VBD", other, "mode"))
        if one_writes and not both_write and host_of(state, other) != host:
            uuid = db.text("VDI", vdi, "uuid")
            raise failures.storage(
                46, "The VDI is not available", detail=f"VDI {uuid} not detached cleanly"
            )


def _attach(state: State, vbd: str, vdi: str) -> None:
    db = state.db
    if known(vdi):
        db.record("VDI", vdi)
        uuid = db.text("VDI", vdi, "uuid")
        writes = db.text("VBD", vbd, "mode") == "RW"
        if writes and not _writers(state, vdi) and not state.storage.activate(uuid):
            lose_tracking(state, vdi, message="VDI_CBT_METADATA_INCONSISTENT")
    number = int(db.text("VBD", vbd, "userdevice"))
    db.set("VBD", vbd, currently_attached=True, device=device_name(number))
    db.set("VBD", vbd, allowed_operations=["attach", "unplug", "unplug_force"])
    if known(vdi):
        _note_hosts(state, vdi)


def device_name(number: int) -> str:
    """Return the block device of a user device number: 0 is xvda, 26 xvdaa."""
    name = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, 26)
        name = chr(ord("a") + letter) + name
    return f"xvd{name}"


def lose_tracking(state: State, vdi: str, *, message: str) -> None:
    """Switch tracking off in the records, and leave the message for it."""
    state.db.set("VDI", vdi, cbt_enabled=False)
    uuid = state.db.text("VDI", vdi, "uuid")
    body = f"Changed Block Tracking has been disabled for VDI {uuid}"
    state.message(message, kind="VDI", uuid=uuid, body=body)


def _writers(state: State, vdi: str) -> list[str]:
    vbds = operations.attached(state, vdi)
    return [vbd for vbd in vbds if state.db.text("VBD", vbd, "mode") == "RW"]


def _note_hosts(state: State, vdi: str) -> None:
    """Write which hosts have a VDI open into sm_config, as SM does, and allowed operations."""
    db = state.db
    config = db.mapping("VDI", vdi, "sm_config")
    config = {k: v for k, v in config.items() if not k.startswith("host_")}
    for vbd in operations.attached(state, vdi):
        config[f"host_{host_of(state, vbd)}"] = db.text("VBD", vbd, "mode")
    db.set("VDI", vdi, sm_config=config)
    operations.refresh(state, vdi)
