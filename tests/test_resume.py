"""Resume: what an interrupted run left is gone on with only if all of it still fits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cbtfs import inventory as inventories, plan as planning, resume
from cbtfs.catalogue import VMHistory
from cbtfs.inventory import VBD, VDI, VM, Inventory, Owned
from cbtfs.journal import DiskJournal
from cbtfs.plan import Damaged, Reason, VMPlan
from cbtfs.resume import Resumption
from cbtfs.store import Intent, Leftover
from cbtfs.units import GiB

from .test_plan import BASE, DISK, LIVE, SNAPSHOT, STORE, WEB1, point, pool

EARLIER = "20261120T020000Z"
TIME = "20261122T020000Z"
TAKEN = "5a900000-0000-4000-8000-000000000001"
SECOND = "d15c0000-0000-4000-8000-000000000002"
TAKEN_VM = "5a900000-0000-4000-8000-00000000000a"


def WHOLE(_time: str, _device: str) -> bool:  # noqa: N802  # a constant
    return False


def tagged(uuid: str, *, time: str = TIME, vm: str = WEB1.uuid) -> dict[str, str]:
    owned = Owned(self_uuid=uuid, role="base", store=STORE, vm=vm, point=time)
    return {inventories.TAG_OWNER: inventories.write_owner(owned)}


DISK_SNAPSHOT = VDI(
    ref="taken",
    uuid=TAKEN,
    sr_ref="sr",
    size=4 * GiB,
    is_a_snapshot=True,
    snapshot_of="live",
    cbt_enabled=True,
    vbd_refs=("tb",),
    other_config=tagged(TAKEN),
)
VM_SNAPSHOT = VM(
    ref="taken-vm",
    uuid=TAKEN_VM,
    name="web1",
    is_a_snapshot=True,
    snapshot_of="vm",
    vbd_refs=("tb",),
    other_config=tagged(TAKEN_VM),
)
ENTRY = DiskJournal(
    device="xvda",
    vdi_uuid=DISK,
    snapshot_uuid=TAKEN,
    size=4 * GiB,
    method="incremental",
    reason="changed",
    base=EARLIER,
    base_snapshot_uuid=BASE,
    offset=GiB,
)
HISTORY = VMHistory(WEB1.uuid, "web1", (point(EARLIER),))


def the_pool(*, disk: VDI = DISK_SNAPSHOT, vm: VM = VM_SNAPSHOT, base: VDI = SNAPSHOT) -> Inventory:
    found = pool(LIVE, base, disk, vms=(WEB1, vm))
    vbds = {**found.vbds, "tb": VBD(ref="tb", vm_ref="taken-vm", vdi_ref="taken", device="xvda")}
    return replace(found, vbds=vbds)


def the_pool_with_a_second_disk() -> tuple[Inventory, VM]:
    """Return it, and its VM; the snapshot does not have that disk."""
    second = replace(LIVE, ref="new", uuid=SECOND, vbd_refs=("n",))
    vm = replace(WEB1, vbd_refs=("b", "n"))
    found = the_pool()
    found = replace(
        found,
        vms={**found.vms, "vm": vm},
        vdis={**found.vdis, "new": second},
        vbds={**found.vbds, "n": VBD(ref="n", vm_ref="vm", vdi_ref="new", device="xvdb")},
    )
    return found, vm


def left(journal: Mapping[str, DiskJournal], *, time: str = TIME) -> Leftover:
    intent = Intent(time=time, run="r", snapshot_name="s", vm_uuid=WEB1.uuid)
    return Leftover(WEB1.uuid, time, Path("partial"), intent, journal)


def plan(inventory: Inventory) -> VMPlan:
    return planning.plan_vm(inventory, WEB1, HISTORY, store=STORE)


def find(
    inventory: Inventory | None = None,
    *leftovers: Leftover,
    history: VMHistory | None = HISTORY,
    damaged: Damaged = WHOLE,
) -> Resumption | None:
    inventory = inventory or the_pool()
    chosen = list(leftovers) or [left({"xvda": ENTRY})]
    return resume.find(
        inventory, WEB1, plan(inventory), chosen, store=STORE, history=history, damaged=damaged
    )


def test_a_begun_disk_goes_on_where_it_was() -> None:
    found = find()

    assert found is not None
    (disk,) = found.plan.disks
    assert (found.plan.resumes, disk.method, disk.reason) == (TIME, "resume", Reason.CHANGED)
    assert "goes on from 1 GiB of 4 GiB" in disk.detail
    assert disk.base is not None
    assert (disk.base.time, disk.base.snapshot_ref) == (EARLIER, "base")
    assert found.snapshot.vm == VM_SNAPSHOT
    assert found.snapshot.disks == {"xvda": DISK_SNAPSHOT}


@pytest.mark.parametrize(
    "entry",
    [
        msgspec.structs.replace(ENTRY, offset=0),
        msgspec.structs.replace(ENTRY, vdi_uuid="another"),
        msgspec.structs.replace(ENTRY, snapshot_uuid="another"),
        msgspec.structs.replace(ENTRY, size=8 * GiB),
    ],
    ids=["nothing-copied", "another-disk", "another-snapshot", "another-size"],
)
def test_an_entry_that_does_not_fit_is_not_gone_on_with(entry: DiskJournal) -> None:
    assert find(None, left({"xvda": entry})) is None


@pytest.mark.parametrize(
    "inventory",
    [
        the_pool(disk=replace(DISK_SNAPSHOT, type="cbt_metadata")),
        the_pool(vm=replace(VM_SNAPSHOT, other_config={})),
        the_pool(vm=replace(VM_SNAPSHOT, other_config=tagged(TAKEN_VM, time=EARLIER))),
        the_pool(vm=replace(VM_SNAPSHOT, other_config=tagged(TAKEN_VM, vm="another"))),
        the_pool(vm=replace(VM_SNAPSHOT, snapshot_of="another")),
        pool(LIVE, SNAPSHOT),
    ],
    ids=["no-data", "not-ours", "other-point", "other-directory", "other-vm", "gone"],
)
def test_a_snapshot_that_is_not_the_one_is_not_copied_further(inventory: Inventory) -> None:
    assert find(inventory) is None


def test_what_began_as_an_image_that_was_then_found_damaged_begins_anew() -> None:
    asked: list[tuple[str, str]] = []

    def damaged(time: str, device: str) -> bool:
        asked.append((time, device))
        return True

    assert find(damaged=damaged) is None
    assert asked == [(EARLIER, "xvda")]
    full = msgspec.structs.replace(ENTRY, method="full", base="", base_snapshot_uuid="")
    assert find(None, left({"xvda": full}), damaged=damaged) is not None


@pytest.mark.parametrize(("flawed", "goes_on"), [("hda", False), ("xvda", True)])
def test_a_disk_is_known_by_its_uuid_in_the_point_it_began_as(flawed: str, goes_on: bool) -> None:
    # then it was hda, and what is xvda there is another disk
    earlier = point(EARLIER)
    (image,) = earlier.disks
    renamed = msgspec.structs.replace(image, device="hda")
    other = msgspec.structs.replace(image, vdi_uuid=SECOND, size=8 * GiB)
    past = msgspec.structs.replace(earlier, disks=(other, renamed))
    entry = msgspec.structs.replace(ENTRY, method="compare", base_snapshot_uuid="")

    found = find(
        None,
        left({"xvda": entry}),
        history=VMHistory(WEB1.uuid, "web1", (past,)),
        damaged=lambda _, device: device == flawed,
    )

    assert (found is not None) is goes_on
    if found is not None:
        base = found.plan.disks[0].base
        assert base is not None
        assert base.disk == renamed


def test_once_there_is_a_later_point_it_is_too_late() -> None:
    later = VMHistory(WEB1.uuid, "web1", (point(EARLIER), point("20261122T020001Z")))

    assert find(history=later) is None


def test_without_an_intent_nobody_knows_whose_it_was() -> None:
    assert find(None, replace(left({"xvda": ENTRY}), intent=None)) is None


def test_the_newest_of_several_is_taken() -> None:
    older = left({"xvda": ENTRY}, time="20261121T020000Z")

    found = find(None, older, left({"xvda": ENTRY}))

    assert found is not None
    assert found.leftover.time == TIME


def test_a_disk_whose_base_is_gone_is_done_as_planned() -> None:
    inventory = the_pool(base=replace(SNAPSHOT, ref="other", uuid="other"))

    found = find(inventory)

    assert found is not None
    assert [disk.method for disk in found.plan.disks] == ["compare"]
    assert found.plan.resumes == TIME


def test_a_disk_that_came_later_waits_for_the_next_point() -> None:
    inventory, vm = the_pool_with_a_second_disk()

    found = resume.find(
        inventory,
        vm,
        planning.plan_vm(inventory, vm, HISTORY, store=STORE),
        [left({"xvda": ENTRY})],
        store=STORE,
        history=HISTORY,
        damaged=WHOLE,
    )

    assert found is not None
    assert [disk.device for disk in found.plan.disks] == ["xvda"]
    ((device, why),) = found.plan.skipped
    assert device == "xvdb"
    assert "attached after the interrupted run" in why


def test_a_disk_that_somebody_took_out_of_the_snapshot_is_not_called_late() -> None:
    inventory, vm = the_pool_with_a_second_disk()
    leftover = left({"xvda": ENTRY})
    assert leftover.intent is not None
    intent = msgspec.structs.replace(leftover.intent, vdis=(DISK, SECOND))

    found = resume.find(
        inventory,
        vm,
        planning.plan_vm(inventory, vm, HISTORY, store=STORE),
        [replace(leftover, intent=intent)],
        store=STORE,
        history=HISTORY,
        damaged=WHOLE,
    )

    assert found is None


def test_a_device_that_vanished_while_the_pool_was_read_hides_no_disk() -> None:
    disk = replace(DISK_SNAPSHOT, vbd_refs=("tb", "unplugged just now"))

    assert find(the_pool(disk=disk)) is not None


def test_a_disk_without_vm_is_known_by_its_tag() -> None:
    key = f"vdi-{DISK}"
    snapshot = replace(DISK_SNAPSHOT, vbd_refs=(), other_config=tagged(TAKEN, vm=key))
    inventory = pool(replace(LIVE, vbd_refs=()), snapshot, vms=())
    entry = msgspec.structs.replace(ENTRY, device="disk", method="full", base="")
    disk = inventory.vdis["live"]

    found = resume.find(
        inventory,
        disk,
        planning.plan_vdi(inventory, disk, None, store=STORE),
        [replace(left({"disk": entry}), vm_uuid=key)],
        store=STORE,
        history=None,
        damaged=WHOLE,
    )

    assert found is not None
    assert [one.method for one in found.plan.disks] == ["resume"]
    assert found.snapshot.disks == {"disk": snapshot}
