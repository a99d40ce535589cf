"""VM: the life of virtual machines, their snapshots and what goes back to one."""

from collections.abc import Callable

from . import attachments, operations, vdis, volumes
from .failures import SimError
from .methods import Call, known, method
from .state import State, new_ref, new_uuid
from .values import EPOCH, NULL, Timestamp, Value

Names = Callable[[str], tuple[str, str]]
"""Gives a new object of a class its ref and uuid."""

DiskCopy = Callable[[Call, str], str]
"""Makes a VDI of another and returns its ref."""

_NOT_COPIED = ("uuid", "VBDs", "VIFs", "snapshots", "children", "consoles", "resident_on")


@method("VM.create", "map args")
def create(call: Call) -> Value:
    """Add a VM without devices."""
    given = call.mapping("args")
    with call.state.lock:
        values = {k: v for k, v in given.items() if k not in ("uuid", "ref")}
        return add(call.state, values)


def add(state: State, values: dict[str, Value], *, ref: str = "", uuid: str = "") -> str:
    """Add a halted VM and return its ref; fields that a VM does not have are ignored."""
    with state.lock:
        fields = state.db.fields("VM")
        made: dict[str, Value] = {
            "power_state": "Halted",
            "snapshot_time": EPOCH,
            "domid": -1,
            "domain_type": "hvm",
            "HVM_shadow_multiplier": 1.0,
            "VCPUs_max": 1,
            "VCPUs_at_startup": 1,
            "memory_target": 0,
            **{k: v for k, v in values.items() if k in fields},
            "uuid": uuid or new_uuid(),
        }
        vm = state.db.create("VM", ref or new_ref(), made)
        _refresh(state, vm)
        return vm


@method("VM.destroy", "VM self")
def destroy(call: Call) -> Value:
    """Remove a VM with its VBDs and VIFs, never its VDIs."""
    state, vm = call.state, call.text("self")
    with state.lock:
        if state.db.flag("VM", vm, "is_control_domain"):
            raise SimError("OPERATION_NOT_ALLOWED", "Cannot destroy a control domain")
        _expect(state, vm, "halted", "Halted", "Suspended")
        remove(state, vm)
    return ""


def remove(state: State, vm: str) -> None:
    """Remove a VM's record and devices; the caller holds the state's lock."""
    for vbd in state.db.refs("VM", vm, "VBDs"):
        vdi = state.db.text("VBD", vbd, "VDI")
        state.db.destroy("VBD", vbd)
        if known(vdi):
            operations.refresh(state, vdi)
    for vif in state.db.refs("VM", vm, "VIFs"):
        state.db.destroy("VIF", vif)
    state.db.destroy("VM", vm)


# ── life ─────────────────────────────────────────────────────────────────────────────────


@method("VM.start", "VM vm", "bool start_paused?", "bool force?")
def start(call: Call) -> Value:
    """Start a VM on the first host that sees all its SRs, its affinity if that does."""
    with call.state.lock:
        host = _place(call.state, call.text("vm"))
    start_on_host(call.state, call.text("vm"), host)
    return ""


@method("VM.start_on", "VM vm", "host host", "bool start_paused?", "bool force?")
def start_on(call: Call) -> Value:
    """Start a VM on a host."""
    start_on_host(call.state, call.text("vm"), call.text("host"))
    return ""


def start_on_host(state: State, vm: str, host: str) -> None:
    """Plug a VM's devices on a host; all of them, or none.

    Raises:
        SimError: VM_IS_TEMPLATE, VM_BAD_POWER_STATE, or what VBD.plug fails with.
    """
    with state.lock:
        if state.db.flag("VM", vm, "is_a_template"):
            raise SimError("VM_IS_TEMPLATE", vm)
        _expect(state, vm, "halted", "Halted")
        state.db.set("VM", vm, resident_on=host)
        vbds = state.db.refs("VM", vm, "VBDs")
    plugged: list[str] = []
    try:
        for vbd in vbds:
            attachments.plug(state, vbd)
            plugged.append(vbd)
    except SimError:
        for vbd in plugged:
            attachments.unplug(state, vbd)
        with state.lock:
            state.db.set("VM", vm, resident_on=NULL)
        raise
    with state.lock:
        state.db.set("VM", vm, power_state="Running", domid=state.db.generation)
        _refresh(state, vm)


@method("VM.hard_shutdown", "VM vm")
@method("VM.clean_shutdown", "VM vm")
@method("VM.shutdown", "VM vm")
def shutdown(call: Call) -> Value:
    """Halt a running VM."""
    with call.state.lock:
        _expect(call.state, call.text("vm"), "running", "Running", "Paused")
        halt(call.state, call.text("vm"))
    return ""


def halt(state: State, vm: str, *, crashed: bool = False) -> None:
    """Take a VM's devices away; ``crashed`` if its host died rather than closed them."""
    for vbd in state.db.refs("VM", vm, "VBDs"):
        if state.db.flag("VBD", vbd, "currently_attached"):
            attachments.detach(state, vbd, crashed=crashed)
    state.db.set("VM", vm, power_state="Halted", resident_on=NULL, domid=-1)
    _refresh(state, vm)


