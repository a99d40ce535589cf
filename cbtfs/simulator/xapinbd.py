"""The NBD server of one host, as xapi-nbd is: every oddity of it is deliberate.

What it does (xen-api, ocaml/nbd/src/main.ml and cleanup.ml; xapi-project/nbd, lib/server.ml):

1. Sixteen connections at most; one more is accepted and closed without a byte.
2. The purpose of all networks decides *before* the greeting: one of ``nbd`` forces TLS on
   everybody, else one of ``insecure_nbd`` turns it off; with neither (or both) the connection is
   closed at once.
3. EXPORT_NAME is the only way in. GO, INFO and everything newer is unsupported.
4. The export name carries a session; dom0 gets a VBD before the reply. Whatever fails there
   closes the connection without an error.
5. One request at a time, data in pieces of 512 KiB, the header before the data: a read that fails
   in the middle has already said that it succeeded. Any other error ends the connection.
6. At the end the VBD goes first, then the socket and the slot: a client that waits for the end of
   file knows that the disk is free.
"""

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from dataclasses import dataclass

from . import nbdwire
from .failures import SimError
from .nbdwire import Command, Error, Option, Reply, Wire
from .pool import Attachment, SimulatedPool

log = logging.getLogger(__name__)

PIECE = 512 * 1024
"""How much xapi-nbd writes at a time, in bytes (mirage-block-unix, lib/server.ml)."""

_STEP = 0.05  # seconds between two looks at a fault that makes something wait
_LONGEST_READ = 1 << 31
_FLAGS = nbdwire.HAS_FLAGS | nbdwire.READ_ONLY
_HEADER = nbdwire.SIMPLE_REPLY.size


@dataclass(frozen=True, slots=True)
class Identity:
    """Who serves: the names a fault may call the host by, and its two certificates."""

    names: tuple[str, ...]
    context: ssl.SSLContext
    impostor: ssl.SSLContext


class XapiNbd:
    """The NBD service of one host; `serve` is a `listener.Listener`'s handler.

    Args:
        pool: asked for purposes and exports.
        host_ref: which host this is.
        identity: names and certificates.
        stopping: set when the simulator ends; delays end with it.
        counters: counted in place: connections, peaks, what an attacker saw.
    """

    def __init__(
        self, pool: SimulatedPool, host_ref: str, *, identity: Identity,
        stopping: threading.Event, counters: "NbdCounters",
    ) -> None:  # fmt: skip
        self.identity = identity
        self.counters = counters
        self.faults = pool.faults
        self._pool = pool
        self._host_ref = host_ref
        self._stopping = stopping
        self._lock = threading.Lock()
        self._busy = 0

    def hit(self, key: str) -> bool:
        """Return whether the fault ``key`` is in force for this host."""
        return self.faults.hits(key, *self.identity.names)

    def pause(self, key: str) -> None:
        """Wait as long as the fault ``key`` says, or until it or the simulator ends."""
        begun = time.monotonic()
        while (left := self.faults.duration(key) - (time.monotonic() - begun)) > 0:
            if self._stopping.wait(min(left, _STEP)):
                return

    def serve(self, connection: socket.socket) -> None:
        """Serve one connection until its end; the caller closes the socket afterwards."""
        with self._lock:
            slots = self.faults.count("nbd.slots") or 16
            admitted = self._busy < slots
            self._busy += admitted
            busy = self._busy
        self.counters.connected(self.identity.names[0], admitted=admitted, busy=busy)
        if not admitted:
            return
        ending = contextlib.ExitStack()
        ending.callback(_close, connection)
        try:
            self._converse(connection, ending)
        except (EOFError, OSError) as exc:
            log.debug("NBD client of %s gone: %s", self.identity.names[0], exc)
        finally:
            # The VBD is gone. The end and the slot are one step for others, as in xapi-nbd's single
            # thread: who saw the end is admitted.
            with self._lock:
                ending.close()
                self._busy -= 1

    def _converse(self, connection: socket.socket, ending: contextlib.ExitStack) -> None:
        if self.hit("nbd.refuse"):
            return
        if self.hit("nbd.silent"):
            while self.hit("nbd.silent") and not self._stopping.wait(0.05):
                pass
            return
        purpose = self._pool.nbd_mode()
        if not purpose:
            return
        session = _Negotiation(self, connection, purpose)
        ending.callback(lambda: _close(session.wire.connection))  # by then TLS, if it came to that
        exportname = session.run()
        if exportname is not None:
            self._export(session, exportname)

    def _export(self, session: "_Negotiation", exportname: str) -> None:
        try:
            attachment = self._pool.open_export(self._host_ref, exportname)
        except SimError as exc:
            log.info("NBD export on %s refused: %s", self.identity.names[0], exc.code)
            return
        try:
            reply = attachment.size.to_bytes(8, "big") + _FLAGS.to_bytes(2, "big") + bytes(124)
            session.wire.send(reply)
            _Transmission(self, session.wire, attachment).run()
        finally:
            attachment.close()


