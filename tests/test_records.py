"""Records are facts: frozen, with values for what was not said."""

from dataclasses import FrozenInstanceError

import pytest

from cbtfs import records
from cbtfs.records import VDI, VM


@pytest.mark.parametrize("kind", ["user", "system"])
def test_a_managed_present_disk_is_readable(kind: str) -> None:
    assert VDI(ref="r", uuid="u", type=kind).is_readable


@pytest.mark.parametrize(
    "vdi",
    [
        VDI(ref="r", uuid="u", type="cbt_metadata"),
        VDI(ref="r", uuid="u", managed=False),
        VDI(ref="r", uuid="u", missing=True),
    ],
)
def test_other_disks_are_not(vdi: VDI) -> None:
    assert not vdi.is_readable


def test_records_cannot_be_changed() -> None:
    vm = VM(ref="r", uuid="u")

    with pytest.raises(FrozenInstanceError):
        vm.name = "x"  # type: ignore[misc]
    assert vm.snapshot_time == records.EPOCH
