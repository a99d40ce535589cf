"""Any name becomes a file name, and no two the same."""

from hashlib import blake2b
from uuid import UUID

import pytest
from hypothesis import given, strategies as st

from cbtfs import names

A, B, C = (str(UUID(digit * 32)) for digit in "abc")


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("root disk", "root disk"),
        ("Größe \U0001f600", "Größe \U0001f600"),
        ("../../etc", ".._.._etc"),
        ("a/b\0c\nd\x1b[31m\x7f\x9b", "a_b_c_d_[31m__"),
        ("\ud800", "_"),
        ("", "~aaaaaaaa"),
        (".", ".~aaaaaaaa"),
        ("..", "..~aaaaaaaa"),
        ("latest", "latest~aaaaaaaa"),
        ("snapshots", "snapshots~aaaaaaaa"),
        ("x" * 255, "x" * 255),
        ("x" * 256, "x" * 246 + "~aaaaaaaa"),
        ("ä" * 200, "ä" * 123 + "~aaaaaaaa"),
    ],
)
def test_a_name_becomes_a_file_name(name: str, safe: str) -> None:
    assert names.safe_names([(A, name)]) == {A: safe}


def test_all_twins_get_digits_not_only_the_second() -> None:
    assert names.safe_names([(A, "x"), (B, "x"), (C, "y")]) == {
        A: "x~aaaaaaaa",
        B: "x~bbbbbbbb",
        C: "y",
    }


def test_twins_are_what_is_equal_afterwards() -> None:
    assert names.safe_names([(A, "a/b"), (B, "a_b")]) == {A: "a_b~aaaaaaaa", B: "a_b~bbbbbbbb"}


def test_a_name_that_looks_like_a_twin_gives_way() -> None:
    found = names.safe_names([(A, "x"), (B, "x"), (C, "x~aaaaaaaa")])

    assert found == {A: "x~aaaaaaaa", B: "x~bbbbbbbb", C: "x~aaaaaaaa~cccccccc"}


def test_equal_digits_become_longer() -> None:
    first, second = "aaaaaaaa-0000-4000-8000-000000000001", "aaaaaaaa-0001-4000-8000-000000000001"

    assert names.safe_names([(first, "x"), (second, "x")]) == {
        first: "x~aaaaaaaa00004000",
        second: "x~aaaaaaaa00014000",
    }


def test_a_vm_and_a_disk_of_one_uuid_differ_too() -> None:
    found = names.safe_names([(A, "x"), (f"vdi-{A}", "x")])

    assert len(set(found.values())) == 2


def test_a_key_that_is_no_uuid_gets_digits_of_its_hash() -> None:
    digits = blake2b(b"key", digest_size=16).hexdigest()[:8]

    assert names.safe_names([("key", "")]) == {"key": f"~{digits}"}


keys = st.one_of(
    st.uuids().map(str),
    st.sampled_from([A, B, C, f"vdi-{A}"]),
    st.integers(0, 30).map(lambda n: f"aaaaaaaa-aaaa-aaaa-aaaa-{n:012x}"),
)
raw_names = st.one_of(
    st.text(alphabet=st.characters(categories=None), max_size=8),
    st.sampled_from(["", ".", "..", "x", "latest", "x~aaaaaaaa", "x~aaaaaaaaaaaaaaaa", "a/b"]),
    st.integers(60, 300).map("é".__mul__),
)


@given(st.dictionaries(keys, raw_names, max_size=12), st.sampled_from([64, 251, 255]))
def test_safe_names_is_total_injective_valid_and_idempotent(
    given_names: dict[str, str], limit: int
) -> None:
    found = names.safe_names(list(given_names.items()), limit=limit)

    assert found.keys() == given_names.keys()
    assert len(set(found.values())) == len(found)
    for name in found.values():
        assert 0 < len(name.encode()) <= limit
        assert name not in {".", "..", "latest", "snapshots"}
        assert not any(c == "/" or ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
    assert names.safe_names(list(found.items()), limit=limit) == found


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("line\nbreak", {"line\\x0abreak", "line_break", "line_break~aaaaaaaa"}),
        ("web1", {"web1~aaaaaaaa"}),
        ("a\u202eb", {"a\\u202eb", "a\u202eb~aaaaaaaa", "a\\u202eb~aaaaaaaa"}),
    ],
)
def test_what_is_printed_of_a_name_is_one_of_its_spellings(name: str, printed: set[str]) -> None:
    assert names.spellings(name, A) == printed
    assert {names.shown(name), names.safe_names([(A, name), (B, name)])[A]} <= printed | {name}


@given(raw_names, keys)
def test_every_name_has_spellings(name: str, key: str) -> None:
    assert name not in names.spellings(name, key)
