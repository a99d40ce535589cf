"""The control socket: one JSON line in, one JSON line out, over ``DIR/control.sock``.

Request ``{"command": "set", "arguments": ["nbd.delay=2ms"]}``; answer ``{"result": …}`` or
``{"error": "one sentence", "kind": "usage"}``.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from cbtfs import errors

from .failures import SimError
from .guest import listen_unix
from .listener import Listener

NAME = "control.sock"

Execute = Callable[[str, list[str]], object]


def serve(directory: Path, execute: Execute) -> Listener:
    """Answer commands with what ``execute(command, arguments)`` returns, until stopped."""

    def handle(connection: socket.socket) -> None:
        with connection.makefile("rwb") as file:
            for line in file:
                file.write(json.dumps(_answer(execute, line)).encode() + b"\n")
                file.flush()

    return Listener(listen_unix(directory / NAME), handle, name="control")


def ask(directory: Path, command: str, *arguments: str) -> object:
    """Have the simulator of ``directory`` carry out a command; return its answer.

    Raises:
        NotFound: no simulator runs there.
        UsageError: it does not know the command, the setting or the value.
        CbtfsError: it failed.
    """
    request = json.dumps({"command": command, "arguments": arguments})
    with contextlib.closing(_connect(directory)) as connection:
        connection.sendall(request.encode() + b"\n")
        with connection.makefile("rb") as file:
            line = file.readline()
    answer: object = json.loads(line) if line else {"error": "it ended while it was asked"}
    if not isinstance(answer, dict):
        raise errors.CbtfsError(f"the simulated pool in {directory} talks nonsense")
    if "error" in answer:
        kind = errors.UsageError if answer.get("kind") == "usage" else errors.CbtfsError
        raise kind(f"simulated pool: {answer['error']}")
    result: object = answer.get("result")
    return result


def _connect(directory: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            connection.connect(f"/proc/self/fd/{folder}/{NAME}")
        finally:
            os.close(folder)
    except OSError:
        connection.close()
        raise errors.NotFound(
            f"no simulated pool runs in {directory}; start one with: cbtfs sim start {directory}"
        ) from None
    return connection


def _answer(execute: Execute, line: bytes) -> dict[str, object]:
    try:
        request: object = json.loads(line)
        if not isinstance(request, dict):
            return {"error": "a command is a JSON object", "kind": "usage"}
        arguments = [str(argument) for argument in request.get("arguments", [])]
        return {"result": execute(str(request.get("command")), arguments)}
    except errors.UsageError as exc:
        return {"error": str(exc), "kind": "usage"}
    except (errors.CbtfsError, SimError, OSError, ValueError, KeyError, TypeError) as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
