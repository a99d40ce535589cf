"""Upload: a body of known length, sent to one of xapi's handlers, which answers before it reads.

xapi sends ``200`` or an error first, and only then takes the body (xen-api, import_raw_vdi.ml). An
HTTP client that sends the body first would lose what a host says that turns it away: the
connection is reset under the body. So this speaks the little HTTP that is needed itself. What
became of the body is never in the answer; the handler's task tells.
"""

import ssl
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

import trio

from . import errors, peers, wire
from .handlers import Moved
from .wire import NoAnswer

LONGEST_HEAD = 1024
"""Bytes of request line and headers that xapi takes (xen-api, xapi_globs.ml)."""

SILENCE = 300.0
"""Seconds without progress after which a host does not answer: it attaches a disk meanwhile."""

_LONGEST_ANSWER = 64 << 10

_Stream = trio.SSLStream[trio.SocketStream]


@dataclass(frozen=True, slots=True)
class Upload:
    """What is to be sent.

    Args:
        path: of the handler.
        query: its parameters.
        length: of the body in bytes.
        body: returns its parts, from the beginning each time.
    """

    path: str
    query: Mapping[str, str]
    length: int
    body: Callable[[], AsyncGenerator[bytes | memoryview]]


@dataclass(frozen=True, slots=True)
class Host:
    """Whom it is sent to, and by which session."""

    address: str
    port: int
    context: ssl.SSLContext
    session: str


@asynccontextmanager
async def sent(upload: Upload, host: Host, *, asked: Callable[[], None]) -> AsyncGenerator[None]:
    """Send it; the connection stays open within the block, where the task is to be waited for.

    Args:
        upload: what.
        host: where to.
        asked: called as soon as the host may have received the request.

    Raises:
        Moved: another host is to be asked.
        XapiFailure: the session is not known any more.
        AuthenticationFailed: its certificate is not the expected one; nothing was sent.
        PoolError: it answered something else than 200, or the head would be too long for it.
        NoAnswer, OSError: it did not answer, or hung up.
    """
    head = _head(upload, host)
    stream = await _connected(host)
    try:
        with _translated(host.address):
            asked()
            await _patiently(stream, head)
            _check(await _answer(stream), host.address, upload.path)
            await _send_body(stream, upload)
        yield
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)


def _head(upload: Upload, host: Host) -> bytes:
    lines = (
        f"PUT {upload.path}?{urlencode(upload.query)} HTTP/1.1",
        f"Host: {peers.netloc(host.address, host.port)}",
        f"User-Agent: {wire.USER_AGENT}",
        f"Cookie: session_id={host.session}",
        f"Content-Length: {upload.length}",
        "Connection: close",
    )
    head = "".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii", errors="replace")
    if len(head) > LONGEST_HEAD:
        raise errors.PoolError(f"xapi takes no request as long as this one for {upload.path}")
    return head


async def _connected(host: Host) -> _Stream:
    with _translated(host.address), trio.fail_after(SILENCE):
        plain = await trio.open_tcp_stream(host.address, host.port)
        stream = trio.SSLStream(
            plain, host.context, server_hostname=host.address, https_compatible=True
        )
        try:
            await stream.do_handshake()
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(plain)
            raise
        return stream


async def _send_body(stream: _Stream, upload: Upload) -> None:
    left = upload.length
    async with aclosing(upload.body()) as parts:
        async for part in parts:
            left -= len(part)
            await _patiently(stream, part)
    if left:
        raise errors.PoolError(f"the body for {upload.path} has another length than announced")


async def _patiently(stream: _Stream, data: bytes | memoryview) -> None:
    with trio.fail_after(SILENCE):
        await stream.send_all(data)


async def _answer(stream: _Stream) -> bytes:
    """Return the head of an answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        with trio.fail_after(SILENCE):
            more = await stream.receive_some()
        if not more or len(data) > _LONGEST_ANSWER:
            raise NoAnswer("it hung up", sent=True)
        data += bytes(more)
    return data.partition(b"\r\n\r\n")[0]


def _check(head: bytes, host: str, path: str) -> None:
    """Raise what an answer means, unless it is the one that asks for the body."""
    first, *lines = head.decode("latin-1").split("\r\n")
    status = first.split(" ")[1] if first.startswith("HTTP/1.") and " " in first else ""
    if status == "200":
        return
    if status == "302":
        fields = {name.lower(): value.strip() for name, _, value in map(_field, lines)}
        raise _moved(fields.get("location", ""), host)
    if status == "401":
        raise errors.XapiFailure("SESSION_INVALID", method=path)
    raise errors.PoolError(f"{host} answered {path} with HTTP {status or 'nonsense'}")


def _field(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def _moved(location: str, host: str) -> Exception:
    """Return what a redirect means: only the host is taken from it, not what to ask there."""
    try:
        parts = urlsplit(location)
        there = parts.hostname if parts.scheme == "https" else None
    except ValueError:
        there = None
    return Moved(there) if there else errors.PoolError(f"{host} sends us on to nowhere")


@contextmanager
def _translated(host: str) -> Generator[None]:
    """Raise what the network's errors mean."""
    try:
        yield
    except trio.TooSlowError as exc:
        raise NoAnswer("it is silent", sent=True) from exc
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise wire.cause_of(exc, host) or NoAnswer("it hung up", sent=True) from exc
