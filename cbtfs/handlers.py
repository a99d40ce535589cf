"""HTTP to a host through httpx: JSON-RPC for what is read in bulk, and xapi's own handlers."""

import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httpx
import msgspec
import trio

from . import errors, peers, wire
from .units import MiB
from .wire import NoAnswer

NOT_JSON = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What msgspec raises of an answer that it does not understand."""

LONGEST = 512 * MiB
"""Bytes of an answer: a bitmap of 16 TiB takes 43 MB, ten thousand disks 20 MB."""


class Moved(Exception):
    """Another host has what was asked for."""

    def __init__(self, host: str) -> None:
        self.host = host
        super().__init__(host)


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is wanted of an answer of one of xapi's handlers: only as much as ``take`` likes.

    Args:
        path: of the handler.
        query: its parameters.
        take: given each part of the body in order; True, or a CbtfsError, ends it.
        silence: seconds without a byte after which a host does not answer.
    """

    path: str
    query: Mapping[str, str]
    take: Callable[[bytes], bool]
    silence: float


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    data: tuple[str, ...] = ()


class _Answer(msgspec.Struct, frozen=True):
    """A JSON-RPC 2.0 answer whose result is left as it is."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: _Error | None = None


class _Closable(Protocol):
    async def aclose(self) -> None: ...


class _Opening:
    """Follows how a request gets its connection (httpx's ``trace``), and closes what failed.

    httpcore closes the socket of a TLS handshake that fails, but not of one that is cancelled.

    Args:
        asked: called as soon as the host may have received the request.
    """

    def __init__(self, asked: Callable[[], None] | None = None) -> None:
        self._asked = asked
        self._stream: _Closable | None = None

    async def trace(self, event: str, told: Mapping[str, object]) -> None:
        """Take one of httpcore's events."""
        if event == "connection.connect_tcp.complete":
            self._stream = cast(_Closable, told["return_value"])
        elif event == "connection.start_tls.failed" and self._stream is not None:
            with trio.CancelScope(shield=True):
                await self._stream.aclose()
        elif event == "http11.send_request_headers.started" and self._asked is not None:
            self._asked()


class _Body(httpx.AsyncByteStream):
    """The body of a request, in one piece.

    httpx has a generator for that, which is left to the garbage collector where sending is
    cancelled; trio warns of it.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Pieces([self._data] if self._data else [])


class _Pieces(AsyncIterator[bytes]):
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __anext__(self) -> bytes:
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop()


class Web:
    """The HTTP clients of one session, one for each master and how it was verified."""

    def __init__(self, port: int, *, timeout: float) -> None:
        self._port = port
        self._timeout = timeout
        self._clients: dict[tuple[str, ssl.SSLContext], httpx.AsyncClient] = {}

    async def post(
        self, host: str, context: ssl.SSLContext, method: str, params: Sequence[object]
    ) -> bytes:
        """Call ``method``, which only reads, over JSON-RPC and return its value as JSON.

        Raises:
            XapiFailure: xapi refused.
            NoAnswer: the host did not answer.
            AuthenticationFailed: its certificate is not the expected one.
            PoolError: it answered something else.
        """
        call = {"jsonrpc": "2.0", "method": method, "params": params, "id": 1}
        client = self._client(host, context)
        request = client.build_request(
            "POST",
            "/jsonrpc",
            content=msgspec.json.encode(call),
            headers={"Content-Type": "application/json"},
        )
        body = await _sent(client, host, request, what=method)
        try:
            answer = msgspec.json.decode(body, type=_Answer)
        except NOT_JSON as exc:
            raise errors.PoolError(f"{host} answered {method} in no form that xapi uses") from exc
        if answer.error is not None:
            raise errors.XapiFailure(answer.error.message, answer.error.data, method=method)
        return bytes(answer.result)

    async def get(
        self,
        host: str,
        context: ssl.SSLContext,
        path: str,
        *,
        query: Mapping[str, str],
        session: str,
    ) -> bytes:
        """Return the body of one of xapi's handlers; raises as ``post``."""
        client = self._client(host, context)
        request = client.build_request(
            "GET",
            path,
            params=dict(query),
            headers={"Cookie": f"session_id={session}"},
        )
        return await _sent(client, host, request, what=path)

    async def peek(
        self,
        host: str,
        context: ssl.SSLContext,
        wanted: Beginning,
        *,
        session: str,
        asked: Callable[[], None],
    ) -> None:
        """Ask one of xapi's handlers, and hang up once there is enough of its answer.

        ``asked`` is called as soon as the host may have received the request.

        Raises:
            Moved: another host is to be asked.
            PoolError: the answer ended before there was enough, or as ``post``.
        """
        client = self._client(host, context)
        request = client.build_request(
            "GET",
            wanted.path,
            params=dict(wanted.query),
            headers={"Cookie": f"session_id={session}"},
            timeout=wanted.silence,
        )
        try:
            response = await _begun(client, request, asked=asked)
            try:
                if response.status_code == 302:
                    raise _moved(response, host)
                _check(response, host, what=wanted.path)
                enough = await _each(response, wanted.take)
            finally:
                await response.aclose()
        except httpx.TransportError as exc:
            raise _no_answer(exc, host) from exc
        if not enough:
            raise errors.PoolError(f"{host} ended its answer to {wanted.path} too early")

    async def close(self) -> None:
        """Close every connection."""
        while self._clients:
            await self._clients.popitem()[1].aclose()

    def _client(self, host: str, context: ssl.SSLContext) -> httpx.AsyncClient:
        if (host, context) not in self._clients:
            self._clients[host, context] = httpx.AsyncClient(
                base_url=f"https://{peers.netloc(host, self._port)}",
                verify=context,
                timeout=self._timeout,
                headers={"User-Agent": wire.USER_AGENT, "Accept-Encoding": "identity"},
                limits=httpx.Limits(keepalive_expiry=300),
                trust_env=False,  # no proxy: a session must reach nobody but the host
            )
        return self._clients[host, context]


async def _sent(
    client: httpx.AsyncClient, host: str, request: httpx.Request, *, what: str
) -> bytes:
    """Send a request and return the body of its answer; raises as ``Web.post``."""
    try:
        response = await _begun(client, request)
        try:
            body = await _body(response, host)
        finally:
            await response.aclose()
    except httpx.TransportError as exc:
        raise _no_answer(exc, host) from exc
    _check(response, host, what=what)
    return body


async def _begun(
    client: httpx.AsyncClient, request: httpx.Request, *, asked: Callable[[], None] | None = None
) -> httpx.Response:
    """Send a request and return its answer as far as the headers; cancelled, it leaves nothing."""
    request.extensions["trace"] = _Opening(asked).trace
    request.stream = _Body(request.content)
    return await client.send(request, stream=True)


def _check(response: httpx.Response, host: str, *, what: str) -> None:
    """Raise what the status of an answer means, unless it is the one that promises a body."""
    status = response.status_code
    if status == 200:
        return
    if status == 401:
        raise errors.XapiFailure("SESSION_INVALID", method=what)
    if status >= 500 and response.request.method == "POST":  # what xapi says while it starts
        raise NoAnswer(f"HTTP {status}", sent=True)
    raise errors.PoolError(f"{host} answered {what} with HTTP {status}")


def _moved(response: httpx.Response, host: str) -> Exception:
    """Return what a redirect means: only the host is taken from it, not what to ask there."""
    try:
        parts = urlsplit(str(response.headers.get("Location", "")))
        there = parts.hostname if parts.scheme == "https" else None
    except ValueError:
        there = None
    if not there:
        return errors.PoolError(f"{host} sends us on to nowhere")
    return Moved(there)


async def _body(response: httpx.Response, host: str) -> bytes:
    """Return what a host answered, which nobody asked it to compress."""
    body = bytearray()

    def take(part: bytes) -> bool:
        body.extend(part)
        return len(body) > LONGEST

    if await _each(response, take):
        raise errors.PoolError(f"the answer of {host} has no end")
    return bytes(body)


async def _each(response: httpx.Response, take: Callable[[bytes], bool]) -> bool:
    """Give the parts of an answer to ``take``; hang up and return True once that says True.

    An error that ``take`` raises hangs up, too.
    """
    over = False
    failure: errors.CbtfsError | None = None
    try:
        async for part in response.aiter_raw():
            try:
                over = over or take(part)
            except errors.CbtfsError as exc:
                over, failure = True, exc
            if over:
                # not to be left in the middle: httpx has generators below this one, which then
                # only the garbage collector ends; so the next part fails instead
                await response.aclose()
    except (httpx.TransportError, httpx.StreamError):
        if not over:
            raise
    if failure is not None:
        raise failure
    return over


def _no_answer(exc: httpx.TransportError, host: str) -> Exception:
    silent = isinstance(exc, httpx.TimeoutException)
    why = "it is silent" if silent else str(exc) or type(exc).__name__
    return wire.cause_of(exc, host) or NoAnswer(why, sent=True)