@method("VM.hard_reboot", "VM vm")
@method("VM.clean_reboot", "VM vm")
def reboot(call: Call) -> Value:
    """Close and open a VM's disks again; the chain of changes is kept."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        _expect(state, vm, "running", "Running")
        host = state.db.text("VM", vm, "resident_on")
        halt(state, vm)
    start_on_host(state, vm, host)
    return ""


@method("VM.pool_migrate", "VM vm", "host host", "map options")
def pool_migrate(call: Call) -> Value:
    """Move a running VM to another host that sees its SRs."""
    state, vm, host = call.state, call.text("vm"), call.text("host")
    with state.lock:
        _expect(state, vm, "running", "Running")
        if host not in _hosts_for(state, vm):
            raise SimError("VM_REQUIRES_SR", vm, NULL)
        halt(state, vm)
    start_on_host(state, vm, host)
    return ""


@method(
    "VM.migrate_send", "VM vm", "map dest", "bool live", "map vdi_map", "map vif_map",
    "map options?", "map vgpu_map?",
)  # fmt: skip
def migrate_send(call: Call) -> Value:
    """Storage migration: refused for each tracked VDI, snapshots' included."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        for machine in (vm, *state.db.refs("VM", vm, "snapshots")):
            for vbd in state.db.refs("VM", machine, "VBDs"):
                vdi = state.db.text("VBD", vbd, "VDI")
                if known(vdi) and state.db.flag("VDI", vdi, "cbt_enabled"):
                    raise SimError("VDI_CBT_ENABLED", vdi)
    raise SimError("NOT_IMPLEMENTED", "VM.migrate_send")


# ── snapshots and copies ─────────────────────────────────────────────────────────────────


@method("VM.snapshot", "VM vm", "text new_name", "set ignore_vdis?")
def snapshot(call: Call) -> Value:
    """Snapshot a VM's disks one after another, and make a VM of them."""
    with call.state.lock:
        _expect(call.state, call.text("vm"), "halted", "Halted", "Running", "Suspended", "Paused")
    return take_snapshot(call, call.text("vm"))


@method("VM.checkpoint", "VM vm", "text new_name")
def checkpoint(call: Call) -> Value:
    """As a snapshot, with memory: its VBDs say that they are attached."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        _expect(state, vm, "running", "Running")
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
        _expect(state, vm, "halted", "Halted")
    disks = _copy_disks(call, vm, ignored=[], how=vdis.take_clone)
    with state.lock:
        return _copy_vm(state, vm, _fresh(call.text("new_name")), disks=disks)


@method("VM.copy", "VM vm", "text new_name", "ref sr")
def copy(call: Call) -> Value:
    """Make a VM with full copies of the disks."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        _expect(state, vm, "halted", "Halted")

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
            halt(state, vm)
        old = _disks(state, vm)
    made = _copy_disks(call, taken, ignored=[], how=vdis.take_clone)
    for vdi in old:
        _replace(call, vdi, made)
    with state.lock:
        for vbd in state.db.refs("VM", vm, "VBDs"):
            state.db.destroy("VBD", vbd)
        for vbd in state.db.refs("VM", taken, "VBDs"):
            _copy_vbd(state, vbd, vm, disks=made)
        state.db.set("VM", vm, parent=taken)
    return ""


@method("VM.get_allowed_VBD_devices", "VM vm")
def get_allowed_vbd_devices(call: Call) -> Value:
    """Return the user devices that are free."""
    with call.state.lock:
        return [*attachments.free_devices(call.state, call.text("vm"))]


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
    made = add(state, {**record, **halted, **values}, ref=ref, uuid=uuid)
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
    }


def _own(value: Value) -> Value:
    """Return a copy of a set or map, so that two records share none."""
    if isinstance(value, list | dict):
        return value.copy()
    return value


def _expect(state: State, vm: str, expected: str, *states: str) -> None:
    power = state.db.text("VM", vm, "power_state")
    if power not in states:
        raise SimError("VM_BAD_POWER_STATE", vm, expected, power.lower())


def _hosts_for(state: State, vm: str) -> list[str]:
    srs = set()
    for vbd in state.db.refs("VM", vm, "VBDs"):
        vdi = state.db.text("VBD", vbd, "VDI")
        if known(vdi):
            srs.add(state.db.text("VDI", vdi, "SR"))
    hosts = state.db.records("host")
    return [host for host in hosts if all(state.sees_sr(host, sr) for sr in srs)]


def _place(state: State, vm: str) -> str:
    hosts = _hosts_for(state, vm)
    if not hosts:
        raise SimError("NO_HOSTS_AVAILABLE")
    affinity = state.db.text("VM", vm, "affinity")
    return affinity if affinity in hosts else hosts[0]


def _refresh(state: State, vm: str) -> None:
    common: list[Value] = ["snapshot", "metadata_export", "changing_VCPUs", "make_into_template"]
    power = {
        "Running": ["checkpoint", "clean_shutdown", "hard_shutdown", "pool_migrate", "hard_reboot"],
        "Halted": ["start", "start_on", "clone", "copy", "destroy", "export"],
    }
    more = power.get(state.db.text("VM", vm, "power_state"), [])
    state.db.set("VM", vm, allowed_operations=[*common, *more])
