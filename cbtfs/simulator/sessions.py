"""Sessions: who is logged in, and for how long.

A session ends by logout, after a day without use, when an originator has more than 500, or
when the master changes (xen-api, ocaml/xapi/xapi_session.ml, db_gc_util.ml). Only the master
takes logins and calls; a supporter answers HOST_IS_SLAVE with the master's address.
"""

import time

from .failures import SimError
from .state import State, new_ref, new_uuid
from .values import Timestamp

PER_ORIGINATOR = 500
"""Sessions of one originator; the one unused for longest goes (xapi_globs.ml)."""


def login(state: State, user: str, password: str, *, host: str, originator: str = "") -> str:
    """Return the ref of a new session.

    Raises:
        SimError: HOST_IS_SLAVE; SESSION_AUTHENTICATION_FAILED, after a delay.
    """
    check_host(state, host)
    if state.users.get(user) != password:
        state.count("xapi.logins_failed")
        state.sleep(state.faults.duration("xapi.auth_delay"))
        raise SimError("SESSION_AUTHENTICATION_FAILED", user, "Authentication failure")
    with state.lock:
        ref = state.db.create(
            "session",
            new_ref(),
            {
                "uuid": new_uuid(),
                "this_host": host,
                "last_active": Timestamp.now(),
                "validation_time": Timestamp.now(),
                "is_local_superuser": user == "root",
                "auth_user_name": user,
                "originator": originator,
            },
        )
        state.used[ref] = time.monotonic()
        _evict(state, originator)
        return ref


def logout(state: State, session: str) -> None:
    """End a session; open NBD connections made with it stay."""
    with state.lock:
        state.used.pop(session, None)
        if state.db.exists("session", session):
            state.db.destroy("session", session)


def check(state: State, session: str, *, host: str = "") -> None:
    """Return if a session is valid, and note its use.

    Raises:
        SimError: SESSION_INVALID; with ``host`` also HOST_IS_SLAVE, HOST_STILL_BOOTING.
    """
    if host:
        check_host(state, host)
    now = time.monotonic()
    with state.lock:
        idle = now - state.used.get(session, float("-inf"))
        busy = session in state.used and session in state.owners.values()
        if idle > state.faults.duration("xapi.idle") and not busy:
            logout(state, session)
            raise SimError("SESSION_INVALID", session)
        state.used[session] = now


def check_host(state: State, host: str) -> None:
    """Return if a host takes calls.

    Raises:
        SimError: HOST_STILL_BOOTING, HOST_IS_SLAVE.
    """
    with state.lock:
        if state.faults.hits("xapi.booting", state.host_name(host)):
            raise SimError("HOST_STILL_BOOTING")
        if host != state.master:
            raise SimError("HOST_IS_SLAVE", state.db.text("host", state.master, "address"))


def expire(state: State) -> int:
    """End all sessions; return how many there were."""
    with state.lock:
        found = list(state.db.records("session"))
        for session in found:
            logout(state, session)
        return len(found)


def _evict(state: State, originator: str) -> None:
    records = state.db.records("session").items()
    same = [ref for ref, record in records if record["originator"] == originator]
    if len(same) > PER_ORIGINATOR:
        logout(state, min(same, key=lambda ref: state.used.get(ref, 0.0)))
