"""The HTTP handlers: disks and metadata in and out (xen-api, ocaml/xapi/importexport.ml).

What a client must know of them, and finds here:

1. 200 comes first. Whether it worked is on the *task*, or in a body that ends early or in HTML.
2. No Content-Length on a disk's export, no ranges; the end of the connection is the end.
3. dom0's VBD is there until after the answer's end.
4. A host that does not see the disk sends a 302 to one that does.
"""

import contextlib
import logging
import socket
import ssl
import struct
import threading
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass

from . import metadata, values, vhd
from .failures import SimError
from .https import HttpError, Request, Stream, html
from .pool import Attachment, HostAddress, SimulatedPool

log = logging.getLogger(__name__)

Handler = Callable[[Request, Stream], None]

_PIECE = 1 << 20
_TICK = 0.05
_LONGEST_CHUNK = 1 << 31
_LONGEST_METADATA = 64 << 20
_CHUNK = struct.Struct("<QI")
_FORMATS = {"raw": "application/octet-stream", "vhd": "application/vhd"}
_AUTHENTICATE = 'WWW-Authenticate: Basic realm="XAPI"'


@dataclass(frozen=True, slots=True)
class Call:
    """An authenticated request and the task that its outcome goes to."""

    request: Request
    stream: Stream
    session: str
    task: str

    def start(self, *headers: str) -> None:
        """Send 200 and the headers that all handlers send."""
        common = ("Connection: close", "Cache-Control: no-cache, no-store")
        self.stream.start(200, [*common, f"Task-id: {self.task}", *headers])


