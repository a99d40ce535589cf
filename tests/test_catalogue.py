"""Restore points survive their JSON form, and a POINT argument names exactly one."""

import json
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from hypothesis import given, strategies as st

from cbtfs import catalogue, errors
from cbtfs.catalogue import Catalogue, DiskFailure, DiskPoint, Point, VMHistory

DISK = DiskPoint(device="xvda", file="xvda.raw", digests="xvda.b3", vdi_uuid="d1", size=1 << 44)
POINT = Point(
    time="20261122T020000Z",
    vm_uuid="v1",
    vm_name="web1",
    disks=(DISK,),
    state="partial",
    failures=(DiskFailure(device="xvdb", vdi_uuid="d2", error="the export is gone"),),
    warnings=("ext4 cannot share extents",),
    tool="0.1.0",
)


def altered(**changes: object) -> bytes:
    return json.dumps(json.loads(catalogue.encode(POINT)) | changes).encode()


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────


def test_a_point_survives_its_json_form() -> None:
    assert catalogue.decode(catalogue.encode(POINT)) == POINT


def test_the_json_is_for_people_too() -> None:
    text = catalogue.encode(POINT).decode()

    assert text.startswith('{\n  "')
    assert text.endswith("\n}\n")
    assert json.loads(text)["schema"] == 1
    assert json.loads(text)["disks"][0]["size"] == 1 << 44


def test_unknown_fields_of_the_same_schema_are_ignored() -> None:
    assert catalogue.decode(altered(pinned=True)) == POINT


OLD_DISK = {
    "device": "xvda", "file": "xvda.raw", "vdi_uuid": "d1", "size": 1 << 44, "digests": "xvda.b3",
    "digest_root": "", "vdi_name": "", "sr_uuid": "", "snapshot_uuid": "s1", "cbt": True,
    "method": "incremental", "reason": "changed", "base": "20261121T020000Z",
    "base_snapshot_uuid": "s0", "extents": 3, "bytes_changed": 1 << 20, "bytes_read": 1 << 20,
    "bytes_written": 1 << 19, "seconds": 0.5,
}  # fmt: skip
"""As the first cbtfs wrote it."""


def test_an_older_point_is_read() -> None:
    (disk,) = catalogue.decode(altered(disks=[OLD_DISK])).disks

    assert {key: getattr(disk, key) for key in OLD_DISK} == OLD_DISK
    assert (disk.detail, disk.resumed, disk.allocated) == ("", "", -1)
    assert (disk.blocks_sampled, disk.blocks_mismatched) == (0, 0)


def test_an_older_cbtfs_reads_our_points() -> None:
    """It knows these keys, with values of these types, and ignores others."""
    new = json.loads(catalogue.encode(POINT))["disks"][0]

    assert {key: type(new[key]) for key in OLD_DISK} == {k: type(v) for k, v in OLD_DISK.items()}
    assert json.loads(catalogue.encode(POINT))["schema"] == 1


@pytest.mark.parametrize("schema", [0, 2])
def test_another_schema_is_refused(schema: int) -> None:
    with pytest.raises(errors.StoreError, match=f"schema {schema}"):
        catalogue.decode(altered(schema=schema))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"schema": 1}',
        b'{"schema": "1"}',
        b"\xff",
        b'{"schema": 1, "time": "\xff"}',
        b"[" * 100_000,
        altered(disks=[{}]),
        altered(disks=None),
    ],
)
def test_what_is_no_point_is_refused(data: bytes) -> None:
    with pytest.raises(errors.StoreError, match="cannot be read"):
        catalogue.decode(data)


@pytest.mark.parametrize(
    "name", ["", "..", "../x.raw", "/etc/passwd", ".x", "x\n", "x/y", "a" * 256]
)
def test_a_file_outside_the_point_is_refused(name: str) -> None:
    for field in ("file", "digests") if name else ("file",):
        disk = msgspec.to_builtins(DISK) | {field: name}
        with pytest.raises(errors.StoreError, match="outside"):
            catalogue.decode(altered(disks=[disk]))


def test_a_disk_may_be_empty() -> None:
    data = altered(disks=[msgspec.to_builtins(DISK) | {"size": 0}])

    assert catalogue.decode(data).disks[0].size == 0


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(errors.StoreError, match="negative"):
        catalogue.decode(altered(disks=[msgspec.to_builtins(DISK) | {"size": -1}]))


@pytest.mark.parametrize("time", ["", "../x", "20261322T020000Z", "latest"])
def test_a_bad_time_is_refused(time: str) -> None:
    with pytest.raises(errors.StoreError, match="bad time"):
        catalogue.decode(altered(time=time))


@given(st.text(alphabet=st.characters(categories=None)))
def test_any_text_can_be_committed(text: str) -> None:
    point = msgspec.structs.replace(POINT, vm_name=text, warnings=(text,))

    found = catalogue.decode(catalogue.encode(point))

    readable = text.encode(errors="replace").decode()
    assert (found.vm_name, found.warnings) == (readable, (readable,))


def test_a_point_knows_its_disks() -> None:
    assert POINT.disk("xvda") == DISK
    assert POINT.disk("xvdb") is None


# ── Times ────────────────────────────────────────────────────────────────────────────────────


def test_times_are_written_in_utc_without_colons() -> None:
    east = datetime(2026, 11, 22, 4, 0, tzinfo=timezone(timedelta(hours=2)))

    assert catalogue.format_time(east) == "20261122T020000Z"
    assert catalogue.parse_time("20261122T020000Z") == east


