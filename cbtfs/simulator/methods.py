"""The table of API methods: what each takes, and the function that carries it out."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import fields
from .failures import SimError
from .state import State
from .values import NULL, Value


@dataclass(frozen=True)
class Parameter:
    """A parameter; ``type`` is a class of objects, or text, int, bool, set, map, ref, any."""

    type: str
    name: str
    optional: bool


@dataclass(frozen=True)
class Call:
    """One call being carried out.

    Attributes:
        state: the pool.
        method: such as ``VDI.snapshot``.
        host: ref of the host that was asked.
        session: ref of the caller's session; "" inside the simulator.
        cancelled: set when the call's task is cancelled; None if it has no task.
    """

    state: State
    method: str
    host: str
    session: str
    arguments: dict[str, Value] = field(default_factory=dict[str, Value])
    cancelled: threading.Event | None = None

    def given(self, name: str) -> bool:
        """Return whether an optional parameter was given."""
        return name in self.arguments

    def text(self, name: str, default: str = "") -> str:
        """Return a string, enum or reference."""
        return str(self.arguments.get(name, default))

    def number(self, name: str) -> int:
        """Return an int; XML-RPC clients send large ones as strings."""
        return number(self.arguments[name], name=name)

    def seconds(self, name: str) -> float:
        """Return a float."""
        value = self.arguments[name]
        try:
            return float(value) if isinstance(value, int | float | str) else 0.0
        except ValueError:
            raise SimError("FIELD_TYPE_ERROR", name) from None

    def flag(self, name: str) -> bool:
        """Return a truth value."""
        return self.arguments.get(name) is True

    def mapping(self, name: str) -> dict[str, Value]:
        """Return a map or record; empty if it was not given."""
        value = self.arguments.get(name, {})
        if not isinstance(value, dict):
            raise SimError("FIELD_TYPE_ERROR", name)
        return value

    def texts(self, name: str) -> list[str]:
        """Return a set of strings or references; empty if it was not given."""
        value = self.arguments.get(name, [])
        if not isinstance(value, list):
            raise SimError("FIELD_TYPE_ERROR", name)
        return [str(item) for item in value]


Handler = Callable[[Call], Value]


@dataclass(frozen=True)
class Method:
    """An API method."""

    name: str
    parameters: tuple[Parameter, ...]
    run: Handler
    has_session: bool
    has_async: bool

    def bind(self, values: Sequence[Value], *, state: State) -> dict[str, Value]:
        """Return arguments by name.

        Raises:
            SimError: MESSAGE_PARAMETER_COUNT_MISMATCH, HANDLE_INVALID, FIELD_TYPE_ERROR.
        """
        least = sum(not parameter.optional for parameter in self.parameters)
        if not least <= len(values) <= len(self.parameters):
            raise SimError(
                "MESSAGE_PARAMETER_COUNT_MISMATCH", self.name, str(least), str(len(values))
            )
        bound: dict[str, Value] = {}
        for parameter, value in zip(self.parameters, values, strict=False):
            if parameter.type in fields.CLASSES:
                with state.lock:
                    state.db.record(parameter.type, str(value))
            elif parameter.type == "int":
                value = number(value, name=parameter.name)
            bound[parameter.name] = value
        return bound


METHODS: dict[str, Method] = {}
"""Every method that has its own function; see ``accessors`` for those of fields."""


def method(
    name: str, *spec: str, has_session: bool = True, has_async: bool = True
) -> Callable[[Handler], Handler]:
    """Enter a function in the table.

    Args:
        name: of the method, such as ``VDI.resize``.
        spec: a string for each parameter, such as ``"VDI self"`` or ``"map options?"``.
        has_session: the first parameter on the wire is a session.
        has_async: there is ``Async.NAME``.
    """

    def enter(run: Handler) -> Handler:
        METHODS[name] = Method(name, parse(*spec), run, has_session, has_async)
        return run

    return enter


def parse(*spec: str) -> tuple[Parameter, ...]:
    """Return parameters from ``"VDI self"`` and so on."""
    pairs = [item.split() for item in spec]
    return tuple(Parameter(t, n.rstrip("?"), optional=n.endswith("?")) for t, n in pairs)


def number(value: Value, *, name: str) -> int:
    """Return an int that may have come as a string.

    Raises:
        SimError: FIELD_TYPE_ERROR.
    """
    try:
        if isinstance(value, int | str):
            return int(value)
    except ValueError:
        pass
    raise SimError("FIELD_TYPE_ERROR", name)


def known(ref: str) -> bool:
    """Return whether a reference is neither empty nor null."""
    return ref not in ("", NULL)
