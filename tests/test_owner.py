"""Only an object whose own tag it is counts as ours."""

import pytest
from hypothesis import given, strategies as st

from cbtfs import owner
from cbtfs.owner import Block, Owned

OWNED = Owned(
    self_uuid="u1",
    role="base",
    store="s",
    vm="v",
    point="20261122T020000Z",
    host="backup1",
    pid=42,
    boot="b",
    starttime=7,
)


def test_a_tag_is_read_as_it_was_written() -> None:
    other_config = {"k": "v", owner.TAG_OWNER: owner.write_owner(OWNED)}

    assert owner.read_owner(other_config, "u1") == OWNED


def test_the_form_is_documented_json() -> None:
    assert owner.write_owner(Owned(self_uuid="u1", role="live")) == (
        '{"self":"u1","role":"live","store":"","vm":"","point":"","host":"","pid":0,"boot":"","starttime":0}'
    )


def test_a_copied_tag_counts_for_nothing() -> None:
    assert owner.read_owner({owner.TAG_OWNER: owner.write_owner(OWNED)}, "u2") is None


@pytest.mark.parametrize(
    "value",
    ["", "null", "[]", "{}", '{"self":"u1"}', '{"self":7,"role":"base"}', "\ud800", "[" * 100_000],
)
def test_another_value_is_no_tag(value: str) -> None:
    assert owner.read_owner({owner.TAG_OWNER: value}, "u1") is None


def test_no_tag_is_no_tag() -> None:
    assert owner.read_owner({}, "u1") is None


def test_an_object_without_uuid_is_nobodys() -> None:
    blank = owner.write_owner(Owned(self_uuid="", role="base"))

    assert owner.read_owner({owner.TAG_OWNER: blank}, "") is None


@given(st.text(alphabet=st.characters(categories=None)))
def test_any_value_can_be_asked(value: str) -> None:
    assert owner.read_owner({owner.TAG_OWNER: value}, "u1") is None
    assert owner.read_task(value) is None


def test_a_task_is_known_by_its_description() -> None:
    made = Owned(self_uuid="", role=owner.TASK, host="h", pid=7)

    assert owner.read_task(owner.write_owner(made)) == made
    assert owner.read_task(owner.write_owner(OWNED)) is None


def test_a_run_is_known_by_the_name_of_its_snapshot() -> None:
    name = owner.run_name("20261122T020000Z", "0123456789abcdef")

    assert name == "cbtfs 20261122T020000Z 0123456789abcdef"
    assert owner.time_of_run(name) == "20261122T020000Z"


@pytest.mark.parametrize(
    "name",
    ["", "nightly", "cbtfs", "cbtfs 20261122T020000Z", "cbtfs 20261122T020000Z 0123456789ABCDEF"],
)
def test_other_snapshots_are_of_no_run(name: str) -> None:
    assert owner.time_of_run(name) == ""


# ── what a restore makes ─────────────────────────────────────────────────────────────────────

RUN = owner.run_name("20261122T020000Z", "0123456789abcdef")


def restored(bound: str) -> dict[str, str]:
    """Return an ``other_config`` with the tag of what is not finished."""
    return {owner.TAG_OWNER: owner.write_owner(Owned(self_uuid=bound, role="restored"))}


def test_what_has_no_uuid_yet_is_bound_to_the_name_of_its_run() -> None:
    assert owner.read_unfinished(restored(RUN), uuid="u1", name=RUN) is not None
    assert owner.read_unfinished(restored("u1"), uuid="u1", name=RUN) is not None
    assert owner.read_unfinished(restored("u1"), uuid="u1", name="any") is not None


@pytest.mark.parametrize(("bound", "name"), [(RUN, "other"), ("n", "n"), ("u2", RUN), ("", "")])
def test_another_name_or_uuid_is_another_object(bound: str, name: str) -> None:
    assert owner.read_unfinished(restored(bound), uuid="u1", name=name) is None


def test_only_a_restore_leaves_something_unfinished() -> None:
    other_config = {owner.TAG_OWNER: owner.write_owner(Owned(self_uuid=RUN, role="live"))}

    assert owner.read_unfinished(other_config, uuid="u1", name=RUN) is None


# ── what keeps a VM from starting ────────────────────────────────────────────────────────────


@given(st.text(), st.text())
def test_a_block_is_read_after_any_sentence(sentence: str, snapshot: str) -> None:
    block = Block(self_uuid="u1", role=owner.RESTORING, pid=7, snapshot=snapshot)
    reason = owner.write_block(sentence, block)

    assert reason.startswith(sentence)
    for key in owner.BLOCKED:
        assert owner.read_block({"destroy": "true", key: reason}, "u1") == block
    assert owner.read_block({"start": reason}, "u2") is None
    assert owner.read_block({"pause": reason}, "u1") is None


@given(st.text(alphabet=st.characters(categories=None)))
def test_any_reason_can_be_asked(reason: str) -> None:
    assert owner.read_block({"start": reason}, "u1") is None
    assert not owner.is_block(reason)
