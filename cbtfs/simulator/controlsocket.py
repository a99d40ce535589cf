"""The control socket: one JSON line in, one JSON line out, over ``DIR/control.sock``.

Request ``{"command": "set", "arguments": ["nbd.delay=2ms"]}``; answer ``{"result": …}`` or
``{"error": "one sentence", "kind": "usage"}``.
"""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from cbtfs import errors

from .failures import SimError
from .listener import Listener, listen_unix

NAME = "control.sock"


class Request(msgspec.Struct):
    """A line from a client."""

    command: str
    arguments: list[str] = []


class Answer(msgspec.Struct, omit_defaults=True):
    """A line to a client; ``error`` is "" where all went well."""

    result: object = None
    error: str = ""
    kind: str = ""


Execute = Callable[[str, list[str]], object]


def serve(directory: Path, execute: Execute) -> Listener:
    """Answer commands with what ``execute(command, arguments)`` returns, until stopped."""

    def handle(connection: socket.socket) -> None:
        with connection.makefile("rwb") as file:
            for line in file:
                file.write(msgspec.json.encode(_answer(execute, line)) + b"\n")
                file.flush()

    return Listener(listen_unix(directory / NAME), handle, name="control")


def ask(directory: Path, command: str, *arguments: str) -> object:
    """Have the simulator of ``directory`` carry out a command; return its answer.

    Raises:
        NotFound: no simulator runs there.
        UsageError: it does not know the command, the setting or the value.
        CbtfsError: it failed, or cannot be asked.
    """
    request = msgspec.json.encode(Request(command, list(arguments)))
    with contextlib.closing(_connect(directory)) as connection:
        connection.sendall(request + b"\n")
        with connection.makefile("rb") as file:
            line = file.readline()
    try:
        answer = msgspec.json.decode(line, type=Answer)
    except msgspec.DecodeError:
        raise errors.CbtfsError(
            f"the simulated pool in {directory} ended before it answered"
        ) from None
    if answer.error:
        kind = errors.UsageError if answer.kind == "usage" else errors.CbtfsError
        raise kind(f"simulated pool: {answer.error}")
    return answer.result


def _connect(directory: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{folder}/{NAME}")
        finally:
            os.close(folder)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connection.close()
        raise errors.NotFound(
            f"no simulated pool runs in {directory}; start one with: cbtfs sim start {directory}"
        ) from None
    except OSError as exc:
        connection.close()
        raise errors.CbtfsError(
            f"the simulated pool in {directory} cannot be asked: {exc.strerror}"
        ) from None
    return connection


def _answer(execute: Execute, line: bytes) -> Answer:
    try:
        request = msgspec.json.decode(line, type=Request)
        return Answer(result=execute(request.command, request.arguments))
    except (errors.UsageError, msgspec.DecodeError) as exc:
        return Answer(error=str(exc), kind="usage")
    except (errors.CbtfsError, SimError, OSError, ValueError, KeyError, TypeError) as exc:
        return Answer(error=f"{type(exc).__name__}: {exc}")
