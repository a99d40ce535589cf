"""Contents: what a disk holds, and how each part of it is looked into without changing a byte.

A disk holds a file system, or a table of partitions, or volumes of LVM; each region of it is either
mounted or left alone, with a recipe of ``contrib/docs/restore-files.md`` for whoever wants it all
the same. What tools print about a disk is read here; running them is the caller's.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from . import errors, pieces
from .pieces import Segment, Table
from .volumes import SECTOR, Group, Member, Piece, Stripes, Volume

RECIPES = "contrib/docs/restore-files.md"

LVM_MEMBER = "LVM2_member"
"""What blkid calls a physical volume of LVM."""

AMBIVALENT = "ambivalent"
"""What stands for the type of contents that look like two things at once."""

OPTIONS = ("ro", "nodev", "nosuid", "noexec")
"""Options of every mount: nothing of a disk from elsewhere is run, and none of its devices used."""

_EXTENDED = {"0x5", "0xf", "0x85"}
_JOURNAL_AT, _EXT_MAGIC, _NEEDS_RECOVERY = 1024, b"\x53\xef", 0x4


@dataclass(frozen=True, slots=True)
class Image:
    """The image of a disk.

    Attributes:
        device: of the disk in its VM, ``xvda``.
        label: the same, fit to be the name of a file.
        path: absolute.
        size: in bytes.
    """

    device: str
    label: str
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Region:
    """``size`` bytes of an image from ``offset`` on: the disk, a partition, or a volume.

    Of a volume in several pieces ``devices`` are the disks that have them, and the image is the
    file that shows it as one (see ``joined``).
    """

    image: Image
    label: str
    offset: int
    size: int
    partition: int | None = None
    volume: str = ""
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Spread:
    """A volume in several pieces.

    Attributes:
        label: fit to be the name of a file.
        volume: ``GROUP/NAME``.
        home: the physical volume on which it begins.
        table: where it lies.
        images: what the numbers in ``table`` mean.
    """

    label: str
    volume: str
    home: Region
    table: Table
    images: tuple[Image, ...]

    def region(self, path: str) -> Region:
        """Return the volume as what the file ``path`` shows."""
        devices = tuple(dict.fromkeys(self.images[i].device for i, _ in self.table.ends()))
        image = replace(self.home.image, path=path, size=self.table.size)
        return Region(image, self.label, 0, image.size, None, self.volume, devices)


@dataclass(frozen=True, slots=True)
class Probe:
    """What blkid found: the type of the contents, or of a table of partitions; "" is none."""

    type: str = ""
    table: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A region and what is in it."""

    region: Region
    type: str


@dataclass(frozen=True, slots=True)
class Way:
    """How to mount: a type that the kernel knows, or one of mount's helpers, and its options."""

    type: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """What is left alone: ``why`` follows on its name; ``recipe`` is a heading of the recipes."""

    device: str
    label: str
    type: str
    why: str
    recipe: str
    partition: int | None = None

    def __str__(self) -> str:
        return f'{self.label} {self.why}; see "{self.recipe}" in {RECIPES}'


WAYS: Mapping[str, tuple[Way, ...]] = {
    # noload, norecovery, nologreplay: a journal is not replayed, which would be a write
    "ext2": (Way("ext2"), Way("ext4", ("noload",))),
    "ext3": (Way("ext4", ("noload",)),),
    "ext4": (Way("ext4", ("noload",)),),
    "xfs": (Way("xfs", ("norecovery", "nouuid")),),
    "btrfs": (Way("btrfs", ("rescue=nologreplay",)),),
    "vfat": (Way("vfat", ("umask=077",)),),
    "exfat": (Way("exfat", ("umask=077",)),),
    "ntfs": (Way("ntfs3", ("umask=077",)), Way("ntfs-3g", ("umask=077",))),
    "iso9660": (Way("iso9660"),),
    "udf": (Way("udf"),),
}
"""What is mounted, by blkid's name for it; of several ways the first that this machine knows."""

UNTABLED = "A whole disk or anything else"
BROKEN = "Replaying a journal, or repairing a file system"
DRIVERLESS = "Without root, or without the file system's driver"

