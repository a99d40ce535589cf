"""The guest's side: every writable disk of a running VM as an NBD export on a unix socket.

``DIR/guest/<vm>/<device>.sock``: whoever writes there is the guest, and the pool records the blocks
as tapdisk does. A VM whose name is plain and unique is found under it, any other under its uuid.
Writes of zeros are writes (a bit is set), TRIM is a discard (it is not).
"""

import contextlib
import logging
import re
import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import nbdwire
from .disk import Disk
from .listener import Listener, listen_unix
from .nbdwire import Command, Error, Option, Reply, Wire
from .pool import LiveDisk

log = logging.getLogger(__name__)

FLAGS = (
    nbdwire.HAS_FLAGS | nbdwire.SEND_FLUSH | nbdwire.SEND_FUA | nbdwire.SEND_TRIM
    | nbdwire.SEND_WRITE_ZEROES | nbdwire.CAN_MULTI_CONN
)  # fmt: skip

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}")
_CHUNK = 1 << 20
_LONGEST = 64 << 20
_ZEROS = bytes(_CHUNK)
_INFO_EXPORT = 0


class GuestSockets:
    """The sockets of all live disks, kept in step with the pool by `refresh`.

    Args:
        directory: made and owned by this object; emptied by `stop`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._served: dict[tuple[str, str], tuple[Disk, Listener]] = {}
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)

    def refresh(self, disks: Sequence[LiveDisk]) -> None:
        """Serve exactly ``disks`` from now on."""
        wanted = {key: live for live, key in zip(disks, _names(disks), strict=True)}
        for key, (disk, _) in list(self._served.items()):
            if key not in wanted or wanted[key].disk is not disk:
                self._remove(key)
        for key, live in wanted.items():
            if key not in self._served:
                self._served[key] = (live.disk, self._listen(key, live))

    def stop(self) -> None:
        """Close all sockets and remove their files."""
        for key in list(self._served):
            self._remove(key)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _listen(self, key: tuple[str, str], live: LiveDisk) -> Listener:
        folder = self._directory / key[0]
        folder.mkdir(exist_ok=True)
        path = folder / f"{key[1]}.sock"
        server = GuestDisk(live.disk)
        name = f"guest {key[0]}/{key[1]}"
        return Listener(listen_unix(path), server.serve, name=name)

    def _remove(self, key: tuple[str, str]) -> None:
        _, listener = self._served.pop(key)
        listener.stop()
        folder = self._directory / key[0]
        (folder / f"{key[1]}.sock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


class GuestDisk:
    """A writable NBD server of one disk; `serve` is a `listener.Listener`'s handler."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def serve(self, connection: socket.socket) -> None:
        """Serve one connection until its end."""
        wire = Wire(connection)
        with contextlib.suppress(EOFError, OSError):
            if self._negotiate(wire):
                while self._request(wire):
                    pass

    def _negotiate(self, wire: Wire) -> bool:
        flags = nbdwire.FIXED_NEWSTYLE | nbdwire.NO_ZEROES
        wire.send(nbdwire.NBDMAGIC + nbdwire.IHAVEOPT + flags.to_bytes(2, "big"))
        client = int.from_bytes(wire.exactly(4), "big")
        export = self._disk.size.to_bytes(8, "big") + FLAGS.to_bytes(2, "big")
        while True:
            option, _ = wire.option()
            if option == Option.EXPORT_NAME:
                wire.send(export + (b"" if client & nbdwire.NO_ZEROES else bytes(124)))
                return True
            if option == Option.ABORT:
                wire.reply_to_option(option, Reply.ACK)
                return False
            if option == Option.LIST:
                wire.reply_to_option(option, Reply.SERVER, bytes(4))
                wire.reply_to_option(option, Reply.ACK)
            elif option in {Option.GO, Option.INFO}:
                info = _INFO_EXPORT.to_bytes(2, "big") + export
                wire.reply_to_option(option, Reply.INFO, info)
                wire.reply_to_option(option, Reply.ACK)
                if option == Option.GO:
                    return True
            else:
                wire.reply_to_option(option, Reply.ERR_UNSUP)

    def _request(self, wire: Wire) -> bool:
        request = wire.exactly(nbdwire.REQUEST.size)
        magic, _, command, handle, offset, length = nbdwire.REQUEST.unpack(request)
        if magic != nbdwire.REQUEST_MAGIC or command == Command.DISC:
            return False
        if command == Command.READ:
            return self._read(wire, handle, offset, length)
        if command == Command.WRITE:
            if length > _LONGEST:
                return False
            data = memoryview(bytearray(length))
            wire.into(data)
            wire.reply(self._write(offset, data), handle)
        elif command == Command.FLUSH:
            self._disk.flush()
            wire.reply(Error.NONE, handle)
        elif command in {Command.TRIM, Command.WRITE_ZEROES}:
            wire.reply(self._clear(command, offset, length), handle)
        else:
            wire.reply(Error.EINVAL, handle)
        return True

    def _read(self, wire: Wire, handle: int, offset: int, length: int) -> bool:
        if offset + length > self._disk.size or length > _LONGEST:
            wire.reply(Error.EINVAL, handle)
            return True
        wire.reply(Error.NONE, handle)
        buffer = memoryview(bytearray(min(length, _CHUNK)))
        for start in range(offset, offset + length, _CHUNK):
            piece = buffer[: min(_CHUNK, offset + length - start)]
            self._disk.pread_into(start, piece)
            wire.send(piece)
        return True

    def _write(self, offset: int, data: memoryview) -> Error:
        if offset + len(data) > self._disk.size:
            return Error.ENOSPC
        self._disk.write(offset, data)
        return Error.NONE

    def _clear(self, command: int, offset: int, length: int) -> Error:
        if offset + length > self._disk.size:
            return Error.EINVAL
        if command == Command.TRIM:
            self._disk.discard(offset, length)
            return Error.NONE
        for start in range(offset, offset + length, _CHUNK):
            self._disk.write(start, _ZEROS[: min(_CHUNK, offset + length - start)])
        return Error.NONE


def _names(disks: Sequence[LiveDisk]) -> list[tuple[str, str]]:
    owners = Counter(name for name, _ in {(disk.vm_name, disk.vm_uuid) for disk in disks})
    return [
        (
            disk.vm_name
            if owners[disk.vm_name] == 1 and _PLAIN_NAME.fullmatch(disk.vm_name)
            else disk.vm_uuid,
            disk.device,
        )
        for disk in disks
    ]
