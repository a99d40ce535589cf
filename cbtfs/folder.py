"""Folder: a directory of the store held open, so that no name inside it can lead outside.

Rules of this file:

1. A name is one path component. It is opened relative to its folder's descriptor and never through
   a symbolic link: a store that was tampered with gives an error, not a file from elsewhere.
2. What must appear whole appears by a rename: written beside, fsynced, renamed, folder fsynced.
3. An ``OSError`` leaves as a ``StoreError`` whose sentence names the path and the remedy.
"""

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from . import errors

FILE_MODE = 0o600
"""Images hold the secrets of the disks they copy: for the owner of the store only."""

FOLDER_MODE = 0o700

_READ_LIMIT = 64 << 20
"""More than any file of ours that is read whole; what is bigger was put there by someone else."""

_RENAME_NOREPLACE = 1  # linux/fs.h
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a named pipe that nobody writes to would hang
_FILE_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

_REMEDIES = {
    errno.ENOSPC: "no space left on its file system; remove restore points or enlarge it, then run again",
    errno.EDQUOT: "the disk quota is used up; remove restore points or raise it, then run again",
    errno.EROFS: "its file system is read-only; see dmesg for the reason and remount it read-write",
    errno.EIO: "the disk below it failed; see dmesg, then run cbtfs verify",
    errno.ELOOP: "a symbolic link is in its place; look where it points and remove it",
    errno.ENOTDIR: "a file or symbolic link stands where the store has a directory; remove it",
    errno.EISDIR: "a directory stands where the store has a file; remove it",
    errno.EACCES: "permission denied; run as the owner of the store",
    errno.EPERM: "not permitted; run as the owner of the store",
    errno.ENOENT: "it does not exist",
    errno.EEXIST: "it exists already; it is left as it is",
    errno.ENOTEMPTY: "it exists already; it is left as it is",
}

_REMEDIES_OUTSIDE = {
    errno.ENOSPC: "no space left on its file system; make room, then run the command again",
    errno.EDQUOT: "the disk quota is used up; raise it, then run the command again",
    errno.EFBIG: "its file system cannot hold so large a file; choose another one",
    errno.EIO: "the disk below it failed; see dmesg",
    errno.EACCES: "permission denied; run as a user who may write there",
    errno.EPERM: "not permitted; run as a user who may write there",
    errno.EROFS: "it is read-only; choose another place",
    errno.EISDIR: "a directory stands there; choose another name",
    errno.ENOTDIR: "a folder on the way to it is none; choose another place",
    errno.ENAMETOOLONG: "its name is too long; choose another one",
    errno.EBUSY: "it is in use; see lsblk and fuser for who has it",
    errno.EEXIST: "it exists already; --force replaces it",
    errno.ENOENT: "it does not exist",
}

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def told(action: str, path: Path) -> Generator[None]:
    """Turn an ``OSError`` into the sentence "cannot ACTION PATH: why and what to do".

    Raises:
        StoreFull: no space or quota left.
        StoreError: anything else.
    """
    try:
        yield
    except OSError as exc:
        raise _sentence(action, path, exc, _REMEDIES) from exc


@contextmanager
def told_outside(action: str, path: Path) -> Generator[None]:
    """Do as ``told`` for what is no part of a store, with the remedies that help there.

    Raises:
        StoreFull: no space or quota left.
        StoreError: anything else.
    """
    try:
        yield
    except errors.StoreError as exc:
        if isinstance(exc.__cause__, OSError):  # of a Folder
            why = exc.__cause__
            raise _sentence(action, path, why, _REMEDIES_OUTSIDE) from why
        raise
    except OSError as exc:
        raise _sentence(action, path, exc, _REMEDIES_OUTSIDE) from exc


def _sentence(
    action: str, path: Path, exc: OSError, remedies: Mapping[int, str]
) -> errors.StoreError:
    why = remedies.get(exc.errno or 0) or (exc.strerror or str(exc)).lower()
    full = exc.errno in {errno.ENOSPC, errno.EDQUOT}
    kind = errors.StoreFull if full else errors.StoreError
    return kind(f"cannot {action} {path}: {why}")


