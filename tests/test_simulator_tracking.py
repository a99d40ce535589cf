"""Change tracking of the simulated pool, against a model that knows nothing of logs."""

import base64
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from .smallpool import BLOCK, Failed, Json, MiB, SmallPool

UNRELATED = [
    "",
    (
        "Failed to calculate changed blocks for given VDIs."
        " [opterr=Source and target VDI are unrelated]"
    ),
    "",
]
SAME = [
    "",
    "Failed to calculate changed blocks for given VDIs. [opterr=Source and target VDI are same]",
    "",
]
INCONSISTENT = [
    "",
    "Changed block tracking log is in an inconsistent state. [opterr=Inconsistent bitmaps]",
    "",
]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallPool]:
    pool = SmallPool(tmp_path)
    yield pool
    pool.pool.close()


def test_bitmap_has_the_first_block_in_the_highest_bit(small: SmallPool) -> None:
    base = small.snapshot(small.data)
    small.write(small.data, 0, 3, 17)

    text = small.client.text("VDI.list_changed_blocks", base, small.snapshot(small.data))

    bitmap = base64.b64decode(text, validate=True)
    assert bitmap[:3] == bytes([0b1001_0000, 0, 0b0100_0000])
    assert not any(bitmap[3:])
    assert "\n" not in text


@pytest.mark.parametrize(
    ("size", "length"), [(32 * MiB, 64), (65536 * 8, 1), (65536 * 8 + 512, 2), (512, 1)]
)
def test_bitmap_is_as_long_as_the_newer_disk_needs(
    small: SmallPool, size: int, length: int
) -> None:
    vdi = small.builder.add_vdi(small.odd, "odd", size=size, cbt=True)
    base = small.snapshot(vdi)

    text = small.client.text("VDI.list_changed_blocks", base, small.snapshot(vdi))

    assert len(base64.b64decode(text)) == length


def test_last_partial_block_has_a_bit(small: SmallPool) -> None:
    vdi = small.builder.add_vdi(small.odd, "odd", size=3 * BLOCK + 512, cbt=True)
    base = small.snapshot(vdi)
    small.disk(vdi).write(3 * BLOCK, b"x" * 512)

    assert small.client.changed(base, small.snapshot(vdi)) == {3}


def test_nothing_written_is_all_zero(small: SmallPool) -> None:
    base = small.snapshot(small.root)

    assert small.client.changed(base, small.snapshot(small.root)) == set()


def test_an_identical_rewrite_sets_bits(small: SmallPool) -> None:
    small.write(small.root, 5)
    base = small.snapshot(small.root)
    small.write(small.root, 5)

    assert small.client.changed(base, small.snapshot(small.root)) == {5}


def test_a_discard_sets_no_bits_though_contents_change(small: SmallPool) -> None:
    small.write(small.root, 5)
    base = small.snapshot(small.root)
    small.disk(small.root).discard(5 * BLOCK, BLOCK)
    newer = small.snapshot(small.root)

    assert small.client.changed(base, newer) == set()
    assert small.disk(newer).pread(5 * BLOCK, BLOCK) == bytes(BLOCK)
    assert small.disk(base).pread(5 * BLOCK + 17, 1) == b"!"


def test_logs_from_after_the_older_to_with_the_newer_are_ored(small: SmallPool) -> None:
    small.write(small.root, 1)
    first = small.snapshot(small.root)
    small.write(small.root, 2)
    second = small.snapshot(small.root)
    small.write(small.root, 3)
    third = small.snapshot(small.root)

    assert small.client.changed(first, second) == {2}
    assert small.client.changed(second, third) == {3}
    assert small.client.changed(first, third) == {2, 3}


def test_the_live_disk_of_a_halted_vm_can_be_the_newer(small: SmallPool) -> None:
    base = small.snapshot(small.idle_disk)
    small.write(small.idle_disk, 9)

    assert small.client.changed(base, small.idle_disk) == {9}


def test_the_live_disk_of_a_running_vm_is_in_use(small: SmallPool) -> None:
    base = small.snapshot(small.root)

    with pytest.raises(Failed) as failed:
        small.client.changed(base, small.root)

    assert failed.value.code == "VDI_IN_USE"
    assert failed.value.params == [small.root, "list_changed_blocks"]


def expect(small: SmallPool, older: str, newer: str, code: str, params: list[str]) -> None:
    with pytest.raises(Failed) as failed:
        small.client.changed(older, newer)
    assert failed.value.code == code
    assert failed.value.params == params


