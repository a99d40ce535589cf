"""Leftovers: only what a dead run of ours left is chosen, and all of that is.

``contrib/soak/foreign-pools N`` looks at N random pools.
"""

import os
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from cbtfs import leftovers
from cbtfs.inventory import read_owner
from cbtfs.leftovers import Findings, Folder, Kind, Partial, Shelf, Thing, Wish
from cbtfs.owner import Owned

from .foreignpools import ALIVE, DEAD, ELSEWHERE, HOST, NOW, POOL, STORE, Fantasy, judge

POOLS = int(os.environ.get("CBTFS_POOLS", "300"))

pytestmark = pytest.mark.timeout(60 + POOLS // 10)


def found(fantasy: Fantasy, *, shelf: Shelf | None) -> Findings:
    return leftovers.decide(
        fantasy.inventory(), shelf, tuple(fantasy.tasks), judge=judge(), wish=fantasy.wish
    )


def names(things: tuple[Thing, ...]) -> list[str]:
    stored = {Kind.PARTIAL, Kind.REMOVED}
    return [thing.name if thing.kind in stored else thing.ref for thing in things]


@settings(max_examples=POOLS, deadline=None)
@given(st.integers(min_value=0, max_value=1 << 64))
def test_of_a_random_pool_exactly_the_leftovers_are_chosen(seed: int) -> None:
    fantasy = Fantasy(random.Random(seed)).fill()

    findings = found(fantasy, shelf=fantasy.shelf())

    chosen = names(findings.remove)
    assert len(chosen) == len(set(chosen))
    assert set(chosen) == fantasy.doomed
    assert not set(chosen) & set(names(findings.left))
    assert [list(Kind).index(t.kind) for t in findings.remove] == sorted(
        list(Kind).index(t.kind) for t in findings.remove
    )


@settings(max_examples=POOLS // 3, deadline=None)
@given(st.integers(min_value=0, max_value=1 << 64))
def test_without_a_store_no_base_is_chosen(seed: int) -> None:
    fantasy = Fantasy(random.Random(seed)).fill()

    findings = found(fantasy, shelf=None)

    assert set(names(findings.remove)) <= fantasy.doomed
    for thing in findings.remove:
        vdi = fantasy.vdis.get(thing.ref)
        tag = read_owner(vdi.other_config, vdi.uuid) if vdi else None
        assert tag is None or tag.role in {"live", "restored"}
        assert thing.kind not in {Kind.VM, Kind.PARTIAL, Kind.REMOVED}


@settings(max_examples=POOLS // 3, deadline=None)
@given(st.integers(min_value=0, max_value=1 << 64))
def test_without_a_pool_only_what_never_asked_it_for_anything_goes(seed: int) -> None:
    fantasy = Fantasy(random.Random(seed)).fill()

    findings = leftovers.decide(
        None, fantasy.shelf(), judge=judge(), wish=Wish(partial=True, now=NOW)
    )

    partials = {
        f"{folder.label}/{partial.time}": partial
        for folder in fantasy.folders.values()
        for partial in folder.partials
    }
    for thing in findings.remove:
        assert thing.kind in {Kind.PARTIAL, Kind.REMOVED}
        assert thing.kind is Kind.REMOVED or partials[thing.name].maker is None


def test_random_pools_have_what_the_test_is_about() -> None:
    fantasies = [Fantasy(random.Random(seed)).fill() for seed in range(200)]
    kinds = {t.kind for f in fantasies for t in found(f, shelf=f.shelf()).remove}
    reasons = {t.why for f in fantasies for t in found(f, shelf=f.shelf()).left}

    assert kinds == set(Kind)
    for part in ("is at work", "made on backup2", "another store", "cannot be read", "goes on"):
        assert any(part in reason for reason in reasons), part


# ── partial points ──

TIME = "20261122T010000Z"
MAKER = Owned(self_uuid="", role="base", host=HOST, pid=DEAD)
RESUMABLE = Partial(TIME, maker=MAKER, pool_uuid=POOL, resumable=True)


def fate(partial: Partial, *, wish: Wish | None = None, target: str = "v") -> str:
    """Return why a partial point stays, "" if it goes."""
    shelf = Shelf(STORE, {"key": Folder("web1", target, partials=(partial,))})
    pool = Fantasy(random.Random(1)).inventory()
    findings = leftovers.decide(pool, shelf, judge=judge(), wish=wish or Wish(now=NOW))
    (thing,) = (*findings.remove, *findings.left)
    assert thing.name == f"web1/{TIME}"
    return thing.why if findings.left else ""


@pytest.mark.parametrize(
    ("partial", "why"),
    [
        (RESUMABLE, "the next sync goes on from there"),
        (replace(RESUMABLE, resumable=False), ""),
        (replace(RESUMABLE, resumable=None), "the pool has to be asked first"),
        (replace(RESUMABLE, maker=None), ""),
        (replace(RESUMABLE, pool_uuid="9002"), "of another pool, 9002"),
        (replace(RESUMABLE, maker=Owned(self_uuid="", role="", host=HOST, pid=ALIVE)), "at work"),
        (replace(RESUMABLE, maker=Owned(self_uuid="", role="", host=ELSEWHERE)), "--host backup2"),
    ],
)
def test_what_becomes_of_a_partial_point(partial: Partial, why: str) -> None:
    told = fate(partial)

    assert bool(told) == bool(why)
    assert why in told


@pytest.mark.parametrize(
    ("wish", "goes"),
    [
        (Wish(partial=True, now=NOW), True),
        (Wish(partial=True, older_than=3600, now=NOW), True),
        (Wish(partial=True, older_than=3601, now=NOW), False),
        (Wish(now=NOW), False),
    ],
)
def test_what_could_be_gone_on_with_goes_only_if_asked_for(wish: Wish, *, goes: bool) -> None:
    assert (fate(RESUMABLE, wish=wish) == "") == goes


def test_of_a_vm_that_is_nowhere_a_partial_point_goes_only_if_its_pool_is_known() -> None:
    assert fate(RESUMABLE, target="") == ""
    assert "not on record" in fate(replace(RESUMABLE, pool_uuid=""), target="")


def test_a_snapshot_that_a_partial_point_goes_on_from_is_not_removed_by_name() -> None:
    kept = replace(RESUMABLE, snapshots=("cbtfs new",))
    older = replace(RESUMABLE, time="20261121T010000Z", resumable=False,
                    snapshots=("cbtfs old", "cbtfs new"))  # fmt: skip
    shelf = Shelf(STORE, {"key": Folder("web1", "v", partials=(older, kept))})
    pool = Fantasy(random.Random(1)).inventory()

    findings = leftovers.decide(pool, shelf, judge=judge(), wish=Wish(now=NOW))

    assert [thing.snapshots for thing in findings.remove] == [("cbtfs old",)]
