"""diff: what it says against a comparison of the bytes, and what people and programs get."""

import itertools
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from cbtfs import difference, digests, store as stores
from cbtfs.catalogue import DiskPoint, Point
from cbtfs.difference import DigestArray, NoDigests
from cbtfs.extents import Extent
from cbtfs.store import Store

from .program import Program
from .test_store import BLOCK, FIRST, SECOND, VM, commit, disk_point, noise, spoil

THIRD = "20261124T020000Z"
A = noise(BLOCK, seed=1)
B = noise(BLOCK, seed=2)
O = bytes(BLOCK)  # noqa: E741  # as it looks


# ── against the bytes ──


def naive(old: bytes, new: bytes) -> list[tuple[int, int]]:
    """Return the bytes that differ, by blocks, read as one would without any digests."""
    runs: list[tuple[int, int]] = []
    size = max(len(old), len(new))
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        one, other = old[start:stop], new[start:stop]
        if one == other or not (any(one) or any(other)):
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((start, stop))
    return runs


BLOCKS = st.lists(st.sampled_from([O, A, B]), max_size=40)
TAILS = st.sampled_from([b"", A[:512], bytes(512)])


@settings(max_examples=60, deadline=None)
@given(old=BLOCKS, new=BLOCKS, old_tail=TAILS, new_tail=TAILS)
def test_it_is_what_a_comparison_of_the_bytes_finds(
    old: list[bytes], new: list[bytes], old_tail: bytes, new_tail: bytes
) -> None:
    contents = b"".join([*old, old_tail]), b"".join([*new, new_tail])
    with tempfile.TemporaryDirectory() as place, stores.open_store(Path(place) / "s") as store:
        arrays: list[DigestArray] = []
        for time, content in zip((FIRST, SECOND), contents, strict=True):
            commit(store, time=time, content=content)
            arrays.append(opened(store, time))
        with arrays[0] as one, arrays[1] as other:
            found = list(difference.between(one, other))
            back = list(difference.between(other, one))
            grown = list(difference.between(NoDigests(), other))

    assert [tuple(e) for e in found] == naive(*contents)
    assert back == found
    assert [tuple(e) for e in grown] == naive(b"", contents[1])


def opened(store: Store, time: str) -> DigestArray:
    point = store.catalogue().resolve(f"web1/{time}").point
    with store.opened_point(VM, time) as folder:
        return DigestArray(folder, point.disks[0])


