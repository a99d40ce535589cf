"""Contents: what tools say about a disk, and what is done about it."""

from dataclasses import replace

import pytest

from cbtfs import contents
from cbtfs.contents import Found, Image, Probe, Region
from cbtfs.volumes import Group, Member, Piece, Stripes, Volume

MiB = 1 << 20
IMAGE = Image("xvda", "xvda", "/store/xvda.raw", 100 * MiB)
OTHER = Image("xvdb", "xvdb", "/store/xvdb.raw", 100 * MiB)
WHOLE, TWIN = (Region(image, image.label, 0, image.size) for image in (IMAGE, OTHER))


def test_probe_is_read() -> None:
    text = "DEVNAME=x\nUUID=1\nLABEL=a=b\nTYPE=vfat\nPTTYPE=dos\n"

    assert contents.parse_probe(text) == Probe("vfat", "dos")
    assert contents.parse_probe("") == Probe()


def test_partitions_are_those_that_hold_something() -> None:
    text = "1 2048 2048 0x83\n2 4096 4096 0x5\n5 6144 2048 0x83\n6 8192 999999 0x83\n7 0 0\n"

    regions, skipped = contents.partitions(text, IMAGE)

    assert [(r.label, r.offset, r.size, r.partition) for r in regions] == [
        ("xvda1", MiB, MiB, 1),
        ("xvda5", 3 * MiB, MiB, 5),
    ]
    assert [s.label for s in skipped] == ["xvda6", "xvda7"]


def test_partition_of_a_disk_that_ends_in_a_digit() -> None:
    regions, _ = contents.partitions("1 8 8 0x83", replace(IMAGE, label="nvme0n1"))

    assert regions[0].label == "nvme0n1p1"


def member(uuid: str, *volumes: Volume, group: str = "vg", seqno: int = 1) -> Member:
    return Member(uuid, Group(group, f"id of {group}", seqno, volumes))


def test_volume_is_where_its_physical_volume_is() -> None:
    root = Volume("root", (Piece("a", MiB, MiB),))
    partition = replace(WHOLE, label="xvda2", offset=10 * MiB, size=50 * MiB, partition=2)

    told = contents.volumes([(partition, member("a", root))])

    (found,) = told.regions
    assert (found.label, found.offset, found.size) == ("xvda-root", 11 * MiB, MiB)
    assert (found.partition, found.volume) == (2, "vg/root")
    assert not told.skipped


def test_newest_text_of_a_group_counts_once() -> None:
    old = member("a", Volume("old", (Piece("a", MiB, MiB),)), seqno=1)
    new = member("b", Volume("new", (Piece("a", MiB, MiB),)), seqno=2)

    (found,) = contents.volumes([(WHOLE, old), (TWIN, new)]).regions

    assert (found.label, found.volume) == ("xvda-new", "vg/new")


@pytest.mark.parametrize(
    ("volume", "why"),
    [
        (Volume("v", kind="thin"), "of the kind thin"),
        (Volume("v", (Piece("a", 0, MiB), Piece("gone", 0, MiB))), "on another disk"),
        (Volume("v", (Piece("a", 0, MiB), Piece("b", 0, 101 * MiB))), "beyond the end"),
        (Volume("v", (Piece("a", 0, MiB), Piece("b", 0, 0))), "beyond the end"),
        (Volume("v", (Stripes((Piece("a", 0, MiB), Piece("b", 0, MiB)), 0),)), "do not add up"),
        (Volume("v", (Stripes((Piece("a", 0, MiB), Piece("b", 0, MiB)), 3072),)), "do not add"),
        (Volume("v", tuple(Piece("b", 2 * i, 1) for i in range(5000))), "in 5000 pieces"),
        (Volume("v", (Piece("gone", 0, MiB),)), "on another disk"),
        (Volume("v", (Piece("a", 99 * MiB, 2 * MiB),)), "beyond the end"),
        (Volume("v"), "in 0 pieces"),
    ],
)
def test_volume_that_is_no_range_is_left_alone(volume: Volume, why: str) -> None:
    found = contents.volumes([(WHOLE, member("a", volume)), (TWIN, Member("b", None))])

    assert not found.regions
    assert not found.spread
    (skipped,) = found.skipped
    assert why in skipped.why
    assert str(skipped).endswith(f'; see "LVM" in {contents.RECIPES}')


def test_disks_that_are_copies_of_each_other_are_left_alone() -> None:
    root = Volume("root", (Piece("a", MiB, MiB),))

    found = contents.volumes([(WHOLE, member("a", root)), (TWIN, member("a", root))])

    assert not found.regions
    assert "copies" in found.skipped[0].why


def test_volumes_of_one_name_are_told_apart() -> None:
    root = Volume("root", (Piece("a", MiB, MiB),))
    second = Volume("root", (Piece("b", MiB, MiB),))
    upper = replace(WHOLE, label="xvda2", offset=50 * MiB, size=50 * MiB)

    found = contents.volumes(
        [(WHOLE, member("a", root)), (upper, member("b", second, group="vg2"))]
    )

    assert [region.label for region in found.regions] == ["xvda-vg-root", "xvda-vg2-root"]


def test_volume_in_several_pieces_is_a_table() -> None:
    stripes = Stripes((Piece("a", 5 * MiB, MiB), Piece("b", 6 * MiB, MiB)), 65536)
    data = Volume("data", (Piece("b", MiB, 2 * MiB), stripes))
    partition = replace(WHOLE, label="xvda2", offset=10 * MiB, size=50 * MiB, partition=2)

    found = contents.volumes([(partition, member("a", data)), (TWIN, Member("b", None))])

    (spread,) = found.spread
    assert list(spread.table.lines([0, 1])) == [
        "0 4096 linear 0 2048",
        "4096 4096 striped 2 128 1 30720 0 12288",
    ]
    assert spread.images == (OTHER, IMAGE)
    region = spread.region("/run/x")
    assert (region.label, region.volume, region.size) == ("xvdb-data", "vg/data", 4 * MiB)
    assert (region.image.path, region.devices) == ("/run/x", ("xvdb", "xvda"))
    assert not found.regions + found.skipped


def test_pieces_of_all_volumes_together_are_limited() -> None:
    many = [Volume(name, tuple(Piece("a", 1024 * i, 512) for i in range(2000))) for name in "abc"]

    found = contents.volumes([(WHOLE, member("a", *many))])

    assert [spread.volume for spread in found.spread] == ["vg/a", "vg/b"]
    assert [skipped.why for skipped in found.skipped] == ["is a volume of LVM in 2000 pieces"]


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("crypto_LUKS", "Encrypted disks"),
        ("zfs_member", "ZFS"),
        ("linux_raid_member", "Software RAID"),
        ("isw_raid_member", "Software RAID"),
        ("hfsplus", contents.UNTABLED),
        ("", contents.UNTABLED),
    ],
)
def test_what_is_left_alone_has_a_recipe(kind: str, recipe: str) -> None:
    skipped = contents.left_alone(Found(WHOLE, kind))

    assert skipped is not None
    assert skipped.recipe == recipe


def test_no_way_to_mount_replays_a_journal() -> None:
    options = {way.type: way.options for ways in contents.WAYS.values() for way in ways}

    assert "noload" in options["ext4"]
    assert "norecovery" in options["xfs"]
    assert "rescue=nologreplay" in options["btrfs"]
    assert contents.OPTIONS[0] == "ro"
