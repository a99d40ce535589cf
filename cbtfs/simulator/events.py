"""event.from: what changed since a token, waiting until something does.

Of several changes to an object a reader sees the last; a token of another life of xapi is
refused (xen-api, ocaml/xapi/xapi_event.ml).
"""

import re
import time

from . import fields, sessions
from .database import Change
from .failures import SimError
from .methods import Call, method
from .state import State
from .values import Record, TypedInt, Value

_LOWER = {name.lower(): name for name in fields.CLASSES}


class Subscription:
    """Which objects somebody wants to hear of: ``*``, ``vdi`` or ``vdi/OpaqueRef:…``."""

    def __init__(self, classes: list[str]) -> None:
        self._kinds: set[str] = set()
        self._objects: set[tuple[str, str]] = set()
        for item in classes:
            kind, _, ref = item.partition("/")
            if kind == "*":
                self._kinds |= set(_LOWER.values())
            elif not kind:
                raise SimError("EVENT_SUBSCRIPTION_PARSE_FAILURE", item)
            elif ref:
                self._objects.add((_LOWER.get(kind.lower(), kind), ref))
            else:
                self._kinds.add(_LOWER.get(kind.lower(), kind))

    def wants(self, change: Change) -> bool:
        """Return whether ``change`` is of interest."""
        return change.kind in self._kinds or (change.kind, change.ref) in self._objects

    def counts(self, state: State) -> Record:
        """Return how many objects there are of each class of interest."""
        kinds = self._kinds | {kind for kind, _ in self._objects}
        known = sorted(kinds & _LOWER.keys() | kinds & set(_LOWER.values()))
        return {kind.lower(): TypedInt(len(state.db.records(kind))) for kind in known}


@method("event.from", "set classes", "text token", "any timeout", has_async=False)
def from_(call: Call) -> Value:
    """Return events since a token, or none after ``timeout`` seconds."""
    state = call.state
    wanted = Subscription(call.texts("classes"))
    since = _parse(call.text("token"))
    deadline = time.monotonic() + call.seconds("timeout")
    with state.lock:
        if since > state.db.generation:
            raise SimError("EVENT_FROM_TOKEN_PARSE_FAILURE", call.text("token"))
        while not any(map(wanted.wants, state.db.changes_since(since))):
            _check(call)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            state.db.changed.wait(min(remaining, 1.0))
    if time.monotonic() < deadline and since:
        state.sleep(state.faults.duration("xapi.batch"))
    with state.lock:
        _check(call)
        return _answer(state, wanted, since)


@method("event.get_current_id", has_async=False)
def get_current_id(call: Call) -> Value:
    """Return the number of the last change."""
    return call.state.db.generation


def _check(call: Call) -> None:
    if call.state.closing.is_set():
        raise SimError("HOST_STILL_BOOTING")
    if call.session:
        sessions.check(call.state, call.session)


def _parse(token: str) -> int:
    if not token:
        return 0
    match = re.fullmatch(r"(\d+),(\d+)", token)
    if match is None:
        raise SimError("EVENT_FROM_TOKEN_PARSE_FAILURE", token)
    return int(match[2])


def _answer(state: State, wanted: Subscription, since: int) -> Value:
    changes = [c for c in state.db.changes_since(since) if wanted.wants(c)]
    changes.sort(key=lambda change: change.generation)
    now = state.db.generation
    return {
        "events": [_event(state, change) for change in changes],
        "valid_ref_counts": wanted.counts(state),
        "token": f"{now:020d},{now:020d}",
    }


def _event(state: State, change: Change) -> Value:
    event: Record = {
        "id": str(change.generation),
        "timestamp": "0.0",
        "class": change.kind.lower(),
        "operation": change.operation,
        "ref": change.ref,
    }
    if change.operation != "del":
        event["snapshot"] = dict(state.db.record(change.kind, change.ref))
    return event
