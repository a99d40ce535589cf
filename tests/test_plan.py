"""Every disk gets the copy it needs, and a reason that says why."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from cbtfs import inventory as inventories, plan
from cbtfs.catalogue import DiskPoint, Point, VMHistory
from cbtfs.inventory import SR, VBD, VDI, VM, Inventory, Owned, Pool
from cbtfs.plan import Base, DiskPlan, Reason
from cbtfs.units import GiB

STORE = "5702e000-0000-4000-8000-000000000001"
DISK = "d15c0000-0000-4000-8000-000000000001"
BASE = "ba5e0000-0000-4000-8000-000000000001"
OLDER = "ba5e0000-0000-4000-8000-000000000000"


def tag(uuid: str, *, role: str = "base", store: str = STORE) -> dict[str, str]:
    owned = Owned(self_uuid=uuid, role=role, store=store)
    return {inventories.TAG_OWNER: inventories.write_owner(owned)}


LIVE = VDI(
    ref="live", uuid=DISK, name="root", sr_ref="sr", size=4 * GiB, cbt_enabled=True, vbd_refs=("b",)
)
SNAPSHOT = VDI(
    ref="base",
    uuid=BASE,
    sr_ref="sr",
    size=4096,
    type="cbt_metadata",
    is_a_snapshot=True,
    snapshot_of="live",
    cbt_enabled=True,
    other_config=tag(BASE),
)
WEB1 = VM(ref="vm", uuid="00000000-0000-4000-8000-00000000000a", name="web1", vbd_refs=("b",))


def pool(
    *vdis: VDI, sr: SR | None = None, vms: tuple[VM, ...] = (WEB1,), licence: str = "false"
) -> Inventory:
    sr = sr or SR(ref="sr", uuid="57", name="ssd", type="ext", host_refs=("h",), cbt_capable=True)
    return Inventory(
        pool=Pool(uuid="p", name="prod", restrictions={"restrict_cbt": licence}),
        srs={sr.ref: sr},
        vms={vm.ref: vm for vm in vms},
        vbds={"b": VBD(ref="b", vm_ref="vm", vdi_ref="live", device="xvda")},
        vdis={vdi.ref: vdi for vdi in vdis},
    )


def point(time: str, *, snapshot: str = BASE, vdi: str = DISK, size: int = 4 * GiB) -> Point:
    disk = DiskPoint(
        device="xvda", file="xvda.raw", vdi_uuid=vdi, size=size, snapshot_uuid=snapshot
    )
    return Point(time=time, vm_uuid=WEB1.uuid, disks=(disk,))


def history(*points: Point) -> VMHistory:
    return VMHistory(WEB1.uuid, "web1", points)


def replace_device(old: Point, device: str) -> Point:
    return msgspec.structs.replace(
        old, disks=(msgspec.structs.replace(old.disks[0], device=device),)
    )


ONE = history(point("20261121T020000Z"))
TWO = history(point("20261120T020000Z", snapshot=OLDER), point("20261121T020000Z"))
IMAGE = Base(time="20261121T020000Z", disk=ONE.points[0].disks[0])
"""The image of ``ONE``, as a comparison begins with it: without snapshot."""


def decide(
    inventory: Inventory, past: VMHistory | None, *, full: bool = False, damaged: Sequence[str] = ()
) -> DiskPlan:
    """Return the plan of ``WEB1``'s disk; the images of the times in ``damaged`` are."""

    def is_damaged(time: str, device: str) -> bool:
        assert device == "xvda"
        return time in damaged

    found = plan.plan_vm(inventory, WEB1, past, store=STORE, full=full, damaged=is_damaged)
    return found.disks[0]


def test_a_known_base_makes_an_increment() -> None:
    disk = decide(pool(LIVE, SNAPSHOT), ONE)

    assert (disk.method, disk.reason) == ("incremental", Reason.CHANGED)
    assert disk.base is not None
    assert (disk.base.time, disk.base.snapshot_ref) == ("20261121T020000Z", "base")
    assert disk.detail == "changes since 20261121T020000Z"
    assert not disk.enable_cbt


