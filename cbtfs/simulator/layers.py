"""Layer: one storey of a disk's contents, as a VHD is: a sparse file and a map of what it holds.

Contents are kept in blocks of 64 KiB. A block that a layer does not hold is looked up in its
parent, and reads as zeros where no layer holds it::

    leaf     |....XX..........|     X held here, . look below
    base     |XXXX....XXXX....|
    a read    bbbbll  bbbb          of the rest: zeros

A map is a dict of masks, one bit per block for 2 MiB, so that 16 TiB of nothing cost nothing.
Which blocks a layer holds is told by its map alone, never by the file: a block is written to
the file first and entered in the map after, so a reader without a lock sees old or new.
"""

import ctypes
import os
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

BLOCK = 64 << 10
"""Unit of allocation and of copying up, in bytes."""

CHUNK = 2 << 20
"""Bytes whose blocks share one mask: the block size of VHD."""

_PER_CHUNK = CHUNK // BLOCK
_FULL = (1 << _PER_CHUNK) - 1
_SEGMENT = 1 << 40  # ext4 ends a file 4 KiB before 16 TiB: a layer is several files
_ZEROS = bytes(1 << 20)
_PUNCH_HOLE = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE (linux/falloc.h)

Span = tuple["Layer | None", int, int]


class _File:
    """An open file, closed when nobody refers to it any more.

    A reader may still be in the middle of a layer that was merged away.
    """

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, self.number)


