"""XML-RPC to a host, through the XenAPI package in worker threads, one line per thread.

The package wraps ``xmlrpc.client.ServerProxy``, which blocks, is not thread-safe, sends a call
again when a connection breaks, and logs in again behind one's back. So a ``Line`` is one connection
that serves one thread at a time and breaks for good, called by the proxy's plain methods; what a
failure means is decided by the session that owns the lines.
"""

import http.client
import math
import select
import ssl
import threading
import time
import xml.parsers.expat
import xmlrpc.client
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import msgspec
import trio
import XenAPI

from . import __version__, errors, peers, tls
from .units import KiB, MiB

USER_AGENT = f"cbtfs/{__version__}"  # short: xapi takes 1024 bytes of headers

NOT_XML_RPC = (
    xml.parsers.expat.ExpatError,
    xmlrpc.client.Error,
    # what the package raises of values that are none, of types that are no key, of what never began
    ValueError,
    TypeError,
    LookupError,
    RecursionError,
)
"""What xmlrpc.client raises of an answer that it does not understand."""

LONGEST = 64 * MiB
"""Bytes of an answer; what is long in a pool is read over JSON-RPC."""

FRESH = 1.0
"""Seconds after an answer in which a line is as good as a new one, which costs a TLS handshake."""

_THREADS = 8
"""Calls of one session at a time; xapi serves 800 connections to everybody."""


class _Remote(Protocol):
    """A method of the proxy."""

    def __call__(self, *params: object) -> object: ...


class _Answer(msgspec.Struct, frozen=True):
    """The struct in which xapi wraps every answer."""

    status: str = msgspec.field(name="Status")
    value: object = msgspec.field(name="Value", default=None)
    error: list[str] = msgspec.field(name="ErrorDescription", default_factory=list[str])


class NoAnswer(Exception):
    """A host did not answer; ``sent`` tells whether it may have received the call."""

    def __init__(self, why: str, *, sent: bool) -> None:
        self.sent = sent
        super().__init__(why)


