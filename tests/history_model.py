"""What a history must look like: the test's own bytes of every disk, and what may be said of it.

Nothing here comes from the simulator's storage or from cbtfs: the test writes the same bytes into
a guest's disk and into its model, and knows by itself which change log reaches from where to where.
"""

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 64 << 10

_ZEROS = bytes(BLOCK)
_epochs = itertools.count(1)


def new_epoch() -> int:
    """Return a number for a chain of change logs that begins now."""
    return next(_epochs)


class Content:
    """The bytes of a disk: blocks of 64 KiB by number, all others zero."""

    def __init__(self, size: int, blocks: Mapping[int, bytes] | None = None) -> None:
        self.size = size
        self._blocks = dict(blocks or {})

    def __repr__(self) -> str:
        return f"<{self.size} bytes, data in blocks {sorted(self._blocks)}>"

    def copy(self) -> "Content":
        """Return the bytes as they are now."""
        return Content(self.size, self._blocks)

    def write(self, offset: int, data: bytes) -> set[int]:
        """Write as a guest does; return the numbers of the blocks touched."""
        assert offset + len(data) <= self.size
        touched: set[int] = set()
        position = 0
        while position < len(data):
            number, within = divmod(offset + position, BLOCK)
            piece = data[position : position + BLOCK - within]
            block = self._block(number)
            self._blocks[number] = block[:within] + piece + block[within + len(piece) :]
            touched.add(number)
            position += len(piece)
        return touched

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes within the disk."""
        first, last = offset // BLOCK, -(-(offset + length) // BLOCK)
        whole = b"".join(self._block(number) for number in range(first, last))
        return whole[offset - first * BLOCK :][:length]

    def differs_at(self, image: Path) -> str:
        """Return where the file ``image`` is another, "" if it is the same."""
        found = image.read_bytes()
        if len(found) != self.size:
            return f"{len(found)} bytes instead of {self.size}"
        for number in range(-(-self.size // BLOCK)):
            start, stop = number * BLOCK, min((number + 1) * BLOCK, self.size)
            if found[start:stop] != self._block(number)[: stop - start]:
                return f"block {number}"
        return ""

    def _block(self, number: int) -> bytes:
        return self._blocks.get(number, _ZEROS)


@dataclass
class ModelDisk:
    """A disk of the VM that is in the pool now.

    Attributes:
        number: of the device in the VM, -1 while it is detached.
        trackable: its SR can track changes.
        epoch: of the chain of change logs that its live log ends, 0 while changes are not tracked.
        written: blocks written, by the moment in which they were.
        stunted: moments in which the disk grew, but its bitmap of changes did not.
    """

    ref: str
    uuid: str
    content: Content
    number: int
    trackable: bool
    epoch: int = 0
    written: list[tuple[int, frozenset[int]]] = field(
        default_factory=list[tuple[int, frozenset[int]]]
    )

    stunted: list[int] = field(default_factory=list[int])

    @property
    def device(self) -> str:
        """The name of the disk in its VM."""
        return f"xvd{chr(ord('a') + self.number)}"

    def grow(self, size: int, moment: int) -> None:
        """Follow a resize."""
        before, self.content.size = self.content.size, size
        if before < size and _bitmap_length(before) == _bitmap_length(size):
            self.stunted.append(moment)

    def written_since(self, moment: int) -> set[int]:
        """Return the blocks written after a moment."""
        return {number for when, blocks in self.written if when > moment for number in blocks}


def _bitmap_length(size: int) -> int:
    blocks = -(-size // BLOCK)
    return -(-blocks // 8)


@dataclass(frozen=True)
class Instant:
    """A disk as a snapshot shows it.

    Attributes:
        moment: what was written later is not in it.
    """

    vdi_uuid: str
    content: Content
    epoch: int
    moment: int


@dataclass(frozen=True)
class PointDisk:
    """A disk of a listed restore point, as it must be."""

    device: str
    file: str
    vdi_uuid: str
    snapshot_uuid: str
    content: Content


@dataclass(frozen=True)
class Allowed:
    """What the record of a disk may say of how it was copied.

    Attributes:
        changed: of an increment, the bytes that the pool must have called changed; else -1.
        or_mismatch: the pool may also answer that its logs do not fit together. SM does so where a
            disk grew and its bitmap did not, with a snapshot in between (sm, drivers/VDI.py).
    """

    method: str
    reason: str
    changed: int = -1
    or_mismatch: bool = False

    @property
    def ways(self) -> set[tuple[str, str]]:
        """Pairs of method and reason."""
        mismatch = {("compare", "cbt-mismatch")} if self.or_mismatch else set[tuple[str, str]]()
        return {(self.method, self.reason)} | mismatch


def allowed(
    disk: ModelDisk,
    *,
    points: Sequence[Sequence[PointDisk]],
    bases: Mapping[str, Instant],
    present: Container[str],
    full: bool,
) -> Allowed:
    """Return how ``disk`` may be copied now, where nothing goes wrong on the way.

    Args:
        disk: to be copied.
        points: all listed ones, oldest first.
        bases: what our snapshots in the pool show, by uuid, as far as they are tracked.
        present: uuids of all VDIs in the pool.
        full: all is to be copied.
    """
    listed = [known for point in points for known in point]
    own = [known for known in listed if known.vdi_uuid == disk.uuid]
    if full:
        return Allowed("full", "requested")
    if not own:
        return _newcomer(disk, [known for known in listed if known.device == disk.device], present)
    if not disk.trackable:
        return Allowed("compare", "cbt-unsupported")
    if not disk.epoch:
        return Allowed("compare", "cbt-off")
    return _increment(disk, [known.snapshot_uuid for known in own], bases)


def _increment(disk: ModelDisk, snapshots: Sequence[str], bases: Mapping[str, Instant]) -> Allowed:
    """Return how a disk may be copied that is tracked, and in points with these snapshots."""
    for uuid in reversed(snapshots):
        base = bases.get(uuid)
        if base is None:
            continue
        if base.epoch != disk.epoch:
            break  # the pool says that it is one, and finds out only when it is asked
        blocks = disk.written_since(base.moment)
        changed = sum(min(BLOCK, disk.content.size - number * BLOCK) for number in blocks)
        stunted = any(moment > base.moment for moment in disk.stunted)
        return Allowed("incremental", "changed", changed, or_mismatch=stunted)
    return Allowed("compare", "base-lost")


def _newcomer(disk: ModelDisk, before: Sequence[PointDisk], present: Container[str]) -> Allowed:
    """Return how a disk that no point has may be copied; ``before``: what had its device."""
    if not before:
        return Allowed("full", "first")
    image = before[-1]
    if image.vdi_uuid in present or disk.content.size < image.content.size:
        return Allowed("full", "replaced")
    return Allowed("compare", "moved")
