"""A replica that took in events is what a fresh look at the pool gives."""

import json
from collections.abc import Mapping

import pytest
from hypothesis import given, settings, strategies as st

from cbtfs import errors, inventory, rawrecords
from cbtfs.inventory import CLASSES, Inventory
from cbtfs.replica import Batch, Event, Replica

Fields = dict[str, object]
World = dict[str, dict[str, Fields]]


def uuid(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


def a_world(**classes: dict[str, Fields]) -> World:
    """The records of a pool by class and reference; it has a pool record."""
    world: World = {name: {} for name in CLASSES}
    world["pool"]["p"] = {"uuid": uuid(999)}
    return world | classes


def event(operation: str, kind: str, ref: str, fields: Fields | None = None) -> Event:
    return Event(
        kind.lower(), operation, ref, b"" if fields is None else json.dumps(fields).encode()
    )


def dump(world: Mapping[str, Mapping[str, Fields]]) -> Batch:
    tables = {name: json.dumps(world[name]).encode() for name in CLASSES}
    return Batch([], tables={name: rawrecords.READERS[name](tables[name]) for name in CLASSES})


def fresh(world: Mapping[str, Mapping[str, Fields]]) -> Inventory:
    return inventory.parse({name: json.dumps(world[name]).encode() for name in CLASSES})


@pytest.fixture
def world() -> World:
    vdis: dict[str, Fields] = {
        "d1": {"uuid": uuid(1), "name_label": "one"},
        "d2": {"uuid": uuid(2), "name_label": "two"},
    }
    return a_world(VDI=vdis)


@pytest.fixture
def replica(world: World) -> Replica:
    replica = Replica()
    replica.apply(dump(world))
    return replica


# ── Equal to a fresh parse ───────────────────────────────────────────────────────────────────────

REFS = ["r1", "r2", "r3", "OpaqueRef:NULL", ""]
UUIDS = st.sampled_from([uuid(1), uuid(2), uuid(3), uuid(0xAB).upper(), "../etc", ""])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "uuid": UUIDS,
        "name_label": st.sampled_from(["a", "b", "\ud800", "latest"]),
        "SR": st.sampled_from(REFS),
        "VDI": st.sampled_from(REFS),
        "VM": st.sampled_from(REFS),
        "host": st.sampled_from(REFS),
        "snapshot_of": st.sampled_from(REFS),
        "is_a_snapshot": st.booleans(),
        "currently_attached": st.booleans(),
        "type": st.sampled_from(["lvm", "ext", "user"]),
        "VBDs": st.lists(st.sampled_from(REFS), max_size=3),
    },
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from([name for name in CLASSES if name != "pool"]),
        st.sampled_from(REFS),
        st.none() | FIELDS,
    ),
    max_size=30,
)
SM: dict[str, Fields] = {"s": {"type": "lvm", "features": {"VDI_CONFIG_CBT": 1}}}


@settings(max_examples=200, deadline=None)
@given(changes=CHANGES, cuts=st.sets(st.integers(0, 30)))
def test_events_lead_where_a_fresh_look_does(
    changes: list[tuple[str, str, Fields | None]], cuts: set[int]
) -> None:
    world = a_world(SM=dict(SM))
    replica = Replica()
    replica.apply(dump(world))
    batch: list[Event] = []
    for number, (name, ref, fields) in enumerate(changes):
        if fields is None:
            world[name].pop(ref, None)
            batch.append(event("del", name, ref))
        else:
            batch.append(event("mod" if ref in world[name] else "add", name, ref, fields))
            world[name][ref] = fields
        if number in cuts:  # whatever is remembered of this state must not show in the next
            replica.apply(Batch(batch))
            replica.inventory()
            batch = []
    replica.apply(Batch(batch))

    found = replica.inventory()

    assert found == fresh(world)
    assert list(found.vdis) == list(fresh(world).vdis)


# ── Each rule ────────────────────────────────────────────────────────────────────────────────────


def test_what_did_not_change_is_the_same_object(replica: Replica) -> None:
    before = replica.inventory()

    replica.apply(Batch([event("mod", "VDI", "d2", {"uuid": uuid(2), "name_label": "new"})]))

    after = replica.inventory()
    assert after.vdis["d1"] is before.vdis["d1"]
    assert after.vdis["d2"].name == "new"


def test_an_event_that_says_nothing_new_is_no_change(replica: Replica, world: World) -> None:
    assert not replica.apply(Batch([event("mod", "VDI", "d1", world["VDI"]["d1"])]))
    assert not replica.apply(Batch([event("del", "VDI", "unheard of")]))
    assert not replica.apply(dump(world))


def test_classes_that_are_of_no_interest_are_ignored(replica: Replica) -> None:
    assert not replica.apply(Batch([Event("task", "add", "t", b"rubbish")]))


def test_what_a_complete_batch_lacks_is_gone(replica: Replica, world: World) -> None:
    del world["VDI"]["d1"]

    assert replica.apply(dump(world))

    assert set(replica.inventory().vdis) == {"d2"}


@pytest.mark.parametrize("record", [b"", b"{", b'{"virtual_size": "7"}', b"[]"])
def test_a_record_that_is_none_changes_nothing(replica: Replica, record: bytes) -> None:
    before = replica.inventory()

    with pytest.raises(errors.PoolError, match="VDI"):
        replica.apply(Batch([event("del", "VDI", "d1"), Event("vdi", "mod", "d2", record)]))

    assert replica.inventory() == before


def test_a_pool_without_pool_is_refused(replica: Replica) -> None:
    replica.apply(Batch([event("del", "pool", "p")]))

    with pytest.raises(errors.PoolError, match="no pool record"):
        replica.inventory()


@pytest.mark.parametrize(
    ("counts", "missed"),
    [
        ({}, False),
        ({"vdi": 2}, False),
        ({"vdi": 1}, True),
        ({"vdi": 3}, True),
        ({"task": 7}, False),
    ],
)
def test_a_missed_event_shows_in_the_counts(
    replica: Replica, counts: dict[str, int], *, missed: bool
) -> None:
    assert replica.lacks(Batch([], counts=counts)) is missed
