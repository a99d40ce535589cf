"""Hosts for the tests of the doors: certificates as xapi makes them, and an awkward NBD server.

The simulated pool behaves like the real one. What stands here behaves worse than it, byte by byte,
and tells what it was sent.
"""

import datetime as dt
import functools
import ipaddress
import random
import ssl
import struct
import tempfile
import xmlrpc.client
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from cbtfs.nbd import NbdAddress, Timeouts

CONTENT = random.Random(1).randbytes((1 << 20) + 3 * 512)
"""A disk whose size is no multiple of 4096."""

QUICK = Timeouts(connect=5.0, request=0.2, close=0.2)

_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_ERR_UNSUP, _ERR_POLICY, _ERR_TLS_REQD, _ERR_UNKNOWN = (0x80000000 + n for n in (1, 2, 5, 6))


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate with nothing but names in it, and its key."""

    pem: str
    key: bytes = field(repr=False)

    def server_context(self) -> ssl.SSLContext:
        """Return a context as xapi's: TLS 1.2, two suites, one curve."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE-RSA-AES256-GCM-SHA384:ECDHE-RSA-AES128-GCM-SHA256")
        context.set_ecdh_curve("secp384r1")
        with tempfile.NamedTemporaryFile() as file:
            file.write(self.pem.encode() + self.key)
            file.flush()
            context.load_cert_chain(file.name)
        return context


