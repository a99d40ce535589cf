"""VM: the calls on the life of virtual machines."""

from . import attachments, operations
from .failures import SimError
from .methods import Call, known, method
from .state import State, new_ref, new_uuid
from .values import EPOCH, NULL, Value


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
        refresh(state, vm)
        return vm


@method("VM.destroy", "VM self")
def destroy(call: Call) -> Value:
    """Remove a VM with its VBDs and VIFs, never its VDIs."""
    state, vm = call.state, call.text("self")
    with state.lock:
        if state.db.flag("VM", vm, "is_control_domain"):
            raise SimError("OPERATION_NOT_ALLOWED", "Cannot destroy a control domain")
        expect(state, vm, "halted", "Halted", "Suspended")
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
        expect(state, vm, "halted", "Halted")
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
        refresh(state, vm)


@method("VM.hard_shutdown", "VM vm")
@method("VM.clean_shutdown", "VM vm")
@method("VM.shutdown", "VM vm")
def shutdown(call: Call) -> Value:
    """Halt a running VM."""
    with call.state.lock:
        expect(call.state, call.text("vm"), "running", "Running", "Paused")
        halt(call.state, call.text("vm"))
    return ""


def halt(state: State, vm: str, *, crashed: bool = False) -> None:
    """Take a VM's devices away; ``crashed`` if its host died rather than closed them."""
    for vbd in state.db.refs("VM", vm, "VBDs"):
        if state.db.flag("VBD", vbd, "currently_attached"):
            attachments.detach(state, vbd, crashed=crashed)
    state.db.set("VM", vm, power_state="Halted", resident_on=NULL, domid=-1)
    refresh(state, vm)


@method("VM.hard_reboot", "VM vm")
@method("VM.clean_reboot", "VM vm")
def reboot(call: Call) -> Value:
    """Close and open a VM's disks again; the chain of changes is kept."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        expect(state, vm, "running", "Running")
        host = state.db.text("VM", vm, "resident_on")
        halt(state, vm)
    start_on_host(state, vm, host)
    return ""


@method("VM.pool_migrate", "VM vm", "host host", "map options")
def pool_migrate(call: Call) -> Value:
    """Move a running VM to another host that sees its SRs."""
    state, vm, host = call.state, call.text("vm"), call.text("host")
    with state.lock:
        expect(state, vm, "running", "Running")
        if host not in _hosts_for(state, vm):
            raise SimError("VM_REQUIRES_SR", vm, NULL)
        before = state.db.text("VM", vm, "resident_on")
        halt(state, vm)
    try:
        start_on_host(state, vm, host)
    except SimError:
        start_on_host(state, vm, before)
        raise
    return ""


@method(
    "VM.migrate_send", "VM vm", "map dest", "bool live", "map vdi_map", "map vif_map",
    "map options?", "map vgpu_map?",
)  # fmt: skip
def migrate_send(call: Call) -> Value:
    """Storage migration: refused for each tracked VDI, snapshots' included."""
    state, vm = call.state, call.text("vm")
    with state.lock:
        machines = (vm, *state.db.refs("VM", vm, "snapshots"))
        vbds = [vbd for machine in machines for vbd in state.db.refs("VM", machine, "VBDs")]
        for vdi in filter(known, (state.db.text("VBD", vbd, "VDI") for vbd in vbds)):
            if state.db.flag("VDI", vdi, "cbt_enabled"):
                raise SimError("VDI_CBT_ENABLED", vdi)
    raise SimError("NOT_IMPLEMENTED", "VM.migrate_send")


@method("VM.update_allowed_operations", "VM self")
def update_allowed_operations(call: Call) -> Value:
    """Work out anew what is allowed; a change of ``blocked_operations`` alone does not do that."""
    with call.state.lock:
        refresh(call.state, call.text("self"))
    return ""


@method("VM.get_allowed_VBD_devices", "VM vm")
def get_allowed_vbd_devices(call: Call) -> Value:
    """Return the user devices that are free."""
    with call.state.lock:
        return [*attachments.free_devices(call.state, call.text("vm"))]


def expect(state: State, vm: str, expected: str, *states: str) -> None:
    """Return if a VM is in one of ``states``; fail with VM_BAD_POWER_STATE otherwise."""
    power = state.db.text("VM", vm, "power_state")
    if power not in states:
        raise SimError("VM_BAD_POWER_STATE", vm, expected, power.lower())


def _hosts_for(state: State, vm: str) -> list[str]:
    srs: set[str] = set()
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


def refresh(state: State, vm: str) -> None:
    """Bring a VM's allowed operations up to date; the caller holds the state's lock."""
    common: list[Value] = ["snapshot", "metadata_export", "changing_VCPUs", "make_into_template"]
    power = {
        "Running": ["checkpoint", "clean_shutdown", "hard_shutdown", "pool_migrate", "hard_reboot"],
        "Halted": ["start", "start_on", "clone", "copy", "destroy", "export"],
    }
    more = power.get(state.db.text("VM", vm, "power_state"), [])
    blocked = state.db.mapping("VM", vm, "blocked_operations")
    allowed: list[Value] = [name for name in (*common, *more) if name not in blocked]
    state.db.set("VM", vm, allowed_operations=allowed)