def cause_of(exc: BaseException, host: str) -> Exception | None:
    """Return what an error of a connection to ``host`` means; None if it does not say."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return errors.AuthenticationFailed(
                f"{host} no longer shows the certificate it showed before "
                f"({cause.verify_message}); run the command again, and compare its fingerprint if "
                "that fails too"
            )
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError):
            return NoAnswer(tls.explain(cause), sent=True)
        cause = cause.__cause__ or cause.__context__
    return None


class _Transport(xmlrpc.client.SafeTransport):
    """HTTPS with our TLS context and a time limit, over a single connection."""

    user_agent = USER_AGENT
    accept_gzip_encoding = False

    def __init__(self, context: ssl.SSLContext, *, timeout: float) -> None:
        super().__init__()
        self._tls = context
        self._timeout = timeout
        self._line: http.client.HTTPSConnection | None = None
        self._broken = False

    def make_connection(
        self, host: tuple[str, dict[str, str]] | str
    ) -> http.client.HTTPSConnection:
        """Return the one connection; the base class asks again to send a call a second time."""
        if self._broken:
            raise ConnectionAbortedError("the host closed the connection")
        if self._line is None:
            self._line = http.client.HTTPSConnection(
                str(host), timeout=self._timeout, context=self._tls
            )
        return self._line

    def parse_response(  # type: ignore[override]  # the base class names a type of typeshed's own
        self, response: http.client.HTTPResponse
    ) -> tuple[object, ...]:
        """Return what an answer holds, as the base class does, but only up to a length."""
        parser, unmarshaller = self.getparser()
        length = 0
        with response:
            while data := response.read(64 * KiB):
                length += len(data)
                if length > LONGEST:
                    raise errors.PoolError("the host's answer has no end")
                parser.feed(data)
        parser.close()
        return unmarshaller.close()

    def close(self) -> None:
        """Close the connection for good; the base class does so after any failure."""
        self._broken = True
        if self._line is not None:
            self._line.close()

    def is_quiet(self) -> bool:
        """Tell whether the host has sent nothing unasked and has not hung up."""
        if self._broken or self._line is None or self._line.sock is None:
            return False
        waiting = select.poll()
        waiting.register(self._line.sock, select.POLLIN)
        return not waiting.poll(0)


class Line:
    """One connection to one host; ``call`` blocks, and is for one thread at a time.

    Args:
        host: its address.
        port: its port.
        context: verifies it.
        timeout: seconds of silence after which it does not answer.
    """

    def __init__(self, host: str, port: int, *, context: ssl.SSLContext, timeout: float) -> None:
        self.host = host
        self._netloc = peers.netloc(host, port)
        self._transport = _Transport(context, timeout=timeout)
        self._proxy = XenAPI.Session(f"https://{self._netloc}", transport=self._transport)
        self._lock = threading.Lock()
        self._busy = self._unwanted = False
        self._answered = -math.inf

    def call(self, method: str, params: Sequence[object]) -> object:
        """Call ``method`` and return its value.

        Raises:
            XapiFailure: xapi refused.
            NoAnswer: the host did not answer.
            AuthenticationFailed: its certificate is not the expected one; nothing was sent.
            PoolError: it answered something else.
        """
        with self._lock:
            self._busy = True
        try:
            self._connect()
            answer = self._request(method, params)
            self._answered = time.monotonic()
            return _value(answer, method)
        finally:
            with self._lock:
                self._busy = False
                if self._unwanted:
                    self._transport.close()

    def is_fresh(self) -> bool:
        """Tell whether it was of use just now, and nothing has happened to it since."""
        return time.monotonic() - self._answered < FRESH and self._transport.is_quiet()

    def discard(self) -> None:
        """Close the line, or have the thread that still uses it do so."""
        with self._lock:
            self._unwanted = True
            if not self._busy:
                self._transport.close()

    def _connect(self) -> None:
        line = self._transport.make_connection(self._netloc)
        if getattr(line, "sock", None) is not None:
            return
        try:
            line.connect()
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as exc:
            raise NoAnswer("the connection was closed in the TLS handshake", sent=False) from exc
        except ssl.SSLError as exc:
            why = getattr(exc, "verify_message", "") or exc.reason or "TLS error"
            raise errors.AuthenticationFailed(
                f"{self._netloc} no longer shows the certificate it showed before ({why}); run the "
                "command again, and compare its fingerprint if that fails too"
            ) from exc
        except OSError as exc:
            raise NoAnswer(tls.explain(exc), sent=False) from exc

    def _request(self, method: str, params: Sequence[object]) -> object:
        remote = cast(_Remote, getattr(self._proxy, method))
        try:
            return remote(*(_encoded(value) for value in params))
        except xmlrpc.client.ProtocolError as exc:
            if exc.errcode >= 500:  # what xapi says while it starts
                raise NoAnswer(f"HTTP {exc.errcode}", sent=True) from exc
            raise errors.PoolError(
                f"{self._netloc} answered {method} with HTTP {exc.errcode}: is this a xapi?"
            ) from exc
        except (OSError, http.client.HTTPException) as exc:
            why = tls.explain(exc) if isinstance(exc, OSError) else "the answer was cut"
            raise NoAnswer(why, sent=True) from exc
        except NOT_XML_RPC as exc:
            raise errors.PoolError(
                f"{self._netloc} answered {method} with something else than XML-RPC: is this a xapi?"
            ) from exc


class Lines:
    """The lines of one session, kept for the next call."""

    def __init__(self, port: int, *, timeout: float) -> None:
        self._port = port
        self._timeout = timeout
        self._idle: list[Line] = []
        self._threads = trio.CapacityLimiter(_THREADS)

    async def call(
        self, host: str, context: ssl.SSLContext, method: str, params: Sequence[object]
    ) -> object:
        """Call ``method`` at ``host``; raises as ``Line.call``.

        A call that may be repeated takes an idle line, which its host may have closed meanwhile,
        and if cancelled is left behind. Any other takes one that was of use just now or is new, so
        that it is not lost without anybody knowing whether it was carried out; it is waited for.
        """
        harmless = is_repeatable(method)
        line = self._take(host, fresh=not harmless)
        line = line or Line(host, self._port, context=context, timeout=self._timeout)
        try:
            value = await trio.to_thread.run_sync(
                line.call, method, params, abandon_on_cancel=harmless, limiter=self._threads
            )
        except errors.XapiFailure:
            self._keep(line)
            raise
        except BaseException:
            line.discard()
            raise
        self._keep(line)
        return value

    def close(self) -> None:
        """Close all lines that are not in use, and each other one as its call ends."""
        while self._idle:
            self._idle.pop().discard()

    def _keep(self, line: Line) -> None:
        """Leave ``line`` for a later call, and close the oldest where there are more than needed.

        Without that there would be one more with each call that has a new one.
        """
        self._idle.append(line)
        while len(self._idle) > _THREADS:
            self._idle.pop(0).discard()

    def _take(self, host: str, *, fresh: bool) -> Line | None:
        for line in reversed(self._idle):
            if line.host == host and (not fresh or line.is_fresh()):
                self._idle.remove(line)
                return line
        return None


def is_repeatable(method: str) -> bool:
    """Tell whether a call only reads, so that sending it twice does no harm."""
    return method.partition(".")[2].startswith("get_")


def _encoded(value: object) -> object:
    """Return ``value`` as xapi takes it: XML-RPC's own integers end at 32 bits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        record = cast(Mapping[str, object], value)
        return {key: _encoded(part) for key, part in record.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part) for part in cast(Sequence[object], value)]
    return value


def _value(answer: object, method: str) -> object:
    try:
        told = msgspec.convert(answer, _Answer)
    except msgspec.ValidationError as exc:
        raise errors.PoolError(f"the host answered {method} in no form that xapi uses") from exc
    if told.status == "Success":
        return told.value
    code, *params = told.error or ["INTERNAL_ERROR"]
    raise errors.XapiFailure(code, tuple(params), method=method)
