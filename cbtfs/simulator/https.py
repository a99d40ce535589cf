"""HTTP/1.1 as xapi's own server speaks it: strict, small, with HTML for errors.

Limits and answers are xapi's (xen-api, ocaml/libs/http-lib/http.ml, http_svr.ml; xapi_globs.ml):
request line and headers in 1024 bytes or 431, a body of an API call needs Content-Length and has
at most 300 KiB, an unknown address is 403.
"""

import base64
import binascii
import contextlib
import logging
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, unquote, urlsplit

log = logging.getLogger(__name__)

MAX_HEADER = 1024
MAX_CALL = 300 * 1024
HEADER_PATIENCE = 10.0
"""How long xapi waits for more of a header, in seconds (http.ml)."""


class HttpError(Exception):
    """A request that ends in an HTML page.

    Args:
        status: HTTP status.
        text: what the page says.
        headers: further header lines.
    """

    def __init__(self, status: int, text: str = "", *, headers: Iterable[str] = ()) -> None:
        self.status = status
        self.text = text
        self.headers = tuple(headers)
        super().__init__(f"{status} {text}")


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head; the body is still in the connection."""

    method: str
    path: str
    target: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)

    @property
    def keep_alive(self) -> bool:
        """Whether the client expects another answer on this connection."""
        return self.headers.get("connection", "").lower() != "close"

    @property
    def length(self) -> int | None:
        """Content-Length in bytes, None if the client did not say."""
        text = self.headers.get("content-length", "")
        return int(text) if text.isdigit() else None

    @property
    def cookies(self) -> Mapping[str, str]:
        """Cookies sent along."""
        jar = SimpleCookie()
        with contextlib.suppress(CookieError):
            jar.load(self.headers.get("cookie", ""))
        return {name: unquote(morsel.value) for name, morsel in jar.items()}

    def parameter(self, name: str) -> str:
        """Return a parameter of the query, else of the cookies, else ""."""
        return self.query.get(name) or self.cookies.get(name, "")

    @property
    def basic(self) -> tuple[str, str] | None:
        """User and password of HTTP Basic, None without."""
        scheme, _, coded = self.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(coded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        return user, password


class Stream:
    """A connection of which heads, exact bodies and answers are read and written.

    Args:
        connection: connected and blocking; closed by its owner.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._ahead = b""

    def request(self) -> Request | None:
        """Return the next request, None at the end of the connection.

        Raises:
            HttpError: 431 for a long head, 400 for nonsense, 408 for a stalled one.
        """
        head = self._head()
        if head is None:
            return None
        try:
            return _parse(head)
        except ValueError:
            raise HttpError(400, "Bad request") from None

    def body(self, length: int) -> bytes:
        """Return the next ``length`` bytes; raise EOFError if there are fewer."""
        data = bytearray(length)
        self.into(memoryview(data))
        return bytes(data)

    def into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes; raise EOFError if there are fewer."""
        count = min(len(view), len(self._ahead))
        view[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        view = view[count:]
        while view:
            count = self.connection.recv_into(view)
            if count == 0:
                raise EOFError
            view = view[count:]

    def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``."""
        self.connection.sendall(data)

    def answer(self, status: int, *, headers: Iterable[str] = (), body: bytes = b"") -> None:
        """Send a complete answer with its length."""
        lines = [*headers, f"Content-Length: {len(body)}"]
        self.send(_status_line(status, lines) + body)

    def start(self, status: int, headers: Iterable[str]) -> None:
        """Send a head of an answer whose end is the end of the connection."""
        self.send(_status_line(status, headers))

    def page(self, error: HttpError) -> None:
        """Send the HTML page of an error."""
        headers = [*error.headers, "Content-Type: text/html", "Connection: close"]
        self.answer(error.status, headers=headers, body=html(error))

    def _head(self) -> bytes | None:
        data = self._ahead
        self.connection.settimeout(None if not data else HEADER_PATIENCE)
        try:
            while (end := data.find(b"\r\n\r\n")) < 0:
                if len(data) > MAX_HEADER:
                    raise HttpError(431)
                more = self.connection.recv(65536)
                if not more:
                    return None
                self.connection.settimeout(HEADER_PATIENCE)
                data += more
        except TimeoutError:
            raise HttpError(408) from None
        self.connection.settimeout(None)
        if end + 4 > MAX_HEADER:
            raise HttpError(431)
        self._ahead = data[end + 4 :]
        return data[:end]


def html(error: HttpError) -> bytes:
    """Return the page xapi shows for an error."""
    title = f"HTTP {error.status} {_phrase(error.status)}"
    return f"<html><body><h1>{title}</h1>{error.text}</body></html>".encode()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase.lower()
    except ValueError:
        return ""


def _status_line(status: int, headers: Iterable[str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {_phrase(status).capitalize()}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1", errors="replace")


def _parse(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    parts = urlsplit(target)
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines)
    }
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    return Request(method, parts.path, target, query, headers)