class Folder:
    """An open directory; close it, or use it as a context manager.

    Args:
        fd: descriptor of the directory; owned from now on.
        path: where it was found, for messages.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the directory at ``path``, which may be a symbolic link: the user named it."""
        with told("open", path):
            return cls(os.open(path, _FOLDER_FLAGS), path)

    def __repr__(self) -> str:
        return f"<Folder {self.path}{' closed' if self.fd < 0 else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def folder(self, name: str, *, create: bool = False) -> "Folder":
        """Open the directory ``name`` in this one, made first if ``create`` and it is missing."""
        path = self._checked(name)
        with told("open", path):
            if create:
                with suppress(FileExistsError):
                    os.mkdir(name, FOLDER_MODE, dir_fd=self.fd)
            return Folder(os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=self.fd), path)

    def make_folder(self, name: str) -> "Folder":
        """Make the directory ``name`` and open it.

        Raises:
            StoreError: it exists already.
        """
        path = self._checked(name)
        with told("create", path):
            os.mkdir(name, FOLDER_MODE, dir_fd=self.fd)
        return self.folder(name)

    def open_file(self, name: str, *, flags: int = os.O_RDONLY) -> int:
        """Return a descriptor of the regular file ``name``, to be closed by the caller."""
        path = self._checked(name)
        with told("open", path):
            fd = os.open(name, flags | _FILE_FLAGS, FILE_MODE, dir_fd=self.fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise errors.StoreError(f"cannot open {path}: it is no regular file; remove it")

    def read(self, name: str, *, limit: int = _READ_LIMIT) -> bytes:
        """Return the content of the small file ``name``, at most ``limit`` bytes.

        Raises:
            StoreError: it cannot be read, or is larger.
        """
        with os.fdopen(self.open_file(name), "rb") as file, told("read", self.path / name):
            content = file.read(limit + 1)
        if len(content) > limit:
            raise errors.StoreError(f"cannot read {self.path / name}: it is too large to be ours")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put ``content`` under ``name``, whole and on disk, in place of what was there.

        The caller holds a lock that keeps other writers of the same name away.
        """
        # one fixed temporary name: a killed run leaves at most this one, and the next reuses it
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with told("write", self._checked(name)):
            fd = self.open_file(f"{name}.new", flags=flags)
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(f"{name}.new", name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)

    def names(self) -> list[str]:
        """Return the names in this directory, sorted."""
        with told("list", self.path):
            return sorted(os.listdir(self.fd))  # noqa: PTH208 - Path cannot list a descriptor

    def is_folder(self, name: str) -> bool:
        """Tell whether ``name`` is a directory here, and no symbolic link to one.

        Raises:
            StoreError: the disk failed, or this user may not look.
        """
        found = self._stat(name)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def exists(self, name: str) -> bool:
        """Tell whether anything is here under ``name``, be it a dangling symbolic link.

        Raises:
            StoreError: the disk failed, or this user may not look.
        """
        return self._stat(name) is not None

    def size(self, name: str) -> int:
        """Return the size in bytes of the regular file ``name``; -1 if there is none.

        Raises:
            StoreError: the disk failed, or this user may not look.
        """
        found = self._stat(name)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else -1

    def stored(self, name: str) -> int:
        """Return the bytes that ``name`` takes on disk, its holes not counted; 0 if it is gone.

        Raises:
            StoreError: the disk failed, or this user may not look.
        """
        found = self._stat(name)
        return found.st_blocks * 512 if found is not None else 0

    def identity(self, name: str) -> tuple[int, int] | None:
        """Return device and inode of what is called ``name``, None if nothing is."""
        found = self._stat(name)
        return (found.st_dev, found.st_ino) if found is not None else None

    def _stat(self, name: str) -> os.stat_result | None:
        with told("look at", self.path / name), suppress(FileNotFoundError):
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        return None

    def link_target(self, name: str) -> str | None:
        """Return where the symbolic link ``name`` points; None if it is none."""
        try:
            return os.readlink(name, dir_fd=self.fd)
        except OSError:
            return None

    def link(self, name: str, target: str) -> None:
        """Make ``name`` a symbolic link to ``target``, in one step in place of an older link.

        The caller holds a lock that keeps other writers of the same name away.
        """
        path = self._checked(name)
        with told("link", path):
            with suppress(FileNotFoundError):
                os.unlink(".link.new", dir_fd=self.fd)
            os.symlink(target, ".link.new", dir_fd=self.fd)
            os.rename(".link.new", name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)

    def rename(self, old: str, new: str) -> None:
        """Rename ``old`` to ``new`` and make it last; whatever is under ``new`` is not touched.

        Raises:
            StoreError: ``new`` exists already, or may not last; then it is ``old`` again, unless
                the disk refuses even that.
        """
        path = self._checked(new)
        with told("create", path):
            self._rename_noreplace(old, new)
            try:
                os.fsync(self.fd)
            except OSError:
                with suppress(OSError):
                    self._rename_noreplace(new, old)
                raise

    def _rename_noreplace(self, old: str, new: str) -> None:
        if renameat2(self.fd, os.fsencode(old), os.fsencode(new)):
            return
        # NFS and other file systems without the flag: the lock of the VM has to be enough
        if self.exists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Remove the file or symbolic link ``name``; nothing happens if it is not there."""
        with told("remove", self._checked(name)), suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def remove_all(self, name: str) -> None:
        """Remove whatever is under ``name``: a file, a link, or a directory and all in it."""
        if self.is_folder(name):
            self.remove_folder(name)
        else:
            self.remove(name)

    def remove_folder(self, name: str) -> None:
        """Remove the directory ``name`` and all in it; symbolic links are not followed."""
        with told("remove", self._checked(name)):
            shutil.rmtree(name, dir_fd=self.fd)
            os.fsync(self.fd)

    def sync(self) -> None:
        """Make the names in this directory survive a power failure."""
        with told("write", self.path):
            os.fsync(self.fd)

    def _checked(self, name: str) -> Path:
        if name in {"", ".", ".."} or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
            raise errors.StoreError(f"{name!r} in {self.path} is no file name; it is not used")
        return self.path / name


def renameat2(folder_fd: int, old: bytes, new: bytes) -> bool:
    """Rename without overwriting; return False if this file system cannot promise that.

    Raises:
        OSError: the rename failed.
    """
    call = getattr(_libc, "renameat2", None)  # glibc >= 2.28, musl >= 1.2.4
    if call is None:
        return False
    if call(folder_fd, old, folder_fd, new, ctypes.c_uint(_RENAME_NOREPLACE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.EINVAL, errno.ENOSYS}:
        return False
    raise OSError(number, os.strerror(number))
