"""Block device: one that nobody else uses, to be overwritten.

The kernel gives it to one holder at a time (O_EXCL): nobody mounts it, or makes a volume of it,
meanwhile, and what somebody has already is not opened. What can be found out about who has it is
for the message.
"""

import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from . import errors, sparse, units
from .folder import told_outside

EDGE = units.MiB
"""Bytes at the beginning and at the end that tell whether there is anything: partition tables, file
systems, volumes and RAIDs all have something there."""

_SYS = Path("/sys/dev/block")
_MOUNTS = Path("/proc/self/mountinfo")
_SWAPS = Path("/proc/swaps")


class BlockDevice(AbstractContextManager["BlockDevice"]):
    """An open block device that is ours alone; made by ``open``, closed by the caller.

    Attributes:
        path: as the user named it.
        fd: open for reading, and for writing unless it was only looked at.
        size: in bytes.
    """

    def __init__(self, path: Path, fd: int, *, size: int) -> None:
        self.path = path
        self.fd = fd
        self.size = size

    @classmethod
    def open(cls, path: Path, *, only_look: bool = False) -> "BlockDevice":
        """Open the device at ``path``.

        Raises:
            StoreError: somebody uses it, or it cannot be opened.
        """
        with told_outside("open", path):
            number = path.stat().st_rdev
            if _text(_SYS / _name(number) / "ro").strip() == "1":
                # opening it for writing works all the same
                raise errors.StoreError(f"{path} is read-only; see blockdev --setrw")
            uses = users(number, path.resolve())
            if uses:
                raise errors.StoreError(f"{path} is in use: {'; '.join(uses)}; see lsblk")
            mode = os.O_RDONLY if only_look else os.O_RDWR
            fd = os.open(path, mode | os.O_EXCL | os.O_CLOEXEC)
            try:
                if not stat.S_ISBLK(os.fstat(fd).st_mode):
                    raise errors.StoreError(f"{path} is no block device any more")
                return cls(path, fd, size=os.lseek(fd, 0, os.SEEK_END))
            except BaseException:
                os.close(fd)
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def holds_something(self) -> bool:
        """Tell whether there is anything but zeros in its first and last MiB.

        Raises:
            StoreError: it cannot be read.
        """
        edge = min(EDGE, self.size)
        return any(self.is_not_zero(at, edge) for at in {0, self.size - edge})

    def is_not_zero(self, offset: int, length: int) -> bool:
        """Tell whether there is anything but zeros in ``length`` bytes at ``offset``."""
        with told_outside("read", self.path):
            found = sparse.read_all(self.fd, length, offset)
        return found.count(0) < length


def is_block_device(path: Path) -> bool:
    """Tell whether ``path``, or what it links to, is a block device."""
    try:
        return stat.S_ISBLK(path.stat().st_mode)
    except OSError:
        return False


def backing_file(path: Path) -> Path | None:
    """Return the file behind a loop device, or behind the one that ``path`` is a partition of."""
    number = path.stat().st_rdev
    device = (_SYS / _name(number)).resolve()
    for one in (device, device.parent):
        found = _text(one / "loop/backing_file").strip()
        if found:
            return Path(found)
    return None


def users(number: int, path: Path) -> list[str]:
    """Return, for people, who uses the device ``number`` (at ``path``) or one of its partitions."""
    device = _SYS / _name(number)
    parts = sorted(p.parent for p in device.glob("*/partition"))
    numbers = {_name(number), *(_text(part / "dev").strip() for part in parts)}
    names = {str(path), *(f"/dev/{part.name}" for part in parts)}
    held = [holder.name for one in (device, *parts) for holder in one.glob("holders/*")]
    found = [f"mounted on {where}" for where in _mounted(numbers, names)]
    found += [f"part of {name}" for name in held]
    found += [f"swap space on {name}" for name in sorted(_swaps() & names)]
    return found


def _mounted(numbers: set[str], names: set[str]) -> list[str]:
    """Return where a device is mounted; the fields are those of proc_pid_mountinfo(5)."""
    found: list[str] = []
    for line in _text(_MOUNTS).splitlines():
        fields = line.split()
        if " - " not in line or len(fields) < 10:
            continue
        source = line.partition(" - ")[2].split()[1:2]
        if fields[2] in numbers or set(source) & names:
            found.append(fields[4].replace("\\040", " "))
    return found


def _swaps() -> set[str]:
    return {line.split()[0] for line in _text(_SWAPS).splitlines()[1:] if line.split()}


def _name(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
