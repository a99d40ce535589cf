"""What xapi sends is understood or refused, never half believed."""

import json

import pytest
from hypothesis import given, strategies as st

from cbtfs import errors, rawrecords
from cbtfs.rawrecords import VBDRecord, VDIRecord


def vdis(data: bytes) -> dict[str, VDIRecord]:
    return rawrecords.decode(data, dict[str, VDIRecord], name="VDI")


def test_records_come_by_reference_and_in_their_order() -> None:
    found = vdis(b'{"b": {"virtual_size": 7}, "a": {"VBDs": ["x"], "cbt_enabled": true}}')

    assert list(found) == ["a", "b"]
    assert (found["a"].VBDs, found["a"].cbt_enabled) == (("x",), True)
    assert found["b"].virtual_size == 7


def test_unknown_fields_are_ignored_and_missing_ones_have_values() -> None:
    found = vdis(b'{"a": {"new_in_2030": [{}]}}')

    assert found == {"a": VDIRecord()}


def test_defaults_are_not_shared() -> None:
    found = vdis(b'{"a": {}, "b": {}}')

    found["a"].other_config["k"] = "v"

    assert found["b"].other_config == VDIRecord().other_config == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a": {"virtual_size": "7"}}',
        b'{"a": {"virtual_size": 1.5}}',
        b'{"a": {"managed": "true"}}',
        b'{"a": {"VBDs": {}}}',
        b'{"a": {"name_label": null}}',
        b'{"a": "\\ud800"}',
        b'{"a": {"name_label": "\\ud800"}',
        b'{"a": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    ],
)
def test_another_shape_is_refused_by_the_name_of_its_class(data: bytes) -> None:
    with pytest.raises(errors.PoolError, match="the pool sent VDI records"):
        vdis(data)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (rb"a\ud800b", "a_b"),
        (rb"\udc00\ud800", "__"),
        (rb"\ud83d\ude00", "\U0001f600"),
        (b"a\xffb", "a_b"),
        (b"\xed\xa0\x80", "___"),
        (rb"\ud800\\\"\u0000\n", '_\\"\0\n'),
    ],
)
def test_what_utf8_cannot_say_becomes_an_underscore(written: bytes, name: str) -> None:
    found = vdis(b'{"a": {"name_label": "\\ud800"}, "b": {"name_label": "' + written + b'"}}')

    assert [record.name_label for record in found.values()] == ["_", name]


def test_keys_are_repaired_too() -> None:
    assert list(vdis(b'{"a\xff": {}}')) == ["a_"]


@given(st.text(alphabet=st.characters(categories=None)))
def test_any_name_json_can_write_comes_in_without_surrogates(name: str) -> None:
    data = json.dumps({"a": {"device": name}}).encode()

    found = rawrecords.decode(data, dict[str, VBDRecord], name="VBD")["a"].device

    expected = json.loads(json.dumps(name))
    assert found == "".join("_" if "\ud800" <= c <= "\udfff" else c for c in expected)


@given(st.binary())
def test_any_bytes_are_understood_or_refused(data: bytes) -> None:
    try:
        found = vdis(data)
    except errors.PoolError:
        return
    assert isinstance(found, dict)
