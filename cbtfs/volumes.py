r"""Volumes: the LVM2 volumes on a disk, and where they lie, read without LVM.

On a physical volume (lvm2, lib/label/label.h and lib/format_text/layout.h), in sectors of 512::

    label                    in one of the first four: "LABELONE", the volume's uuid, its areas
    metadata area            a header, then a ring of texts, one for each change
    extents ...

The text of the last change describes the whole group. A volume that lies in one piece on one disk
is a range of bytes there, and one in several pieces (linear or striped) a list of such ranges: it
can be mounted without device-mapper, and without this machine's LVM ever hearing of a group that
may be called like one of its own.

What is read here was written by a guest: sizes and places are checked before they are used.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from . import errors, units

SECTOR = 512

_LABEL = struct.Struct("<8sQII8s")  # id, sector, checksum, offset of the header, type
_HEADER = struct.Struct("<32sQ")  # uuid, size
_AREA = struct.Struct("<QQ")  # offset, size; zeros end a list
_TEXTS = struct.Struct("<I16sIQQQQII")
"""Checksum, magic, version, start, size; of the first text: offset, size, checksum, flags."""

_IGNORED = 1  # a flag: what the area holds is out of date
_CRC_START = 0xF597A6CF  # lib/misc/crc.h
_MAGIC = b" LVM2 x[5A%r0N*>"
_TEXT_LIMIT = 16 * units.MiB
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|#[^\n]*|[][{}=,]|[^][{}=,#"\s]+')
_NAME = re.compile(r"(?!-)(?!\.\.?$)[A-Za-z0-9+_.-]{1,127}")  # lvm(8), VALID NAMES

_DAMAGED = "its LVM metadata are damaged"

Reader = Callable[[int, int], bytes]
"""Reads bytes of a physical volume: offset, length; fewer beyond its end."""


@dataclass(frozen=True, slots=True)
class Piece:
    """``size`` bytes of a volume, ``offset`` bytes into the physical volume ``member``."""

    member: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Stripes:
    """Pieces of one size that take turns, ``chunk`` bytes of each at a time."""

    columns: tuple[Piece, ...]
    chunk: int


@dataclass(frozen=True, slots=True)
class Volume:
    """A logical volume; ``kind`` is "" if ``pieces`` are all of it, in order, else what it is."""

    name: str
    pieces: tuple[Piece | Stripes, ...] = ()
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A volume group, as the text numbered ``seqno`` describes it."""

    name: str
    uuid: str
    seqno: int
    volumes: tuple[Volume, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A physical volume: its uuid, and what it knows of its group, if anything."""

    uuid: str
    group: Group | None


def member(read: Reader) -> Member:
    """Return the physical volume from which ``read(offset, length)`` reads.

    Raises:
        StoreError: it is none, or it is not as LVM makes them.
    """
    head = read(0, 4 * SECTOR)
    for at in range(0, len(head) - SECTOR + 1, SECTOR):
        kind, _, _, offset, name = _LABEL.unpack_from(head, at)
        if kind == b"LABELONE" and name == b"LVM2 001":
            return _member(head[at : at + SECTOR], offset, read)
    raise errors.StoreError("it has no LVM label")


def _member(label: bytes, offset: int, read: Reader) -> Member:
    if not _LABEL.size <= offset <= SECTOR - _HEADER.size:
        raise errors.StoreError("its LVM label is damaged")
    identity, _ = _HEADER.unpack_from(label, offset)
    rest = label[offset + _HEADER.size :]
    pairs = _AREA.iter_unpack(rest[: len(rest) // _AREA.size * _AREA.size])
    list(takewhile(any, pairs))  # where data lies; the text says so too
    groups = [_group(read, start) for start, _ in takewhile(any, pairs)]
    known = sorted((group for group in groups if group), key=lambda group: group.seqno)
    return Member(_ascii(identity), known[-1] if known else None)


def _group(read: Reader, start: int) -> Group | None:
    """Return the group that the metadata area at ``start`` describes; None if it is empty."""
    header = read(start, SECTOR)
    if len(header) < SECTOR:
        raise errors.StoreError("its LVM metadata lie beyond its end")
    _, magic, _, _, size, offset, length, checksum, flags = _TEXTS.unpack_from(header)
    if magic == _MAGIC and (not offset or not length or flags & _IGNORED):
        return None
    fits = SECTOR <= offset < size and length <= min(size - SECTOR, _TEXT_LIMIT)
    if magic != _MAGIC or not fits:
        raise errors.StoreError(_DAMAGED)
    first = min(length, size - offset)
    text = read(start + offset, first)
    if first < length:  # the text goes on at the beginning of the ring
        text += read(start + SECTOR, length - first)
    if zlib.crc32(text, _CRC_START ^ 0xFFFFFFFF) ^ 0xFFFFFFFF != checksum:
        raise errors.StoreError(_DAMAGED)
    return parse(text.rstrip(b"\0").decode(errors="replace"))


# ── The text ─────────────────────────────────────────────────────────────────────────────────


def parse(text: str) -> Group:
    """Return the group that a text of LVM's metadata describes.

    Raises:
        StoreError: it is not such a text.
    """
    for name, content in _sections(text).sections.items():
        return _parsed(name, content)
    raise errors.StoreError("its LVM metadata name no group")


def _parsed(name: str, group: "_Section") -> Group:
    extent = group.number("extent_size") * SECTOR
    members = {
        key: (pv.text("id").replace("-", ""), pv.number("pe_start") * SECTOR)
        for key, pv in group.children("physical_volumes")
    }
    volumes = [
        _volume(key, lv, members, extent)
        for key, lv in group.children("logical_volumes")
        if "VISIBLE" in lv.values.get("status", [])
    ]
    for word in (name, *(volume.name for volume in volumes)):
        if not _NAME.fullmatch(word):
            raise errors.StoreError(f"its LVM metadata have the name {word!r}")
    return Group(name, group.text("id"), group.number("seqno"), tuple(volumes))


def _volume(
    name: str, lv: "_Section", members: Mapping[str, tuple[str, int]], extent: int
) -> Volume:
    found: list[Piece | Stripes] = []
    expected = 0
    for number in range(lv.number("segment_count")):
        segment = lv.sections.get(f"segment{number + 1}")
        if segment is None or segment.number("start_extent") != expected:
            raise errors.StoreError(f"its LVM metadata describe {name} with a gap")
        kind = segment.text("type")
        if kind not in ("striped", "linear"):
            return Volume(name, kind=kind)
        count = segment.number("extent_count")
        expected += count
        columns = _columns(segment, members, extent=extent, count=count)
        if len(columns) == 1:
            _append(found, columns[0])
        else:
            found.append(Stripes(columns, segment.number("stripe_size") * SECTOR))
    return Volume(name, tuple(found))


def _columns(
    segment: "_Section", members: Mapping[str, tuple[str, int]], *, extent: int, count: int
) -> tuple[Piece, ...]:
    words = segment.values.get("stripes", [])
    width = segment.number("stripe_count")
    if not width or len(words) != 2 * width or count % width:
        raise errors.StoreError("its LVM metadata have stripes that do not add up")
    return tuple(
        _piece(words[i : i + 2], members, extent=extent, count=count // width)
        for i in range(0, len(words), 2)
    )


def _piece(
    words: list[int | str], members: Mapping[str, tuple[str, int]], *, extent: int, count: int
) -> Piece:
    match words:
        case [str(member), int(first)] if member in members:
            uuid, start = members[member]
            return Piece(uuid, start + first * extent, count * extent)
        case _:
            raise errors.StoreError(
                "its LVM metadata name a physical volume that they do not describe"
            )


def _append(pieces: list[Piece | Stripes], piece: Piece) -> None:
    """Append ``piece``; if it follows on the last, make the two one."""
    last = pieces[-1] if pieces else None
    if (
        isinstance(last, Piece)
        and last.member == piece.member
        and last.offset + last.size == piece.offset
    ):
        pieces[-1] = Piece(last.member, last.offset, last.size + piece.size)
    else:
        pieces.append(piece)


def _sections(text: str) -> "_Section":
    root = _Section()
    stack = [root]
    key = ""
    tokens = (word for word in _TOKEN.findall(text) if not word.startswith("#"))
    for token in tokens:
        if token == "{":
            child = _Section()
            stack[-1].sections[key] = child
            stack.append(child)
        elif token == "}" and len(stack) > 1:
            stack.pop()
        elif token == "=":
            stack[-1].values[key] = _value(tokens)
        else:
            key = token
    return root


def _value(tokens: Iterator[str]) -> list[int | str]:
    token = next(tokens, "")
    if token == "[":
        words = takewhile(lambda word: word != "]", tokens)
        return [_scalar(word) for word in words if word != ","]
    return [_scalar(token)]


def _scalar(token: str) -> int | str:
    if token.startswith('"'):
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    return int(token) if re.fullmatch("[0-9]{1,18}", token) else token


@dataclass(frozen=True, slots=True)
class _Section:
    """What stands between two braces; a single value is a list of one."""

    values: dict[str, list[int | str]] = field(default_factory=dict[str, list[int | str]])
    sections: dict[str, "_Section"] = field(default_factory=dict[str, "_Section"])

    def number(self, key: str) -> int:
        """Return a whole number; LVM writes no negative one."""
        match self.values.get(key):
            case [int(value)]:
                return value
            case _:
                raise errors.StoreError(f"its LVM metadata lack {key}")

    def text(self, key: str) -> str:
        """Return a string."""
        match self.values.get(key):
            case [str(value)]:
                return value
            case _:
                raise errors.StoreError(f"its LVM metadata lack {key}")

    def children(self, key: str) -> Iterable[tuple[str, "_Section"]]:
        """Return the sections in the section ``key``, with their names; () without one."""
        found = self.sections.get(key)
        return found.sections.items() if found else ()


def _ascii(data: bytes) -> str:
    return data.decode("ascii", errors="replace")
