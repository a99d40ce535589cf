"""A snapshot's disks are those that it made, and only those are ours."""

from dataclasses import replace

import pytest

from cbtfs import errors, plan, snapshot
from cbtfs.inventory import SR, VBD, VDI, VM, Inventory, Pool
from cbtfs.plan import VMPlan
from cbtfs.snapshot import Snapshot

LIVE = VDI(ref="live", uuid="d15c", sr_ref="sr", size=4096, vbd_refs=("live-vbd",))
OTHER = VDI(ref="other", uuid="07e5", sr_ref="sr", size=4096, vbd_refs=("other-vbd",))


def taken(name: str, *, of: str = "live", vbds: tuple[str, ...] = ()) -> VDI:
    vbds = vbds or (f"{name}-vbd",)
    return VDI(ref=name, uuid=f"uuid-{name}", is_a_snapshot=True, snapshot_of=of, vbd_refs=vbds)


def pool(*vdis: VDI) -> Inventory:
    """Return a pool with the VM ``vm`` of two disks, and a snapshot of it that has ``vdis``."""
    both = (LIVE, OTHER, *vdis)
    live = VM(ref="vm", uuid="00", vbd_refs=("live-vbd", "other-vbd"))
    copy = VM(
        ref="copy", uuid="01", is_a_snapshot=True, vbd_refs=tuple(f"{v.ref}-vbd" for v in vdis)
    )
    return Inventory(
        pool=Pool(uuid="p", name="prod"),
        srs={"sr": SR(ref="sr", uuid="57", type="ext", host_refs=("h",))},
        vms={"vm": live, "copy": copy},
        vdis={vdi.ref: vdi for vdi in both},
        vbds={
            f"{v.ref}-vbd": VBD(ref=f"{v.ref}-vbd", vdi_ref=v.ref, device=f"xvd{chr(97 + number)}")
            for number, v in enumerate(both)
        },
    )


def planned(inventory: Inventory, *, exclude: tuple[str, ...] = ()) -> VMPlan:
    return plan.plan_vm(inventory, inventory.vms["vm"], None, store="s", exclude=exclude)


def found(*vdis: VDI, exclude: tuple[str, ...] = ()) -> Snapshot:
    inventory = pool(*vdis)
    return snapshot.of_vm(inventory, planned(inventory, exclude=exclude), "copy")


def test_disks_are_told_by_what_they_are_snapshots_of() -> None:
    made = found(taken("b", of="other"), taken("a"))

    assert {device: vdi.ref for device, vdi in made.disks.items()} == {"xvda": "a", "xvdb": "b"}
    assert made.others == ()


def test_a_disk_that_was_left_out_came_along() -> None:
    made = found(taken("a"), taken("b", of="other"), exclude=("xvdb",))

    assert [vdi.ref for vdi in made.others] == ["b"]


def test_a_disk_that_is_there_twice_is_ours_twice() -> None:
    made = found(taken("a"), taken("twin"))

    assert {*(v.ref for v in made.disks.values()), *(v.ref for v in made.others)} == {"a", "twin"}


def test_what_is_attached_elsewhere_too_was_not_made_by_it() -> None:
    foreign = taken("theirs", vbds=("theirs-vbd", "their-own-vbd"))

    made = found(taken("a"), foreign)

    assert [vdi.ref for vdi in made.disks.values()] == ["a"]
    assert made.others == ()


def test_what_a_control_domain_still_reads_for_a_killed_run_is_ours() -> None:
    inventory = pool(taken("a", vbds=("a-vbd", "reader")))
    dom0 = VM(ref="dom0", uuid="d0", is_control_domain=True, vbd_refs=("reader",))
    reader = VBD(ref="reader", vm_ref="dom0", vdi_ref="a", device="xvdz", mode="RO")
    read = replace(
        inventory,
        vms={**inventory.vms, "dom0": dom0},
        vbds={**inventory.vbds, "reader": reader},
    )

    made = snapshot.of_vm(read, planned(read), "copy")

    assert [vdi.ref for vdi in made.disks.values()] == ["a"]


def test_a_live_disk_that_stands_as_itself_was_not_made_by_it() -> None:
    itself = VDI(ref="self", uuid="5e", snapshot_of="live", vbd_refs=("self-vbd",))

    made = found(itself)

    assert (made.disks, made.others) == ({}, ())


def test_a_snapshot_that_vanished_is_an_error() -> None:
    inventory = pool()

    with pytest.raises(errors.PoolError, match="vanished"):
        snapshot.of_vm(inventory, planned(inventory), "gone")