def test_the_wrong_way_round_is_unrelated(small: SmallPool) -> None:
    older, newer = small.snapshot(small.root), small.snapshot(small.root)

    expect(small, newer, older, "SR_BACKEND_FAILURE_460", UNRELATED)


def test_the_same_vdi_twice_is_the_same(small: SmallPool) -> None:
    one = small.snapshot(small.root)

    expect(small, one, one, "SR_BACKEND_FAILURE_460", SAME)


def test_snapshots_of_different_disks_are_unrelated(small: SmallPool) -> None:
    one, other = small.snapshot(small.root), small.snapshot(small.data)

    expect(small, one, other, "SR_BACKEND_FAILURE_460", UNRELATED)


def test_a_snapshot_from_before_tracking_is_unrelated(small: SmallPool) -> None:
    vdi = small.builder.add_vdi(small.shared, "late", size=8 * MiB)
    before = small.snapshot(vdi)
    small.client.call("VDI.enable_cbt", vdi)

    expect(small, before, small.snapshot(vdi), "SR_BACKEND_FAILURE_460", UNRELATED)


def test_disable_and_enable_break_the_chain_though_both_ends_say_enabled(small: SmallPool) -> None:
    before = small.snapshot(small.root)
    small.client.call("VDI.disable_cbt", small.root)
    small.client.call("VDI.enable_cbt", small.root)
    after = small.snapshot(small.root)

    assert small.client.call("VDI.get_cbt_enabled", before) is True
    assert small.client.call("VDI.get_cbt_enabled", after) is True
    expect(small, before, after, "SR_BACKEND_FAILURE_460", UNRELATED)


def test_nothing_older_reaches_a_live_disk_tracked_anew(small: SmallPool) -> None:
    before = small.snapshot(small.idle_disk)
    small.write(small.idle_disk, 5)
    small.client.call("VDI.disable_cbt", small.idle_disk)
    small.client.call("VDI.enable_cbt", small.idle_disk)

    expect(small, before, small.idle_disk, "SR_BACKEND_FAILURE_460", UNRELATED)


def test_snapshots_keep_their_logs_when_tracking_goes_off(small: SmallPool) -> None:
    first = small.snapshot(small.root)
    small.write(small.root, 7)
    second = small.snapshot(small.root)
    small.client.call("VDI.disable_cbt", small.root)

    assert small.client.changed(first, second) == {7}


def test_destroying_an_intermediate_snapshot_keeps_its_bits(small: SmallPool) -> None:
    first = small.snapshot(small.root)
    small.write(small.root, 2)
    second = small.snapshot(small.root)
    small.write(small.root, 3)
    third = small.snapshot(small.root)
    small.client.call("VDI.destroy", second)

    assert small.client.changed(first, third) == {2, 3}


def test_data_destroy_of_both_ends_changes_nothing(small: SmallPool) -> None:
    first = small.snapshot(small.root)
    small.write(small.root, 2)
    second = small.snapshot(small.root)
    for vdi in (first, second):
        small.client.call("VDI.data_destroy", vdi)

    assert small.client.changed(first, second) == {2}


def test_scan_breaks_nothing_but_the_size_of_metadata(small: SmallPool) -> None:
    first = small.snapshot(small.root)
    small.write(small.root, 2)
    second = small.snapshot(small.root)
    small.client.call("VDI.data_destroy", first)
    small.client.call("SR.scan", small.shared)

    assert small.client.changed(first, second) == {2}
    assert small.client.call("VDI.get_virtual_size", first) == 4 * MiB


def test_a_grown_area_has_zero_bits_until_it_is_written(small: SmallPool) -> None:
    base = small.snapshot(small.idle_disk)
    small.client.call("VDI.resize", small.idle_disk, 32 * MiB)
    small.write(small.idle_disk, 16 * 16 + 1)
    newer = small.snapshot(small.idle_disk)

    assert small.client.changed(base, newer) == {257}
    text = small.client.text("VDI.list_changed_blocks", base, newer)
    assert len(base64.b64decode(text)) == 64


def test_older_logs_are_extended_when_a_disk_grows_between(small: SmallPool) -> None:
    base = small.snapshot(small.idle_disk)
    small.write(small.idle_disk, 1)
    small.snapshot(small.idle_disk)
    small.client.call("VDI.resize", small.idle_disk, 32 * MiB)
    small.write(small.idle_disk, 300)

    assert small.client.changed(base, small.snapshot(small.idle_disk)) == {1, 300}


