"""The API's entry: one HTTP body in, one out.

In order: is the method known, does this host take calls, is the session valid, do the
parameters fit, what was ordered to fail; then the call itself, in the caller's thread, for as
long as it takes. ``Async.METHOD`` does the same in a thread of its own and reports to a task.
"""

import logging
import threading
from collections.abc import Sequence

from . import (
    accessors,
    devices,
    events,
    logins,
    methods,
    sessions,
    snapshots,
    tasks,
    vdis,
    vms,
    wire,
)
from .failures import SimError
from .methods import Call, Method
from .state import State
from .values import Value

_log = logging.getLogger(__name__)

HANDLERS = (devices, events, logins, snapshots, vdis, vms)
"""The modules whose methods are in the table once they are imported."""

_NO_ASYNC = ("session", "event", "task", "data_source", "blob")


def handle_rpc(
    state: State, host_ref: str, *, path: str, body: bytes, client: str
) -> tuple[int, str, bytes]:
    """Answer one XML-RPC (``/``, ``/RPC2``) or JSON-RPC (``/json``, ``/jsonrpc``) request.

    Blocks as long as the call does: to be run in the connection's thread.

    Returns:
        HTTP status, content type and body. Unparseable: 500 with HTML.
    """
    try:
        request = wire.decode(path, body)
    except wire.Malformed as error:
        page = f"<html><body><h1>HTTP 500 internal server error</h1>{error}</body></html>"
        return 500, "text/html", page.encode("utf-8", "replace")
    state.count(f"rpc.{request.method}")
    _log.debug("%s calls %s", client, request.method)
    try:
        reply = wire.success(request, dispatch(state, host_ref, request.method, request.params))
    except SimError as failure:
        reply = wire.failure(request, failure)
    except Exception as failure:
        _log.exception("%s failed", request.method)
        reply = wire.failure(request, tasks.internal(failure))
    return 200, request.content_type, reply


def dispatch(state: State, host: str, name: str, params: Sequence[Value]) -> Value:
    """Carry out a call that came over the wire and return its result.

    Raises:
        SimError: what the call fails with.
    """
    in_background = name.startswith("Async.")
    called = find(name.removeprefix("Async."), in_background=in_background)
    if called is None:
        raise SimError("MESSAGE_METHOD_UNKNOWN", name)
    session = ""
    if called.has_session:
        if not params:
            raise SimError("MESSAGE_PARAMETER_COUNT_MISMATCH", name, "1", "0")
        session, params = str(params[0]), params[1:]
        sessions.check(state, session, host=host)
    else:
        sessions.check_host(state, host)
    call = Call(state, called.name, host, session, called.bind(params, state=state))
    if in_background:
        return _start(call, called)
    return _carry_out(call, called)


def invoke(state: State, name: str, params: Sequence[Value], *, host: str, session: str) -> Value:
    """Carry out a call from inside, with all rights and without ordered faults.

    Raises:
        SimError: what the call fails with.
    """
    called = find(name)
    if called is None:
        raise SimError("MESSAGE_METHOD_UNKNOWN", name)
    return called.run(Call(state, name, host, session, called.bind(params, state=state)))


def find(name: str, *, in_background: bool = False) -> Method | None:
    """Return the method of that name, None if there is none."""
    if in_background:
        found = methods.METHODS.get(name)
        kind = name.partition(".")[0]
        return found if found is not None and found.has_async and kind not in _NO_ASYNC else None
    return methods.METHODS.get(name) or accessors.find(name)


def _carry_out(call: Call, called: Method) -> Value:
    faults = call.state.faults
    call.state.sleep(faults.delay_of(call.method), cancelled=call.cancelled)
    faults.check(call.method)
    _refuse_blocked(call, called)
    result = called.run(call)
    faults.check(call.method, key="xapi.fail_after")
    return result


def _refuse_blocked(call: Call, called: Method) -> None:
    """Fail if somebody has blocked an operation of a VM (xen-api, xapi_vm_lifecycle.ml)."""
    kind, _, operation = call.method.partition(".")
    if kind != "VM" or not called.parameters or called.parameters[0].type != "VM":
        return
    vm = call.text(called.parameters[0].name)
    with call.state.lock:
        blocked = call.state.db.mapping("VM", vm, "blocked_operations")
    if operation in blocked:
        raise SimError("OPERATION_BLOCKED", vm, str(blocked[operation]))


def _start(call: Call, called: Method) -> str:
    """Carry out a call in a thread; return the ref of the task that tells how it went."""
    state = call.state
    task = tasks.create(state, f"Async.{call.method}", session=call.session)
    watched = Call(
        state, call.method, call.host, call.session, call.arguments, tasks.cancellation(state, task)
    )

    def run() -> None:
        try:
            tasks.finish_with(state, task, _carry_out(watched, called))
        except Exception as failure:
            if not isinstance(failure, SimError):
                _log.exception("%s failed", call.method)
            tasks.fail(state, task, failure)

    threading.Thread(target=run, name=f"Async.{call.method}", daemon=True).start()
    return task
