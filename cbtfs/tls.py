"""Verified TLS: whom to believe, and how to shake hands without a socket.

Rules of this file:

1. A wrong identity is ``AuthenticationFailed``; a connection that fails is ``OSError``, which the
   caller translates, because only it knows what another attempt would mean.
2. A pinned certificate is the only trust anchor of its context. A leaf as anchor needs
   ``VERIFY_X509_PARTIAL_CHAIN`` (default only since Python 3.13), and xapi's certificates lack the
   extensions that ``VERIFY_X509_STRICT`` (default since 3.13) asks for.
"""

import hashlib
import os
import re
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import trio

from . import errors
from .units import KiB

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UNREADABLE = "the pool handed out a certificate that cannot be read"


# ── whom to believe ──────────────────────────────────────────────────────────────────────────────


def pin(pem: str) -> ssl.SSLContext:
    """Return a context that trusts exactly the certificate ``pem``, whatever its names.

    Raises:
        PoolError: ``pem`` is no certificate.
    """
    context = _context()
    context.check_hostname = False
    try:
        context.load_verify_locations(cadata=first(pem))
    except (ssl.SSLError, TypeError) as exc:  # TypeError: it is not ASCII
        raise errors.PoolError(_UNREADABLE) from exc
    return context


def ca(ca_file: str = "") -> ssl.SSLContext:
    """Return a context that trusts the certificates in ``ca_file`` ("" = the system's).

    A host's own self-signed certificate may stand in the file: it then verifies that host.

    Raises:
        ConfigError: the file cannot be read, or holds no certificate.
    """
    context = _context()
    if not ca_file:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cafile=ca_file)
    except OSError as exc:  # ssl.SSLError is one
        why = os.strerror(exc.errno) if type(exc) is not ssl.SSLError and exc.errno else "no PEM"
        raise errors.ConfigError(
            f"ca_file {ca_file} cannot be used ({why}): give a file of PEM certificates"
        ) from exc
    return context


def fingerprint(certificate: str | bytes) -> str:
    """Return ``sha256:HEX`` of a certificate in PEM or DER.

    Raises:
        PoolError: the PEM cannot be read.
    """
    if isinstance(certificate, str):
        try:
            certificate = ssl.PEM_cert_to_DER_cert(first(certificate))
        except ValueError as exc:
            raise errors.PoolError(_UNREADABLE) from exc
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}"


def parse_fingerprint(text: str) -> str:
    """Return ``text`` (``sha256:…``, with or without colons, in any case) as ``sha256:HEX``.

    Raises:
        ConfigError: it is not a SHA-256 fingerprint.
    """
    digits = text.strip().lower().removeprefix("sha256").replace("fingerprint=", "")
    digits = re.sub(r"[\s:=]", "", digits)
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise errors.ConfigError(
            f"fingerprint {text!r} is not sha256: and 64 hexadecimal digits; print the right one "
            "with: openssl x509 -in /etc/xensource/xapi-ssl.pem -noout -fingerprint -sha256"
        )
    return f"sha256:{digits}"


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VerifyFlags.VERIFY_X509_STRICT
    return context


def first(pem: str) -> str:
    """Return the first certificate in ``pem``; a host's own comes first in a chain.

    Raises:
        PoolError: there is none.
    """
    match = _PEM.search(pem)
    if match is None:
        raise errors.PoolError(_UNREADABLE)
    return match[0]


# ── handshakes ───────────────────────────────────────────────────────────────────────────────────


async def fetch_certificate(host: str, port: int) -> str:
    """Return the certificate that ``host`` shows, as PEM and unverified.

    Only a handshake takes place: not a byte of data is sent.

    Raises:
        OSError: nobody answers.
        AuthenticationFailed: it does not speak TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return await probe(host, port, context=context)


async def probe(host: str, port: int, *, context: ssl.SSLContext) -> str:
    """Shake hands with ``host`` as ``context`` asks, send nothing, return its certificate as PEM.

    Raises:
        OSError: nobody answers.
        AuthenticationFailed: ``context`` does not accept the certificate.
    """
    async with await connect(host, port) as stream:
        session = Handshake(context, host)
        await session.run(stream, peer=f"{host}:{port}")
    return ssl.DER_cert_to_PEM_cert(session.certificate())


async def connect(host: str, port: int) -> trio.SocketStream:
    """Return a TCP connection.

    Raises:
        OSError: nobody answers, or ``host`` is no name at all.
    """
    try:
        return await trio.open_tcp_stream(host, port)
    except (ValueError, TypeError) as exc:  # UnicodeError is one
        raise OSError(f"{host!r} is no host name") from exc


class Handshake:
    """TLS without a socket: ``incoming`` takes what came from the wire, ``outgoing`` gives.

    Raises:
        AuthenticationFailed: ``context`` checks names, and ``name`` is none.
    """

    def __init__(self, context: ssl.SSLContext, name: str) -> None:
        if context.check_hostname and _sni(name) is None:
            raise errors.AuthenticationFailed(f"{name!r} is no name that a certificate can have")
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=_sni(name))

    def certificate(self) -> bytes:
        """Return the peer's certificate as DER, verified or not."""
        return self.tls.getpeercert(binary_form=True) or b""

    async def run(self, stream: trio.SocketStream, *, peer: str) -> None:
        """Shake hands over ``stream``; ``peer`` is its name in messages.

        Raises:
            AuthenticationFailed: the certificate is not accepted, or the peer does not do TLS.
            OSError: the connection was closed.
        """
        with broken_is_oserror():
            while not self._step(peer):
                await stream.send_all(self.outgoing.read())
                data = await stream.receive_some(64 * KiB)
                if not data:
                    raise ConnectionAbortedError("hung up in the TLS handshake")
                self.incoming.write(data)
            await stream.send_all(self.outgoing.read())

    def _step(self, peer: str) -> bool:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLCertVerificationError as exc:
            raise errors.AuthenticationFailed(
                f"{peer} shows a certificate that is not to be trusted ({exc.verify_message})"
            ) from exc
        except ssl.SSLError as exc:
            raise errors.AuthenticationFailed(
                f"{peer} does not do TLS as a host of a pool does ({exc.reason or 'TLS error'})"
            ) from exc
        return True


def _sni(name: str) -> str | None:
    """Return ``name`` if it can be a host name on the wire; Python refuses odd ones loudly."""
    ok = re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.:-]*[A-Za-z0-9_])?", name)
    return name if ok and len(name) < 254 else None


@contextmanager
def broken_is_oserror() -> Generator[None]:
    """Turn trio's word for a broken connection back into the OSError it was."""
    try:
        yield
    except trio.BrokenResourceError as exc:
        raise ConnectionResetError("hung up") from exc


def explain(exc: OSError) -> str:
    """Return why a connection failed, in the system's words (``Connection refused``)."""
    cause: BaseException = exc
    while not getattr(cause, "errno", None) and cause.__cause__ is not None:
        cause = cause.__cause__  # trio wraps the attempts of each address
        if isinstance(cause, BaseExceptionGroup):
            group = cast(BaseExceptionGroup[BaseException], cause)
            cause = group.exceptions[0]
    number = getattr(cause, "errno", None)
    if isinstance(number, int) and number > 0:
        return os.strerror(number)
    return str(getattr(cause, "strerror", None) or cause) or type(cause).__name__
