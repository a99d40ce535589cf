"""verify: samples, what was verified lately, and what people and programs get."""

import errno
import json
import os
import random
import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cbtfs import damage, errors, verified
from cbtfs.catalogue import Reference
from cbtfs.damage import Scope
from cbtfs.extents import Extent
from cbtfs.folder import Folder
from cbtfs.store import Store, VerifyResult

from .program import Program
from .test_store import BLOCK, CONTENT, FIRST, SECOND, SIZE, VM, commit, noise, only, spoil


def record(root: Path, name: str = "verified.json", time: str = FIRST) -> dict[str, object]:
    found: dict[str, object] = json.loads((root / VM / time / name).read_bytes())
    return found


def put_verified(root: Path, when: datetime | str, time: str = FIRST) -> None:
    text = when if isinstance(when, str) else when.isoformat()
    content = {"disks": {"xvda": text}, "schema": 1}
    (root / VM / time / "verified.json").write_text(json.dumps(content))


# ── samples ──


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.999])
def test_a_sample_is_a_share_of_what_may_hold_data(store: Store, share: float) -> None:
    commit(store)
    steps: list[int] = []

    (disk,) = store.verify(only(store), scope=Scope(share=share), advanced=steps.append).disks
    found = disk.damage
    blocks = -(-found.sampled_of // BLOCK)
    assert 25 <= blocks <= 41  # as far as the file system knows holes
    count = -(-int(share * 1000) * blocks // 1000)
    assert -(-found.checked // BLOCK) == max(count, 1)
    assert sum(steps) == found.checked
    assert found.sampled


def test_each_block_is_as_likely_as_any_other() -> None:
    rng = random.Random(1)
    suspects = [Extent(0, 3 * BLOCK), Extent(8 * BLOCK, 15 * BLOCK + 512)]
    blocks = [0, 1, 2, *range(8, 16)]
    drawn: Counter[int] = Counter()
    for _ in range(4000):
        found = list(Scope(share=0.3, rng=rng).drawn(suspects, 10 * BLOCK + 512))
        assert len(found) == len(set(found)) == 4
        assert found == sorted(found)
        drawn.update(extent.start // BLOCK for extent in found)
    assert sorted(drawn) == blocks
    assert max(drawn.values()) < 1.6 * min(drawn.values())


def test_a_sample_finds_what_it_meets_and_adds_it_to_the_record(store: Store, root: Path) -> None:
    commit(store)
    spoil(root / VM / FIRST / "xvda.raw", 0)
    store.verify(only(store))
    spoil(root / VM / FIRST / "xvda.raw", 30 * BLOCK)

    for _ in range(40):  # one of them meets the second place; none forgets the first
        store.verify(only(store), scope=Scope(share=0.3))
    disks = record(root, "damaged.json")["disks"]
    assert isinstance(disks, dict)
    told = disks["xvda"]
    assert told["extents"] == [[0, BLOCK], [30 * BLOCK, 31 * BLOCK]]
    assert told["blocks"] == 2


def test_a_sample_never_clears_a_record(store: Store, root: Path, cbtfs: Program) -> None:
    commit(store)
    spoil(root / VM / FIRST / "xvda.raw", 0)
    store.verify(only(store))
    spoil(root / VM / FIRST / "xvda.raw", 0, CONTENT[:1])

    result = cbtfs("verify", "--sample", "50%")
    assert result.status == 4
    assert "but damage is on record; verify all of it" in result.out
    assert store.damaged(VM, FIRST) == {"xvda"}
    assert not verified_at(root)

    assert cbtfs("verify").status == 0
    assert store.damaged(VM, FIRST) == frozenset()
    assert verified_at(root)


def verified_at(root: Path, time: str = FIRST) -> dict[str, datetime]:
    with Folder.open(root / VM / time) as folder:
        return verified.times(folder)


def test_a_sample_sees_changed_digests_whatever_it_draws(store: Store, root: Path) -> None:
    commit(store)
    spoil(root / VM / FIRST / "xvda.b3", 24 * 16)

    (disk,) = store.verify(only(store), scope=Scope(share=0.001)).disks
    assert disk.damage.problem == "its digests changed"


def test_a_sample_of_nothing_is_nothing(store: Store) -> None:
    commit(store, content=bytes(4 * BLOCK))

    (disk,) = store.verify(only(store), scope=Scope(share=0.5)).disks
    assert (disk.damage.found, disk.damage.sampled) == (False, True)


def test_how_much_a_sample_was_is_said(store: Store, cbtfs: Program) -> None:
    commit(store, content=noise(40 * BLOCK))

    result = cbtfs("verify", "--sample", "10%")
    assert result.out == f"web1/{FIRST}/xvda  ok, 256 KiB checked, a sample of 2.5 MiB\n"
    found = cbtfs.json("verify", "--sample", "10%")
    assert isinstance(found["points"], list)
    (disk,) = found["points"][0]["disks"]
    assert (disk["checked"], disk["sample_of"]) == (4 * BLOCK, 40 * BLOCK)


# ── verified lately ──


def test_only_a_full_check_that_found_nothing_is_on_record(store: Store, root: Path) -> None:
    commit(store)
    store.verify(only(store), scope=Scope(share=0.5))
    assert not (root / VM / FIRST / "verified.json").exists()

    store.verify(only(store))
    assert abs(verified_at(root)["xvda"] - datetime.now(UTC)) < timedelta(minutes=1)

    spoil(root / VM / FIRST / "xvda.raw", 0)
    store.verify(only(store))
    assert verified_at(root) == {}


def test_what_was_verified_lately_is_left_out(store: Store, root: Path, cbtfs: Program) -> None:
    commit(store)
    commit(store, time=SECOND)
    now = datetime.now(UTC)
    put_verified(root, now - timedelta(days=31))
    put_verified(root, now - timedelta(days=29), SECOND)

    result = cbtfs("-v", "verify", "--older-than", "30d")
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0] == f"web1/{FIRST}/xvda  ok, 2.5 MiB checked"
    assert lines[1].startswith(f"web1/{SECOND}/xvda  left out, found whole ")
    assert "1 disks left out" in result.err
    assert now - verified_at(root)["xvda"] < timedelta(minutes=1)
    assert cbtfs("verify", "--older-than", "30d").out == ""


@pytest.mark.parametrize("when", ["future", "yesterday", "", "2026-11-01T00:00:00", "{"])
def test_a_time_that_proves_nothing_counts_as_never(
    store: Store, root: Path, cbtfs: Program, when: str
) -> None:
    commit(store)
    future = datetime.now(UTC) + timedelta(days=1)
    put_verified(root, future if when == "future" else when)
    if when == "{":
        (root / VM / FIRST / "verified.json").write_text("{")

    assert "ok, 2.5 MiB checked" in cbtfs("verify", "--older-than", "9999d").out


def test_damage_on_record_is_looked_at_again(store: Store, root: Path, cbtfs: Program) -> None:
    commit(store)
    put_verified(root, datetime.now(UTC))
    with Folder.open(root / VM / FIRST) as point:
        damage.record(point, "xvda", damage.Damage(blocks=1), now="then")

    assert "ok, 2.5 MiB checked" in cbtfs("verify", "--older-than", "9d").out
    assert store.damaged(VM, FIRST) == frozenset()


def test_a_store_that_cannot_be_written_is_verified_all_the_same(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.EROFS, "no")

    commit(store)
    found = only(store)
    monkeypatch.setattr(os, "write", refuse)
    result = store.verify(found)
    assert (result.damaged, result.warnings) == (False, ())
    assert not (root / VM / FIRST / "verified.json").exists()


# ── the command ──


def test_what_can_be_repaired_is_said_and_then_done(
    store: Store, root: Path, cbtfs: Program
) -> None:
    commit(store)
    commit(store, time=SECOND)
    spoil(root / VM / SECOND / "xvda.raw", 2 * BLOCK + 9)
    image = root / VM / SECOND / "xvda.raw"
    before = image.read_bytes()

    for arguments, what in (([], "repairs"), (["--repair", "-n"], "would repair")):
        result = cbtfs("verify", "web1/latest", *arguments)
        assert result.status == 4
        assert result.out.splitlines() == [
            f"web1/{SECOND}/xvda  DAMAGED: 1 blocks differ, 2.5 MiB checked",
            f"  damaged: bytes {2 * BLOCK} to {3 * BLOCK}, whole in {FIRST}",
            f"  verify --repair {what} 1 blocks",
        ]
        assert image.read_bytes() == before

    result = cbtfs("verify", "web1/latest", "--repair")
    assert result.status == 0, result.err
    assert result.out.splitlines() == [
        f"web1/{SECOND}/xvda  REPAIRED: 1 blocks, 2.5 MiB checked",
        f"  repaired: bytes {2 * BLOCK} to {3 * BLOCK}, from {FIRST}",
    ]
    assert image.read_bytes() != before
    assert cbtfs("verify").status == 0
    assert store.damaged(VM, SECOND) == frozenset()
    assert "xvda" in verified_at(root, SECOND)


def test_what_is_left_is_damage_still(store: Store, root: Path, cbtfs: Program) -> None:
    commit(store, content=noise(4 * BLOCK))
    commit(store, time=SECOND, content=noise(BLOCK) + noise(3 * BLOCK, seed=3))
    for block in (0, 2):
        spoil(root / VM / SECOND / "xvda.raw", block * BLOCK)

    result = cbtfs("verify", "web1/latest", "--repair")
    assert result.status == 4
    assert result.out.splitlines() == [
        f"web1/{SECOND}/xvda  DAMAGED: 1 blocks differ, 256 KiB checked",
        f"  damaged: bytes {2 * BLOCK} to {3 * BLOCK}",
        f"  repaired: bytes 0 to {BLOCK}, from {FIRST}",
    ]
    disks = record(root, "damaged.json", SECOND)["disks"]
    assert isinstance(disks, dict)
    assert disks["xvda"]["extents"] == [[2 * BLOCK, 3 * BLOCK]]


def test_a_repair_is_no_all_clear_for_what_is_not_as_in_the_pool(
    store: Store, root: Path, cbtfs: Program
) -> None:
    commit(store, content=noise(BLOCK) + bytes(BLOCK))
    found = damage.Disagreement(blocks=1, extents=(Extent(0, BLOCK),))
    with Folder.open(root / VM / FIRST) as point:
        damage.record_pool(point, "xvda", found, unproven=iter, now="2026-11-23T08:00:00+00:00")
    spoil(root / VM / FIRST / "xvda.raw", BLOCK)

    result = cbtfs("verify", "--repair")

    assert result.status == 4
    assert "ok, 128 KiB checked, but 1 blocks were not as in the pool" in result.out
    assert f"  repaired: bytes {BLOCK} to {2 * BLOCK}, which are zeros" in result.out
    assert store.damaged(VM, FIRST) == frozenset({"xvda"})


def test_a_record_that_cannot_be_read_is_no_all_clear(
    store: Store, root: Path, cbtfs: Program
) -> None:
    commit(store)
    broken = root / VM / FIRST / "damaged.json"
    broken.write_text("rubbish")

    result = cbtfs("verify")

    assert result.status == 4  # restore and sync take the disk for damaged, too
    assert result.out.endswith("checked, but damage is on record\n")
    assert f"{broken} cannot be read" in result.err
    broken.unlink()
    assert cbtfs("verify").status == 0


def test_changed_digests_can_be_repaired(store: Store, root: Path, cbtfs: Program) -> None:
    commit(store)
    spoil(root / VM / FIRST / "xvda.b3", 16)

    result = cbtfs("verify")
    assert result.status == 4
    assert "DAMAGED: its digests changed" in result.out
    assert result.out.endswith("verify --repair repairs 1 digests\n")
    assert cbtfs("verify", "--repair").status == 0
    assert cbtfs("verify").status == 0


def test_a_point_that_is_removed_meanwhile_does_not_end_the_run(
    store: Store, root: Path, cbtfs: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store)
    commit(store, time=SECOND)
    whole = Store.verify

    def verify(self: Store, *args: object, **kwargs: object) -> object:
        shutil.rmtree(root / VM / FIRST, ignore_errors=True)
        return whole(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "verify", verify)
    result = cbtfs("verify")
    assert result.status == 0
    assert f"web1/{FIRST}/xvda is gone: its restore point was removed meanwhile" in result.err
    assert result.out == f"web1/{SECOND}/xvda  ok, 2.5 MiB checked\n"


def test_a_disk_that_cannot_be_read_does_not_keep_others_from_it(
    store: Store, root: Path, cbtfs: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store)
    commit(store, time=SECOND)
    verify = Store.verify

    def refused(opened: Store, reference: Reference, **rest: object) -> VerifyResult:
        if reference.point.time == FIRST:
            raise errors.StoreError("you may not")
        return verify(opened, reference, **rest)  # type: ignore[arg-type]  # as they came

    monkeypatch.setattr(Store, "verify", refused)
    some = cbtfs("verify")
    none = cbtfs("-q", "--json", "verify", f"web1/{FIRST}")
    spoil(root / VM / SECOND / "xvda.raw", 0)

    assert some.status == 3
    assert some.out.startswith(f"web1/{SECOND}/xvda  ok")
    assert f"web1/{FIRST}/xvda  failed: you may not" in some.err
    assert none.status == 1
    assert none.err == f"cbtfs: web1/{FIRST}/xvda: you may not\n"
    assert json.loads(none.out)["points"][0]["unverified"][0]["error"] == "you may not"
    assert cbtfs("verify").status == 4


def test_progress_is_told_in_json(store: Store, cbtfs: Program) -> None:
    commit(store)

    result = cbtfs("verify", "--json-progress")
    events = [json.loads(line) for line in result.err.splitlines()]
    assert [e["event"] for e in events] == ["disk_started", "disk_finished"]
    assert (events[0]["method"], events[0]["total"]) == ("verify", SIZE)
    assert (events[1]["disk"], events[1]["read"]) == (f"web1/{FIRST}/xvda", SIZE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sample", "5"], "--sample: '5' is not a percentage"),
        (["--sample", "0%"], "--sample: '0%' of the blocks are none"),
        (["--older-than", "30"], "--older-than: '30' is not a duration"),
        (["-n"], "-n is for --repair"),
    ],
)
def test_mistakes(store: Store, cbtfs: Program, arguments: list[str], sentence: str) -> None:
    result = cbtfs("verify", *arguments)

    assert (result.status, result.out) == (2, "")
    assert sentence in result.err