def test_a_plan_describes_vm_and_disk() -> None:
    found = plan.plan_vm(pool(LIVE), WEB1, None, store=STORE)

    assert (found.vm_uuid, found.vm_ref, found.vm_name) == (WEB1.uuid, "vm", "web1")
    disk = found.disks[0]
    assert (disk.device, disk.vdi_uuid, disk.vdi_ref) == ("xvda", DISK, "live")
    assert (disk.vdi_name, disk.sr_uuid, disk.size) == ("root", "57", 4 * GiB)


@pytest.mark.parametrize("past", [None, history()])
def test_without_a_restore_point_it_is_the_first(past: VMHistory | None) -> None:
    disk = decide(pool(LIVE, SNAPSHOT), past)

    assert (disk.method, disk.reason, disk.base) == ("full", Reason.FIRST, None)


def test_a_disk_that_is_new_in_an_old_vm_is_the_first() -> None:
    old = point("20261121T020000Z", vdi=OLDER)
    other = replace_device(old, "xvdb")

    assert decide(pool(LIVE), history(other)).reason is Reason.FIRST


def test_a_full_can_be_asked_for_despite_a_base() -> None:
    assert decide(pool(LIVE, SNAPSHOT), ONE, full=True).reason is Reason.REQUESTED


def test_another_vdi_at_the_same_device_was_replaced_if_the_pool_has_the_old_one() -> None:
    old = replace(LIVE, ref="old", uuid=OLDER)
    past = history(point("20261121T020000Z", vdi=OLDER))

    disk = decide(pool(LIVE, SNAPSHOT, old), past)

    assert (disk.method, disk.reason, disk.base) == ("full", Reason.REPLACED, None)
    assert disk.detail == (
        "xvda is another VDI than in 20261121T020000Z; that one is still in the pool"
    )


@pytest.mark.parametrize("size", [4 * GiB, 5 * GiB])
def test_another_vdi_at_the_same_device_was_moved_if_the_old_one_is_gone(size: int) -> None:
    past = history(point("20261120T020000Z", vdi=OLDER), point("20261121T020000Z", vdi=OLDER))

    disk = decide(pool(replace(LIVE, size=size)), past)

    assert (disk.method, disk.reason) == ("compare", Reason.MOVED)
    assert disk.base == Base(time="20261121T020000Z", disk=past.points[1].disks[0])
    assert disk.detail == (
        "xvda is another VDI than in 20261121T020000Z;"
        " that one is gone from the pool (moved, restored or reverted)"
    )


def test_a_smaller_vdi_at_the_same_device_is_no_moved_one() -> None:
    past = history(point("20261121T020000Z", vdi=OLDER))

    disk = decide(pool(replace(LIVE, size=2 * GiB)), past)

    assert (disk.method, disk.reason, disk.base) == ("full", Reason.REPLACED, None)
    assert disk.detail == "xvda is another VDI than in 20261121T020000Z, and smaller"


def test_a_moved_vdi_is_compared_with_the_newest_image_without_damage() -> None:
    past = history(point("20261120T020000Z", vdi=OLDER), point("20261121T020000Z", vdi=OLDER))

    disk = decide(pool(LIVE), past, damaged=["20261121T020000Z"])

    assert (disk.method, disk.reason) == ("compare", Reason.MOVED)
    assert disk.base is not None
    assert disk.base.time == "20261120T020000Z"


def test_a_moved_vdi_whose_images_are_all_damaged_is_copied_in_full() -> None:
    past = history(point("20261121T020000Z", vdi=OLDER))

    disk = decide(pool(LIVE), past, damaged=["20261121T020000Z"])

    assert (disk.method, disk.reason, disk.base) == ("full", Reason.BASE_DAMAGED, None)