class Layer:
    """One storey; frozen as soon as it has children.

    Attributes:
        name: of its file, without suffix.
        parent: the layer below, None at the bottom.
        children: the layers directly above.
        uuid: of the hidden VDI ("base copy") this layer is, "" for a leaf.
        size: of the disk when it was frozen, in bytes; 0 for a leaf.
        masks: number of a chunk → bits of the blocks held, lowest bit first.
    """

    def __init__(self, directory: Path, name: str, *, parent: "Layer | None" = None) -> None:
        self.directory = directory
        self.name = name
        self.uuid = ""
        self.size = 0
        self.masks: dict[int, int] = {}
        self.children: set[Layer] = set()
        self.parent: Layer | None = None
        self._files: dict[int, _File] = {}
        self.link(parent)

    def __repr__(self) -> str:
        return f"<Layer {self.name} {self.uuid or 'leaf'} {self.blocks()} blocks>"

    def link(self, parent: "Layer | None") -> None:
        """Put this layer above ``parent``."""
        if self.parent is not None:
            self.parent.children.discard(self)
        if parent is not None:
            parent.children.add(self)
        self.parent = parent

    def chain(self) -> "tuple[Layer, ...]":
        """Return this layer and all below it, top first."""
        layer: Layer | None = self
        found: list[Layer] = []
        while layer is not None:
            found.append(layer)
            layer = layer.parent
        return tuple(found)

    def blocks(self) -> int:
        """Return how many blocks this layer holds."""
        return sum(mask.bit_count() for mask in list(self.masks.values()))

    def holds(self, block: int) -> bool:
        """Return whether block number ``block`` is held here."""
        return bool(self.masks.get(block // _PER_CHUNK, 0) >> block % _PER_CHUNK & 1)

    def mark(self, first: int, last: int, *, held: bool = True) -> None:
        """Enter blocks ``first`` up to, not including, ``last`` in the map, or take them out."""
        for chunk in range(first // _PER_CHUNK, -(-last // _PER_CHUNK)):
            low = max(first - chunk * _PER_CHUNK, 0)
            high = min(last - chunk * _PER_CHUNK, _PER_CHUNK)
            bits = (1 << high) - (1 << low)
            before = self.masks.get(chunk, 0)
            after = before | bits if held else before & ~bits
            if after:
                self.masks[chunk] = after
            else:
                self.masks.pop(chunk, None)

    def pwrite(self, offset: int, data: memoryview) -> None:
        """Write to the file only; the caller enters whole blocks in the map."""
        for position, start, stop in _pieces(offset, len(data)):
            file = self._file(position)
            piece = data[start:stop]
            while piece:
                done = os.pwrite(file.number, piece, position % _SEGMENT)
                piece, position = piece[done:], position + done

    def pread_into(self, offset: int, view: memoryview) -> None:
        """Read from the file only; where it ends it reads as zeros."""
        for position, start, stop in _pieces(offset, len(view)):
            file = self._file(position)
            while start < stop:
                done = os.preadv(file.number, [view[start:stop]], position % _SEGMENT)
                if not done:
                    clear(view[start:stop])
                    break
                start, position = start + done, position + done

    def punch(self, offset: int, length: int) -> None:
        """Make whole blocks of the file read as zeros, giving back their space if possible."""
        for position, start, stop in _pieces(offset, length):
            file, place = self._file(position), position % _SEGMENT
            if _fallocate(file.number, _PUNCH_HOLE, place, stop - start) == 0:
                continue
            for step in range(0, stop - start, len(_ZEROS)):
                os.pwrite(file.number, _ZEROS[: stop - start - step], place + step)

    def sync(self) -> None:
        """Flush the files to disk."""
        for file in list(self._files.values()):
            os.fdatasync(file.number)

    def close(self) -> None:
        """Close the files; a later read or write opens them again."""
        self._files = {}

    def paths(self) -> list[Path]:
        """Return the files that exist."""
        return sorted(self.directory.glob(f"{self.name}.*raw"))

    def _file(self, offset: int) -> _File:
        number = offset // _SEGMENT
        file = self._files.get(number)
        if file is None:
            suffix = f".{number}.raw" if number else ".raw"
            path = self.directory / f"{self.name}{suffix}"
            file = self._files.setdefault(number, _File(path))
        return file


def clear(view: memoryview) -> None:
    """Fill ``view`` with zeros."""
    for start in range(0, len(view), len(_ZEROS)):
        piece = view[start : start + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


def spans(layers: Sequence[Layer], start: int, stop: int) -> Iterator[Span]:
    """Yield which layer holds each part of a half-open byte range, in order, long runs joined."""
    owner: Layer | None = None
    since = start
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        for layer, first in _owners(layers, chunk):
            begin = max(chunk * CHUNK + first * BLOCK, start)
            if layer is owner or begin >= stop:
                continue
            if begin > since:
                yield owner, since, begin
            owner, since = layer, begin
    if since < stop:
        yield owner, since, stop


def held(layers: Sequence[Layer]) -> Iterator[tuple[int, int]]:
    """Yield the half-open byte ranges held by any of ``layers``, in order, neighbours joined."""
    since = until = 0
    for start, stop in _held_runs(layers):
        if start != until and until > since:
            yield since, until
        since = since if start == until else start
        until = stop
    if until > since:
        yield since, until


def _held_runs(layers: Sequence[Layer]) -> Iterator[tuple[int, int]]:
    for chunk in sorted({chunk for layer in layers for chunk in list(layer.masks)}):
        mask = 0
        for layer in layers:
            mask |= layer.masks.get(chunk, 0)
        for first, last in _runs(mask):
            yield chunk * CHUNK + first * BLOCK, chunk * CHUNK + last * BLOCK


def copy_missing(source: Layer, target: Layer, *, override: bool) -> None:
    """Copy the blocks of ``source`` that ``target`` lacks, or all of them with ``override``."""
    for chunk in sorted(source.masks):
        mask = source.masks[chunk]
        if not override:
            mask &= ~target.masks.get(chunk, 0)
        for first, last in _runs(mask):
            offset = chunk * CHUNK + first * BLOCK
            data = memoryview(bytearray((last - first) * BLOCK))
            source.pread_into(offset, data)
            target.pwrite(offset, data)
            base = chunk * _PER_CHUNK
            target.mark(base + first, base + last)


def _owners(layers: Sequence[Layer], chunk: int) -> Iterator[tuple[Layer | None, int]]:
    """Yield (layer, first block) for each run of blocks in a chunk with one owner."""
    wanted = _FULL
    claims: list[tuple[Layer, int]] = []
    for layer in layers:
        mask = layer.masks.get(chunk, 0) & wanted
        if mask == _FULL:
            yield layer, 0
            return
        if mask:
            claims.append((layer, mask))
            wanted &= ~mask
            if not wanted:
                break
    if not claims:
        yield None, 0
        return
    owners: list[Layer | None] = [None] * _PER_CHUNK
    for layer, mask in claims:
        for first, last in _runs(mask):
            owners[first:last] = [layer] * (last - first)
    yield owners[0], 0
    yield from ((b, i) for i, (a, b) in enumerate(pairwise(owners), 1) if a is not b)


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges of set bits."""
    position = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        length = (~mask & (mask + 1)).bit_length() - 1
        yield position + skip, position + skip + length
        mask >>= length
        position += skip + length


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (offset on disk, start, stop) of the pieces that lie in one file each."""
    start = 0
    while start < length:
        position = offset + start
        stop = min(length, start + _SEGMENT - position % _SEGMENT)
        yield position, start, stop
        start = stop


_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(file: int, mode: int, offset: int, length: int) -> int:
    call = _libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return int(call(file, mode, offset, length))