class Handlers:
    """The handlers of one host."""

    def __init__(self, pool: SimulatedPool, host: HostAddress) -> None:
        self._pool = pool
        self._host = host

    def table(self) -> dict[tuple[str, str], Handler]:
        """Return the handlers by method and path."""
        return {
            ("GET", "/export_raw_vdi"): self._handler(self._export_raw, "Exporting raw VDI"),
            ("PUT", "/import_raw_vdi"): self._handler(self._import_raw, "Importing raw VDI"),
            ("GET", "/export_metadata"): self._handler(self._export_metadata, "VM export"),
            ("PUT", "/import_metadata"): self._handler(self._import_metadata, "VM import"),
        }

    def _handler(self, work: Callable[[Call], str], label: str) -> Handler:
        """Return ``work`` with authentication before it and the task around it."""

        def handle(request: Request, stream: Stream) -> None:
            with self._session(request) as session:
                task, own = self._task(request, session, label)
                try:
                    time.sleep(self._pool.faults.delay_of(request.path[1:]))
                    self._pool.faults.check(request.path[1:])
                    result = work(Call(request, stream, session, task))
                except SimError as exc:
                    self._pool.task_fail(task, exc)
                    status = 403 if exc.code == "RBAC_PERMISSION_DENIED" else 500
                    raise HttpError(status, str(exc)) from None
                except _Redirected:
                    # the host that the client was sent to completes the client's task
                    if own:
                        self._pool.task_finish(task)
                except (OSError, EOFError) as exc:
                    log.info("%s: %s", request.path, exc)
                    self._pool.task_fail(task, SimError("VDI_IO_ERROR", "Device I/O errors"))
                except _Answered as answered:
                    self._pool.task_fail(task, answered.failure)
                else:
                    self._pool.task_finish(task, result)

        return handle

    def _task(self, request: Request, session: str, label: str) -> tuple[str, bool]:
        """Return the task that the request names or a new one, and whether it is new."""
        task = request.parameter("task_id")
        if not task:
            return self._pool.task_create(session, label), True
        try:
            self._pool.db.record("task", task)
        except SimError as exc:
            raise HttpError(500, str(exc)) from None
        return task, False

    @contextlib.contextmanager
    def _session(self, request: Request) -> Generator[str]:
        """Give the request's session, or a temporary one for HTTP Basic."""
        session = request.parameter("session_id")
        given = request.basic
        try:
            if session:
                self._pool.check_session(session)
            elif given is not None:
                session = self._pool.login(*given, host_ref=self._host.ref, originator="http")
            else:
                raise SimError("SESSION_AUTHENTICATION_FAILED")
        except SimError:
            task = request.parameter("task_id")
            if task:
                with contextlib.suppress(SimError):
                    self._pool.task_fail(task, SimError("SESSION_AUTHENTICATION_FAILED"))
            raise HttpError(401, "Unauthorised", headers=[_AUTHENTICATE]) from None
        try:
            yield session
        finally:
            if not request.parameter("session_id"):
                self._pool.logout(session)

    # ── disks ────────────────────────────────────────────────────────────────────────────

    def _export_raw(self, call: Call) -> str:
        query = call.request.query
        vdi = self._pool.find_vdi(query.get("vdi", ""))
        kind = query.get("format", "raw")
        self._check_format(call, kind, *_FORMATS)
        self._redirect(call, vdi)
        name = self._pool.db.text("VDI", vdi, "uuid")
        disposition = f'Content-Disposition: attachment; filename="{name}.{kind}"'
        call.start(f"Content-Type: {_FORMATS[kind]}", disposition)
        with self._attached(call, vdi, write=False) as attachment:
            out = _Body(call.stream, self._pool)
            if kind == "raw":
                _send_raw(attachment, out)
            else:
                self._send_vhd(attachment, query.get("base", ""), out)
        return ""

    def _is_full(self, vdi: str) -> bool:
        """Tell whether the SR of a disk is one that does not know what it has allocated."""
        sr = self._pool.db.text("VDI", vdi, "SR")
        names = (self._pool.db.text("SR", sr, key) for key in ("uuid", "name_label"))
        return self._pool.faults.hits("vhd.full", *names)

    def _send_vhd(self, attachment: Attachment, base: str, out: "_Body") -> None:
        if attachment.size > vhd.LARGEST:
            raise SimError("VDI_TOO_LARGE", attachment.vdi_ref, str(vhd.LARGEST))
        disk, parent = attachment.disk, None
        if base:
            ancestor = self._pool.disk(self._pool.find_vdi(base))
            parent = uuid.UUID(ancestor.uuid)
            blocks = vhd.allocation(disk.differences(ancestor))
        elif self._is_full(attachment.vdi_ref):
            blocks = vhd.everything(attachment.size)
        else:
            blocks = vhd.allocation(disk.allocated())
        plan = vhd.Plan(attachment.size, uuid.UUID(attachment.vdi_uuid), blocks, parent)
        for piece in vhd.stream(plan, attachment.pread_into):
            out.send(piece)

    def _import_raw(self, call: Call) -> str:
        request = call.request
        kind = request.query.get("format", "raw")
        if "transfer-encoding" in request.headers:
            raise self._refuse(call, 404, "Cannot handle encoding", SimError("INTERNAL_ERROR"))
        self._check_format(call, kind, "raw")
        vdi = self._import_target(call)
        self._redirect(call, vdi)
        call.start()
        with self._attached(call, vdi, write=True) as attachment:
            source = _Inbox(call.stream, self._pool)
            if "chunked" in request.query:
                _receive_chunks(source, attachment)
            else:
                _receive_raw(source, attachment, request.length)
            attachment.disk.flush()
        return values.xml(vdi)

    def _import_target(self, call: Call) -> str:
        """Return the VDI to write to, made now if the request names an SR instead."""
        query = call.request.query
        if "vdi" in query:
            return self._pool.find_vdi(query["vdi"])
        sr = query.get("sr_id", "")
        if "sr_uuid" in query:
            sr = self._pool.db.by_uuid("SR", query["sr_uuid"])
        if not sr or call.request.length is None:
            raise self._refuse(call, 400, "Bad request", SimError("VDI_MISSING"))
        record: values.Value = {
            "name_label": "Imported VDI",
            "name_description": "",
            "SR": sr,
            "virtual_size": call.request.length,
            "type": "user",
            "sharable": False,
            "read_only": False,
            "other_config": {},
        }
        return str(self._pool.call("VDI.create", record, session=call.session))

    def _check_format(self, call: Call, kind: str, *known: str) -> None:
        if kind not in known:
            if kind == "vhd" and "chunked" in call.request.query:
                text = "Cannot handle chunked VHD"
            else:
                text = f"Unknown format {kind}"
            raise self._refuse(call, 404, text, SimError("INTERNAL_ERROR", text))

    def _redirect(self, call: Call, vdi: str) -> None:
        """Send the client to another host if this one does not see the disk."""
        host = self._pool.sees(self._host.ref, vdi)
        elsewhere = host not in {"", self._host.ref}
        address = self._pool.db.text("host", host, "address") if elsewhere else ""
        address = self._pool.faults.text("http.redirect") or address
        if not address:
            return
        location = f"https://{address}:{self._pool.https_port}{call.request.target}"
        call.stream.answer(302, headers=[f"Location: {location}", "Connection: close"])
        raise _Redirected

    def _refuse(self, call: Call, status: int, text: str, failure: SimError) -> "_Answered":
        call.stream.page(HttpError(status, text))
        return _Answered(failure)

    @contextlib.contextmanager
    def _attached(self, call: Call, vdi: str, *, write: bool) -> Generator[Attachment]:
        """Plug the disk in dom0; failures go into the body, the answer ends before the unplug."""
        with contextlib.ExitStack() as plugged:
            try:
                attachment = self._pool.http_attach(self._host.ref, call.session, vdi, write=write)
                plugged.callback(attachment.close)
                yield attachment
            except SimError as exc:
                call.stream.send(html(HttpError(500, str(exc))))
                raise _Answered(exc) from None
            finally:
                _end(call.stream.connection)

    # ── metadata ─────────────────────────────────────────────────────────────────────────

    def _export_metadata(self, call: Call) -> str:
        query = call.request.query
        db = self._pool.db
        with self._pool.lock:
            if "all" in query:
                kept = ("is_a_snapshot", "is_control_domain")
                vms = [r for r, vm in db.records("VM").items() if not any(vm[k] for k in kept)]
            else:
                vms = [query["ref"] if "ref" in query else db.by_uuid("VM", query.get("uuid", ""))]
            snapshots = query.get("export_snapshots", "true") == "true"
            archive = metadata.export(self._pool, vms, snapshots=snapshots)
        head = ("HTTP/1.0 200 OK", "Connection: close", "Cache-Control: no-cache, no-store")
        lines = (*head, f"Content-Length: {len(archive)}", f"Task-id: {call.task}", "", "")
        call.stream.send("\r\n".join(lines).encode() + archive)
        return ""

    def _import_metadata(self, call: Call) -> str:
        query = call.request.query
        length = call.request.length
        if length is None or length > _LONGEST_METADATA:
            raise self._refuse(call, 400, "Bad request", SimError("IMPORT_ERROR", "no length"))
        call.start()
        try:
            vms = metadata.import_vms(
                self._pool,
                metadata.read(call.stream.body(length)),
                disks={k[4:]: v for k, v in query.items() if k.startswith("vdi:")},
                restore=query.get("restore") == "true",
                dry_run=query.get("dry_run") == "true",
            )
        except SimError as exc:
            raise _Answered(exc) from None
        finally:
            _end(call.stream.connection)
        return values.xml([*vms])