def test_a_disk_without_vm_never_moves() -> None:
    past = VMHistory(
        f"vdi-{DISK}", "x", (replace_device(point("20261121T020000Z", vdi=OLDER), "disk"),)
    )

    disk = plan.plan_vdi(pool(LIVE), LIVE, past, store=STORE).disks[0]

    assert (disk.method, disk.reason) == ("full", Reason.FIRST)


def test_only_images_that_may_be_built_on_are_looked_at_for_damage() -> None:
    asked: list[str] = []

    def is_damaged(time: str, _device: str) -> bool:
        asked.append(time)
        return False

    plan.plan_vm(pool(LIVE, SNAPSHOT), WEB1, TWO, store=STORE, damaged=is_damaged)

    assert set(asked) == {"20261121T020000Z"}


def test_a_damaged_image_is_passed_over_for_an_older_one() -> None:
    disk = decide(pool(LIVE, SNAPSHOT), TWO, damaged=["20261121T020000Z"])

    assert (disk.method, disk.reason) == ("compare", Reason.BASE_DAMAGED)
    assert disk.base == Base(time="20261120T020000Z", disk=TWO.points[0].disks[0])
    assert disk.detail == "verify found damage in 20261121T020000Z"


def test_an_older_image_without_damage_is_a_base_if_its_snapshot_is_known() -> None:
    older = replace(SNAPSHOT, ref="older", uuid=OLDER, other_config=tag(OLDER))

    disk = decide(pool(LIVE, SNAPSHOT, older), TWO, damaged=["20261121T020000Z"])

    assert (disk.method, disk.reason) == ("incremental", Reason.CHANGED)
    assert disk.base is not None
    assert (disk.base.time, disk.base.snapshot_ref) == ("20261120T020000Z", "older")
    assert disk.detail == (
        "changes since 20261120T020000Z: verify found damage in 20261121T020000Z"
    )


@pytest.mark.parametrize(
    ("past", "told"), [(ONE, "20261121T020000Z"), (TWO, "20261121T020000Z and all before")]
)
def test_without_an_image_that_is_whole_everything_is_copied(past: VMHistory, told: str) -> None:
    everything = ["20261120T020000Z", "20261121T020000Z"]

    disk = decide(pool(LIVE, SNAPSHOT), past, damaged=everything)

    assert (disk.method, disk.reason, disk.base) == ("full", Reason.BASE_DAMAGED, None)
    assert disk.detail == f"verify found damage in {told}"


def test_a_damaged_image_is_nothing_to_compare_with_on_an_sr_without_tracking() -> None:
    sr = SR(ref="sr", uuid="57", type="udev", host_refs=("h",))

    disk = decide(pool(LIVE, sr=sr), TWO, damaged=["20261121T020000Z"])

    assert (disk.method, disk.reason) == ("compare", Reason.CBT_UNSUPPORTED)
    assert disk.base is not None
    assert disk.base.time == "20261120T020000Z"


def test_a_disk_that_moved_to_another_device_keeps_its_base() -> None:
    moved = pool(LIVE, SNAPSHOT)
    moved = replace(moved, vbds={"b": replace(moved.vbds["b"], device="xvdc")})

    disk = decide(moved, ONE)

    assert (disk.device, disk.method) == ("xvdc", "incremental")


def test_tracking_that_is_off_is_turned_on_and_costs_a_comparison() -> None:
    disk = decide(pool(replace(LIVE, cbt_enabled=False), SNAPSHOT), ONE)

    assert (disk.method, disk.reason, disk.enable_cbt) == ("compare", Reason.CBT_OFF, True)
    assert disk.base == IMAGE


def test_the_first_point_turns_tracking_on() -> None:
    disk = decide(pool(replace(LIVE, cbt_enabled=False)), None)

    assert (disk.reason, disk.enable_cbt) == (Reason.FIRST, True)


