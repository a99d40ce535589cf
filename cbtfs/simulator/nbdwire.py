"""The NBD protocol's numbers and the few reads and writes every server needs.

From the protocol's doc/proto.md in NetworkBlockDevice/nbd; nothing here knows about xapi.
"""

import socket
import struct
from enum import IntEnum

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698

FIXED_NEWSTYLE = 1
NO_ZEROES = 2

HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
CAN_MULTI_CONN = 1 << 8

REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, type, handle, offset, length."""

SIMPLE_REPLY = struct.Struct(">IIQ")
OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")

MAX_OPTION = 64 * 1024
"""Longest option data read, in bytes; an export name is at most 4096."""


class Option(IntEnum):
    """What a client may ask for before the transmission."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """Answers to an option."""

    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6


class Command(IntEnum):
    """Requests of the transmission."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Error(IntEnum):
    """Errors in a reply; Linux's numbers on every system."""

    NONE = 0
    EPERM = 1
    EIO = 5
    EINVAL = 22
    ENOSPC = 28


class Wire:
    """A connection read in exact pieces.

    Args:
        connection: a connected socket, plain or TLS; closed by its owner.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def exactly(self, length: int) -> bytes:
        """Return the next ``length`` bytes.

        Raises:
            EOFError: the peer closed first.
        """
        data = bytearray(length)
        self.into(memoryview(data))
        return bytes(data)

    def into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes; raise EOFError if the peer closes first."""
        while view:
            count = self.connection.recv_into(view)
            if count == 0:
                raise EOFError
            view = view[count:]

    def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``."""
        self.connection.sendall(data)

    def option(self) -> tuple[int, bytes]:
        """Return the next option and its data."""
        magic, option, length = OPTION.unpack(self.exactly(OPTION.size))
        if magic != IHAVEOPT or length > MAX_OPTION:
            raise EOFError
        return option, self.exactly(length)

    def reply_to_option(self, option: int, reply: Reply, data: bytes = b"") -> None:
        """Answer an option."""
        self.send(OPTION_REPLY.pack(REPLY_MAGIC, option, reply, len(data)) + data)

    def reply(self, error: Error, handle: int) -> None:
        """Send a simple reply without data."""
        self.send(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, handle))
