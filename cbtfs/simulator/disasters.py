"""Disasters: a master that fails, a host that dies, xapi that restarts, the power that goes."""

from . import attachments, operations, vms, volumes
from .state import State


def promote(state: State, host: str) -> None:
    """Make a host the master: sessions and tasks are lost, event tokens void."""
    with state.lock:
        state.db.set("pool", state.db.only("pool"), master=host)
        restart_xapi(state)


def restart_xapi(state: State) -> None:
    """Restart xapi: sessions and tasks are lost, event tokens void; disks stay open."""
    with state.lock:
        state.used.clear()
        state.db.restart()


def crash_host(state: State, host: str) -> None:
    """Let a host die, with all that runs on it and what its dom0 has open."""
    with state.lock:
        for vm in state.db.refs("host", host, "resident_VMs"):
            if state.db.flag("VM", vm, "is_control_domain"):
                drop_dom0_devices(state, vm)
            else:
                vms.halt(state, vm, crashed=True)


def drop_dom0_devices(state: State, dom0: str) -> None:
    """Remove a control domain's VBDs."""
    for vbd in state.db.refs("VM", dom0, "VBDs"):
        if state.db.flag("VBD", vbd, "currently_attached"):
            attachments.detach(state, vbd, crashed=True)
        vdi = state.db.text("VBD", vbd, "VDI")
        state.db.destroy("VBD", vbd)
        operations.refresh(state, vdi)


def settle(state: State, *, crashed: bool) -> None:
    """Undo what cannot outlive the process; ``crashed`` as after a power cut."""
    with state.lock:
        for vm, record in list(state.db.records("VM").items()):
            if record["is_control_domain"]:
                drop_dom0_devices(state, vm)
            elif crashed and record["power_state"] == "Running":
                vms.halt(state, vm, crashed=True)
        _forget_operations(state)
        _remove_orphans(state)
        for sr in state.db.records("SR"):
            state.db.set("SR", sr, allowed_operations=operations.allowed_on_sr(state, sr))


def _remove_orphans(state: State) -> None:
    """Remove disks whose record was destroyed just before the state was saved."""
    orphans = [u for u in state.storage.disks if not state.db.has_uuid("VDI", u)]
    for uuid in orphans:
        if uuid not in state.forgotten:
            state.storage.destroy(uuid)
    for sr in list(state.db.records("SR"))[:1]:
        volumes.follow_chain(state, sr)


def _forget_operations(state: State) -> None:
    for kind in ("VDI", "VBD", "SR"):
        busy = [r for r, record in state.db.records(kind).items() if record["current_operations"]]
        for ref in busy:
            state.db.set(kind, ref, current_operations={})
