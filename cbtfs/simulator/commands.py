"""Commands: what can be asked of a simulated pool that no real one would answer.

=========================== ==================================================================
``status``                  hosts, running VMs, settings
``counters``                connections, bytes read per VDI, calls by method, snapshots
``reset-counters``          all to zero
``changed-log A B``         what the pool's own logs say was written after VDI A up to B
``volume VDI``              layers, size, allocated bytes, whether a log is kept
``crash-vm VM``             a VM's host dies under it: disks left open, logs inconsistent
``crash-host HOST``         a host dies, with its VMs and dom0's devices
``failover HOST``           another master: sessions and tasks are lost, event tokens void
``restart-xapi``            sessions and tasks are lost, event tokens void
``expire-sessions``         all sessions end
``collect``                 coalesce chains now
``save``                    write state.json now
``call METHOD PARAM…``      an API call with all rights; a parameter is JSON or text
=========================== ==================================================================

Objects are named by uuid, or by name where that is unique.
"""

import json
from collections.abc import Callable, Sequence

from cbtfs import errors

from . import api, disasters, nbdinfo, sessions, vms, volumes
from .failures import SimError
from .state import State
from .values import Value

Command = Callable[[State, Sequence[str]], object]


def run(state: State, command: str, args: Sequence[str]) -> object:
    """Carry out a command; the answer fits into JSON.

    Raises:
        UsageError: no such command, wrong number of arguments, or no such object.
    """
    known = COMMANDS.get(command)
    if known is None:
        raise errors.UsageError(
            f"the simulated pool has no command {command!r}; there are {', '.join(COMMANDS)}"
        )
    names, function = known
    if len(args) != len(names) and not (names and names[-1] == "PARAM…" and args):
        raise errors.UsageError(f"{command} takes {' '.join(names) or 'nothing'}")
    return function(state, args)


def find(state: State, kind: str, name: str) -> str:
    """Return the ref of the object with this uuid, ref, or unique name.

    Raises:
        UsageError: there is none, or several.
    """
    with state.lock:
        if state.db.has_uuid(kind, name):
            return state.db.by_uuid(kind, name)
        if state.db.exists(kind, name):
            return name
        records = state.db.records(kind).items()
        found = [
            ref
            for ref, record in records
            if record["name_label"] == name and not record.get("is_a_snapshot")
        ]
    if len(found) != 1:
        raise errors.UsageError(f"{len(found) or 'no'} {kind} of the pool is called {name!r}")
    return found[0]


def _status(state: State, _: Sequence[str]) -> object:
    db = state.db
    with state.lock:
        return {
            "master": state.host_name(state.master),
            "hosts": {r["name_label"]: r["address"] for r in db.records("host").values()},
            "running": sorted(
                str(r["name_label"])
                for r in db.records("VM").values()
                if r["power_state"] == "Running" and not r["is_control_domain"]
            ),
            "vdis": len(db.records("VDI")),
            "sessions": len(db.records("session")),
            "nbd": nbdinfo.purpose(state),
            "https_port": state.https_port,
            "nbd_port": state.nbd_port,
            "settings": dict(state.faults.current()),
        }


def _counters(state: State, _: Sequence[str]) -> object:
    return dict(state.counters)


def _reset_counters(state: State, _: Sequence[str]) -> object:
    state.counters.clear()
    return {}


def _changed_log(state: State, args: Sequence[str]) -> object:
    older, newer = (state.db.text("VDI", find(state, "VDI", name), "uuid") for name in args)
    try:
        log = state.storage.changed(older, newer)
    except SimError as failure:
        return {"error": [failure.code, *failure.params]}
    extents = [[start, stop] for start, stop in log.ranges()]
    return {
        "size": log.size,
        "extents": extents,
        "bytes": sum(stop - start for start, stop in extents),
    }


def _volume(state: State, args: Sequence[str]) -> object:
    disk = volumes.disk_of(state, find(state, "VDI", args[0]))
    return {
        "uuid": disk.uuid,
        "size": disk.size,
        "sector": disk.sector,
        "layers": len(disk.chain()),
        "allocated": sum(stop - start for start, stop in disk.allocated()),
        "tracked": disk.log is not None,
        "consistent": disk.log is None or disk.log.consistent,
    }


def _crash_vm(state: State, args: Sequence[str]) -> object:
    with state.lock:
        vms.halt(state, find(state, "VM", args[0]), crashed=True)
    return {}


def _crash_host(state: State, args: Sequence[str]) -> object:
    disasters.crash_host(state, find(state, "host", args[0]))
    return {}


def _failover(state: State, args: Sequence[str]) -> object:
    disasters.promote(state, find(state, "host", args[0]))
    return {}


def _restart_xapi(state: State, _: Sequence[str]) -> object:
    disasters.restart_xapi(state)
    return {}


def _expire(state: State, _: Sequence[str]) -> object:
    return sessions.expire(state)


def _collect(state: State, _: Sequence[str]) -> object:
    with state.lock:
        state.storage.collect()
        srs = list(state.db.records("SR"))
        volumes.follow_chain(state, srs[0])
    return {}


def _save(state: State, _: Sequence[str]) -> object:
    state.save()
    return {}


def _call(state: State, args: Sequence[str]) -> object:
    try:
        params = [_parameter(arg) for arg in args[1:]]
        answer = api.invoke(state, args[0], params, host=state.master, session="")
        plain: object = json.loads(json.dumps(answer))  # times are strings of a class of their own
        return plain
    except SimError as failure:
        return {"error": [failure.code, *failure.params]}


def _parameter(text: str) -> Value:
    try:
        value: Value = json.loads(text)
    except ValueError:
        return text
    return value


COMMANDS: dict[str, tuple[tuple[str, ...], Command]] = {
    "status": ((), _status),
    "counters": ((), _counters),
    "reset-counters": ((), _reset_counters),
    "changed-log": (("A", "B"), _changed_log),
    "volume": (("VDI",), _volume),
    "crash-vm": (("VM",), _crash_vm),
    "crash-host": (("HOST",), _crash_host),
    "failover": (("HOST",), _failover),
    "restart-xapi": ((), _restart_xapi),
    "expire-sessions": ((), _expire),
    "collect": ((), _collect),
    "save": ((), _save),
    "call": (("METHOD", "PARAM…"), _call),
}
"""Name → what it takes, and its function."""
