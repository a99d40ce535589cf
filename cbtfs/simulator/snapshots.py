"""VM.snapshot, clone, copy and revert: virtual machines made of others.

A snapshot takes a VM's disks one after another: there is no one instant for all of them
(xen-api, ocaml/xapi/xapi_vm_clone.ml).
"""

import json
from collections.abc import Callable

from . import operations, vdis, vms, volumes
from .failures import SimError
from .methods import Call, known, method
from .state import State, new_ref, new_uuid
from .values import EPOCH, NULL, Timestamp, Value

Names = Callable[[str], tuple[str, str]]
"""Gives a new object of a class its ref and uuid."""

DiskCopy = Callable[[Call, str], str]
"""Makes a VDI of another and returns its ref."""

_REVERTED = (
    "name_label", "name_description", "other_config", "blocked_operations", "platform",
    "xenstore_data", "HVM_boot_params", "VCPUs_max", "VCPUs_at_startup",
)  # fmt: skip
"""Fields of a VM that are as they were after a revert: most; tags and affinity stay as they are."""

_NOT_COPIED = ("uuid", "VBDs", "VIFs", "snapshots", "children", "consoles", "resident_on")


@method("VM.snapshot", "VM vm", "text new_name", "set ignore_vdis?")
def snapshot(call: Call) -> Value:
    """Snapshot a VM's disks one after another, and make a VM of them."""
    with call.state.lock:
        vms.expect(
            call.state, call.text("vm"), "halted", "Halted", "Running", "Suspended", "Paused"
        )
    return take_snapshot(call, call.text("vm"))


@method("VM.checkpoint", "VM vm", "text new_name")
def checkpoint(call: Call) -> Value:
    """As a snapshot, with memory: its VBDs say that they are attached."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        vms.expect(state, vm, "running", "Running")
    taken = take_snapshot(call, vm)
    with state.lock:
        state.db.set("VM", taken, power_state="Suspended")
        for vbd in state.db.refs("VM", taken, "VBDs"):
            state.db.set("VBD", vbd, currently_attached=True)
    return taken


def random_names(_: str) -> tuple[str, str]:
    """Return a ref and a uuid for an object of any class."""
    return new_ref(), new_uuid()


def take_snapshot(
    call: Call, vm: str, *, names: Names = random_names, at: Timestamp | None = None
) -> str:
    """Return the ref of a new snapshot of a VM.

    Args:
        call: with ``new_name`` and ``ignore_vdis`` as for VM.snapshot.
        vm: to snapshot.
        names: for the new VM and its VBDs; the disks' are random unless ``at`` is given.
        at: take this for the time, and do not wait for SR locks: a scenario is being built.
    """
    state = call.state

    def built(_: Call, vdi: str) -> str:
        ref, uuid = names("VDI")
        return volumes.snapshot(state, vdi, names=volumes.Names(ref, uuid, names("VDI")[1]), at=at)

    how = vdis.take_snapshot if at is None else built
    disks = _copy_disks(call, vm, ignored=call.texts("ignore_vdis"), how=how)
    with state.lock:
        power = state.db.text("VM", vm, "power_state")
        values: dict[str, Value] = {
            "name_label": call.text("new_name"),
            "is_a_template": True,
            "is_a_snapshot": True,
            "snapshot_of": vm,
            "snapshot_time": at or Timestamp.now(),
            "parent": state.db.text("VM", vm, "parent"),
            "suspend_VDI": NULL,
            "transportable_snapshot_id": "",
            "blocked_operations": {},
            "snapshot_metadata": json.dumps(
                {name: state.db.record("VM", vm)[name] for name in _REVERTED}
            ),
            "snapshot_info": {
                "power-state-at-snapshot": power,
                "disk-snapshot-type": "crash_consistent",
            },
        }
        taken = _copy_vm(state, vm, values, disks=disks, names=names)
        state.db.set("VM", vm, parent=taken)
        state.count("vm.snapshots")
        return taken


@method("VM.clone", "VM vm", "text new_name")
def clone(call: Call) -> Value:
    """Make a VM whose disks share contents with the original's."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        vms.expect(state, vm, "halted", "Halted")
    disks = _copy_disks(call, vm, ignored=[], how=vdis.take_clone)
    with state.lock:
        return _copy_vm(state, vm, _fresh(call.text("new_name")), disks=disks)