def test_an_sr_that_cannot_track_always_gets_comparisons() -> None:
    sr = SR(ref="sr", uuid="57", type="udev", host_refs=("h",))
    disk = decide(pool(replace(LIVE, cbt_enabled=False), SNAPSHOT, sr=sr), ONE)

    assert (disk.method, disk.reason) == ("compare", Reason.CBT_UNSUPPORTED)
    assert "udev" in disk.detail
    assert not disk.enable_cbt


def test_a_raw_image_cannot_be_tracked() -> None:
    disk = decide(pool(replace(LIVE, cbt_enabled=False, sm_config={"type": "raw"})), ONE)

    assert (disk.reason, disk.enable_cbt) == (Reason.CBT_UNSUPPORTED, False)


def test_a_licence_without_tracking_is_told() -> None:
    disk = decide(pool(replace(LIVE, cbt_enabled=False), licence="true"), ONE)

    assert (disk.reason, disk.enable_cbt) == (Reason.CBT_UNSUPPORTED, False)
    assert "licence" in disk.detail


def test_a_licence_that_lapsed_does_not_stop_tracking_that_is_on() -> None:
    assert decide(pool(LIVE, SNAPSHOT, licence="true"), ONE).method == "incremental"


@pytest.mark.parametrize(
    ("snapshot", "reason", "told"),
    [
        (None, Reason.BASE_LOST, "no longer has"),
        (replace(SNAPSHOT, is_a_snapshot=False), Reason.BASE_LOST, "another disk"),
        (replace(SNAPSHOT, snapshot_of="other"), Reason.BASE_LOST, "another disk"),
        (replace(SNAPSHOT, sr_ref="sr2"), Reason.BASE_LOST, "another SR"),
        (replace(SNAPSHOT, other_config={}), Reason.BASE_LOST, "not tagged"),
        (replace(SNAPSHOT, other_config=tag(DISK)), Reason.BASE_LOST, "not tagged"),
        (replace(SNAPSHOT, other_config=tag(BASE, role="live")), Reason.BASE_LOST, "not tagged"),
        (replace(SNAPSHOT, other_config=tag(BASE, store="x")), Reason.BASE_LOST, "not tagged"),
        (replace(SNAPSHOT, cbt_enabled=False), Reason.CBT_OFF, "not tracked yet"),
    ],
)
def test_a_base_that_cannot_be_built_on_costs_a_comparison(
    snapshot: VDI | None, reason: Reason, told: str
) -> None:
    disk = decide(pool(LIVE, *([snapshot] if snapshot else [])), ONE)

    assert (disk.method, disk.reason, disk.base) == ("compare", reason, IMAGE)
    assert told in disk.detail


def test_the_newest_point_whose_snapshot_is_known_is_the_base() -> None:
    past = history(
        point("20261119T020000Z", snapshot=OLDER),
        point("20261120T020000Z"),
        point("20261121T020000Z", snapshot=""),
        point("20261122T020000Z", vdi=OLDER),
    )
    older = replace(SNAPSHOT, ref="older", uuid=OLDER, other_config=tag(OLDER))

    disk = decide(pool(LIVE, SNAPSHOT, older), past)

    assert disk.base is not None
    assert disk.base.time == "20261120T020000Z"


def test_an_increment_over_an_older_point_tells_why() -> None:
    past = history(point("20261120T020000Z"), point("20261121T020000Z", snapshot=OLDER))

    disk = decide(pool(LIVE, SNAPSHOT), past)

    assert disk.detail == (
        "changes since 20261120T020000Z: the pool no longer has the snapshot of 20261121T020000Z"
    )


def test_a_base_larger_than_the_disk_is_none() -> None:
    past = history(point("20261120T020000Z", size=9 * GiB), point("20261121T020000Z", snapshot=""))

    disk = decide(pool(LIVE, SNAPSHOT), past)

    assert (disk.method, disk.reason, disk.base) == (
        "compare",
        Reason.BASE_LOST,
        Base(time="20261121T020000Z", disk=past.points[1].disks[0]),
    )


