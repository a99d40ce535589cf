"""The HTTPS server of one host: API calls to the API, everything else to the handlers."""

import contextlib
import logging
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping

from . import api
from .https import MAX_CALL, HttpError, Request, Stream
from .pool import HostAddress, SimulatedPool
from .xapinbd import Identity, NbdCounters

log = logging.getLogger(__name__)

_CALLS = frozenset({"/", "/RPC2", "/json", "/jsonrpc"})

Handler = Callable[[Request, Stream], None]


class XapiServer:
    """The HTTPS service of one host; `serve` is a `listener.Listener`'s handler.

    Args:
        pool: answers the calls.
        host: which host this is.
        identity: names and certificates.
        handlers: by method and path, such as ``("GET", "/export_raw_vdi")``; each ends its
            connection.
        stopping: set when the simulator ends.
        counters: told what an impostor received.
    """

    def __init__(
        self, pool: SimulatedPool, host: HostAddress, *, identity: Identity,
        handlers: Mapping[tuple[str, str], Handler], stopping: threading.Event,
        counters: NbdCounters,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._host = host
        self._identity = identity
        self._handlers = handlers
        self._stopping = stopping
        self._counters = counters

    def serve(self, connection: socket.socket) -> None:
        """Serve one connection until its end."""
        if self._hit("http.reset"):
            connection.recv(1)  # let the client begin its handshake
            # a linger time of zero turns the close into a reset
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        while self._hit("http.silent"):
            if self._stopping.wait(0.05):
                return
        impostor = self._hit("http.impostor")
        context = self._identity.impostor if impostor else self._identity.context
        with contextlib.suppress(EOFError, OSError):
            # a copy of the descriptor: the listener must stay able to shut the original down
            with context.wrap_socket(connection.dup(), server_side=True) as encrypted:
                self._requests(Stream(encrypted), impostor=impostor)
                _goodbye(encrypted)

    def _requests(self, stream: Stream, *, impostor: bool) -> None:
        try:
            while (request := stream.request()) is not None:
                if impostor:
                    self._counters.stole(f"{request.method} {request.target}")
                if not self._answer(request, stream):
                    return
        except HttpError as error:
            stream.page(error)

    def _answer(self, request: Request, stream: Stream) -> bool:
        """Answer one request; return whether the connection goes on."""
        status = self._pool.faults.text("http.status")
        if status:
            raise HttpError(int(status) if status.isdigit() else 500, "fault injected")
        if request.method == "POST" and request.path in _CALLS:
            return self._call(request, stream)
        handler = self._handlers.get((request.method, request.path))
        if handler is None:
            raise HttpError(403, "Forbidden")
        handler(request, stream)
        return False

    def _call(self, request: Request, stream: Stream) -> bool:
        length = request.length
        if length is None or length > MAX_CALL:
            raise HttpError(400, "Bad request")
        body = stream.body(length)
        client = request.headers.get("user-agent", "")
        status, kind, answer = api.handle_rpc(
            self._pool, self._host.ref, path=request.path, body=body, client=client
        )
        keep = request.keep_alive and status == 200
        headers = [
            f"Content-Type: {kind}",
            "Connection: keep-alive" if keep else "Connection: close",
            "Cache-Control: no-cache, no-store",
        ]
        stream.answer(status, headers=headers, body=answer)
        return keep

    def _hit(self, key: str) -> bool:
        return self._pool.faults.hits(key, *self._identity.names)


def _goodbye(encrypted: ssl.SSLSocket) -> None:
    with contextlib.suppress(OSError, ValueError):
        encrypted.settimeout(0)
        encrypted.unwrap()
