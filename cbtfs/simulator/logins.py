"""session and task: the calls on logins and on what runs by itself."""

from . import sessions, tasks
from .methods import Call, method
from .values import Value


@method(
    "session.login_with_password", "text uname", "text pwd", "text version?", "text originator?",
    has_session=False, has_async=False,
)  # fmt: skip
@method(
    "session.slave_local_login_with_password", "text uname", "text pwd",
    has_session=False, has_async=False,
)  # fmt: skip
def login(call: Call) -> Value:
    """Return a new session."""
    return sessions.login(
        call.state,
        call.text("uname"),
        call.text("pwd"),
        host=call.host,
        originator=call.text("originator"),
    )


@method("session.logout", has_async=False)
@method("session.local_logout", has_async=False)
def logout(call: Call) -> Value:
    """End the session."""
    sessions.logout(call.state, call.session)
    return ""


@method("task.create", "text label", "text description", has_async=False)
def create(call: Call) -> Value:
    """Return a task that the caller hands to an HTTP handler, and destroys."""
    about = call.text("description")
    return tasks.create(call.state, call.text("label"), session=call.session, description=about)


@method("task.destroy", "task self", has_async=False)
def destroy(call: Call) -> Value:
    """Remove a task."""
    with call.state.lock:
        call.state.db.destroy("task", call.text("self"))
        call.state.owners.pop(call.text("self"), None)
    return ""


@method("task.cancel", "task task", has_async=False)
def cancel(call: Call) -> Value:
    """Ask a task to stop."""
    tasks.cancel(call.state, call.text("task"))
    return ""
