"""Progress: what a run has done so far, for people, programs and nobody."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TextIO

from .catalogue import DiskPoint

Kind = Literal["bar", "line", "json", "silent"]


class Progress(Protocol):
    """Where a run tells what it does; a disk is called by its key, such as ``web1/xvda``."""

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """A disk is being copied; ``total`` bytes are to be read."""

    def advanced(self, key: str, *, read: int, written: int) -> None:
        """So many more bytes were read and written."""

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """The disk is done, or failed with ``error``."""

    def message(self, text: str) -> None:
        """Something worth a line."""


class SilentProgress:
    """Tells nobody."""

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """Do nothing."""

    def advanced(self, key: str, *, read: int, written: int) -> None:
        """Do nothing."""

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


@contextmanager
def open_progress(kind: Kind, stream: TextIO) -> Iterator[Progress]:
    """Give a view of the kind asked for, that ends with the block."""
    yield SilentProgress()


def summary(key: str, point: DiskPoint) -> str:
    """Return ``web1/xvda  inc  1.2 GiB of 40 GiB in 14 s  (base 20261121T020000Z)``."""
    raise NotImplementedError
