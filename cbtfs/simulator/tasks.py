"""Tasks: what ``Async`` calls and HTTP handlers report through.

A task's result is a string of XML whatever the transport (xen-api, wire-protocol.md).
"""

import threading

from . import values
from .failures import SimError
from .state import State, new_ref, new_uuid
from .values import NULL, Timestamp, Value

MOST_FINISHED = 200
"""Finished tasks that are kept (xen-api, ocaml/xapi/db_gc_util.ml)."""


def create(state: State, label: str, *, session: str = "", description: str = "") -> str:
    """Return the ref of a new pending task; it keeps ``session`` from ending by disuse."""
    with state.lock:
        _tidy(state)
        task = state.db.create(
            "task",
            new_ref(),
            {
                "uuid": new_uuid(),
                "name_label": label,
                "name_description": description,
                "created": Timestamp.now(),
                "status": "pending",
                "resident_on": state.master,
                "type": "<none/>",
                "subtask_of": NULL,
                "allowed_operations": ["cancel", "destroy"],
            },
        )
        state.cancellations[task] = threading.Event()
        state.owners[task] = session
        return task


def cancellation(state: State, task: str) -> threading.Event:
    """Return the event that is set when a task is cancelled."""
    return state.cancellations.setdefault(task, threading.Event())


def progress(state: State, task: str, value: float) -> None:
    """Set how far a task is, from 0 to 1; without effect on one that is gone."""
    with state.lock:
        if state.db.exists("task", task):
            state.db.set("task", task, progress=value)


def finish(state: State, task: str, *, result: str = "") -> None:
    """Complete a task; ``result`` is XML text, "" for nothing."""
    _end(state, task, status="success", result=result)


def finish_with(state: State, task: str, value: Value) -> None:
    """Complete a task with the result of a call."""
    finish(state, task, result="" if value == "" else values.xml(value))


def fail(state: State, task: str, failure: Exception) -> None:
    """Fail a task; whatever is not a SimError becomes INTERNAL_ERROR."""
    known = failure if isinstance(failure, SimError) else internal(failure)
    if known.code == "TASK_CANCELLED":
        _end(state, task, status="cancelled", error=[known.code, task])
    else:
        _end(state, task, status="failure", error=[known.code, *known.params])


def cancel(state: State, task: str) -> None:
    """Ask a task to stop; it does where it waits."""
    with state.lock:
        if state.db.text("task", task, "status") == "pending":
            state.db.set("task", task, status="cancelling")
        cancellation(state, task).set()


def internal(failure: Exception) -> SimError:
    """Return what xapi makes of an exception that it did not expect."""
    return SimError("INTERNAL_ERROR", f"{type(failure).__name__}: {failure}")


def _end(
    state: State, task: str, *, status: str, result: str = "", error: list[str] | None = None
) -> None:
    with state.lock:
        state.cancellations.pop(task, None)
        state.owners.pop(task, None)
        if not state.db.exists("task", task):
            return
        if state.db.text("task", task, "status") not in ("pending", "cancelling"):
            return
        state.db.set(
            "task",
            task,
            status=status,
            result=result,
            error_info=[*(error or [])],
            progress=1.0,
            finished=Timestamp.now(),
            allowed_operations=["destroy"],
        )


def _tidy(state: State) -> None:
    done = [r for r, t in state.db.records("task").items() if t["status"] != "pending"]
    for task in done[:-MOST_FINISHED]:
        state.db.destroy("task", task)
