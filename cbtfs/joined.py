"""Joined: volumes in several pieces, each shown as one file, by a process of its own.

::

    python -m cbtfs.joined DIR --image IMAGE … 'NAME LINE OF A TABLE' …

    DIR             a file system of FUSE, read-only
    └── NAME        what the table of that name makes of the images (see ``pieces``)

The command returns when the files can be read. Its process goes on in the background, and ends
when the kernel has no more use for the file system: it is unmounted, and nothing of it is open.
``opened`` mounts what is in the files and then unmounts DIR lazily, so that it is the loop devices
that keep the process: with the last of them it ends.

Rules of this file:

1. Nothing is kept in memory but the tables; the kernel keeps what was read, for it never changes.
2. An image is opened once, at the start, and only read.
3. Whatever goes wrong in a read is EIO: another exception would end the process (see ``fuse``).
"""

import argparse
import errno
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyfuse3
import trio

from . import errors, pieces, sparse
from .folder import told
from .pieces import Table

SUBTYPE = "cbtfs-volumes"
"""The kernel's list of mounts has ``fuse.`` before it."""

_TIMEOUT = 3600.0
"""Seconds that the kernel believes a name, and attributes: nothing changes."""


class Joined(pyfuse3.Operations):
    """The file system: a folder with a file for each table.

    Args:
        tables: by the names of the files.
        images: open descriptors, in the order of the tables' numbers; closed by the caller.
    """

    def __init__(self, tables: Mapping[str, Table], images: Sequence[int]) -> None:
        super().__init__()
        self._images = images
        self._files = [(name.encode(), table) for name, table in tables.items()]

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of a file."""
        for inode, (known, _) in enumerate(self._files, start=pyfuse3.ROOT_INODE + 1):
            if known == name and parent_inode == pyfuse3.ROOT_INODE:
                return self._attributes(inode)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes of a file, or of the folder."""
        return self._attributes(inode)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Open the folder."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List the folder from its ``start_id``-th name on."""
        for index, (name, _) in enumerate(self._files[start_id:], start=start_id + 1):
            entry = self._attributes(pyfuse3.ROOT_INODE + index)
            if not pyfuse3.readdir_reply(token, name, entry, index):
                break

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open a file to be read."""
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Return bytes of a file, from the images; fewer at its end."""
        _, table = self._files[fh - pyfuse3.ROOT_INODE - 1]
        try:
            return await trio.to_thread.run_sync(self._read, table, off, size)
        except (OSError, errors.CbtfsError):
            raise pyfuse3.FUSEError(errno.EIO) from None

    def _read(self, table: Table, offset: int, length: int) -> bytes:
        parts = table.parts(offset, length)
        return b"".join(sparse.read_all(self._images[i], count, at) for i, at, count in parts)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        entry.entry_timeout = entry.attr_timeout = _TIMEOUT
        if inode == pyfuse3.ROOT_INODE:
            entry.st_mode, entry.st_nlink = stat.S_IFDIR | 0o500, 2
        else:
            entry.st_mode, entry.st_nlink = stat.S_IFREG | 0o400, 1
            entry.st_size = self._files[inode - pyfuse3.ROOT_INODE - 1][1].size
            entry.st_blocks = entry.st_size // pieces.SECTOR
        return entry


def main(arguments: Sequence[str]) -> int:
    """Show the volumes in a directory; return the exit status as soon as they can be read.

    From then on another process goes on with it.
    """
    parser = argparse.ArgumentParser(prog="cbtfs.joined", description=__doc__)
    parser.add_argument("dir")
    parser.add_argument("--image", action="append", required=True)
    parser.add_argument("line", nargs="+")
    options = parser.parse_args(arguments)
    try:
        return _show(options.dir, options.image, options.line)
    except errors.CbtfsError as exc:
        sys.stderr.write(f"{exc}\n")
        return exc.exit_code


def _show(place: str, images: Sequence[str], lines: Sequence[str]) -> int:
    tables = _tables(lines)
    opened = [_opened(path) for path in images]
    sizes = [os.fstat(fd).st_size for fd in opened]
    for name, table in tables.items():
        if any(image >= len(sizes) or end > sizes[image] for image, end in table.ends()):
            raise errors.StoreError(f"{name} lies beyond the end of its disk")
    kernel = {f"fsname={SUBTYPE}", f"subtype={SUBTYPE}", "default_permissions", "ro"}
    try:
        # libfuse says on stderr what is wrong, and this only that something is
        pyfuse3.init(Joined(tables, opened), place, kernel | {"nosuid", "nodev", "noexec"})
    except RuntimeError as exc:
        raise errors.MountError(f"{place} cannot be mounted: {exc}") from exc
    if os.fork():
        os._exit(0)  # the mount is the other's: to close it here would end it
    _leave()
    trio.run(pyfuse3.main)
    pyfuse3.close(unmount=False)
    return 0


def _tables(lines: Sequence[str]) -> dict[str, Table]:
    found: dict[str, list[str]] = {}
    for line in lines:
        name, _, rest = line.partition(" ")
        found.setdefault(name, []).append(rest)
    return {name: pieces.parse(table) for name, table in found.items()}


def _opened(path: str) -> int:
    with told("read", Path(path)):
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _leave() -> None:
    """Let go of what whoever started this waits for: a terminal, pipes, a lock."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
