"""Lock: a file in a folder that one run at a time holds, and that says which.

The kernel releases the lock when its process ends, however it ends. The file stays for ever:
removing it would let two runs hold two different files of the same name.
"""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

import msgspec

from . import errors
from .folder import Folder, told

NAME = ".lock"


class _Owner(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    host: str
    since: str


@contextmanager
def held(folder: Folder, *, wait: bool) -> Generator[int]:
    """Hold the lock of ``folder``; yield its descriptor: who inherits that holds the lock, too.

    Args:
        folder: what is locked.
        wait: until it is free; only where nobody holds it for long.

    Raises:
        StoreLocked: not ``wait``, and somebody has it; the text says who.
        StoreError: there can be no lock here.
    """
    fd = folder.open_file(NAME, flags=os.O_RDWR | os.O_CREAT)
    try:
        with told("lock", folder.path / NAME):
            _take(fd, folder, wait=wait)
        try:
            yield fd
        finally:
            # it tells people who works here; on a disk that fails or is full it may stay
            with suppress(OSError):
                os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _take(fd: int, folder: Folder, *, wait: bool) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise errors.StoreLocked(_who_holds(folder, os.pread(fd, 4096, 0))) from None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    owner = _Owner(pid=os.getpid(), host=socket.gethostname(), since=now)
    # the kernel holds the lock, not this text; a full store must be locked to be tidied up
    with suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(owner), 0)


def _who_holds(folder: Folder, content: bytes) -> str:
    try:
        owner = msgspec.json.decode(content, type=_Owner)
    except (ValueError, RecursionError):
        return f"{folder.path} is locked by another run; wait for it to end"
    return (
        f"{folder.path} is locked by process {owner.pid} on {owner.host} since {owner.since};"
        " wait for it to end"
    )


def take(fd: int) -> bool:
    """Lock the open file ``fd`` until it is closed; return False if somebody else has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: then it has to go without
        return True
    return True
