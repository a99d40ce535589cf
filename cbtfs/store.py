"""Store: a directory of restore points – lock, stage, commit, list, verify."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .catalogue import Catalogue, DiskPoint, Point, Reference
from .damage import Damage
from .image import Image


class Intent(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is about to do, on disk before it changes anything in the pool."""

    time: str
    run: str
    snapshot_name: str
    vm_uuid: str
    pool_uuid: str = ""
    pid: int = 0
    host: str = ""
    boot: str = ""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A partial point that no running process owns; ``intent`` is None if none was recorded."""

    vm_uuid: str
    time: str
    path: Path
    intent: Intent | None


@dataclass(frozen=True, slots=True)
class DiskResult:
    """What ``verify`` found on one disk."""

    disk: DiskPoint
    damage: Damage


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What ``verify`` found in one point."""

    point: Point
    disks: tuple[DiskResult, ...]


class Stage(AbstractContextManager["Stage"]):
    """A restore point in the making: ``.partial-TIME`` until ``commit`` renames it."""

    path: Path
    time: str
    vm_uuid: str

    def record(self, intent: Intent) -> None:
        """Put ``intent`` on disk."""
        raise NotImplementedError

    def new_image(self, file: str, *, size: int) -> Image:
        """Make an empty image."""
        raise NotImplementedError

    def cloned_image(
        self,
        file: str,
        *,
        base_time: str,
        base: DiskPoint,
        size: int,
        copied: Callable[[int], None] | None = None,
    ) -> Image:
        """Make an image that begins as disk ``base`` of the point ``base_time`` of the same VM."""
        raise NotImplementedError

    def write_metadata(self, name: str, content: bytes) -> None:
        """Add a small file such as ``vm.xml``."""
        raise NotImplementedError

    def commit(self, point: Point) -> tuple[str, ...]:
        """Make this the restore point ``point``; return warnings about links."""
        raise NotImplementedError

    def close(self) -> None:
        """Close all files; the partial point stays for ``leftovers``."""
        raise NotImplementedError


class Store:
    """An open store."""

    path: Path
    uuid: str
    problems: tuple[str, ...]

    def catalogue(self) -> Catalogue:
        """Read all points; what cannot be read is told in ``problems``."""
        raise NotImplementedError

    def lock(self, vm_uuid: str) -> AbstractContextManager[None]:
        """Hold the VM's lock."""
        raise NotImplementedError

    def stage(self, vm_uuid: str, *, time: str) -> Stage:
        """Begin a restore point; the caller holds the lock."""
        raise NotImplementedError

    def leftovers(self, vm_uuid: str) -> list[Leftover]:
        """Return the partial points of dead runs; the caller holds the lock."""
        raise NotImplementedError

    def abandon(self, leftover: Leftover) -> None:
        """Remove a partial point; the caller holds the lock."""
        raise NotImplementedError

    def damaged(self, vm_uuid: str, time: str) -> frozenset[str]:
        """Return the devices of a point that ``verify`` found damaged."""
        raise NotImplementedError

    def verify(
        self, reference: Reference, *, advanced: Callable[[int], None] | None = None
    ) -> VerifyResult:
        """Compare the images of a point with their digests, and record damage."""
        raise NotImplementedError

    def point_path(self, vm_uuid: str, time: str) -> Path:
        """Return the directory of a point."""
        raise NotImplementedError

    def free_space(self) -> int:
        """Return the bytes that can still be written."""
        raise NotImplementedError

    def reflink_supported(self) -> bool:
        """Tell whether files in this store can share extents."""
        raise NotImplementedError


@contextmanager
def open_store(path: Path, *, create: bool = True) -> Iterator[Store]:
    """Open the store at ``path``."""
    raise NotImplementedError
    yield Store()


def file_names(device: str) -> tuple[str, str]:
    """Return the names of a device's image and digests: ``xvda.raw``, ``xvda.b3``."""
    return f"{device}.raw", f"{device}.b3"
