"""Sockets that accept, one thread per connection, and a stop that leaves nothing behind."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

Handler = Callable[[socket.socket], None]


class Listener:
    """A listening socket whose connections are served by ``handler``, each in its own thread.

    The handler owns the connection's life but not its socket: that is closed when the handler
    returns or raises. `stop` shuts all of them down, so a handler blocked in a read sees the end.

    Args:
        listening: bound and listening; closed by `stop`.
        handler: called with a connected, blocking socket.
        name: for the threads and the log.
    """

    def __init__(self, listening: socket.socket, handler: Handler, *, name: str) -> None:
        self._listening = listening
        self._handler = handler
        self._name = name
        self._lock = threading.Lock()  # guards _open and _stopped
        self._open: dict[socket.socket, threading.Thread] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def stop(self, *, patience: float = 5.0) -> None:
        """Close everything and wait up to ``patience`` seconds for the threads."""
        with self._lock:
            self._stopped = True
            busy = dict(self._open)
        # closing alone would not wake a thread that sits in accept() or recv()
        for wake in (self._listening, *busy):
            with contextlib.suppress(OSError):
                wake.shutdown(socket.SHUT_RDWR)
        self._thread.join(patience)
        self._listening.close()
        deadline = time.monotonic() + patience
        for thread in busy.values():
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def drop_connections(self) -> int:
        """Cut every open connection as a crash of the server would; return how many."""
        with self._lock:
            busy = list(self._open)
        for connection in busy:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        return len(busy)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                if self._stopped:
                    return
                continue
            connection.setblocking(True)
            thread = threading.Thread(
                target=self._serve, args=(connection,), name=self._name, daemon=True
            )
            with self._lock:
                if self._stopped:
                    connection.close()
                    return
                self._open[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            self._handler(connection)
        except OSError as exc:
            log.debug("%s: connection ended: %s", self._name, exc)
        except Exception:
            log.exception("%s: connection failed", self._name)
        finally:
            with self._lock:
                self._open.pop(connection, None)
            connection.close()


def listen_tcp(address: str, port: int, *, backlog: int = 64) -> socket.socket:
    """Return a socket that listens on an IPv4 address; port 0 takes a free one."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(backlog)
    except OSError:
        listening.close()
        raise
    return listening


def listen_unix(path: Path) -> socket.socket:
    """Return a listening unix socket at ``path``, however long the path is."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # a socket address holds 107 bytes; going through the folder's descriptor always fits
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        path.unlink(missing_ok=True)
        listening.bind(f"/proc/self/fd/{folder}/{path.name}")
        listening.listen(16)
    except OSError:
        listening.close()
        raise
    finally:
        os.close(folder)
    return listening