class _Answered(Exception):
    """The client has its answer; the failure is for the task."""

    def __init__(self, failure: SimError) -> None:
        self.failure = failure
        super().__init__(failure)


class _Redirected(Exception):
    """The client was sent to another host."""


class _Body:
    """The body of a disk's export, with what was ordered to be wrong with it."""

    def __init__(self, stream: Stream, pool: SimulatedPool) -> None:
        self._stream = stream
        self._pool = pool
        self._sent = 0
        self._truncate = pool.faults.size("http.truncate")
        self._stall = pool.faults.size("http.stall")
        self._flip = pool.faults.size("http.flip")

    def send(self, data: bytes | memoryview) -> None:
        """Send ``data``, or the part of it before the end that was ordered and raise OSError."""
        start, self._sent = self._sent, self._sent + len(data)
        if self._flip is not None and start <= self._flip < self._sent:
            flipped = bytearray(data)
            flipped[self._flip - start] ^= 0xFF
            data = bytes(flipped)
        for limit, silent in ((self._truncate, False), (self._stall, True)):
            if limit is not None and self._sent > limit:
                self._stream.send(data[: max(limit - start, 0)])
                if silent:
                    _wait_for_end(self._stream.connection, self._pool.closing)
                raise OSError("cut by a fault")
        self._stream.send(data)