@functools.cache
def certificate(*names: str, serial: int = 1) -> Certificate:
    """Return a certificate for ``names``, DNS names or addresses; another for each serial."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0] if names else "host")])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), serial)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=3650))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(map(_name, names)), False)
    made = builder.sign(key, hashes.SHA256())
    return Certificate(
        made.public_bytes(serialization.Encoding.PEM).decode(),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def ca_file(directory: Path, *certificates: Certificate) -> str:
    """Write certificates to a file and return its path."""
    path = directory / "ca.pem"
    path.write_text("".join(one.pem for one in certificates))
    return str(path)


@asynccontextmanager
async def serving(
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
) -> AsyncGenerator[int]:
    """Serve ``handler`` on a port of ``host``, which is yielded."""

    async def handle(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await handler(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
            pass  # the client went away, as it may

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host=host)
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield int(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


@dataclass
class NbdHost:
    """An NBD server like xapi-nbd, unless ``quirk`` says otherwise; notes what it is told.

    Attributes:
        tls: whether it offers TLS and insists on it.
        quirk: what is wrong with it; see the branches below.
        heard: every byte that came after its greeting, TLS taken off.
        reads: offset and length of each read.
        detached: to be set before it hangs up after a goodbye; None hangs up at once.
    """

    shown: Certificate
    tls: bool = True
    quirk: str = ""
    content: bytes = CONTENT
    heard: bytearray = field(default_factory=bytearray)
    reads: list[tuple[int, int]] = field(default_factory=list)
    parted: trio.Event = field(default_factory=trio.Event)
    stuck: trio.Event = field(default_factory=trio.Event)
    detached: trio.Event | None = None

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        await _Connection(self, stream).serve()


class _Connection:
    def __init__(self, host: NbdHost, stream: trio.SocketStream) -> None:
        self.host = host
        self.quirk = host.quirk
        self.stream: trio.abc.Stream = stream
        self.secure = False

    async def serve(self) -> None:
        if self.quirk == "full":
            return
        if self.quirk == "silent":
            await trio.sleep_forever()
        if self.quirk == "oldstyle":
            await self.stream.send_all(b"NBDMAGIC" + bytes.fromhex("00420281861253") + bytes(150))
            return
        await self.stream.send_all(b"NBDMAGICIHAVEOPT\x00\x01")
        await self.take(4)
        while await self.option():
            pass

    async def take(self, length: int) -> bytes:
        told = b""
        while len(told) < length:
            part = await self.stream.receive_some(length - len(told))
            if not part:
                raise EOFError
            told += part
        self.host.heard += told
        return told

    async def option(self) -> bool:
        _, option, length = struct.unpack(">QII", await self.take(16))
        data = await self.take(length)
        if option == 5 and self.host.tls and not self.secure:
            return await self.starttls()
        if option == 1:
            return self.secure is self.host.tls and await self.export(data)
        refusal = _ERR_POLICY if option in {3, 5} else _ERR_UNSUP
        if self.host.tls and not self.secure:
            refusal = _ERR_TLS_REQD
        if self.quirk == "unknown" and option == 7:
            refusal = _ERR_UNKNOWN
        await self.answer(option, refusal)
        return True

    async def answer(self, option: int, kind: int) -> None:
        await self.stream.send_all(_REPLY.pack(0x3E889045565A9, option, kind, 0))

    async def starttls(self) -> bool:
        await self.answer(5, 1)
        if self.quirk == "injected":  # what a man in the middle slips in before TLS
            await self.answer(7, _ERR_UNKNOWN)
        if self.quirk == "no handshake":
            return False
        if self.quirk == "plain after ack":
            await self.stream.receive_some()
            await self.answer(7, _ERR_UNSUP)
            return False
        secured = trio.SSLStream(self.stream, self.host.shown.server_context(), server_side=True)
        self.host.heard.clear()
        try:
            await secured.do_handshake()
        except trio.BrokenResourceError:
            return False
        self.stream, self.secure = secured, True
        return True

    async def export(self, name: bytes) -> bool:
        if self.quirk == "refused export":
            return False
        size = struct.pack(">QH", len(self.host.content), 3)
        await self.stream.send_all(size + bytes(124))
        while await self.request():
            pass
        return False

    async def request(self) -> bool:
        _, flags, kind, handle, offset, length = _REQUEST.unpack(await self.take(28))
        if kind == 2:
            self.host.parted.set()
            if self.host.detached is not None:
                await self.host.detached.wait()
            return False
        assert (flags, kind) == (0, 0)
        self.host.reads.append((offset, length))
        return await self.read(handle, offset, length)

    async def read(self, handle: int, offset: int, length: int) -> bool:
        data = self.host.content[offset : offset + length]
        error = 0
        if self.quirk == "stuck":
            self.host.stuck.set()
            await trio.sleep_forever()
        if self.quirk == "cut after 4096" and length > 4096:
            self.quirk = "cut"
        if self.quirk == "cut":
            data = data[: len(data) // 2]
        if self.quirk in {"error", "einval"}:
            data, error = b"", 5 if self.quirk == "error" else 22
        await self.stream.send_all(struct.pack(">IIQ", 0x67446698, error, handle) + data)
        return self.quirk not in {"cut", "einval"}


@asynccontextmanager
async def nbd_host(host: NbdHost, **changes: object) -> AsyncGenerator[NbdAddress]:
    """Serve ``host`` and yield the address by which the pool would tell of it."""
    async with serving(host.serve) as port:
        known = {"cert_pem": host.shown.pem, "subject": "xcp1.test", "tls": host.tls, **changes}
        yield NbdAddress("127.0.0.1", port, "/uuid?session_id=OpaqueRef:secret", **known)  # type: ignore[arg-type]


class Xapi:
    """An HTTPS server that answers every request with the same bytes, and keeps the requests.

    Args:
        shown: its certificate.
        answer: HTTP as it is, ``b"silence"``, or what is to be wrapped in XML-RPC.
    """

    def __init__(self, shown: Certificate, answer: object) -> None:
        self.shown = shown
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.hangs_up = False
        self.silent = trio.Event()
        self._answer = answer if isinstance(answer, bytes) else _xml(answer)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        self.connections += 1
        self.open += 1
        secured = trio.SSLStream(stream, self.shown.server_context(), server_side=True)
        try:
            while True:
                await self._take(secured)
                if self._answer == b"silence":
                    self.silent.set()
                    await trio.sleep_forever()
                await secured.send_all(self._answer)
                if self.hangs_up or not self._answer.startswith(b"HTTP/1.1 200"):
                    return
        except trio.BrokenResourceError:
            return
        finally:
            self.open -= 1

    async def _take(self, stream: trio.abc.Stream) -> None:
        told = b""
        while b"\r\n\r\n" not in told:
            told += await _some(stream)
        head, _, body = told.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or b"0")
        while len(body) < length:
            body += await _some(stream)
        self.heads.append(head)
        self.bodies.append(body)


def http(body: bytes, status: str = "200 OK") -> bytes:
    """Return an HTTP answer."""
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


def _xml(answer: object) -> bytes:
    return http(xmlrpc.client.dumps((answer,), methodresponse=True).encode())  # type: ignore[arg-type]


async def _some(stream: trio.abc.Stream) -> bytes:
    part = bytes(await stream.receive_some())
    if not part:
        raise EOFError
    return part