@method("VM.copy", "VM vm", "text new_name", "ref sr")
def copy(call: Call) -> Value:
    """Make a VM with full copies of the disks."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        vms.expect(state, vm, "halted", "Halted")

    def copied(_: Call, vdi: str) -> str:
        with state.lock:
            sr = call.text("sr")
            sr = sr if known(sr) else state.db.text("VDI", vdi, "SR")
        return volumes.copy(state, vdi, sr=sr)

    disks = _copy_disks(call, vm, ignored=[], how=copied)
    with state.lock:
        return _copy_vm(state, vm, _fresh(call.text("new_name")), disks=disks)


@method("VM.revert", "VM snapshot")
def revert(call: Call) -> Value:
    """Go back to a snapshot: each live disk is destroyed, a clone with a new uuid replaces it.

    All snapshots of the old disk point to the new one afterwards, so that a matching
    ``snapshot_of`` proves nothing (xen-api, ocaml/xapi/xapi_vm_snapshot.ml).
    """
    state, taken = call.state, call.text("snapshot")
    with state.lock:
        if not state.db.flag("VM", taken, "is_a_snapshot"):
            raise SimError("REVERT_ONLY_ALLOWED_ON_SNAPSHOT", taken)
        vm = state.db.text("VM", taken, "snapshot_of")
        if state.db.text("VM", vm, "power_state") != "Halted":
            vms.halt(state, vm)
        old = _disks(state, vm)
    made = _copy_disks(call, taken, ignored=[], how=vdis.take_clone)
    for vdi in old:
        _replace(call, vdi, made)
    with state.lock:
        for vbd in state.db.refs("VM", vm, "VBDs"):
            state.db.destroy("VBD", vbd)
        for vbd in state.db.refs("VM", taken, "VBDs"):
            _copy_vbd(state, vbd, vm, disks=made)
        fields: dict[str, Value] = json.loads(state.db.text("VM", taken, "snapshot_metadata"))
        state.db.set("VM", vm, parent=taken, **fields)
        vms.refresh(state, vm)
    return ""


def _replace(call: Call, old: str, made: dict[str, str]) -> None:
    """Destroy a live disk whose snapshot was cloned, and repoint all its snapshots."""
    state = call.state
    with state.lock:
        snapshots = set(state.db.refs("VDI", old, "snapshots"))
        new = next((clone for source, clone in made.items() if source in snapshots), "")
        if new:
            vdis.take_over(state, old, new)
    with vdis.exclusive(call, old, "destroy"):
        volumes.destroy(state, old)


def _copy_disks(call: Call, vm: str, *, ignored: list[str], how: DiskCopy) -> dict[str, str]:
    """Copy a VM's disks one after another; if one fails, remove those made before.

    Returns:
        Old VDI → new VDI; ignored ones are missing.
    """
    state = call.state
    with state.lock:
        wanted = [vdi for vdi in _disks(state, vm) if vdi not in ignored]
    made: dict[str, str] = {}
    try:
        for vdi in wanted:
            made[vdi] = how(call, vdi)
    except SimError:
        for vdi in made.values():
            volumes.destroy(state, vdi)
        raise
    return made


def _disks(state: State, vm: str) -> list[str]:
    vbds = state.db.refs("VM", vm, "VBDs")
    vbds.sort(key=lambda vbd: int(state.db.text("VBD", vbd, "userdevice") or 0))
    disks = [vbd for vbd in vbds if state.db.text("VBD", vbd, "type") == "Disk"]
    return [v for v in (state.db.text("VBD", vbd, "VDI") for vbd in disks) if known(v)]


def _copy_vm(
    state: State,
    vm: str,
    values: dict[str, Value],
    *,
    disks: dict[str, str],
    names: Names = random_names,
) -> str:
    record = {k: _own(v) for k, v in state.db.record("VM", vm).items() if k not in _NOT_COPIED}
    ref, uuid = names("VM")
    halted: dict[str, Value] = {"power_state": "Halted", "domid": -1}
    made = vms.add(state, {**record, **halted, **values}, ref=ref, uuid=uuid)
    for vbd in state.db.refs("VM", vm, "VBDs"):
        _copy_vbd(state, vbd, made, disks=disks, names=names)
    for vif in state.db.refs("VM", vm, "VIFs"):
        copied = {k: _own(v) for k, v in state.db.record("VIF", vif).items()}
        ref, uuid = names("VIF")
        copied |= {"uuid": uuid, "VM": made, "currently_attached": False}
        state.db.create("VIF", ref, copied)
    return made


def _copy_vbd(
    state: State, vbd: str, vm: str, *, disks: dict[str, str], names: Names = random_names
) -> None:
    """Give a VM a VBD as another has it; a CD stays the same CD, an ignored disk is left out."""
    record = state.db.record("VBD", vbd)
    vdi = str(record["VDI"])
    if record["type"] == "Disk" and known(vdi):
        if vdi not in disks:
            return
        vdi = disks[vdi]
    copied = {k: _own(v) for k, v in record.items()}
    ref, uuid = names("VBD")
    copied |= {
        "uuid": uuid,
        "VM": vm,
        "VDI": vdi,
        "currently_attached": False,
        "current_operations": {},
        "allowed_operations": ["attach"],
    }
    state.db.create("VBD", ref, copied)
    if known(vdi):
        operations.refresh(state, vdi)


def _fresh(name: str) -> dict[str, Value]:
    return {
        "name_label": name,
        "is_a_snapshot": False,
        "snapshot_of": NULL,
        "snapshot_time": EPOCH,
        "parent": NULL,
        "blocked_operations": {},
    }


def _own(value: Value) -> Value:
    """Return a copy of a set or map, so that two records share none."""
    if isinstance(value, list | dict):
        return value.copy()
    return value
