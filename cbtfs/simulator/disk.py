"""Disk: the contents of one VDI, read and written as a guest, an NBD server or an import does.

Rules of this file:

1. Writers hold the disk's lock; readers hold none. A reader takes the tuple of layers once,
   and every change keeps old tuples right (see ``layers``).
2. A write reaches the layer first and the change log last, both under the lock: a snapshot,
   which takes the same lock, finds both or neither.
3. The log is told what was written, not what changed: an identical rewrite sets bits, a
   discard does not (blktap, drivers/block-log.c).
"""

import threading
from collections.abc import Iterator

from . import layers
from .changelog import ChangeLog
from .layers import BLOCK, Layer


class Disk:
    """The contents of one VDI; thread-safe. The live VDI's Disk stays the same over snapshots.

    Attributes:
        uuid: of the VDI.
        size: virtual size in bytes; grows with a resize.
        sector: 512 or 4096, in bytes.
        leaf: the layer that writes go to; None once the data is destroyed.
        log: the log of writes since the last snapshot; None if CBT is off.
        lock: held while writing, and by the storage while it rearranges layers or logs.
    """

    def __init__(self, uuid: str, *, size: int, sector: int, leaf: Layer | None) -> None:
        self.uuid = uuid
        self.size = size
        self.sector = sector
        self.log: ChangeLog | None = None
        self.lock = threading.RLock()
        self.leaf: Layer | None = None
        self._layers: tuple[Layer, ...] = ()
        self.stack(leaf)

    def __repr__(self) -> str:
        return f"<Disk {self.uuid} {self.size} bytes, {len(self._layers)} layers>"

    def stack(self, leaf: Layer | None) -> None:
        """Make ``leaf`` and what is below it the contents; the caller holds the lock."""
        self._layers = leaf.chain() if leaf is not None else ()
        self.leaf = leaf

    def chain(self) -> tuple[Layer, ...]:
        """Return the layers, top first; empty once the data is destroyed."""
        return self._layers

    def pread(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes; both within the disk, any alignment.

        Raises:
            ValueError: the range is not within the disk.
        """
        data = bytearray(length)
        self.pread_into(offset, memoryview(data))
        return bytes(data)

    def pread_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; one read of a file for each run held by one layer.

        Raises:
            ValueError: the range is not within the disk.
        """
        self._check(offset, len(view))
        for layer, start, stop in layers.spans(self._layers, offset, offset + len(view)):
            part = view[start - offset : stop - offset]
            if layer is None:
                layers.clear(part)
            else:
                layer.pread_into(start, part)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write as a guest does: any alignment; sets bits of the change log.

        Raises:
            ValueError: the range is not within the disk, or the disk has no data.
        """
        view = memoryview(data).cast("B")
        if not len(view):
            return
        with self.lock:
            leaf = self._writable(offset, len(view))
            first, last = offset // BLOCK, -(-(offset + len(view)) // BLOCK)
            if offset % BLOCK:
                self._copy_up(leaf, first)
            if (offset + len(view)) % BLOCK:
                self._copy_up(leaf, last - 1)
            leaf.pwrite(offset, view)
            leaf.mark(first, last)
            if self.log is not None:
                self.log.mark(offset, len(view))

    def discard(self, offset: int, length: int) -> None:
        """Make a range read as zeros without setting bits of the change log.

        Raises:
            ValueError: the range is not within the disk, or the disk has no data.
        """
        with self.lock:
            leaf = self._writable(offset, length)
            first, last = -(-offset // BLOCK), (offset + length) // BLOCK
            if first > last or (first == last and length):
                self._clear_within(leaf, offset, offset + length)
                return
            self._clear_within(leaf, offset, first * BLOCK)
            self._drop_blocks(leaf, first, last)
            self._clear_within(leaf, last * BLOCK, offset + length)

    def flush(self) -> None:
        """Write to disk what was written so far."""
        if self.leaf is not None:
            self.leaf.sync()

    def allocated(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open byte ranges that hold data, in order (multiples of 64 KiB)."""
        return layers.held(self._layers)

    def differences(self, base: "Disk") -> Iterator[tuple[int, int]]:
        """Yield ranges held in layers of this disk that ``base`` does not share, or the reverse.

        What a delta export copies: nothing outside them can differ.
        """
        mine, theirs = self._layers, base.chain()
        own = [layer for layer in mine if layer not in theirs]
        return layers.held([*own, *(layer for layer in theirs if layer not in mine)])

    def utilisation(self) -> int:
        """Return the space that the disk's own layer takes, in bytes."""
        return self.leaf.blocks() * BLOCK if self.leaf is not None else 0

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"range {offset}+{length} is not within disk {self.uuid}")

    def _writable(self, offset: int, length: int) -> Layer:
        self._check(offset, length)
        if self.leaf is None:
            raise ValueError(f"disk {self.uuid} has no data")
        return self.leaf

    def _copy_up(self, leaf: Layer, block: int) -> None:
        if leaf.holds(block):
            return
        content = memoryview(bytearray(BLOCK))
        length = min(BLOCK, self.size - block * BLOCK)
        self.pread_into(block * BLOCK, content[:length])
        leaf.pwrite(block * BLOCK, content)
        leaf.mark(block, block + 1)

    def _clear_within(self, leaf: Layer, start: int, stop: int) -> None:
        """Clear a range that may begin and end inside blocks, where anything is held."""
        while start < stop:
            end = min(stop, (start // BLOCK + 1) * BLOCK)
            if any(layer.holds(start // BLOCK) for layer in self._layers):
                self._copy_up(leaf, start // BLOCK)
                leaf.pwrite(start, memoryview(bytes(end - start)))
            start = end

    def _drop_blocks(self, leaf: Layer, first: int, last: int) -> None:
        below = self._layers[1:]
        for layer, start, stop in list(layers.spans(self._layers, first * BLOCK, last * BLOCK)):
            if layer is None:
                continue
            leaf.punch(start, stop - start)
            leaf.mark(start // BLOCK, stop // BLOCK, held=bool(below))
