"""Where a VDI can be read over NBD: an entry for each host and each of its NBD addresses.

Only interfaces that are plugged in, on a network with a purpose, of hosts that see the SR; IPv4
first. IPv6 addresses carry their prefix length, as xapi's do (xen-api, xapi_vdi.ml, nm.ml). An
entry has a certificate even where the purpose is insecure_nbd.
"""

from collections.abc import Iterator

from . import operations
from .failures import SimError
from .state import State
from .values import Record, Value

PURPOSES = ("nbd", "insecure_nbd")


def records(state: State, vdi: str, *, session: str) -> list[Value]:
    """Return the ``vdi_nbd_server_info`` records of a VDI; the caller holds the state's lock.

    Raises:
        SimError: VDI_INCOMPATIBLE_TYPE; CANNOT_CONTACT_HOST, as each host is asked for its
            certificate.
    """
    db = state.db
    if db.text("VDI", vdi, "type") == "cbt_metadata":
        raise operations.incompatible(state, vdi)
    sr = db.text("VDI", vdi, "SR")
    name = f"/{db.text('VDI', vdi, 'uuid')}?session_id={session}"
    hosts = [host for host in db.records("host") if state.sees_sr(host, sr)]
    for host in hosts:
        if state.faults.hits("host.down", state.host_name(host)):
            raise SimError("CANNOT_CONTACT_HOST", host)
    return [
        {"exportname": name, "address": address, "port": state.nbd_port, **_identity(state, host)}
        for host in hosts
        for address in _addresses(state, host)
    ]


def _identity(state: State, host: str) -> Record:
    known = state.certificates.get(host)
    if known is None:
        return {"cert": "", "subject": state.db.text("host", host, "hostname")}
    return {"cert": known.pem, "subject": known.subject}


def purpose(state: State) -> str:
    """Return the purpose that all NBD servers of the pool go by: "" if none, or both."""
    with state.lock:
        given = {
            name
            for network in state.db.records("network")
            for name in state.db.refs("network", network, "purpose")
        }
    return given.pop() if len(given) == 1 else ""


def _addresses(state: State, host: str) -> Iterator[str]:
    db = state.db
    for pif in db.refs("host", host, "PIFs"):
        network = db.text("PIF", pif, "network")
        purposes = db.refs("network", network, "purpose")
        if not db.flag("PIF", pif, "currently_attached") or not set(purposes) & set(PURPOSES):
            continue
        if db.text("PIF", pif, "IP"):
            yield db.text("PIF", pif, "IP")
        yield from filter(None, db.refs("PIF", pif, "IPv6"))