class NbdCounters:
    """What the NBD servers of a pool have seen; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._peak: dict[str, int] = {}
        self._stolen: list[str] = []

    def connected(self, host: str, *, admitted: bool, busy: int) -> None:
        """Record a connection to ``host`` that now serves ``busy``."""
        with self._lock:
            self._counts["connections"] += 1
            self._counts["turned_away"] += not admitted
            self._peak[host] = max(busy, self._peak.get(host, 0))

    def dropped(self) -> None:
        """Record that a fault ended a connection."""
        with self._lock:
            self._counts["dropped"] += 1

    def stole(self, what: str) -> None:
        """Record that somebody who is not the host received ``what`` from a client."""
        with self._lock:
            self._stolen.append(what)

    def reset(self) -> None:
        """Forget everything counted."""
        with self._lock:
            self._counts.clear()
            self._peak.clear()
            self._stolen.clear()

    def take_stolen(self) -> list[str]:
        """Return what was stolen since the last call."""
        with self._lock:
            taken, self._stolen = self._stolen, []
            return taken

    def report(self) -> dict[str, object]:
        """Return everything counted, as JSON can carry it."""
        with self._lock:
            counted = {key: self._counts[key] for key in ("connections", "turned_away", "dropped")}
            return {**counted, "peak": dict(self._peak), "stolen": list(self._stolen)}


class _Negotiation:
    """From the greeting to an export name."""

    def __init__(self, server: XapiNbd, connection: socket.socket, purpose: str) -> None:
        self._server = server
        self._identity = server.identity
        self._forced = purpose == "nbd"
        self._strip = self._forced and server.hit("nbd.strip")
        self._impostor = self._forced and server.hit("nbd.impostor")
        self._plain = self._strip or (self._forced and server.hit("nbd.no_tls"))
        if self._plain:
            self._forced = False
        self._encrypted = False
        self.wire = Wire(connection)

    def run(self) -> str | None:
        """Return the export name the client settles on, or None to close."""
        hello = nbdwire.NBDMAGIC + nbdwire.IHAVEOPT + nbdwire.FIXED_NEWSTYLE.to_bytes(2, "big")
        self.wire.send(hello)
        flags = int.from_bytes(self.wire.exactly(4), "big")
        if self._forced and not flags & nbdwire.FIXED_NEWSTYLE:
            return None
        while True:
            option, data = self.wire.option()
            if option == Option.EXPORT_NAME:
                if self._plain or self._impostor:
                    self._server.counters.stole(data.decode(errors="replace"))
                return data.decode(errors="replace") if self._open else None
            if option == Option.ABORT:
                if self._open:
                    self.wire.reply_to_option(option, Reply.ACK)
                return None
            if option == Option.STARTTLS and not self._open:
                self.wire.reply_to_option(option, Reply.ACK)
                self._encrypt()
            else:
                self.wire.reply_to_option(option, self._refusal(option))

    @property
    def _open(self) -> bool:
        return self._encrypted or not self._forced

    def _refusal(self, option: int) -> Reply:
        if not self._open:
            return Reply.ERR_TLS_REQD
        if option == Option.LIST:
            return Reply.ERR_POLICY
        if option == Option.STARTTLS:
            if self._strip:  # the attacker plays a server that never heard of TLS
                return Reply.ERR_UNSUP
            return Reply.ERR_INVALID if self._encrypted else Reply.ERR_POLICY
        return Reply.ERR_UNSUP

    def _encrypt(self) -> None:
        context = self._identity.impostor if self._impostor else self._identity.context
        plain = self.wire.connection
        # a copy of the descriptor, since wrapping takes the socket away from the listener, which
        # must be able to shut it down
        self.wire = Wire(context.wrap_socket(plain.dup(), server_side=True))
        self._encrypted = True


class _Transmission:
    """Reads until the client or the first error ends it."""

    def __init__(self, server: XapiNbd, wire: Wire, attachment: Attachment) -> None:
        self._server = server
        self._faults = server.faults
        self._wire = wire
        self._export = attachment
        self._sent = 0
        self._answered = 0
        buffer = memoryview(bytearray(_HEADER + PIECE))
        self._first = buffer
        self._piece = buffer[_HEADER:]

    def run(self) -> None:
        """Answer requests until the connection ends."""
        request = memoryview(bytearray(nbdwire.REQUEST.size))
        answering = True
        while answering:
            self._wire.into(request)
            magic, flags, kind, handle, offset, length = nbdwire.REQUEST.unpack(request)
            if magic != nbdwire.REQUEST_MAGIC:
                return
            # flags and type are one number to xapi-nbd: a flag makes it an unknown command
            command = flags << 16 | kind
            if command == Command.READ:
                answering = self._read(handle, offset, length) and not self._had_enough()
                continue
            if command == Command.WRITE:
                self._wire.reply(Error.EPERM, handle)
            elif command != Command.DISC:
                self._wire.reply(Error.EINVAL, handle)
            return

    def _read(self, handle: int, offset: int, length: int) -> bool:
        """Answer a read; return False when that ended the connection."""
        if length >= _LONGEST_READ:
            return False
        if offset % self._export.sector or length % self._export.sector:
            self._wire.reply(Error.EINVAL, handle)
            return False
        self._server.pause("nbd.delay")
        nbdwire.SIMPLE_REPLY.pack_into(
            self._first, 0, nbdwire.SIMPLE_REPLY_MAGIC, Error.NONE, handle
        )
        readable = self._readable(offset, length)
        if not self._send_pieces(offset, readable):
            return False
        return readable == length

    def _readable(self, offset: int, length: int) -> int:
        readable = max(0, min(length, self._export.size - offset))
        bad = self._faults.size("nbd.fail_read_at")
        if bad is not None and offset + readable > bad:
            readable = max(0, bad - offset)
        return readable

    def _send_pieces(self, offset: int, length: int) -> bool:
        """Send the header and ``length`` bytes; return False if a fault cut them short."""
        header = _HEADER  # goes out in one write with the first piece
        while True:
            count = min(length, PIECE)
            self._export.pread_into(offset, self._piece[:count])
            allowed = self._allowed(count)
            start = _HEADER - header
            self._wire.send(self._first[start : _HEADER + allowed])
            self._sent += allowed
            if allowed < count:
                return False
            offset += count
            length -= count
            header = 0
            if not length:
                return True
            self._server.pause("nbd.trickle")

    def _allowed(self, count: int) -> int:
        """Return how many of ``count`` bytes may go before the connection is dropped."""
        limit = self._faults.size("nbd.drop_after")
        if limit is None or self._sent + count <= limit:
            return count
        return max(0, limit - self._sent) if self._may_drop() else count

    def _had_enough(self) -> bool:
        """Count a read that was answered in full; return whether a fault ends things here."""
        self._answered += 1
        limit = self._faults.count("nbd.close_after")
        return limit is not None and self._answered >= limit and self._may_drop()

    def _may_drop(self) -> bool:
        """Return whether one more connection may be dropped; it counts as dropped then."""
        times = self._faults.count("nbd.drop_count")
        dropped = times is None or self._faults.take("nbd.drop_count", limit=times)
        if dropped:
            self._server.counters.dropped()
        return dropped


def _close(connection: socket.socket) -> None:
    """End a connection so that the peer reads an end of file, on TLS with its goodbye."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(connection, ssl.SSLSocket):
            connection.settimeout(0)  # say goodbye without waiting for the peer's
            connection.unwrap()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