def test_growth_too_small_for_a_longer_bitmap_is_inconsistent(small: SmallPool) -> None:
    vdi = small.builder.add_vdi(small.odd, "odd", size=MiB + 512, cbt=True)
    base = small.snapshot(vdi)
    small.snapshot(vdi)
    small.client.call("VDI.resize", vdi, MiB + 1024)

    expect(small, base, small.snapshot(vdi), "SR_BACKEND_FAILURE_459", INCONSISTENT)


def test_a_failed_resize_of_the_log_switches_tracking_off_with_a_message(small: SmallPool) -> None:
    small.pool.faults.set("cbt.resize_fail", "*")
    small.client.call("VDI.resize", small.idle_disk, 32 * MiB)

    assert small.client.call("VDI.get_cbt_enabled", small.idle_disk) is False
    assert messages(small) == [("VDI_CBT_RESIZE_FAILED", "VDI", small.uuid(small.idle_disk))]


def test_a_failed_log_leaves_the_snapshot_and_switches_tracking_off(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    small.pool.faults.set("cbt.snapshot_fail", small.uuid(small.root))
    taken = small.snapshot(small.root)

    assert small.client.call("VDI.get_cbt_enabled", taken) is False
    assert small.client.call("VDI.get_cbt_enabled", small.root) is False
    assert messages(small) == [("VDI_CBT_SNAPSHOT_FAILED", "VDI", small.uuid(small.root))]
    expect(small, base, taken, "SR_BACKEND_FAILURE_460", UNRELATED)


def messages(small: SmallPool) -> list[tuple[str, str, str]]:
    found = small.client.call("message.get_all_records")
    assert isinstance(found, dict)
    records = [record for record in found.values() if isinstance(record, dict)]
    assert all(record["priority"] == 3 for record in records)
    return [(str(r["name"]), str(r["cls"]), str(r["obj_uuid"])) for r in records]


@pytest.mark.parametrize(("command", "name"), [("crash-vm", "web1"), ("crash-host", "xcp1")])
def test_a_crash_switches_tracking_off_at_the_next_start(
    small: SmallPool, command: str, name: str
) -> None:
    base = small.snapshot(small.root)
    small.pool.control(command, name)
    assert small.client.call("VDI.get_cbt_enabled", small.root) is True

    small.client.call("VM.start", small.web1, False, False)

    assert small.client.call("VDI.get_cbt_enabled", small.root) is False
    assert ("VDI_CBT_METADATA_INCONSISTENT", "VDI", small.uuid(small.root)) in messages(small)
    expect(small, base, small.snapshot(small.root), "SR_BACKEND_FAILURE_460", UNRELATED)


def test_a_snapshot_between_crash_and_start_hides_lost_bits(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    small.write(small.root, 4)
    small.pool.control("crash-vm", "web1")
    after = small.snapshot(small.root)
    small.client.call("VM.start", small.web1)

    assert small.client.changed(base, after) == set()
    assert small.disk(after).pread(4 * BLOCK + 17, 1) == b"!"


@pytest.mark.parametrize("method", ["VM.clean_shutdown", "VM.hard_shutdown", "VM.hard_reboot"])
def test_a_shutdown_or_reboot_keeps_the_chain(small: SmallPool, method: str) -> None:
    base = small.snapshot(small.root)
    small.write(small.root, 4)
    small.client.call(method, small.web1)
    if method != "VM.hard_reboot":
        small.client.call("VM.start", small.web1, False, False)
    small.write(small.root, 6)

    assert small.client.changed(base, small.snapshot(small.root)) == {4, 6}


def test_migration_within_an_sr_keeps_the_chain(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    small.write(small.root, 4)
    small.client.call("VM.pool_migrate", small.web1, small.host2, {})
    small.write(small.root, 6)

    assert small.client.changed(base, small.snapshot(small.root)) == {4, 6}


def test_storage_migration_is_refused(small: SmallPool) -> None:
    refused: list[tuple[str, tuple[Json, ...]]] = [
        ("VDI.pool_migrate", (small.idle_disk, small.local, {})),
        ("VM.migrate_send", (small.idle, {}, True, {}, {}, {})),
    ]
    for method, params in refused:
        with pytest.raises(Failed) as failed:
            small.client.call(method, *params)
        assert (failed.value.code, failed.value.params) == ("VDI_CBT_ENABLED", [small.idle_disk])


def test_storage_migration_makes_a_new_untracked_disk_of_the_same_contents(
    small: SmallPool,
) -> None:
    small.write(small.idle_disk, 3)
    base = small.snapshot(small.idle_disk)
    content = small.disk(small.idle_disk).pread(0, 16 * MiB)
    uuid = small.uuid(small.idle_disk)
    small.client.call("VDI.disable_cbt", small.idle_disk)

    moved = small.client.text("VDI.pool_migrate", small.idle_disk, small.odd, {})

    assert small.uuid(moved) != uuid
    assert small.client.call("VDI.get_SR", moved) == small.odd
    assert small.client.call("VDI.get_cbt_enabled", moved) is False
    assert small.disk(moved).pread(0, 16 * MiB) == content
    (vbd,) = small.client.texts("VM.get_VBDs", small.idle)
    assert small.client.call("VBD.get_VDI", vbd) == moved
    with pytest.raises(Failed, match="HANDLE_INVALID"):
        small.client.call("VDI.get_record", small.idle_disk)
    small.client.call("VDI.enable_cbt", moved)
    with pytest.raises(Failed, match=r"INTERNAL_ERROR.*No_VDI"):
        small.client.call("VDI.list_changed_blocks", base, small.snapshot(moved))


@pytest.mark.parametrize("method", ["VDI.clone", "VDI.copy"])
def test_a_copy_is_not_tracked_and_leaves_the_source_alone(small: SmallPool, method: str) -> None:
    base = small.snapshot(small.idle_disk)
    small.write(small.idle_disk, 3)
    more: tuple[Json, ...] = (
        (small.local, "OpaqueRef:NULL", "OpaqueRef:NULL") if method == "VDI.copy" else ({},)
    )
    made = small.client.text(method, small.idle_disk, *more)

    assert small.client.call("VDI.get_cbt_enabled", made) is False
    assert small.disk(made).pread(0, 16 * MiB) == small.disk(small.idle_disk).pread(0, 16 * MiB)
    assert small.client.changed(base, small.snapshot(small.idle_disk)) == {3}


def test_revert_gives_a_new_disk_repoints_snapshots_and_breaks_the_chain(small: SmallPool) -> None:
    older = small.snapshot(small.root)
    taken = small.client.text("VM.snapshot", small.web1, "before")
    small.write(small.root, 3)

    small.client.call("VM.revert", taken)

    vbd = small.client.texts("VM.get_VBDs", small.web1)[0]
    live = small.client.text("VBD.get_VDI", vbd)
    assert live != small.root
    assert small.client.call("VDI.get_cbt_enabled", live) is False
    assert small.client.call("VDI.get_snapshot_of", older) == live
    with pytest.raises(Failed, match="HANDLE_INVALID"):
        small.client.call("VDI.get_record", small.root)
    assert small.disk(live).pread(3 * BLOCK + 17, 1) == b"\0"
    small.client.call("VDI.enable_cbt", live)
    expect(small, older, small.snapshot(live), "SR_BACKEND_FAILURE_460", UNRELATED)


def test_a_destroyed_older_end_is_an_invalid_handle(small: SmallPool) -> None:
    base, newer = small.snapshot(small.root), small.snapshot(small.root)
    small.client.call("VDI.destroy", base)

    expect(small, base, newer, "HANDLE_INVALID", ["VDI", base])


def test_ends_on_different_srs_are_an_internal_error(small: SmallPool) -> None:
    other = small.builder.add_vdi(small.local, "other", size=8 * MiB, cbt=True)

    with pytest.raises(Failed, match=r"INTERNAL_ERROR.*No_VDI"):
        small.client.changed(small.snapshot(small.root), small.snapshot(other))


def test_an_export_blocks_the_newer_end_only(small: SmallPool) -> None:
    base, newer = small.snapshot(small.root), small.snapshot(small.root)
    with small.pool.open_export(small.host2, small.export(base)):
        assert small.client.changed(base, newer) == set()
    with small.pool.open_export(small.host2, small.export(newer)):
        expect(small, base, newer, "VDI_IN_USE", [newer, "list_changed_blocks"])

    assert small.client.changed(base, newer) == set()


def test_a_checkpoint_does_not_block(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    taken = small.client.text("VM.checkpoint", small.web1, "with memory")
    vbd = small.client.texts("VM.get_VBDs", taken)[0]

    assert small.client.call("VBD.get_currently_attached", vbd) is True
    assert small.client.changed(base, small.client.text("VBD.get_VDI", vbd)) == set()


def test_bits_can_be_dropped_and_bitmaps_garbled_on_request(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    small.write(small.root, 1, 2, 3)
    newer = small.snapshot(small.root)

    small.pool.faults.set("cbt.drop_bits", "2")
    assert small.client.changed(base, newer) == {3}
    small.pool.faults.set("cbt.drop_bits", "")
    lengths = {}
    for how in ("short", "long"):
        small.pool.faults.set("cbt.garble", how)
        text = small.client.text("VDI.list_changed_blocks", base, newer)
        lengths[how] = len(base64.b64decode(text, validate=True))
    assert lengths["short"] < 128 < lengths["long"]
    small.pool.faults.set("cbt.garble", "base64")
    with pytest.raises(ValueError, match=r"base64|padding"):
        small.client.changed(base, newer)


def test_the_pools_own_log_is_there_for_tests(small: SmallPool) -> None:
    base = small.snapshot(small.root)
    small.write(small.root, 1, 2, 9)
    newer = small.snapshot(small.root)

    assert small.pool.control("changed-log", small.uuid(base), small.uuid(newer)) == {
        "size": 64 * MiB,
        "extents": [[BLOCK, 3 * BLOCK], [9 * BLOCK, 10 * BLOCK]],
        "bytes": 3 * BLOCK,
    }


WRITTEN = 3 * MiB  # beyond what the rules write


class History(RuleBasedStateMachine):
    """Random lives of a disk; the model keeps a set of blocks for each span between snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.small = SmallPool(self.directory)
        self.vdi = self.small.idle_disk
        self.contents = bytearray(16 * MiB)
        self.snapshots: list[str] = []
        self.images: dict[str, bytes] = {}
        self.spans: list[set[int] | None] = []  # None: the chain is broken before this one
        self.since: set[int] | None = set()
        self.fill = 0

    def teardown(self) -> None:
        self.small.pool.close()
        shutil.rmtree(self.directory)

    @rule(offset=st.integers(0, 2 * MiB - 1), length=st.integers(1, 300_000))
    def write(self, offset: int, length: int) -> None:
        self.fill = self.fill % 255 + 1
        data = bytes([self.fill]) * length
        self.small.disk(self.vdi).write(offset, data)
        self.contents[offset : offset + length] = data
        if self.since is not None:
            self.since |= set(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    @rule()
    def snapshot(self) -> None:
        taken = self.small.snapshot(self.vdi)
        self.snapshots.append(taken)
        self.images[taken] = bytes(self.contents[:WRITTEN])
        self.spans.append(self.since)
        enabled = self.small.client.call("VDI.get_cbt_enabled", self.vdi)
        self.since = set() if enabled else None

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def destroy(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.snapshots) - 1))
        self.small.client.call("VDI.destroy", self.snapshots.pop(index))
        span = self.spans.pop(index)
        newer = self.spans[index] if index < len(self.spans) else self.since
        merged = None if span is None or newer is None else span | newer
        if index < len(self.spans):
            self.spans[index] = merged
        elif self.since is not None:
            self.since = merged

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def data_destroy(self, data: st.DataObject) -> None:
        taken = data.draw(st.sampled_from(self.snapshots))
        if self.small.client.call("VDI.get_cbt_enabled", taken):
            self.small.client.call("VDI.data_destroy", taken)
            self.images.pop(taken, None)

    @rule()
    def lose_tracking(self) -> None:
        self.small.client.call("VDI.disable_cbt", self.vdi)
        self.since = None

    @rule()
    def track_again(self) -> None:
        self.small.client.call("VDI.enable_cbt", self.vdi)

    @rule()
    def grow(self) -> None:
        size = len(self.contents) + 2 * MiB
        self.small.client.call("VDI.resize", self.vdi, size)
        self.contents += bytes(2 * MiB)

    @invariant()
    def changes_are_what_the_model_says(self) -> None:
        newest = len(self.snapshots) - 1
        for older, newer in {(newest - 1, newest), (0, newest)}:
            if not 0 <= older < newer:
                continue
            spans = self.spans[older + 1 : newer + 1]
            asked = (self.snapshots[older], self.snapshots[newer])
            if None in spans:
                with pytest.raises(Failed, match="SR_BACKEND_FAILURE_460"):
                    self.small.client.changed(*asked)
            else:
                wanted = {block for span in spans for block in span or ()}
                assert self.small.client.changed(*asked) == wanted

    @invariant()
    def contents_are_what_was_written(self) -> None:
        live = self.small.disk(self.vdi)
        assert live.size == len(self.contents)
        assert live.pread(0, WRITTEN) == self.contents[:WRITTEN]
        for taken, image in self.images.items():
            if taken in self.snapshots:
                assert self.small.disk(taken).pread(0, WRITTEN) == image


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
