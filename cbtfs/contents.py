"""Contents: what a disk holds, and how each part of it is looked into without changing a byte.

A disk holds a file system, or a table of partitions, or volumes of LVM; each region of it is either
mounted or left alone, with a recipe of ``contrib/docs/restore-files.md`` for whoever wants it all
the same. What tools print about a disk is read here; running them is the caller's.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .volumes import SECTOR, Group, Member, Volume

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
    """``size`` bytes of an image from ``offset`` on: the disk, a partition, or a volume."""

    image: Image
    label: str
    offset: int
    size: int
    partition: int | None = None
    volume: str = ""


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


def volumes(members: Sequence[tuple[Region, Member]]) -> tuple[list[Region], list[Skipped]]:
    """Return the volumes of LVM that lie in one piece, and those that are left alone.

    Args:
        members: the physical volumes and where they are. Two of one uuid, copies of each other, are
            left alone: there is no telling which is meant.
    """
    times = Counter(member.uuid for _, member in members)
    places = {member.uuid: region for region, member in members if times[member.uuid] == 1}
    regions: list[Region] = []
    skipped: list[Skipped] = []
    for home, group in _groups(members):
        for volume in group.volumes:
            found = _placed(home, group, volume, places)
            if isinstance(found, Region):
                regions.append(found)
            else:
                skipped.append(found)
    return _told_apart(regions), skipped


def _groups(members: Iterable[tuple[Region, Member]]) -> Iterable[tuple[Region, Group]]:
    """Return each group once, as the newest of its texts describes it."""
    newest: dict[str, tuple[Region, Group]] = {}
    for region, member in members:
        group = member.group
        if group and (group.uuid not in newest or newest[group.uuid][1].seqno < group.seqno):
            newest[group.uuid] = (region, group)
    return newest.values()


def _placed(
    home: Region, group: Group, volume: Volume, places: Mapping[str, Region]
) -> Region | Skipped:
    name = f"{group.name}/{volume.name}"
    label = f"{home.image.label}-{volume.name}"
    why = ""
    if volume.kind:
        why = f"is a volume of LVM of the kind {volume.kind}"
    elif any(piece.member not in places for piece in volume.pieces):
        why = "is a volume of LVM on another disk, or on one of two disks that are copies"
    elif len(volume.pieces) != 1:
        why = f"is a volume of LVM in {len(volume.pieces)} pieces"
    else:
        piece = volume.pieces[0]
        place = places[piece.member]
        if piece.size and piece.offset + piece.size <= place.size:
            label = f"{place.image.label}-{volume.name}"
            offset = place.offset + piece.offset
            return Region(place.image, label, offset, piece.size, place.partition, name)
        why = "is a volume of LVM that lies beyond the end of its disk"
    return Skipped(home.image.device, label, LVM_MEMBER, why, "LVM", home.partition)


def _told_apart(regions: Sequence[Region]) -> list[Region]:
    """Return ``regions`` with the group in the labels of those whose label is not the only one."""
    times = Counter(region.label for region in regions)
    return [
        replace(r, label=f"{r.image.label}-{r.volume.replace('/', '-')}")
        if times[r.label] > 1
        else r
        for r in regions
    ]


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