@given(
    old=st.lists(st.sampled_from([0, 1, 1 << 8, 1 << 127]), min_size=1, max_size=80),
    data=st.data(),
)
def test_digests_differ_where_one_looks_at_each(old: list[int], data: st.DataObject) -> None:
    """Also where entries end and begin with so many zeros that they look like one between them."""
    new = data.draw(
        st.lists(st.sampled_from([0, 1, 1 << 120]), min_size=len(old), max_size=len(old))
    )
    one, other = (b"".join(n.to_bytes(16) for n in numbers) for numbers in (old, new))
    marked = [a != b for a, b in zip(old, new, strict=True)]

    found = list(digests.differences(one, other, length=len(old) * BLOCK - 100))
    blocks = [n for start, stop in found for n in range(start // BLOCK, -(-stop // BLOCK))]
    assert blocks == [n for n, differs in enumerate(marked) if differs]
    assert all(b[0] > a[1] for a, b in itertools.pairwise(found))
    assert all(stop % BLOCK == 0 or stop == len(old) * BLOCK - 100 for _, stop in found)


def test_a_terabyte_takes_its_digests_only(store: Store, root: Path) -> None:
    size = 1 << 40
    for time, block in ((FIRST, A), (SECOND, B)):
        with store.lock(VM), store.stage(VM, time=time) as stage:
            image = stage.new_image("xvda.raw", size=size)
            image.write(0, A)
            image.write(size // 2, block)
            disk = disk_point(size, image.finish())
            stage.commit(Point(time=time, vm_uuid=VM, vm_name="web1", disks=(disk,)))

    with opened(store, FIRST) as one, opened(store, SECOND) as other:
        assert list(difference.between(one, other)) == [Extent(size // 2, size // 2 + BLOCK)]


# ── which disks belong together ──


def disk(device: str, vdi: str) -> DiskPoint:
    return DiskPoint(device=device, file=f"{device}.raw", size=1, vdi_uuid=vdi)


def test_disks_are_matched_by_vdi_then_by_device() -> None:
    old = [disk("xvda", "1"), disk("xvdb", "2"), disk("xvdc", "3"), disk("xvdd", "4")]
    new = [disk("xvda", "2"), disk("xvdb", "1"), disk("xvdc", "9"), disk("xvde", "8")]

    found = [(p.old and p.old.device, p.new and p.new.device) for p in difference.pairs(old, new)]
    assert found == [
        ("xvdb", "xvda"), ("xvda", "xvdb"), ("xvdc", "xvdc"), (None, "xvde"), ("xvdd", None)
    ]  # fmt: skip


# ── the command ──


def test_a_table_and_the_extents_of_the_one_disk(store: Store, cbtfs: Program) -> None:
    commit(store, content=A + O + A)
    commit(store, time=SECOND, content=A + B + B)

    result = cbtfs("diff", "web1/latest~1", "web1/latest")
    assert result.status == 0, result.err
    assert result.out.splitlines() == [
        f"web1/{FIRST} -> web1/{SECOND}",
        "DISK  CHANGED  EXTENTS     SIZE  NOTE",
        "xvda  128 KiB        1  192 KiB",
        f"xvda  bytes {BLOCK} to {3 * BLOCK}",
    ]
    assert cbtfs("diff", f"web1/{SECOND}").out == result.out
    assert cbtfs("diff", "web1/latest~1/xvda", "web1/latest").out == result.out


def test_json_has_all_extents(store: Store, cbtfs: Program) -> None:
    blocks = 2 * 150
    commit(store, content=A * blocks)
    commit(store, time=SECOND, content=(A + B) * (blocks // 2))

    found = cbtfs.json("diff", "web1/latest~1", "web1/latest")
    assert isinstance(found["disks"], list)
    (told,) = found["disks"]
    assert told["extents"] == [[n * BLOCK, (n + 1) * BLOCK] for n in range(1, blocks, 2)]
    assert (told["changed"], told["count"], told["problem"]) == (150 * BLOCK, 150, "")
    assert told["old"] == {"device": "xvda", "vdi_uuid": "v", "size": blocks * BLOCK}
    lines = cbtfs("diff", "web1/latest~1", "web1/latest").out.splitlines()
    assert lines[-1] == "xvda  and 50 more places; --json lists them"


def test_a_disk_in_only_one_point_is_said_so(store: Store, root: Path, cbtfs: Program) -> None:
    commit(store, content=A)
    commit(store, time=SECOND, content=A)
    record = root / VM / SECOND / "point.json"
    point = json.loads(record.read_text())
    more = point["disks"][0] | {"device": "xvdz", "vdi_uuid": "z"}
    point["disks"].append(more)
    record.write_text(json.dumps(point))

    lines = cbtfs("diff", "web1/latest~1", "web1/latest").out.splitlines()
    assert lines[-1] == f"xvdz        -        -  64 KiB  only in web1/{SECOND}"
    assert lines[-2].split() == ["xvda", "0", "B", "0", "64", "KiB"]
    back = cbtfs("diff", "web1/latest", "web1/latest~1").out.splitlines()
    assert back[-1].endswith(f"only in web1/{SECOND}")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_digests_that_changed_are_not_believed(
    store: Store, root: Path, cbtfs: Program, options: list[str]
) -> None:
    commit(store, content=A + A)
    commit(store, time=SECOND, content=A + A)
    spoil(root / VM / FIRST / "xvda.b3", 0)

    for arguments in (["web1/latest~1", "web1/latest"], ["web1"]):
        result = cbtfs(*options, "diff", *arguments)
        assert result.status == 4
        assert "xvda.b3 is not as committed; run cbtfs verify" in result.err
        assert not options or result.document()


def test_growth_is_what_each_point_brought(store: Store, cbtfs: Program) -> None:
    commit(store, content=A + O + A)
    commit(store, time=SECOND, content=A + O + A)
    commit(store, time=THIRD, content=B + B + A)

    assert cbtfs("diff", "web1").out.splitlines() == [
        "POINT                  CHANGED  EXTENTS     SIZE  SINCE",
        f"web1/{FIRST}  128 KiB        2  192 KiB  (new)",
        f"web1/{SECOND}      0 B        0  192 KiB  {FIRST}",
        f"web1/{THIRD}  128 KiB        1  192 KiB  {SECOND}",
    ]
    found = cbtfs.json("diff", VM)
    assert isinstance(found["points"], list)
    assert [p["disks"][0]["changed"] for p in found["points"]] == [2 * BLOCK, 0, 2 * BLOCK]
    assert [p["disks"][0]["since"] for p in found["points"]] == [None, FIRST, SECOND]


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["nobody"], 10, "no restore point of a VM called 'nobody'"),
        (["web1/latest"], 10, f"web1 has no restore point before {FIRST}; name two"),
        (["web1", "web1/latest"], 2, "'web1' is not a restore point"),
        (["web1/latest", "web1/1999"], 10, "web1 has no restore point 1999"),
    ],
)
def test_mistakes(
    store: Store, cbtfs: Program, arguments: list[str], status: int, sentence: str
) -> None:
    commit(store)

    result = cbtfs("diff", *arguments)
    assert (result.status, result.out) == (status, "")
    assert sentence in result.err


def test_numbers_are_those_of_cmp(store: Store, root: Path, cbtfs: Program) -> None:
    """A tool that is not ours says the same of the images."""
    if shutil.which("cmp") is None:
        pytest.skip("no cmp here")
    commit(store, content=noise(5 * BLOCK))
    changed = bytearray(noise(5 * BLOCK))
    changed[3 * BLOCK + 7] ^= 1
    commit(store, time=SECOND, content=bytes(changed))

    images = [root / VM / time / "xvda.raw" for time in (FIRST, SECOND)]
    done = subprocess.run(["cmp", "-l", *images], check=False, capture_output=True, text=True)
    (line,) = done.stdout.splitlines()
    at = int(line.split()[0]) - 1
    found = cbtfs("diff", "web1/latest~1", "web1/latest").out.splitlines()[-1]
    assert found == f"xvda  bytes {at // BLOCK * BLOCK} to {(at // BLOCK + 1) * BLOCK}"