def test_growing_is_no_reason_for_a_full() -> None:
    assert decide(pool(replace(LIVE, size=9 * GiB), SNAPSHOT), ONE).method == "incremental"


def test_shrinking_is() -> None:
    disk = decide(pool(replace(LIVE, size=2 * GiB), SNAPSHOT), ONE)

    assert (disk.method, disk.reason, disk.base) == ("full", Reason.RESIZED, None)
    assert disk.detail == "the disk shrank from 4 GiB to 2 GiB since 20261121T020000Z"


@pytest.mark.parametrize(
    ("vdi", "told"),
    [
        (replace(LIVE, missing=True), "missing"),
        (replace(LIVE, type="suspend"), "suspend"),
        (replace(LIVE, is_a_snapshot=True), "itself a snapshot"),
        (replace(LIVE, sr_ref="gone"), "no host"),
        (replace(LIVE, on_boot="reset"), "reset at every boot"),
        (replace(LIVE, sharable=True), "shared"),
    ],
)
def test_a_disk_that_cannot_be_copied_is_skipped_with_a_reason(vdi: VDI, told: str) -> None:
    found = plan.plan_vm(pool(vdi), WEB1, None, store=STORE)

    assert found.disks == ()
    assert found.skipped[0][0] == "xvda"
    assert told in found.skipped[0][1]


@pytest.mark.parametrize("pattern", ["xvd?", "ro*", DISK])
def test_disks_are_excluded_by_device_name_or_uuid(pattern: str) -> None:
    found = plan.plan_vm(pool(LIVE), WEB1, None, store=STORE, exclude=["no", pattern])

    assert found.skipped == (("xvda", "it is excluded"),)


def test_a_disk_without_vm_is_a_vm_of_one_disk() -> None:
    past = VMHistory(f"vdi-{DISK}", "root", ONE.points)

    found = plan.plan_vdi(pool(LIVE, SNAPSHOT), LIVE, past, store=STORE)

    assert (found.vm_uuid, found.vm_ref, found.vm_name) == (f"vdi-{DISK}", "", "root")
    assert [(d.device, d.method) for d in found.disks] == [("disk", "incremental")]
    assert plan.plan_vdi(pool(LIVE), LIVE, past, store=STORE, full=True).disks[0].base is None


def test_a_disk_without_vm_can_be_impossible_to_copy() -> None:
    found = plan.plan_vdi(pool(LIVE), replace(LIVE, missing=True), None, store=STORE)

    assert found.disks == ()
    assert found.skipped == (("disk", "it is missing from its SR"),)


def test_falling_back_makes_a_comparison_of_an_increment() -> None:
    disk = decide(pool(LIVE, SNAPSHOT), ONE)

    fallen = plan.fall_back(disk, reason=Reason.CBT_MISMATCH, detail="inconsistent bitmaps")

    assert (fallen.method, fallen.reason, fallen.base) == ("compare", Reason.CBT_MISMATCH, IMAGE)
    assert fallen.detail == "inconsistent bitmaps"
    assert fallen.device == disk.device


@pytest.mark.parametrize("reason", [Reason.BASE_DAMAGED, Reason.RESIZED])
def test_falling_back_makes_a_full_where_the_image_is_no_good(reason: Reason) -> None:
    disk = decide(pool(LIVE, SNAPSHOT), ONE)

    fallen = plan.fall_back(disk, reason=reason, detail="it is")

    assert (fallen.method, fallen.reason, fallen.base) == ("full", reason, None)


def test_falling_back_without_an_image_makes_a_full() -> None:
    disk = decide(pool(LIVE), None)

    fallen = plan.fall_back(disk, reason=Reason.BASE_LOST, detail="it is")

    assert (fallen.method, fallen.base) == ("full", None)


def test_reasons_are_written_as_their_words() -> None:
    assert f"{Reason.BASE_LOST}" == "base-lost"
