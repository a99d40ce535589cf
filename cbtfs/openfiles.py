"""Open files: which files somebody has open, as far as this machine and this user can see.

Programs show theirs under ``/proc`` (those of others to root only), loop devices under ``/sys``. A
client of a file server shows nothing.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

Identity = tuple[int, int]
"""Device and inode of a file, whatever it is called."""

_PROCESSES = Path("/proc")
_BLOCK_DEVICES = Path("/sys/block")


def identities(wanted: Callable[[Path], bool]) -> frozenset[Identity]:
    """Return the regular files that are open now, of those whose path is ``wanted``.

    Only at these is looked: to look at a file of a server that does not answer can take for ever.
    """
    found: set[Identity] = set()
    for path in filter(wanted, _paths()):
        with suppress(OSError):
            told = path.stat()
            if stat.S_ISREG(told.st_mode):
                found.add((told.st_dev, told.st_ino))
    return frozenset(found)


def _paths() -> Iterator[Path]:
    folders = (_entries(process / "fd") for process in _entries(_PROCESSES))
    for file in chain.from_iterable(folders):
        with suppress(OSError):
            yield file.readlink()
    for device in _entries(_BLOCK_DEVICES):
        with suppress(OSError):
            told = (device / "loop" / "backing_file").read_bytes()
            yield Path(os.fsdecode(told.rstrip(b"\n")))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # it has ended, or is not ours to look at
        return []
