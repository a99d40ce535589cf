"""Which older points a wrong list of blocks makes doubtful, and what is said."""

import pytest

from cbtfs import doubt
from cbtfs.catalogue import DiskPoint, Point, VMHistory

WHOLE, TRUSTING = -1, 4096


def disk(
    method: str, *, vdi: str = "v", allocated: int = WHOLE, resumed: str = "", reason: str = ""
) -> DiskPoint:
    return DiskPoint(
        device="xvda",
        file="xvda.raw",
        vdi_uuid=vdi,
        size=1,
        method=method,
        resumed=resumed,
        reason=reason,
        allocated=allocated,
    )


def history(*disks: DiskPoint) -> VMHistory:
    points = (
        Point(time=f"2026112{n}T020000Z", vm_uuid="m", disks=(d,)) for n, d in enumerate(disks)
    )
    return VMHistory("m", "web1", tuple(points))


CHANGED = DiskPoint(
    device="xvda",
    file="xvda.raw",
    vdi_uuid="v",
    size=1,
    method="compare",
    reason="cbt-mismatch",
    blocks_sampled=256,
    blocks_mismatched=3,
)
ALLOCATED = DiskPoint(
    device="xvda",
    file="xvda.raw",
    vdi_uuid="v",
    size=1,
    method="compare",
    reason="cbt-off",
    blocks_sampled=16,
    blocks_mismatched=1,
)


def test_nothing_is_said_of_a_sample_that_matched() -> None:
    assert doubt.warnings([disk("incremental")], history(disk("full"))) == []


def test_a_wrong_list_of_changed_blocks_is_told_with_the_points_in_doubt() -> None:
    past = history(disk("full"), disk("incremental"), disk("incremental"))

    (said,) = doubt.warnings([CHANGED], past)

    assert said == (
        "xvda: the pool's list of changed blocks was wrong: 3 of 256 sampled blocks had changed;"
        " the whole disk was compared and the restore point is right, but points since"
        " 20261121T020000Z may not be"
    )


def test_a_wrong_list_of_allocated_blocks_is_told_as_such() -> None:
    (said,) = doubt.warnings([ALLOCATED], history(disk("compare")))

    assert said == (
        "xvda: the pool's list of allocated blocks was wrong: 1 of 16 sampled blocks held data;"
        " the whole disk was read and the restore point is right"
    )


@pytest.mark.parametrize("past", [None, history(), history(disk("full")), history(disk("compare"))])
def test_without_a_point_in_doubt_none_is_named(past: VMHistory | None) -> None:
    (said,) = doubt.warnings([CHANGED], past)

    assert said.endswith("the restore point is right")


@pytest.mark.parametrize(
    ("past", "since"),
    [
        (history(disk("incremental"), disk("incremental")), "20261120"),
        (
            history(disk("full"), disk("incremental"), disk("compare"), disk("incremental")),
            "20261123",
        ),
        (history(disk("full"), disk("resume", resumed="incremental")), "20261121"),
        (
            history(disk("incremental"), disk("resume", resumed="full"), disk("incremental")),
            "20261122",
        ),
        (history(disk("full"), disk("incremental"), disk("full", vdi="other")), "20261121"),
        (history(disk("full", allocated=TRUSTING), disk("incremental")), "20261121"),
    ],
)
def test_doubt_goes_back_to_where_everything_was_compared(past: VMHistory, since: str) -> None:
    (said,) = doubt.warnings([CHANGED], past)

    assert f"points since {since}T020000Z may not be" in said


def test_a_copy_that_believed_the_allocation_is_in_doubt_where_that_was_wrong() -> None:
    past = history(disk("full"), disk("full", allocated=TRUSTING), disk("incremental"))

    (said,) = doubt.warnings([ALLOCATED], past)

    assert "points since 20261121T020000Z may not be" in said