class _Inbox:
    """The body of a disk's import, with what was ordered to be wrong with it."""

    def __init__(self, stream: Stream, pool: SimulatedPool) -> None:
        self._stream = stream
        self._pool = pool
        self._got = 0

    def body(self, length: int) -> bytes:
        """Return the next ``length`` bytes."""
        data = bytearray(length)
        self.into(memoryview(data))
        return bytes(data)

    def into(self, view: memoryview) -> None:
        """Fill ``view``, or raise OSError where that was ordered."""
        self._got += len(view)
        for key, silent in (("http.upload_cut", False), ("http.upload_stall", True)):
            limit = self._pool.faults.size(key)
            if limit is not None and self._got > limit:
                if silent:
                    _wait_for_end(self._stream.connection, self._pool.closing)
                raise OSError("cut by a fault")
        self._stream.into(view)
        flip = self._pool.faults.size("http.upload_flip")
        start = self._got - len(view)
        if flip is not None and start <= flip < self._got:
            view[flip - start] ^= 0xFF


def _wait_for_end(connection: socket.socket, closing: threading.Event) -> None:
    """Return when the client hangs up, or the pool closes."""
    connection.settimeout(_TICK)
    while not closing.is_set():
        with contextlib.suppress(TimeoutError):
            if not connection.recv(_PIECE):
                return


def _send_raw(attachment: Attachment, out: _Body) -> None:
    buffer = memoryview(bytearray(_PIECE))
    for offset in range(0, attachment.size, _PIECE):
        piece = buffer[: min(_PIECE, attachment.size - offset)]
        attachment.pread_into(offset, piece)
        out.send(piece)


def _receive_raw(stream: _Inbox, attachment: Attachment, length: int | None) -> None:
    left = attachment.size if length is None else length
    if left > attachment.size:
        raise SimError("VDI_IO_ERROR", "Device I/O errors")
    _write(stream, attachment, offset=0, length=left)


def _receive_chunks(stream: _Inbox, attachment: Attachment) -> None:
    """Write chunks as they come: offset and length, little-endian, then data; zeros end it."""
    while True:
        offset, length = _CHUNK.unpack(stream.body(_CHUNK.size))
        if length == 0:
            return
        if length >= _LONGEST_CHUNK or offset + length > attachment.size:
            raise SimError("VDI_IO_ERROR", "Device I/O errors")
        _write(stream, attachment, offset=offset, length=length)


def _write(stream: _Inbox, attachment: Attachment, *, offset: int, length: int) -> None:
    buffer = memoryview(bytearray(min(_PIECE, length)))
    for start in range(offset, offset + length, _PIECE):
        piece = buffer[: min(_PIECE, offset + length - start)]
        stream.into(piece)
        attachment.write(start, piece)


def _end(connection: socket.socket) -> None:
    """Let the client see the end of the answer, while this side goes on."""
    with contextlib.suppress(OSError, ValueError):
        connection.settimeout(0)
        if isinstance(connection, ssl.SSLSocket):
            connection.unwrap()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
