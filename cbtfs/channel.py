"""A verified TLS channel in front of libnbd.

libnbd before 1.22 verifies nothing when it is given a socket, and checks the address, not the name,
when it connects by itself. xapi's certificates carry neither the address of an NBD network nor a
usable name for it, so TLS is done here and libnbd reads plain bytes. A libnbd that can do it all
comes first (see ``anchor``), and whatever it refuses is decided here::

    host:10809 ══ TCP ══ STARTTLS, TLS ══ relay thread ══ socketpair ══ libnbd
               (only here is the peer's identity decided)

The export name contains the session. So nothing that libnbd says leaves before the peer has shown
exactly the expected certificate, and there is no way from "asked for TLS" to a plain connection.
"""

import select
import socket
import ssl
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import cast

import trio

from . import errors, tls
from .units import KiB

# https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_NBDMAGIC = b"NBDMAGIC"
_IHAVEOPT = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE = 1
_NO_ZEROES = 2
_STARTTLS = 5
_ACK = 1

_CHUNK = 256 * KiB
"""Bytes taken from TCP at a time, 16 full TLS records. Measured with 1 MiB reads over loopback:
16 KiB 330, 64 KiB 550, 256 KiB 830, 1 MiB 870 MB/s."""


class Channel:
    """A verified connection to an NBD server, seen as a plain socket that has yet to say hello.

    ``socket`` is the end for libnbd, which takes it over. ``run`` moves the bytes; ``close`` ends
    both sides, at once and from any thread.
    """

    def __init__(self, stream: trio.SocketStream, session: tls.Handshake, *, flags: int) -> None:
        self.socket, self._pair = socket.socketpair()
        self._session = session
        self._flags = struct.pack(">I", flags)
        self._relaying = False
        # the relay's thread blocks; trio's sockets do not
        self._tcp = socket.socket(fileno=stream.socket.detach())
        self._tcp.setblocking(True)
        self._pair.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _CHUNK)
        # libnbd begins with a greeting; the host has said its own already
        self._pair.sendall(_GREETING.pack(_NBDMAGIC, _IHAVEOPT, flags))

    async def run(self) -> None:
        """Relay until the host hangs up or ``close`` is called; survives cancellation.

        Whoever is cancelled still wants to say goodbye to the host, and then calls ``close``.
        """
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._relay, limiter=trio.CapacityLimiter(1))

    def close(self) -> None:
        """Close both sides; a relay under way ends by itself."""
        for sock in (self._pair, self._tcp):
            with suppress(OSError):  # the other side was faster
                sock.shutdown(socket.SHUT_RDWR)
            if not self._relaying:  # else the thread does it: nobody else may reuse its numbers
                sock.close()

    def _relay(self) -> None:
        self._relaying = True
        with self._pair, self._tcp:
            try:
                if self._received_flags():
                    _Relay(self._tcp, self._pair, self._session).run()
            except OSError:
                return  # libnbd sees the end of its socket and says what that means to it

    def _received_flags(self) -> bool:
        """Swallow the flags with which libnbd answers the greeting: the host has them already."""
        told = b""
        while len(told) < len(self._flags):
            part = self._pair.recv(len(self._flags) - len(told))
            if not part:
                return False
            told += part
        return told == self._flags


async def open_channel(host: str, port: int, *, cert_pem: str, subject: str) -> Channel:
    """Connect to an NBD server, do STARTTLS, and verify that it is the owner of ``cert_pem``.

    Args:
        host: address to connect to.
        port: its NBD port.
        cert_pem: the certificate that the pool says this host has.
        subject: the name that the pool says is in it.

    Returns:
        A channel; the caller runs and closes it.

    Raises:
        AuthenticationFailed: the peer does not do TLS, or is not the owner of the certificate;
            it has been told nothing.
        OSError: nobody answers, or the connection was closed.
    """
    peer = f"{host}:{port}"
    context = tls.pin(cert_pem)
    stream = await tls.connect(host, port)
    try:
        with tls.broken_is_oserror():
            flags = await _starttls(stream, peer=peer)
        session = tls.Handshake(context, subject)
        await _verified(session, stream, cert_pem=cert_pem, peer=peer)
        _check_subject(session, subject, peer=peer)
        return Channel(stream, session, flags=flags)
    except BaseException:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
        raise


async def _starttls(stream: trio.SocketStream, *, peer: str) -> int:
    """Ask for TLS; return the handshake flags agreed on before it."""
    magic, style, offered = _GREETING.unpack(await _exactly(stream, _GREETING.size))
    if magic != _NBDMAGIC or style != _IHAVEOPT or not offered & _FIXED_NEWSTYLE:
        raise errors.AuthenticationFailed(f"{peer} does not offer NBD with TLS; {_ASK_ADMIN}")
    flags = int(offered) & (_FIXED_NEWSTYLE | _NO_ZEROES)

    await stream.send_all(struct.pack(">I", flags) + _OPTION.pack(_IHAVEOPT, _STARTTLS, 0))
    reply = _REPLY.unpack(await _exactly(stream, _REPLY.size))

    # anything but a bare ACK is a refusal; what follows the ACK is read by TLS alone, so bytes
    # slipped in before the handshake make it fail
    if reply != (_REPLY_MAGIC, _STARTTLS, _ACK, 0):
        raise errors.AuthenticationFailed(f"{peer} refuses TLS; {_ASK_ADMIN}")
    return flags


