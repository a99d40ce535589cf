"""A file system of its own whose power can be cut: what was not made durable is lost.

It can also be filled, made read-only, and fail from now on.
"""

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

KINDS = ("xfs", "ext4")

_SHUTDOWN = 0x8004587D  # linux/ext4.h: EXT4_IOC_SHUTDOWN, the same as XFS_IOC_GOINGDOWN
_LOSING_THE_LOG = struct.pack("=I", 2)  # EXT4_GOING_FLAGS_NOLOGFLUSH
_MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "ext4": ["mkfs.ext4", "-q", "-F"]}


class Machine:
    """A file system on an image file, mounted at ``path``."""

    def __init__(self, disk: Path, path: Path) -> None:
        self.disk = disk
        self.path = path
        self.mounted = False
        self.failing = False

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.disk, self.path], check=True)
        self.mounted = True

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", self.path], check=True)
            self.mounted = False

    def cut_power(self) -> None:
        """Lose all that is not durable; every file of it must be closed before."""
        if not self.failing:
            self.fail()
        self.unmount()
        self.failing = False
        self.mount()

    def fail(self) -> None:
        """Make all that is asked of the file system fail with EIO, until its power is cut."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, _LOSING_THE_LOG)
        finally:
            os.close(folder)
        self.failing = True

    def fill(self) -> None:
        """Leave no room on the file system, for root neither."""
        step = 64 << 20
        with (self.path / "filler").open("wb") as file:
            while step >= 4096:
                if not _extended(file.fileno(), step):
                    step //= 2

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)


def _extended(fd: int, step: int) -> bool:
    try:
        os.posix_fallocate(fd, os.fstat(fd).st_size, step)
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        return False
    return True


@contextmanager
def machine(root: Path, kind: str) -> Generator[Machine]:
    """Make and mount a file system of ``kind`` under ``root`` until the end."""
    command = _MAKE[kind]
    if os.geteuid() != 0 or shutil.which(command[0]) is None:
        pytest.skip(f"a file system of its own needs root and {command[0]}")
    made = Machine(root / "disk.img", root / "mounted")
    made.path.mkdir()
    with made.disk.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([*command, made.disk], check=True)
    try:
        made.mount()
    except subprocess.CalledProcessError:
        pytest.skip("the kernel cannot mount an image of this file system")
    try:
        yield made
    finally:
        made.unmount()
        made.disk.unlink()
