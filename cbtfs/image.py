"""Image: one raw file with its digests – reflink clone, sparse write, fsync.

The only module that makes ioctls. Everything here blocks: call it from worker threads. Several
threads may write one image at once, as long as no two write the same block.

Rules of this file:

1. Writes start at a block boundary and end at one, or at the end of the disk: then every digest is
   that of a whole block (the last one at its true length), and nothing is ever read back.
2. Zeros are never stored: a zero block is a hole, in the image and (as far as the file system's
   blocks allow) in the digest array.
3. The page cache stays clean: what is written goes to disk window by window, and is dropped there.
   ``finish`` waits for the rest; only then may a commit name the file.
"""

import ctypes
import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import blake3

from . import digests, errors, extents, units
from .extents import Extent
from .folder import Folder, told

Origin = Literal["new", "reflink", "copy"]
"""How an image began: empty, sharing its base's extents, or as a sparse copy of its base."""

_WINDOW = 32 * units.MiB
"""Bytes written between two rounds of write-back; at most about two windows are dirty."""

_COPY_STEP = 8 * units.MiB
_ROOT_STEP = 4 * units.MiB

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int), on x86 and Arm
_NO_REFLINK = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS}
_NO_COPY_RANGE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS}

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # linux/falloc.h
_START_WRITE = 2  # linux/fs.h: SYNC_FILE_RANGE_WRITE
_WRITE_AND_WAIT = 1 | 2 | 4  # linux/fs.h: WAIT_BEFORE, WRITE, WAIT_AFTER
_REAL_FAILURES = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS}

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Where an image and its digests are: two names in an open folder."""

    folder: Folder
    name: str
    digests: str

    @property
    def path(self) -> Path:
        """Path of the image, for messages."""
        return self.folder.path / self.name


class Image:
    """An image being written; made by ``create`` or ``clone``, closed by the caller."""

    path: Path
    size: int
    origin: Origin
    bytes_written: int

    @classmethod
    def create(cls, files: ImageFiles, *, size: int) -> Self:
        """Make an image of ``size`` bytes that holds zeros and uses no space."""
        raise NotImplementedError

    @classmethod
    def clone(
        cls,
        files: ImageFiles,
        *,
        base: ImageFiles,
        size: int,
        copied: Callable[[int], None] | None = None,
    ) -> Self:
        """Make an image of ``size`` bytes that begins with the content of ``base``."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write ``data`` at ``offset``; return the bytes stored, zeros not counted."""
        raise NotImplementedError

    def zero(self, offset: int, length: int) -> None:
        """Make ``length`` bytes at ``offset`` zero, as a hole."""
        raise NotImplementedError

    def finish(self) -> str:
        """Bring all to disk; return the digest root."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the files."""
        raise NotImplementedError