_ASK_ADMIN = (
    "the pool's network has the purpose nbd, which means TLS, so this is an impostor, or the "
    "purpose changed a moment ago and xapi-nbd has yet to follow"
)


async def _exactly(stream: trio.SocketStream, length: int) -> bytes:
    told = b""
    while len(told) < length:
        part = await stream.receive_some(length - len(told))
        if not part:
            raise ConnectionAbortedError("hung up before TLS")
        told += part
    return told


async def _verified(
    session: tls.Handshake, stream: trio.SocketStream, *, cert_pem: str, peer: str
) -> None:
    """Shake hands; raise unless the peer then has shown that very certificate."""
    why = "it is another one"
    try:
        await session.run(stream, peer=peer)
    except errors.AuthenticationFailed as exc:
        if not isinstance(exc.__cause__, ssl.SSLCertVerificationError):
            raise
        why = exc.__cause__.verify_message
    else:
        # an anchor that is a CA would also let through what it signed
        if session.certificate() == ssl.PEM_cert_to_DER_cert(tls.first(cert_pem)):
            return
    raise errors.AuthenticationFailed(
        f"{peer} does not show the certificate that the pool says it has ({why}): it is an "
        "impostor, or the certificate was renewed; then restart xapi-nbd on that host"
    )


def _check_subject(session: tls.Handshake, subject: str, *, peer: str) -> None:
    if not _names(session.tls.getpeercert() or {}, subject):
        raise errors.AuthenticationFailed(
            f"the certificate of {peer} is not for {subject!r}, as the pool says it is"
        )


def _names(certificate: Mapping[str, object], subject: str) -> bool:
    """Tell whether ``subject`` is a name of the certificate; one without names has every name.

    xapi reports the base of a wildcard name, and the host's own name where the certificate has
    none (xen-api, ocaml/xapi/xapi_vdi.ml, get_nbd_info). Such a certificate proves itself by being
    equal to the one the pool told.
    """
    pairs = cast(Iterable[tuple[str, str]], certificate.get("subjectAltName", ()))
    names = {(kind, value.lower()) for kind, value in pairs}
    wanted = subject.lower()
    strict = {("DNS", wanted), ("IP Address", wanted)}
    wild = {("DNS", f"*.{wanted}"), ("DNS", f"*.{wanted.partition('.')[2]}")}
    nameless = not any(kind == "DNS" for kind, _ in names)
    return nameless or not names.isdisjoint(strict | wild)


class _Relay:
    """Moves bytes between TLS on ``tcp`` and plain on ``pair``, in one thread.

    It decrypts through memory buffers rather than an ``SSLSocket``: that reads the wire with one
    call for many records, where OpenSSL takes two for each. Requests are 28 bytes, and a few dozen
    at most are under way, so sending them never waits for replies to be taken.
    """

    def __init__(self, tcp: socket.socket, pair: socket.socket, session: tls.Handshake) -> None:
        self._tcp = tcp
        self._pair = pair
        self._session = session
        self._wire = memoryview(bytearray(_CHUNK))
        self._plain = memoryview(bytearray(_CHUNK))

    def run(self) -> None:
        """Relay until the host ends the connection.

        When libnbd ends its side first (it has said that it disconnects), the host's end is still
        awaited: xapi-nbd closes only when the disk is detached.
        """
        poller = select.poll()
        poller.register(self._tcp, select.POLLIN)
        poller.register(self._pair, select.POLLIN)
        alive = self._deliver()  # the handshake may have read further
        while alive:
            ready = {fd for fd, _ in poller.poll()}
            if self._pair.fileno() in ready and not self._send_requests():
                poller.unregister(self._pair)
                self._say_goodbye()
            if self._tcp.fileno() in ready:
                alive = self._receive()

    def _send_requests(self) -> bool:
        data = self._pair.recv(64 * KiB)
        if data:
            self._session.tls.write(data)
            self._flush()
        return bool(data)

    def _say_goodbye(self) -> None:
        """Tell the host that nothing more will come: some (nbdkit 1.42) wait for it."""
        with suppress(ssl.SSLError):  # the host's own goodbye is read, or not, like all the rest
            self._session.tls.unwrap()
        self._flush()

    def _receive(self) -> bool:
        count = self._tcp.recv_into(self._wire)
        if not count:
            return False
        # a host that does not set TCP_NODELAY holds the tail of a reply back until all before it
        # is acknowledged, which Linux likes to put off by 40 ms; it forgets this, so every time
        self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._session.incoming.write(self._wire[:count])
        return self._deliver()

    def _deliver(self) -> bool:
        """Hand all decrypted bytes to libnbd; return whether more may come."""
        read, plain = self._session.tls.read, self._plain
        alive, filled = True, 0
        while alive:
            if filled == len(plain):
                self._pair.sendall(plain)
                filled = 0
            try:
                # given a buffer, it returns a count; some type stubs say bytes
                count = int(read(len(plain) - filled, plain[filled:]))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                count = 0
            alive = bool(count)
            filled += count
        if filled:
            self._pair.sendall(plain[:filled])
        self._flush()
        return alive

    def _flush(self) -> None:
        if self._session.outgoing.pending:
            self._tcp.sendall(self._session.outgoing.read())
