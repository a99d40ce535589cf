"""Export: one NBD export of a pool, read through libnbd and driven by trio.

A request lives like this; one task, the pump, is the only one to call ``aio_notify_*``::

    read_each ── aio_pread ──▶ libnbd ──▶ socket ··· reply ··· ──▶ pump: aio_notify_read
        ▲           (in the pump's thread while it has one)          │ callback: record only
        └───────────── call.settled ◀─────────── settle ◀────────────┘

Rules of this file:

1. A completion callback only records: libnbd's binding prints and loses what it raises, and
   whoever waited for that request would wait for ever.
2. Every completion's error is looked at before the buffer is (libnbd leaves it undefined).
3. A buffer is its caller's again only when libnbd is done with it, also after a cancellation.
4. libnbd's messages can contain the export name, which contains the session: they are scrubbed.
5. The pump runs in a thread while much is due (see ``BULK``). Then requests are sent there, too: a
   handle is locked while it receives, and who sends from trio's thread would wait for that. They
   are counted and settled in trio's alone.
"""

import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Protocol, cast

import nbd as libnbd
import trio

from . import errors, units
from .nbdaddress import NbdAddress, Timeouts

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
"""xapi-nbd ends the connection on a read that is not aligned to the disk's sector, 512 or 4096."""

MAX_REQUEST = 4 * units.MiB
"""Longer reads are cut: beyond it nothing was gained in measurements, and it bounds a stall."""

MAX_IN_FLIGHT = 16
"""Requests under way on one connection; a 28-byte request then never fills a socket."""

BULK = units.MiB
"""Bytes due from which on a thread waits for the socket, and trio's loop hears of whole answers
only. Over TLS, 1 GiB came in 36,000 turns of the loop and 2.1 s of processor time; now 1,800 and
1.6 s."""

Part = tuple[memoryview, int]
"""Where bytes are to go, and their offset on the disk."""

_CANCEL_GRACE = 2.0
_GONE = {errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.EPIPE}


class _Errno(Protocol):
    """What libnbd hands a completion callback: a C int."""

    value: int


class _Call:
    """The requests of one call, and how many of them are under way."""

    def __init__(self) -> None:
        self.requests: list[_Request] = []
        self.pending = 0
        self._done = trio.Event()

    def answered(self) -> None:
        """Count one answer."""
        self.pending -= 1
        if not self.pending:
            self._done.set()

    async def settled(self) -> None:
        """Return when no request is under way; for one task alone."""
        if self.pending:
            self._done = trio.Event()
            await self._done.wait()


class _Request:
    """A read under way; ``error`` is an errno once libnbd has recorded the outcome."""

    def __init__(
        self, call: _Call, view: memoryview, offset: int, finished: list["_Request"]
    ) -> None:
        self.call = call
        self.view = view
        self.offset = offset
        self.length = len(view)
        self.error = 0
        self._finished = finished

    def record(self, error: _Errno) -> int:
        """Note the outcome (libnbd's completion callback); 1 retires the command."""
        self.error = error.value
        self._finished.append(self)
        return 1