@given(st.datetimes(timezones=st.just(UTC)).map(lambda when: when.replace(microsecond=0)))
def test_every_second_has_its_name(when: datetime) -> None:
    assert catalogue.parse_time(catalogue.format_time(when)) == when
    assert catalogue.is_time(catalogue.format_time(when))


@pytest.mark.parametrize(
    "text",
    ["", "latest", "20261122", "20261122T020000", "20261122T020000Z\n", "20261122T0\uff120000Z"],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    assert not catalogue.is_time(text)
    with pytest.raises(errors.UsageError, match="is not a time"):
        catalogue.parse_time(text)


# ── Histories and references ─────────────────────────────────────────────────────────────────


def point(time: str, *, name: str = "web1") -> Point:
    return msgspec.structs.replace(POINT, time=time, vm_name=name)


FIRST, SECOND, THIRD = (point(f"202611{day}T020000Z") for day in (20, 21, 22))
WEB1 = VMHistory("v1", "web1", (FIRST, SECOND, THIRD))
STORE = Catalogue(
    {
        "v1": WEB1,
        "v2": VMHistory("v2", "twin", (FIRST,)),
        "v3": VMHistory("v3", "twin", (SECOND,)),
        "v4": VMHistory("v4", "a/b/latest", (THIRD,)),
        "v5": VMHistory("v5", "empty"),
        "vdi-d1": VMHistory("vdi-d1", "data", (FIRST,)),
    }
)


def test_a_history_is_in_order_and_named_as_last() -> None:
    renamed = point("20261123T020000Z", name="www")

    found = catalogue.history_of("v1", [renamed, FIRST])

    assert found == VMHistory("v1", "www", (FIRST, renamed))
    assert found.latest == renamed


def test_a_history_without_points_is_named_by_its_uuid() -> None:
    found = catalogue.history_of("v1", [])

    assert (found.name, found.latest) == ("v1", None)


@pytest.mark.parametrize(
    ("text", "uuid", "found"),
    [
        ("web1/latest", "v1", THIRD),
        ("web1/latest~0", "v1", THIRD),
        ("web1/latest~2", "v1", FIRST),
        ("web1/20261121T020000Z", "v1", SECOND),
        ("web1/20261121", "v1", SECOND),
        ("v1/latest", "v1", THIRD),
        ("v3/2", "v3", SECOND),
        ("a/b/latest/latest", "v4", THIRD),
        ("vdi-d1/latest", "vdi-d1", FIRST),
        ("data/latest", "vdi-d1", FIRST),
    ],
)
def test_a_point_is_named_by_vm_and_time(text: str, uuid: str, found: Point) -> None:
    reference = STORE.resolve(text)

    assert (reference.history.uuid, reference.point, reference.disk) == (uuid, found, None)


@pytest.mark.parametrize("text", ["web1/latest/xvda", "v1/20261122/xvda", "a/b/latest/2026/xvda"])
def test_a_disk_is_named_after_its_point(text: str) -> None:
    reference = STORE.resolve(text)

    assert (reference.point, reference.disk) == (THIRD, DISK)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("web2/latest", "'web2'"),
        ("web1/latest~3", "3 restore points"),
        ("empty/latest", "0 restore points"),
        ("web1/2027", "no restore point 2027"),
        ("web1/latest/xvdz", "it has: xvda"),
    ],
)
def test_what_is_not_there_is_not_found(text: str, told: str) -> None:
    with pytest.raises(errors.NotFound, match=told):
        STORE.resolve(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not a restore point"),
        ("web1", "is not a restore point"),
        ("latest", "is not a restore point"),
        ("/latest", "is not a restore point"),
        ("web1/", "is not a restore point"),
        ("web1/latest/", "is not a restore point"),
        ("web1/latest~", "is not a restore point"),
        ("web1/yesterday", "is not a restore point"),
        ("/latest/xvda", "is not a restore point"),
        ("twin/latest", "v2, v3"),
        ("web1/202611", "3 restore points .* begin with 202611"),
    ],
)
def test_what_names_nothing_or_several_is_refused(text: str, told: str) -> None:
    with pytest.raises(errors.UsageError, match=told):
        STORE.resolve(text)


@pytest.mark.parametrize("text", ["a\nb", "a\\x0ab", "a_b~aaaaaaaa"])
def test_a_vm_is_found_by_its_name_as_it_is_printed(text: str) -> None:
    uuid = "aaaaaaaa-0000-4000-8000-000000000001"
    found = Catalogue({uuid: VMHistory(uuid, "a\nb", (FIRST,))})

    assert found.resolve(f"{text}/latest").history.uuid == uuid


def test_all_of_few_candidates_are_listed() -> None:
    days = tuple(point(f"202611{day:02d}T020000Z") for day in range(1, 6))

    with pytest.raises(errors.UsageError, match=r"20261105T020000Z$"):
        Catalogue({"v1": VMHistory("v1", "web1", days)}).resolve("web1/2")


def test_only_some_of_many_candidates_are_listed() -> None:
    days = tuple(point(f"202611{day:02d}T020000Z") for day in range(1, 31))

    with pytest.raises(errors.UsageError, match=r"20261105T020000Z, …$"):
        Catalogue({"v1": VMHistory("v1", "web1", days)}).resolve("web1/2")


def test_a_point_without_disks_says_so() -> None:
    empty = msgspec.structs.replace(POINT, disks=())

    with pytest.raises(errors.NotFound, match="it has: none"):
        Catalogue({"v1": VMHistory("v1", "web1", (empty,))}).resolve("web1/latest/xvda")


@given(st.text())
def test_any_text_resolves_or_is_explained(text: str) -> None:
    with pytest.raises((errors.NotFound, errors.UsageError)):
        STORE.resolve(text + "!")
