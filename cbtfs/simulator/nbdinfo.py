"""Where a VDI can be read over NBD: an entry for each host and each of its NBD addresses.

Only interfaces that are plugged in, on a network with a purpose, of hosts that see the SR; IPv4
first. IPv6 addresses carry their prefix length, as xapi's do (xen-api, xapi_vdi.ml, nm.ml). An
entry has a certificate even where the purpose is insecure_nbd.
"""

from collections.abc import Iterator

from . import operations
from .state import State
from .values import Value

PURPOSES = ("nbd", "insecure_nbd")


def records(state: State, vdi: str, *, session: str) -> list[Value]:
    """Return the ``vdi_nbd_server_info`` records of a VDI; the caller holds the state's lock.

    Raises:
        SimError: VDI_INCOMPATIBLE_TYPE.
    """
    db = state.db
    if db.text("VDI", vdi, "type") == "cbt_metadata":
        raise operations.incompatible(state, vdi)
    sr = db.text("VDI", vdi, "SR")
    name = f"/{db.text('VDI', vdi, 'uuid')}?session_id={session}"
    found: list[Value] = []
    for host in db.records("host"):
        if not state.sees_sr(host, sr):
            continue
        certificate = state.certificates.get(host)
        for address in _addresses(state, host):
            found.append(
                {
                    "exportname": name,
                    "address": address,
                    "port": state.nbd_port,
                    "cert": certificate.pem if certificate else "",
                    "subject": certificate.subject
                    if certificate
                    else db.text("host", host, "hostname"),
                }
            )
    return found


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
