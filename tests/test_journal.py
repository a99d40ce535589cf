"""Journal: what a run leaves for the next one, and what is not believed of it."""

import json
from typing import cast

import msgspec
import pytest
from hypothesis import given, strategies as st

from cbtfs import journal
from cbtfs.catalogue import DiskPoint
from cbtfs.journal import DiskJournal

BLOCK = 64 << 10
SIZE = 40 * BLOCK + 512

DONE = DiskPoint(
    device="xvdb",
    file="xvdb.raw",
    digests="xvdb.b3",
    digest_root="ab" * 32,
    size=SIZE,
    vdi_uuid="v2",
    snapshot_uuid="s2",
    method="resume",
    resumed="compare",
)
BEGUN = DiskJournal(
    device="xvda",
    vdi_uuid="v1",
    snapshot_uuid="s1",
    size=SIZE,
    method="incremental",
    reason="changed",
    detail="since 20261121T020000Z",
    base="20261121T020000Z",
    base_snapshot_uuid="s0",
    offset=3 * BLOCK,
    bytes_read=BLOCK,
    bytes_written=BLOCK,
    seconds=1.5,
)
FINISHED = DiskJournal(
    device="xvdb",
    vdi_uuid="v2",
    snapshot_uuid="s2",
    size=SIZE,
    method="compare",
    offset=SIZE,
    finished=DONE,
)
BOTH = {"xvda": BEGUN, "xvdb": FINISHED}


def changed(entry: str, values: dict[str, object]) -> bytes:
    """Return the journal with something else in one entry."""
    document = cast("dict[str, dict[str, dict[str, object]]]", json.loads(journal.encode(BOTH)))
    document["disks"][entry].update(values)
    return json.dumps(document).encode()


def test_a_journal_survives_its_json_form() -> None:
    assert journal.decode(journal.encode(BOTH)) == BOTH


def test_a_journal_without_disks_is_one() -> None:
    assert journal.decode(journal.encode({})) == {}


def test_the_json_is_for_people_too() -> None:
    text = journal.encode(BOTH)

    assert text.endswith(b"}\n")
    assert json.loads(text)["schema"] == 1
    assert json.loads(text)["disks"]["xvda"]["offset"] == 3 * BLOCK


def test_unknown_fields_are_ignored() -> None:
    assert journal.decode(changed("xvda", {"colour": "red"})) == BOTH


@pytest.mark.parametrize("offset", [0, BLOCK, SIZE])
def test_a_disk_goes_on_at_a_block_or_at_its_end(offset: int) -> None:
    assert journal.decode(changed("xvda", {"offset": offset}))["xvda"].offset == offset


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": 1}',
        b'{"disks": {}}',
        b'{"schema": 1, "disks": []}',
        b'{"schema": 1, "disks": {"xvda": {}}}',
        b'{"schema": 1, "disks": {"xvda": null}}',
        journal.encode(BOTH).replace(b'"schema": 1', b'"schema": 2'),
        journal.encode(BOTH)[:-3],
    ],
)
def test_what_is_no_journal_has_no_entries(data: bytes) -> None:
    assert journal.decode(data) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "xvdc"),
        ("device", 1),
        ("size", -1),
        ("size", "1"),
        ("size", 1 << 64),
        ("offset", -BLOCK),
        ("offset", 3 * BLOCK + 1),
        ("offset", SIZE + BLOCK),
        ("offset", True),
        ("offset", 1.5),
        ("method", "resume"),
        ("method", ""),
        ("base", "../20261121T020000Z"),
        ("base", "20261321T020000Z"),
        ("bytes_read", -1),
        ("bytes_written", -1),
        ("seconds", -0.1),
        ("seconds", 1e300),
        ("finished", {}),
        ("finished", 1),
    ],
)
def test_one_unsound_entry_spoils_the_journal(key: str, value: object) -> None:
    assert journal.decode(changed("xvda", {key: value})) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("device", "xvda"),
        ("file", "../xvdb.raw"),
        ("file", ""),
        ("digests", "/etc/passwd"),
        ("size", SIZE + 1),
        ("vdi_uuid", "v1"),
        ("snapshot_uuid", "s1"),
    ],
)
def test_a_finished_disk_is_the_one_of_its_entry(key: str, value: object) -> None:
    finished = {**msgspec.to_builtins(DONE), key: value}

    assert journal.decode(changed("xvdb", {"finished": finished})) == {}


def test_a_journal_that_is_too_large_is_none() -> None:
    long = {**BOTH, "xvda": msgspec.structs.replace(BEGUN, detail="x" * journal.LIMIT)}

    assert journal.decode(journal.encode(long)) == {}


def test_a_vm_with_all_its_disks_fits() -> None:
    detail = "x" * 1000
    entries = {
        f"xvd{n}": msgspec.structs.replace(
            FINISHED,
            device=f"xvd{n}",
            detail=detail,
            finished=msgspec.structs.replace(DONE, device=f"xvd{n}", detail=detail),
        )
        for n in range(255)
    }

    assert journal.decode(journal.encode(entries)) == entries


@given(st.text())
def test_any_text_can_be_on_record(text: str) -> None:
    entry = msgspec.structs.replace(BEGUN, detail=text, device=text)

    found = journal.decode(journal.encode({text: entry}))
    assert [e.offset for e in found.values()] == [BEGUN.offset]


@given(st.binary(), st.integers(0, 2000))
def test_no_garbage_raises(garbage: bytes, at: int) -> None:
    text = journal.encode(BOTH)

    assert isinstance(journal.decode(text[:at] + garbage + text[at + len(garbage) :]), dict)