LEFT_ALONE: Mapping[str, tuple[str, str]] = {
    "": ("holds nothing that blkid recognises", UNTABLED),
    AMBIVALENT: ("looks like several things at once", UNTABLED),
    "crypto_LUKS": ("is encrypted (LUKS)", "Encrypted disks"),
    "BitLocker": ("is encrypted (BitLocker)", "Encrypted disks"),
    "zfs_member": ("is part of a ZFS pool", "ZFS"),
    "linux_raid_member": ("is part of a software RAID", "Software RAID"),
    "swap": ("is swap space", UNTABLED),
    "swsuspend": ("is swap space of a system that hibernates", UNTABLED),
    LVM_MEMBER: ("is a physical volume of LVM inside a volume", "LVM"),
}
"""What is wrong with contents that cannot be mounted as they are, and the recipe for them."""


def parse_probe(text: str) -> Probe:
    """Return what ``blkid -p -o export`` printed; "" stands for nothing found."""
    pairs: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition("=")
        pairs[key] = value
    return Probe(pairs.get("TYPE", ""), pairs.get("PTTYPE", ""))


def partitions(text: str, image: Image) -> tuple[list[Region], list[Skipped]]:
    """Return the partitions of a disk, and those that are left alone, as partx tells them.

    Args:
        text: what ``partx --raw --noheadings --output NR,START,SECTORS,TYPE`` printed.
        image: the disk.
    """
    regions: list[Region] = []
    skipped: list[Skipped] = []
    for line in text.splitlines():
        number, start, sectors, *kind = line.split()
        if kind and kind[0] in _EXTENDED:
            continue  # it holds the logical ones, which are told by themselves
        region = Region(
            image,
            _numbered(image.label, number),
            int(start) * SECTOR,
            int(sectors) * SECTOR,
            int(number),
        )
        if region.size and region.offset + region.size <= image.size:
            regions.append(region)
        else:
            why = "lies beyond the end of its disk"
            skipped.append(Skipped(image.device, region.label, "", why, UNTABLED, region.partition))
    return regions, skipped


def _numbered(label: str, number: str) -> str:
    return f"{label}p{number}" if label[-1:].isdigit() else f"{label}{number}"


@dataclass(slots=True)
class Volumes:
    """The volumes of LVM on some disks: in one piece, in several, and those that are left alone."""

    regions: list[Region] = field(default_factory=list[Region])
    spread: list[Spread] = field(default_factory=list[Spread])
    skipped: list[Skipped] = field(default_factory=list[Skipped])


def volumes(members: Sequence[tuple[Region, Member]]) -> Volumes:
    """Return the volumes of LVM on some disks, and which are left alone.

    Args:
        members: the physical volumes and where they are. Two of one uuid, copies of each other, are
            left alone: there is no telling which is meant.
    """
    times = Counter(member.uuid for _, member in members)
    places = {member.uuid: region for region, member in members if times[member.uuid] == 1}
    found = Volumes()
    left = pieces.LIMIT
    for home, group in _groups(members):
        for volume in group.volumes:
            placed = _placed(home, group, volume, places, left=left)
            match placed:
                case Region():
                    found.regions.append(placed)
                case Spread():
                    found.spread.append(placed)
                    left -= len(placed.table)
                case Skipped():
                    found.skipped.append(placed)
    _tell_apart(found)
    return found


def _groups(members: Iterable[tuple[Region, Member]]) -> Iterable[tuple[Region, Group]]:
    """Return each group once, as the newest of its texts describes it."""
    newest: dict[str, tuple[Region, Group]] = {}
    for region, member in members:
        group = member.group
        if group and (group.uuid not in newest or newest[group.uuid][1].seqno < group.seqno):
            newest[group.uuid] = (region, group)
    return newest.values()


def _placed(
    home: Region, group: Group, volume: Volume, places: Mapping[str, Region], *, left: int
) -> Region | Spread | Skipped:
    """Return where a volume lies, if it may have ``left`` pieces; else why it is left alone."""
    found = [piece for each in volume.pieces for piece in _columns(each)]
    why = ""
    if volume.kind:
        why = f"is a volume of LVM of the kind {volume.kind}"
    elif any(piece.member not in places for piece in found):
        why = "is a volume of LVM on another disk, or on one of two disks that are copies"
    elif not found or len(found) > left:
        why = f"is a volume of LVM in {len(found)} pieces"
    elif not all(_is_within(piece, places[piece.member]) for piece in found):
        why = "is a volume of LVM that lies beyond the end of its disk"
    else:
        try:
            return _located(f"{group.name}/{volume.name}", volume, places)
        except errors.StoreError:
            why = "is a volume of LVM whose stripes do not add up"
    label = f"{home.image.label}-{volume.name}"
    return Skipped(home.image.device, label, LVM_MEMBER, why, "LVM", home.partition)


