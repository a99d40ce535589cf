"""Contents: what tools say about a disk, and what is done about it."""

from dataclasses import replace

import pytest

from cbtfs import contents
from cbtfs.contents import Found, Image, Probe, Region
from cbtfs.volumes import Group, Member, Piece, Volume

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

    (found,), skipped = contents.volumes([(partition, member("a", root))])

    assert (found.label, found.offset, found.size) == ("xvda-root", 11 * MiB, MiB)
    assert (found.partition, found.volume) == (2, "vg/root")
    assert not skipped


def test_newest_text_of_a_group_counts_once() -> None:
    old = member("a", Volume("old", (Piece("a", MiB, MiB),)), seqno=1)
    new = member("b", Volume("new", (Piece("a", MiB, MiB),)), seqno=2)

    (found,), _ = contents.volumes([(WHOLE, old), (TWIN, new)])

    assert (found.label, found.volume) == ("xvda-new", "vg/new")


@pytest.mark.parametrize(
    ("volume", "why"),
    [
        (Volume("v", kind="thin"), "of the kind thin"),
        (Volume("v", (Piece("a", 0, MiB), Piece("b", 0, MiB))), "in 2 pieces"),
        (Volume("v", (Piece("gone", 0, MiB),)), "on another disk"),
        (Volume("v", (Piece("a", 99 * MiB, 2 * MiB),)), "beyond the end"),
        (Volume("v"), "in 0 pieces"),
    ],
)
def test_volume_that_is_no_range_is_left_alone(volume: Volume, why: str) -> None:
    regions, (skipped,) = contents.volumes(
        [(WHOLE, member("a", volume)), (TWIN, Member("b", None))]
    )

    assert not regions
    assert why in skipped.why
    assert str(skipped).endswith(f'; see "LVM" in {contents.RECIPES}')


def test_disks_that_are_copies_of_each_other_are_left_alone() -> None:
    root = Volume("root", (Piece("a", MiB, MiB),))

    regions, (skipped,) = contents.volumes([(WHOLE, member("a", root)), (TWIN, member("a", root))])

    assert not regions
    assert "copies" in skipped.why


def test_volumes_of_one_name_are_told_apart() -> None:
    root = Volume("root", (Piece("a", MiB, MiB),))
    second = Volume("root", (Piece("b", MiB, MiB),))
    upper = replace(WHOLE, label="xvda2", offset=50 * MiB, size=50 * MiB)

    regions, _ = contents.volumes(
        [(WHOLE, member("a", root)), (upper, member("b", second, group="vg2"))]
    )

    assert [region.label for region in regions] == ["xvda-vg-root", "xvda-vg2-root"]


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
