"""Damage: what a comparison of an image with its digests found."""

from collections.abc import Callable
from dataclasses import dataclass

from .extents import Extent
from .image import ImageFiles


@dataclass(frozen=True, slots=True)
class Damage:
    """Result of checking one disk.

    Attributes:
        problem: one sentence about the files as a whole (missing, wrong length); "" if they are fine.
        blocks: how many blocks differ from their digests.
        extents: where, in bytes; the first 1000.
        checked: bytes of the disk compared.
    """

    problem: str = ""
    blocks: int = 0
    extents: tuple[Extent, ...] = ()
    checked: int = 0

    @property
    def found(self) -> bool:
        """Whether the image must not be used as a base."""
        return bool(self.problem or self.blocks)


def find(
    files: ImageFiles,
    *,
    size: int,
    root: str,
    advanced: Callable[[int], None] | None = None,
) -> Damage:
    """Compare an image of ``size`` bytes with its digests, and these with their ``root``."""
    raise NotImplementedError