def _located(name: str, volume: Volume, places: Mapping[str, Region]) -> Region | Spread:
    found = [piece for each in volume.pieces for piece in _columns(each)]
    home = places[found[0].member]
    label = f"{home.image.label}-{volume.name}"
    if len(found) == 1:
        offset = home.offset + found[0].offset
        return Region(home.image, label, offset, found[0].size, home.partition, name)
    images = tuple(dict.fromkeys(places[piece.member].image for piece in found))
    segments: list[Segment] = []
    start = 0
    for each in volume.pieces:
        columns = _columns(each)
        size = sum(piece.size for piece in columns)
        spots = [(places[p.member], p.offset) for p in columns]
        where = tuple((images.index(place.image), place.offset + at) for place, at in spots)
        chunk = each.chunk if isinstance(each, Stripes) else size
        segments.append(Segment(start, size, where, chunk))
        start += size
    return Spread(label, name, home, Table(segments), images)


def _columns(each: Piece | Stripes) -> tuple[Piece, ...]:
    return each.columns if isinstance(each, Stripes) else (each,)


def _is_within(piece: Piece, place: Region) -> bool:
    return bool(piece.size) and piece.offset + piece.size <= place.size


def _tell_apart(found: Volumes) -> None:
    """Put the group into the labels of those whose label is not the only one."""
    times = Counter([r.label for r in found.regions] + [s.label for s in found.spread])
    found.regions = [
        replace(r, label=_full_label(r.image, r.volume)) if times[r.label] > 1 else r
        for r in found.regions
    ]
    found.spread = [
        replace(s, label=_full_label(s.home.image, s.volume)) if times[s.label] > 1 else s
        for s in found.spread
    ]


def _full_label(image: Image, volume: str) -> str:
    return f"{image.label}-{volume.replace('/', '-')}"


def left_alone(found: Found) -> Skipped | None:
    """Return why a region is not mounted; None if it is."""
    if found.type in WAYS:
        return None
    default = (f"holds what blkid calls {found.type}", UNTABLED)
    why, recipe = LEFT_ALONE.get(found.type, default)
    if found.type.endswith("_raid_member"):
        why, recipe = LEFT_ALONE["linux_raid_member"]
    region = found.region
    return Skipped(region.image.device, region.label, found.type, why, recipe, region.partition)


def unknown_here(found: Found) -> Skipped:
    """Return why a region is not mounted whose file system this machine does not know."""
    region = found.region
    why = f"holds {found.type}, which this machine cannot mount"
    return Skipped(region.image.device, region.label, found.type, why, DRIVERLESS, region.partition)


def unjoined(spread: Spread, why: str) -> Skipped:
    """Return why a volume in several pieces cannot be shown as one file here."""
    text = f"is a volume of LVM in {len(spread.table)} pieces, which cannot be joined here: {why}"
    device = spread.home.image.device
    return Skipped(device, spread.label, LVM_MEMBER, text, "LVM", spread.home.partition)


def damaged_member(found: Found, why: str) -> Skipped:
    """Return why a physical volume of LVM is not looked into: ``why`` begins with "it" or "its"."""
    region = found.region
    text = f"is a physical volume of LVM, but {why}"
    return Skipped(region.image.device, region.label, found.type, text, "LVM", region.partition)


def unreplayed(region: Region) -> str:
    """Return the warning for an ext file system that was in use."""
    return (
        f"{region.label} was in use when its snapshot was taken, and what its journal holds is not"
        f' shown: the newest files may be missing; see "{BROKEN}" in {RECIPES}'
    )


def has_journal_to_replay(head: bytes) -> bool:
    """Tell whether an ext file system, of which these are the first 2048 bytes, was in use."""
    superblock = head[_JOURNAL_AT:]
    features = int.from_bytes(superblock[96:100], "little")
    return superblock[56:58] == _EXT_MAGIC and bool(features & _NEEDS_RECOVERY)
