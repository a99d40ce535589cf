"""Partial file: a file in the making, which appears under its name by one rename, complete.

::

    DIR/.NAME.0123456789abcdef.cbtfs-partial      what it will hold is in its name, as a digest
    DIR/NAME                                      only once everything is on disk

What a run leaves of it, the next one goes on with, if it is going to hold the same. Whoever has it
open has locked it.
"""

import hashlib
import os
import re
import stat
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

from . import errors, lock
from .folder import Folder, told_outside

_SUFFIX = ".cbtfs-partial"
_LONGEST = 200
"""Bytes of a name that still fit into that of its partial file, which has at most 255."""

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
_TRIES = 5


class PartialFile(AbstractContextManager["PartialFile"]):
    """A partial file, open and locked; made by ``open``.

    Closed without ``commit`` it stays for the next run, unless it holds nothing.

    Attributes:
        path: where the file will be.
        partial_path: where it is now.
        fd: open for reading and writing.
        began: whether an earlier run began it.
    """

    def __init__(self, folder: Folder, path: Path, partial: str, *, fd: int, began: bool) -> None:
        self.path = path
        self.partial_path = folder.path / partial
        self.fd = fd
        self.began = began
        self._folder = folder
        self._partial = partial

    @classmethod
    def open(cls, path: Path, *, identity: str) -> "PartialFile":
        """Open the partial file of ``path``; one that was to become something else is removed.

        Args:
            path: of the file to be, its folder without symbolic links.
            identity: hex digits that tell what it is going to hold.

        Raises:
            StoreLocked: another run is at it.
            StoreError: it cannot be made.
        """
        with told_outside("create", path):
            folder = Folder.open(path.parent)
            try:
                name = _partial_name(path.name, identity)
                _remove_others(folder, path, name)
                fd, began = _opened(folder, path, name)
            except BaseException:
                folder.close()
                raise
        return cls(folder, path, name, fd=fd, began=began)

    @staticmethod
    def name_of(path: Path, *, identity: str) -> str:
        """Return the name that the partial file of ``path`` has beside it."""
        return _partial_name(path.name, identity)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a second call does nothing."""
        if self.fd < 0:
            return
        if self._partial:
            with suppress(OSError, errors.StoreError):
                if os.fstat(self.fd).st_blocks == 0:
                    self.discard()
        fd, self.fd = self.fd, -1
        os.close(fd)
        self._folder.close()

    def resize(self, size: int) -> None:
        """Give it ``size`` bytes; new ones are zeros that take no space.

        Raises:
            StoreFull, StoreError: that is not possible.
        """
        with told_outside("create", self.path):
            if os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)

    def allocated(self) -> int:
        """Return the bytes that it takes."""
        return os.fstat(self.fd).st_blocks * 512

    def free_space(self) -> int:
        """Return the bytes that this user can still write beside it."""
        with told_outside("look at", self._folder.path):
            info = os.fstatvfs(self.fd)
        return info.f_bavail * info.f_frsize

    def commit(self, *, replace: bool) -> None:
        """Give it its name, for good; all that it holds is on disk already.

        Args:
            replace: a file that has the name.

        Raises:
            StoreError: it has not got the name: it is taken, or may not last.
        """
        with told_outside("create", self.path):
            if replace:
                os.rename(
                    self._partial,
                    self.path.name,
                    src_dir_fd=self._folder.fd,
                    dst_dir_fd=self._folder.fd,
                )
                self._folder.sync()
            else:
                self._folder.rename(self._partial, self.path.name)
        self._partial = ""

    def discard(self) -> None:
        """Remove it."""
        self._folder.remove(self._partial)
        self._partial = ""


def _stem(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else hashlib.sha256(encoded).hexdigest()


def _partial_name(name: str, identity: str) -> str:
    return f".{_stem(name)}.{identity[:16]:0>16}{_SUFFIX}"


def _remove_others(folder: Folder, path: Path, own: str) -> None:
    """Remove what runs left that were to put something else under this name."""
    pattern = re.compile(rf"\.{re.escape(_stem(path.name))}\.[0-9a-f]{{16}}{re.escape(_SUFFIX)}")
    for name in folder.names():
        if name != own and pattern.fullmatch(name):
            fd = folder.open_file(name, flags=os.O_RDWR)
            try:
                _lock(fd, path)
                folder.remove(name)
            finally:
                os.close(fd)


def _opened(folder: Folder, path: Path, name: str) -> tuple[int, bool]:
    """Return a descriptor of the locked partial file, and whether an earlier run made it."""
    for _ in range(_TRIES):
        fd, made = _opened_unlocked(folder, name)
        if fd < 0:
            continue
        try:
            _lock(fd, path)
            if _is_ours(folder, name, fd):
                return fd, not made
            folder.remove(name)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise errors.StoreError(f"cannot create {path}: {name} beside it is not ours; remove that")


def _opened_unlocked(folder: Folder, name: str) -> tuple[int, bool]:
    """Return a descriptor, and whether the file was made for it; -1 if it vanished meanwhile."""
    try:
        return folder.open_file(name, flags=_NEW), True
    except errors.StoreError as exc:
        if not isinstance(exc.__cause__, FileExistsError):
            raise
    try:
        return folder.open_file(name, flags=os.O_RDWR), False
    except errors.StoreError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            return -1, False
        raise


def _lock(fd: int, path: Path) -> None:
    if not lock.take(fd):
        raise errors.StoreLocked(f"{path} is being restored by another run; wait for it to end")


def _is_ours(folder: Folder, name: str, fd: int) -> bool:
    """Tell whether the file is still there, and for our eyes only: it may hold secrets."""
    info = os.fstat(fd)
    try:
        named = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (
        (named.st_dev, named.st_ino) == (info.st_dev, info.st_ino)
        and info.st_nlink == 1
        and info.st_uid == os.geteuid()
        and not stat.S_IMODE(info.st_mode) & 0o077
    )
