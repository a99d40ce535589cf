"""VBD, PBD, SR, network, host: the calls on everything but disks and virtual machines."""

from . import attachments, operations, volumes
from .failures import SimError
from .methods import Call, known, method
from .nbdinfo import PURPOSES
from .values import NULL, Value

_LOG_SIZE = 4 << 20  # what SR.scan takes for the size of a metadata VDI (sm, drivers/FileSR.py)


# ── VBD ──────────────────────────────────────────────────────────────────────────────────


@method("VBD.create", "map args")
def vbd_create(call: Call) -> Value:
    """Add a device to a VM."""
    given = call.mapping("args")
    state = call.state
    with state.lock:
        state.db.record("VM", str(given.get("VM", "")))
        vdi = str(given.get("VDI", NULL))
        if known(vdi):
            state.db.record("VDI", vdi)
        fields = state.db.fields("VBD") - {"uuid", "currently_attached", "current_operations"}
        values = {k: v for k, v in given.items() if k in fields}
        return attachments.create(state, {**values, "VDI": vdi})


@method("VBD.plug", "VBD self")
def vbd_plug(call: Call) -> Value:
    """Attach a device to its running VM."""
    attachments.plug(call.state, call.text("self"))
    return ""


@method("VBD.unplug", "VBD self")
@method("VBD.unplug_force", "VBD self")
def vbd_unplug(call: Call) -> Value:
    """Detach a device."""
    attachments.unplug(call.state, call.text("self"))
    return ""


@method("VBD.destroy", "VBD self")
def vbd_destroy(call: Call) -> Value:
    """Remove a device that is not attached."""
    state, vbd = call.state, call.text("self")
    with state.lock:
        if state.db.flag("VBD", vbd, "currently_attached"):
            raise SimError("OPERATION_NOT_ALLOWED", f"VBD '{vbd}' still attached")
        vdi = state.db.text("VBD", vbd, "VDI")
        state.db.destroy("VBD", vbd)
        if known(vdi) and state.db.exists("VDI", vdi):
            operations.refresh(state, vdi)
    return ""


@method("VBD.insert", "VBD vbd", "VDI vdi")
def vbd_insert(call: Call) -> Value:
    """Put a CD into a drive."""
    with call.state.lock:
        call.state.db.set("VBD", call.text("vbd"), VDI=call.text("vdi"), empty=False)
    return ""


@method("VBD.eject", "VBD vbd")
def vbd_eject(call: Call) -> Value:
    """Empty a drive."""
    with call.state.lock:
        call.state.db.set("VBD", call.text("vbd"), VDI=NULL, empty=True)
    return ""


# ── PBD and SR ───────────────────────────────────────────────────────────────────────────


@method("PBD.plug", "PBD self")
def pbd_plug(call: Call) -> Value:
    """Attach an SR to a host."""
    with call.state.lock:
        call.state.db.set("PBD", call.text("self"), currently_attached=True)
    return ""


@method("PBD.unplug", "PBD self")
def pbd_unplug(call: Call) -> Value:
    """Detach an SR from a host where nobody uses it."""
    state, pbd = call.state, call.text("self")
    with state.lock:
        host = state.db.text("PBD", pbd, "host")
        for vdi in state.db.refs("SR", state.db.text("PBD", pbd, "SR"), "VDIs"):
            if any(attachments.host_of(state, v) == host for v in operations.attached(state, vdi)):
                raise SimError("VDI_IN_USE", vdi, "detach")
        state.db.set("PBD", pbd, currently_attached=False)
    return ""


@method("SR.scan", "SR sr")
def sr_scan(call: Call) -> Value:
    """Look at what is on an SR: utilisations, forgotten VDIs, and a wrong size of metadata."""
    state, sr = call.state, call.text("sr")
    with operations.locked(state, sr, "scan", cancelled=call.cancelled), state.lock:
        for uuid in [u for u, place in state.forgotten.items() if place == sr]:
            del state.forgotten[uuid]
            volumes.introduce(state, sr, uuid)
        for vdi in state.db.refs("SR", sr, "VDIs"):
            if state.db.text("VDI", vdi, "type") == "cbt_metadata":
                state.db.set("VDI", vdi, virtual_size=_LOG_SIZE)
            else:
                volumes.measure(state, vdi)
        volumes.measure_sr(state, sr)
    return ""


@method("SR.update", "SR sr")
def sr_update(call: Call) -> Value:
    """Refresh the sizes of an SR."""
    with call.state.lock:
        volumes.measure_sr(call.state, call.text("sr"))
    return ""


# ── network, host, pool ──────────────────────────────────────────────────────────────────


@method("network.add_purpose", "network self", "text value")
def network_add_purpose(call: Call) -> Value:
    """Give a network a purpose; TLS and plain NBD exclude each other in the whole pool."""
    state, network, value = call.state, call.text("self"), call.text("value")
    if value not in PURPOSES:
        raise SimError("VALUE_NOT_SUPPORTED", "purpose", value, "unknown purpose")
    with state.lock:
        networks = state.db.records("network")
        given = {p for other in networks for p in state.db.refs("network", other, "purpose")}
        for conflicting in given - {value}:
            raise SimError("NETWORK_INCOMPATIBLE_PURPOSES", value, conflicting)
        purposes = {*state.db.refs("network", network, "purpose"), value}
        state.db.set("network", network, purpose=[*sorted(purposes)])
    return ""


@method("network.remove_purpose", "network self", "text value")
def network_remove_purpose(call: Call) -> Value:
    """Take a purpose from a network."""
    state, network = call.state, call.text("self")
    with state.lock:
        purposes = {*state.db.refs("network", network, "purpose")} - {call.text("value")}
        state.db.set("network", network, purpose=[*sorted(purposes)])
    return ""


@method("host.get_server_certificate", "host host")
def host_get_server_certificate(call: Call) -> Value:
    """Return the certificate that a host's servers show, the leaf alone, as PEM."""
    certificate = call.state.certificates.get(call.text("host"))
    return certificate.pem if certificate is not None else ""


@method("message.create", "text name", "int priority", "text cls", "text obj_uuid", "text body")
def message_create(call: Call) -> Value:
    """Leave a message."""
    with call.state.lock:
        call.state.message(
            call.text("name"),
            kind=call.text("cls"),
            uuid=call.text("obj_uuid"),
            body=call.text("body"),
            priority=call.number("priority"),
        )
        return list(call.state.db.records("message"))[-1]


@method("message.destroy", "message self")
def message_destroy(call: Call) -> Value:
    """Remove a message."""
    with call.state.lock:
        call.state.db.destroy("message", call.text("self"))
    return ""