class Export:
    """A readable export; opened by ``open_export`` and closed by it.

    State shared between tasks: ``_finished`` is filled by callbacks inside libnbd's calls, which
    may be those of the pump's thread, and emptied by ``_settle`` in trio's. ``lost`` is "" until
    the connection is gone for good.

    Args:
        address: of the export.
        timeouts: how long the host may be silent.
        anchored: directory that ``anchor.anchored`` made, if libnbd is to do TLS; else "".
    """

    def __init__(self, address: NbdAddress, *, timeouts: Timeouts, anchored: str = "") -> None:
        self.address = address
        self.anchored = anchored
        self.size = 0
        self.lost = ""
        self.timeouts = timeouts
        self._handle = _configured(address, anchored)
        self._finished: list[_Request] = []
        self._slots = trio.Semaphore(MAX_IN_FLIGHT)
        self._abort: Callable[[], None] = _nothing
        self._watched: socket.socket | None = None
        self._due = 0  # bytes asked for and not settled
        self._pumping = trio.CapacityLimiter(1)
        self._outbox: deque[_Request] | None = None  # requests for the pump's thread, if it has one
        self._bell = -1  # eventfd(2) that tells it of them
        self._heard = 0.0  # when the last bytes came, on a clock that threads have too
        self._greeted = trio.Event()
        self._ready = trio.Event()
        self._ended = trio.Event()
        self._driver = trio.CancelScope(shield=True)
        self._refused = 0

    def __repr__(self) -> str:
        return f"<Export {self.address} {self.size} bytes{', ' + self.lost if self.lost else ''}>"

    async def read_into(self, buffer: memoryview | bytearray, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; any offset and length within ``size``.

        Several calls may be under way at once. If cancelled, the buffer is not touched after.

        Raises:
            ExportLost: the connection is gone or the server is silent; a fresh one may work.
            ExportError: the range is outside the disk, or the server answered an error.
        """
        view = memoryview(buffer).cast("B")
        stop = offset + len(view)
        self._check_range(offset, stop)
        if not view:
            return
        first = offset - offset % ALIGNMENT
        last = min(stop + -stop % ALIGNMENT, self.size)
        exact = (first, last) == (offset, stop)
        whole = view if exact else memoryview(bytearray(last - first))
        problems = await self.read_each(((whole, first),))
        if problems[0] is not None:
            raise problems[0]
        if not exact:
            view[:] = whole[offset - first : stop - first]

    async def read_each(self, parts: Sequence[Part]) -> list[errors.ExportError | None]:
        """Fill each buffer from its offset, all at once; return for each None, or what failed.

        ``ExportLost`` among them: the connection is gone or the server is silent, and a fresh
        connection may read what is missing; ``ExportError``: the server answered an error. If
        cancelled, the buffers are not touched after.

        Args:
            parts: not empty; offsets are multiples of ``ALIGNMENT``, and so are lengths, but at the
                end of the disk.

        Raises:
            ExportError: a range is outside the disk; nothing was read.
        """
        for view, offset in parts:
            self._check_range(offset, offset + len(view))
        call = _Call()
        sent: list[list[_Request]] = []
        try:
            with suppress(errors.ExportLost):  # the outcome of each part says so
                for view, offset in parts:
                    begun = len(call.requests)
                    await self._send(call, view, offset)
                    sent.append(call.requests[begun:])
                await self._answered(call)
        finally:
            if call.pending:
                await self._reclaim(call)
            for request in call.requests:
                # libnbd 1.14's binding never lets go of a buffer it was given; of a view that is
                # released, it holds nothing but the shell
                request.view.release()
        outcomes = [self._outcome(requests) for requests in sent]
        return outcomes + [errors.ExportLost(self.lost)] * (len(parts) - len(sent))

    async def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes at ``offset``; as ``read_into``."""
        buffer = bytearray(length)
        await self.read_into(buffer, offset)
        return bytes(buffer)

    def abort(self) -> None:
        """Drop the connection at once; reads under way fail with ``ExportLost``."""
        self._abort()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def _check_range(self, offset: int, stop: int) -> None:
        if offset < 0 or stop > self.size:
            raise errors.ExportError(
                f"{self.address}: bytes {offset} to {stop} are not on the disk"
            )

    async def _send(self, call: _Call, view: memoryview, offset: int) -> None:
        """Send the requests for one part, as many at a time as there are slots."""
        for start in range(0, len(view), MAX_REQUEST):
            try:
                # without letting others in between, so that a disk is asked for from its beginning
                self._slots.acquire_nowait()
            except trio.WouldBlock:
                await self._slots.acquire()
            try:
                self._issue(call, view[start : start + MAX_REQUEST], offset + start)
            except errors.ExportLost:
                self._slots.release()
                raise

    def _issue(self, call: _Call, view: memoryview, offset: int) -> None:
        """Send one aligned request, for which the caller has taken a slot."""
        if self.lost:
            raise errors.ExportLost(self.lost)
        request = _Request(call, view, offset, self._finished)
        if not self._due:
            self._heard = monotonic()  # the silence begins now
        if self._outbox is not None:
            self._outbox.append(request)
            os.eventfd_write(self._bell, 1)
        else:
            try:
                self._submit(request)
            except libnbd.Error as exc:
                self._lose(self._told(exc))
                raise errors.ExportLost(self.lost) from None
        call.requests.append(request)
        call.pending += 1
        self._due += request.length
        self._notice_end()

    def _submit(self, request: _Request) -> None:
        buffer = libnbd.Buffer.from_buffer(request.view)
        self._handle.aio_pread(buffer, request.offset, request.record)

    def _notice_end(self) -> None:
        """Wake the pump if the call just made ended the connection."""
        if self._handle.aio_is_dead() or self._handle.aio_is_closed():
            self._lose("the host ended the connection")
        self._settle()

    async def _answered(self, call: _Call) -> None:
        while call.pending:
            patience = self._heard + self.timeouts.request - monotonic()
            if patience <= 0:
                self._lose(f"no answer for {self.timeouts.request:g} s")
                return
            with trio.move_on_after(patience):
                await call.settled()

    async def _reclaim(self, call: _Call) -> None:
        """Wait until libnbd has let go of the buffers, dropping the connection if it does not."""
        with trio.move_on_after(0 if self.lost else _CANCEL_GRACE, shield=True):
            await call.settled()
        if not call.pending:
            return
        self._lose("given up with reads under way")
        with trio.CancelScope(shield=True):
            await call.settled()  # the pump sees the end of the socket at once

    def _outcome(self, requests: Iterable[_Request]) -> errors.ExportError | None:
        failed = next((request for request in requests if request.error), None)
        return None if failed is None else self._error(failed)

    def _error(self, request: _Request) -> errors.ExportError:
        """Return what the failure of ``request`` means."""
        if request.error in _GONE:  # also what libnbd reports for requests cut off by the end
            return errors.ExportLost(self.lost or f"{self.address}: the connection is gone")
        return errors.ExportError(
            f"{self.address} cannot read {request.length} bytes at {request.offset}: "
            f"{os.strerror(request.error)}"
        )

    def _lose(self, why: str) -> None:
        self.lost = self.lost or f"{self.address}: {why}"
        self._abort()

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    async def connect(self, sock: socket.socket, *, abort: Callable[[], None]) -> None:
        """Let libnbd greet the server over ``sock``, which it takes over; needs ``drive``."""
        self._abort = abort
        # libnbd closes its own whenever it sees fit, also while we wait for it
        self._watched = sock.dup()
        sock.setblocking(False)
        try:
            if self.anchored:
                await self._greet_in_thread(sock)
            else:
                self._handle.aio_connect_socket(sock.detach())
        except libnbd.Error as exc:
            raise errors.ExportLost(f"{self.address}: {self._told(exc)}") from None
        self._lives()  # a quick server may have said all there is to say by now
        self._greeted.set()
        await self._ready.wait()
        if self._refused:
            raise errors.ExportError(self.lost)
        if self.lost:  # all that xapi-nbd does to refuse
            raise errors.ExportLost(f"{self.address} hung up without exporting the disk")
        self.size = self._handle.get_size()

    async def _greet_in_thread(self, sock: socket.socket) -> None:
        """Greet in a thread: within a TLS handshake GnuTLS blocks for up to 40 s."""

        def greet() -> libnbd.Error | None:
            try:
                self._handle.aio_connect_socket(sock.detach())
                while self._handle.aio_is_connecting():
                    self._handle.poll(-1)
            except libnbd.Error as exc:
                return exc  # raised in the nursery, it would be in a group
            return None

        async def hang_up() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if not greeted:
                    self._abort()  # which the thread notices at once

        greeted = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_up)
            failure = await trio.to_thread.run_sync(greet, limiter=trio.CapacityLimiter(1))
            greeted = True
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def drive(self) -> None:
        """Move libnbd's state machine until the connection ends; survives outer cancellation.

        Readers that are being cancelled need it to take their buffers back; ``close`` ends it.
        """
        try:
            with self._driver:
                await self._greeted.wait()
                while await self._step():
                    self._settle()
        finally:
            self.lost = self.lost or f"{self.address}: the host ended the connection"
            self._settle()
            self._ready.set()
            self._ended.set()

    async def _step(self) -> bool:
        """Wait for the socket and notify libnbd; return whether the connection lives."""
        watched = cast(socket.socket, self._watched)
        try:
            if self._due >= BULK:
                await self._pump_in_thread()
            elif self._wants_to_write():
                await trio.lowlevel.wait_writable(watched)
                self._handle.aio_notify_write()
            else:
                await trio.lowlevel.wait_readable(watched)
                self._heard = monotonic()
                self._handle.aio_notify_read()
        except libnbd.Error as exc:
            self._refused = self._refusal(exc)
            self.lost = self.lost or f"{self.address}: {self._told(exc)}"
        return self._lives()

    async def _pump_in_thread(self) -> None:
        token = trio.lowlevel.current_trio_token()
        settle = partial(token.run_sync_soon, self._settle, idempotent=True)
        outbox = self._outbox = deque[_Request]()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            await trio.to_thread.run_sync(self._pump, outbox, settle, limiter=self._pumping)
        finally:
            self._outbox = None
            os.close(self._bell)
            self._send_posted(outbox)  # what came too late for the thread

    def _pump(self, outbox: "deque[_Request]", settle: Callable[[], None]) -> None:
        """Send what is in ``outbox`` and notify libnbd until nothing is under way; in a thread.

        Whatever is to end this ends the connection, which wakes it.

        Args:
            outbox: filled by trio's thread, which then rings the bell.
            settle: has ``_settle`` called there, and does not wait for it.
        """
        handle, watched = self._handle, cast(socket.socket, self._watched)
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        while True:
            self._send_posted(outbox)
            if not handle.aio_in_flight() or handle.aio_is_dead() or handle.aio_is_closed():
                break
            writing = self._wants_to_write()
            poller.register(watched, select.POLLOUT if writing else select.POLLIN)
            ready = {fd for fd, _ in poller.poll()}
            if self._bell in ready:
                os.eventfd_read(self._bell)
            if watched.fileno() in ready:
                self._heard = monotonic()
                if writing:
                    handle.aio_notify_write()
                else:
                    handle.aio_notify_read()
            if self._finished:
                settle()

    def _send_posted(self, outbox: "deque[_Request]") -> None:
        """Send what waits in ``outbox``; what cannot be sent fails like a lost connection."""
        while outbox:
            request = outbox.popleft()
            try:
                self._submit(request)
            except libnbd.Error:
                request.error = errno.ENOTCONN
                self._finished.append(request)

    def _wants_to_write(self) -> bool:
        # whenever requests wait to be written, replies are due too (see MAX_IN_FLIGHT)
        return self._handle.aio_get_direction() == libnbd.AIO_DIRECTION_WRITE

    def _lives(self) -> bool:
        """Return whether the connection lives, and note whether its handshake is over."""
        if self._handle.aio_is_dead() or self._handle.aio_is_closed():
            return False
        if not self._handle.aio_is_connecting():
            self._ready.set()
        return True

    def _settle(self) -> None:
        while self._finished:
            request = self._finished.pop()
            request.call.answered()
            self._due -= request.length
            self._slots.release()

    async def close(self) -> None:
        """Say goodbye and wait until the host has ended the connection, within bounds.

        xapi-nbd ends it after it has unplugged and destroyed its VBD, so that then the disk is in
        nobody's use any more.
        """
        with trio.move_on_after(self.timeouts.close, shield=True):
            try:
                if not self._ended.is_set() and self._handle.aio_is_ready():
                    self._handle.aio_disconnect()
                    self._notice_end()
                    await self._ended.wait()
            except libnbd.Error as exc:
                logger.debug("%s: disconnect: %s", self.address, self._told(exc))
        if not self._ended.is_set():
            logger.info("%s: the host has not ended the connection", self.address)
        self._abort()
        self._driver.cancel()

    def forget(self) -> None:
        """Free what libnbd holds; called when nothing waits for its socket any more."""
        del self._handle
        if self._watched is not None:
            self._watched.close()

    def _refusal(self, exc: libnbd.Error) -> int:
        """Return the errno of a server that said no in the handshake, 0 for a lost connection."""
        number = exc.errnum or 0
        return 0 if self._ready.is_set() or number in _GONE else number

    def _told(self, exc: libnbd.Error) -> str:
        name = self.address.export_name
        return str(exc).replace(name, "the export") if name else str(exc)


def _nothing() -> None:
    """Abort nothing: no connection yet."""


def verifies_names() -> bool:
    """Tell whether this libnbd can verify the host behind a socket it is given: since 1.22."""
    return hasattr(libnbd.NBD, "set_tls_hostname")


def _configured(address: NbdAddress, directory: str) -> libnbd.NBD:
    handle = libnbd.NBD()
    if directory:
        # TLS before anything else, and the export is named only after the host is verified
        handle.set_tls(libnbd.TLS_REQUIRE)
        handle.set_tls_certificates(directory)
        handle.set_tls_verify_peer(True)
        handle.set_tls_hostname(address.subject)
    else:
        handle.set_tls(libnbd.TLS_DISABLE)  # if there is TLS, it is done before libnbd speaks
    handle.set_export_name(address.export_name)
    handle.set_pread_initialize(False)  # every completion is checked; saves a pass over memory
    handle.set_request_structured_replies(False)  # xapi-nbd has none; saves a round trip
    return handle
