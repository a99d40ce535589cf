"""Volumes: what LVM's own tools and another writer of its format put on a disk, and rubbish."""

import uuid
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors, volumes
from cbtfs.simulator import lvm
from cbtfs.volumes import Member, Piece, Stripes, Volume

MiB = 1 << 20
SIZE = 64 * MiB

TEXT = """
vg0 { # a comment
id = "mfLxIh-euta-sgSV-1NOy-Ykfz-NtJl-Ptv37g"
seqno = 7
extent_size = 8192
physical_volumes {
pv0 { id = "82dAS3-wDzD-VShc-ZXoQ-s6On-7Iow-mwF9FA"  device = "/dev/x \\"}\\" y" pe_start = 2048 }
pv1 { id = "HqmzxJ-DNNP-DznH-612H-TVQ1-2joo-l1GdXM" pe_start = 4096 }
}
logical_volumes {
VOLUMES
}
}
contents = "Text Format Volume Group"
"""

ONE = "82dAS3wDzDVShcZXoQs6On7IowmwF9FA"
TWO = "HqmzxJDNNPDznH612HTVQ12jool1GdXM"


def segment(number: int, start: int, count: int, place: str, *, kind: str = "striped") -> str:
    return (
        f'segment{number} {{ start_extent = {start} extent_count = {count} type = "{kind}"'
        f" stripe_count = 1 stripes = [ {place} ] }}\n"
    )


def volume(*segments: str, name: str = "root", status: str = '"READ", "VISIBLE"') -> str:
    return f"{name} {{ status = [{status}] segment_count = {len(segments)} {''.join(segments)} }}"


STRIPES = (
    'segment1 { start_extent = 0 extent_count = 6 type = "striped" stripe_count = 2'
    ' stripe_size = 128 stripes = [ "pv0", 0, "pv1", 3 ] }\n'
)
STRIPED = volume(STRIPES)


def parsed(*texts: str) -> tuple[Volume, ...]:
    return volumes.parse(TEXT.replace("VOLUMES", "\n".join(texts))).volumes


def test_pieces_that_follow_on_one_another_are_one() -> None:
    text = volume(segment(1, 0, 3, '"pv0", 2'), segment(2, 3, 1, '"pv0", 5'))

    assert parsed(text) == (Volume("root", (Piece(ONE, MiB + 2 * 4 * MiB, 16 * MiB),)),)


def test_pieces_on_two_disks_stay_apart() -> None:
    (found,) = parsed(volume(segment(1, 0, 3, '"pv0", 0'), segment(2, 3, 1, '"pv1", 3')))

    assert found.pieces == (Piece(ONE, MiB, 12 * MiB), Piece(TWO, 14 * MiB, 4 * MiB))


def test_stripes_take_turns() -> None:
    (found,) = parsed(volume(STRIPES, segment(2, 6, 1, '"pv0", 3')))

    columns = (Piece(ONE, MiB, 12 * MiB), Piece(TWO, 14 * MiB, 12 * MiB))
    assert found.pieces == (Stripes(columns, 65536), Piece(ONE, 13 * MiB, 4 * MiB))


def test_other_kinds_are_named_and_internal_volumes_left_out() -> None:
    hidden = volume(segment(1, 0, 1, '"pv0", 0'), name="pool_tdata", status='"READ"')

    assert parsed(volume(segment(1, 0, 3, "", kind="thin")), hidden) == (
        Volume("root", kind="thin"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (volume(segment(1, 1, 3, '"pv0", 0')), "with a gap"),
        (volume(segment(1, 0, 3, '"pv9", 0')), "do not describe"),
        (volume(segment(1, 0, 3, '"pv0"')), "do not add up"),
        (volume(segment(1, 0, 3, '"pv0", 0, "pv1", 0')), "do not add up"),
        (volume(segment(1, 0, 3, '"pv0", "pv1"')), "do not describe"),
        (volume(segment(1, 0, 3, "0, 0")), "do not describe"),
        (STRIPED.replace("= 6", "= 7"), "do not add up"),
        (STRIPED.replace("count = 2", "count = 0"), "do not add up"),
        (STRIPED.replace("count = 2", "count = 999999999999"), "do not add up"),
        (STRIPED.replace("stripe_size = 128", ""), "lack stripe_size"),
        (volume(segment(1, 0, 3, '"pv0", 0'), name="../etc"), "have the name '../etc'"),
        (volume(segment(1, 0, 3, '"pv0", 0'), name="-o"), "have the name '-o'"),
        ('root { status = ["VISIBLE"] segment_count = 99999999999 }', "with a gap"),
        ('root { status = ["VISIBLE"] }', "lack segment_count"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(errors.StoreError, match=words):
        parsed(text)


def disk(damage: dict[int, bytes] | None = None) -> Callable[[int, int], bytes]:
    content = bytearray(2 * MiB)  # no more is read
    pieces = lvm.physical_volume(
        size=SIZE,
        group="vg",
        volumes=[lvm.LogicalVolume("one", 2, 3), lvm.LogicalVolume("two", 5, 1)],
        seed=uuid.UUID(int=1),
        created=0,
    )
    for offset, data in (*pieces, *(damage or {}).items()):
        content[offset : offset + len(data)] = data
    return lambda offset, length: bytes(content[offset : offset + length])


def test_disk_of_another_writer_is_read() -> None:
    member = volumes.member(disk())

    assert member.group is not None
    assert (member.group.name, member.group.seqno) == ("vg", 3)
    assert [volume.name for volume in member.group.volumes] == ["one", "two"]
    assert member.group.volumes[0].pieces == (Piece(member.uuid, 9 * MiB, 12 * MiB),)


@pytest.mark.parametrize(
    ("offset", "words"),
    [(512, "no LVM label"), (4096 + 4, "damaged"), (4096 + 40, "damaged"), (4608, "damaged")],
)
def test_damage_is_found(offset: int, words: str) -> None:
    with pytest.raises(errors.StoreError, match=words):
        volumes.member(disk({offset: b"\xff" * 8}))


@given(st.dictionaries(st.integers(512, 8192), st.binary(max_size=64), max_size=4))
def test_rubbish_is_a_sentence_or_a_group_whose_names_are_names(damage: dict[int, bytes]) -> None:
    try:
        found = volumes.member(disk(damage))
    except errors.StoreError:
        return
    assert isinstance(found, Member)


@given(st.text(alphabet='ab1{}[]=,"\\# \n', max_size=80))
def test_any_text_is_a_group_or_a_sentence(text: str) -> None:
    for wrapped in (text, TEXT.replace("VOLUMES", text)):
        try:
            group = volumes.parse(wrapped)
        except errors.StoreError:
            continue
        assert all("/" not in volume.name for volume in group.volumes)
