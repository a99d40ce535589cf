"""Disk: the contents of one VDI. (Skeleton: signatures are final.)"""

from collections.abc import Iterator


class Disk:
    """The contents of one VDI; thread-safe. The live VDI's Disk stays the same over snapshots.

    Attributes:
        uuid: of the VDI.
        size: virtual size in bytes; grows with a resize.
        sector: 512 or 4096, in bytes.
    """

    uuid: str
    size: int
    sector: int

    def pread(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes; both within the disk, any alignment."""
        raise NotImplementedError

    def pread_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write as a guest does: any alignment; sets bits of the change log."""
        raise NotImplementedError

    def discard(self, offset: int, length: int) -> None:
        """Make a range read as zeros without setting bits of the change log."""
        raise NotImplementedError

    def flush(self) -> None:
        """Write to disk what was written so far."""
        raise NotImplementedError

    def allocated(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open byte ranges that hold data, in order (multiples of 64 KiB)."""
        raise NotImplementedError

    def differences(self, base: "Disk") -> Iterator[tuple[int, int]]:
        """Yield ranges held in layers that ``base`` does not share (for a VHD delta)."""
        raise NotImplementedError
