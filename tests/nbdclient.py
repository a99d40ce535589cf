"""An NBD client that can be as wrong as a test needs: it sends what it is told and reads bytes."""

import socket
import ssl
import struct
from pathlib import Path

REPLY_MAGIC = 0x3E889045565A9
ACK, ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD = (
    1, 2**31 + 1, 2**31 + 2, 2**31 + 3, 2**31 + 5,
)  # fmt: skip
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY = 1, 2, 3, 5, 6, 7, 8
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
EINVAL, EPERM = 22, 1


class Closed(Exception):
    """The server closed the connection; ``got`` is what came before."""

    def __init__(self, got: bytes) -> None:
        self.got = got
        super().__init__(f"closed after {len(got)} bytes")


class NbdClient:
    """One connection; use as a context manager."""

    def __init__(self, address: str, port: int) -> None:
        self.connection: socket.socket = socket.create_connection((address, port), timeout=20)

    def __enter__(self) -> "NbdClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def exactly(self, length: int) -> bytes:
        """Return the next bytes; raise `Closed` if they don't come."""
        got = b""
        while len(got) < length:
            try:
                piece = self.connection.recv(length - len(got))
            except ConnectionError:
                piece = b""
            if not piece:
                raise Closed(got)
            got += piece
        return got

    def hello(self, flags: int = 1) -> bytes:
        """Read the greeting and answer it with client flags; return the greeting."""
        greeting = self.exactly(18)
        self.connection.sendall(struct.pack(">I", flags))
        return greeting

    def option(self, option: int, data: bytes = b"") -> int:
        """Send an option and return the type of the reply."""
        self.send_option(option, data)
        magic, echoed, kind, length = struct.unpack(">QIII", self.exactly(20))
        assert (magic, echoed) == (REPLY_MAGIC, option)
        self.exactly(length)
        return int(kind)

    def send_option(self, option: int, data: bytes = b"") -> None:
        """Send an option."""
        self.connection.sendall(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)

    def starttls(self, certificate: Path, *, name: str = "xcp1.sim") -> None:
        """Ask for TLS and verify the host; raise ssl.SSLError if it is another."""
        assert self.option(STARTTLS) == ACK
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(certificate)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self.connection = context.wrap_socket(self.connection, server_hostname=name)

    def export_name(self, name: str) -> bytes:
        """Choose an export; return size, flags and the zeroes."""
        self.send_option(EXPORT_NAME, name.encode())
        return self.exactly(134)

    def request(self, command: int, offset: int, length: int, *, flags: int = 0) -> None:
        """Send a request with handle 7."""
        request = struct.pack(">IHHQQI", 0x25609513, flags, command, 7, offset, length)
        self.connection.sendall(request)

    def reply(self) -> int:
        """Return the error of the next reply."""
        magic, error, handle = struct.unpack(">IIQ", self.exactly(16))
        assert (magic, handle) == (0x67446698, 7)
        return int(error)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the export."""
        self.request(READ, offset, length)
        assert self.reply() == 0
        return self.exactly(length)

    def disconnect(self) -> None:
        """Send DISC and wait for the end: the disk is free then."""
        self.request(DISC, 0, 0)
        assert self.at_end()

    def at_end(self) -> bool:
        """Return whether the server closed without another byte."""
        try:
            self.exactly(1)
        except Closed:
            return True
        return False
