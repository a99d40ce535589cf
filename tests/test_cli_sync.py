"""What ``sync`` makes of its options, and what it tells in the end. No pool is needed here."""

import sys
from dataclasses import replace
from typing import cast

import pytest

from cbtfs import errors, progress
from cbtfs.catalogue import DiskFailure, DiskPoint, Point
from cbtfs.cli import forecast, outcomes
from cbtfs.cli.context import Globals
from cbtfs.cli.forecast import Forecast
from cbtfs.cli.outcomes import Result
from cbtfs.cli.syncing import Wish
from cbtfs.plan import DiskPlan, Reason, VMPlan
from cbtfs.sample import Sample
from cbtfs.sync import Outcome, SyncOptions
from cbtfs.tables import JobTable


def uuid(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012d}"


# ── The status ──


def outcome(error: errors.CbtfsError | None = None, *, state: str = "complete") -> Outcome:
    failure = DiskFailure(device="xvdb", vdi_uuid=uuid(5), error="no")
    point = Point(
        time="20261122T020000Z",
        vm_uuid=uuid(1),
        state=state,
        failures=(failure,) if state == "partial" else (),
    )
    return Outcome(uuid(1), "web1", point=None if error else point, error=error)


LEFT_OUT = Outcome(uuid(2), "kiosk")


@pytest.mark.parametrize(
    ("done", "status"),
    [
        ([outcome(), outcome()], 0),
        ([outcome(), outcome(state="partial")], 3),
        ([outcome(), outcome(errors.StoreLocked(""))], 3),
        ([outcome(errors.StoreLocked(""))], 11),
        ([outcome(errors.PoolUnreachable("")), outcome(errors.PoolUnreachable(""))], 13),
        ([outcome(errors.StoreLocked("")), outcome(errors.StoreError(""))], 1),
        ([outcome(), LEFT_OUT], 0),
        ([LEFT_OUT], 1),
        ([outcome(errors.StoreLocked("")), LEFT_OUT], 11),
        ([], 0),
    ],
)
def test_status_of_a_sync_says_how_much_of_it_is_done(done: list[Outcome], status: int) -> None:
    assert outcomes.exit_status(done) == status


def test_document_of_a_partial_point_names_what_failed() -> None:
    document = outcomes.document(Result(outcome(state="partial")))

    assert document["state"] == "partial"
    assert document["failures"] == [{"device": "xvdb", "vdi_uuid": uuid(5), "error": "no"}]


def noted_failures(kind: str) -> outcomes.Failures:
    noted = outcomes.Failures(told=kind != "silent")
    with progress.open_progress(cast(progress.Kind, kind), sys.stderr) as noted.view:
        noted.disk_started("web1/xvdb", method="full", reason="first", total=1)
        noted.advanced("web1/xvdb", read=1, written=1)
        noted.disk_finished("web1/xvdb", None, "no space")
    return noted


@pytest.mark.parametrize("kind", ["line", "bar", "json", "silent"])
@pytest.mark.parametrize(
    "result", [outcome(state="partial"), outcome(errors.StoreFull("no space"))]
)
def test_failed_disk_is_told_once(
    capsys: pytest.CaptureFixture[str], kind: str, result: Outcome
) -> None:
    outcomes.show(Globals(verbosity=-1), [noted_failures(kind).take(result)])

    told = capsys.readouterr().err
    assert told.count("no space") == 1
    assert ("no restore point" in told) == (result.error is not None)


def test_failure_of_a_vm_is_told_whatever_the_view_says(capsys: pytest.CaptureFixture[str]) -> None:
    result = outcome(errors.PoolError("the pool is tired"))

    outcomes.show(Globals(), [Result(result)])

    assert capsys.readouterr().err == "cbtfs: web1: the pool is tired\n"


def test_document_of_a_vm_without_a_point_names_what_failed_of_each_disk() -> None:
    failed = Result(outcome(errors.ExportError("lost")), {"xvda": "lost", "xvdb": "no host"})

    document = outcomes.document(failed)

    assert document["failures"] == [
        {"device": "xvda", "vdi_uuid": "", "error": "lost"},
        {"device": "xvdb", "vdi_uuid": "", "error": "no host"},
    ]
    assert (document["state"], document["error"]) == ("failed", "lost")


def test_the_same_vm_in_two_jobs_has_the_failures_of_each() -> None:
    noted = outcomes.Failures(told=True)
    noted.disk_finished("web1/xvda", None, "once")
    first = noted.take(outcome())
    noted.disk_finished("web1/xvda", None, "again")
    noted.disk_finished("web1/b/xvda", None, "another VM")

    assert first.failed == {"xvda": "once"}
    assert noted.take(outcome()).failed == {"xvda": "again"}


def test_vms_of_one_name_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    twin = replace(outcome(errors.PoolError("tired")), label="web1~12345678")
    noted = outcomes.Failures(told=False)
    noted.disk_finished("web1~12345678/xvda", None, "no host")

    outcomes.show(Globals(), [noted.take(twin)])

    assert capsys.readouterr().err.splitlines() == [
        "cbtfs: web1~12345678/xvda: no host",
        "cbtfs: web1~12345678: tired",
    ]


# ── The disks ──


DISK = DiskPoint(
    device="xvda",
    file="xvda.raw",
    vdi_uuid=uuid(5),
    size=40 << 30,
    method="compare",
    reason="cbt-mismatch",
    detail="1 of 16 blocks",
    base="20261121T020000Z",
    bytes_written=1 << 20,
    blocks_sampled=16,
    blocks_mismatched=1,
    seconds=14.2,
)
WRONG = "xvda: the pool's list of changed blocks was wrong"


def done(disk: DiskPoint, *, warnings: tuple[str, ...] = ()) -> Outcome:
    point = Point(time="20261122T020000Z", vm_uuid=uuid(1), disks=(disk,), warnings=warnings)
    return Outcome(uuid(1), "web1", point=point)


def test_one_line_per_disk_remains(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes.show(Globals(), [Result(done(DISK))])

    assert capsys.readouterr().out == (
        "web1/xvda  cmp  1 MiB of 40 GiB in 14 s  (cbt-mismatch, base 20261121T020000Z)\n"
    )


@pytest.mark.parametrize("verbosity", [-1, 0])
def test_a_sample_that_did_not_match_is_told_even_to_whoever_wants_quiet(
    capsys: pytest.CaptureFixture[str], verbosity: int
) -> None:
    outcomes.show(Globals(verbosity=verbosity), [Result(done(DISK, warnings=(WRONG,)))])

    assert f"cbtfs: web1/{WRONG}\n" in capsys.readouterr().err


def test_document_says_how_each_disk_was_copied_and_what_was_found() -> None:
    document = outcomes.document(Result(done(DISK, warnings=(WRONG,))))

    assert document["warnings"] == [WRONG]
    assert document["disks"] == [
        {
            "device": "xvda",
            "vdi_uuid": uuid(5),
            "snapshot_uuid": "",
            "method": "compare",
            "reason": "cbt-mismatch",
            "detail": "1 of 16 blocks",
            "resumed": None,
            "base": "20261121T020000Z",
            "size": 40 << 30,
            "allocated": None,
            "extents": 0,
            "bytes_changed": 0,
            "bytes_read": 0,
            "bytes_written": 1 << 20,
            "blocks_sampled": 16,
            "blocks_mismatched": 1,
            "seconds": 14.2,
        }
    ]


# ── How to sync ──


JOB = JobTable(limit_rate="200M", verify_sample="1%", exclude_disks=("*scratch*",))


def test_a_job_says_how_to_sync() -> None:
    assert Wish().options("nightly", JOB) == SyncOptions(
        exclude_disks=("*scratch*",),
        sample=Sample(0.01, at_most=None),
        limit_rate=200 << 20,
        job="nightly",
    )


@pytest.mark.parametrize("rate", [0, 50 << 20])
def test_a_rate_that_is_given_goes_before_the_jobs(rate: int) -> None:
    assert Wish(limit_rate=rate).options("nightly", JOB).limit_rate == rate


def test_without_a_job_the_defaults_count() -> None:
    assert Wish().options() == SyncOptions()
    assert Wish(full=True, lock_wait=600).options() == SyncOptions(full=True, lock_wait=600)


# ── What is foretold ──


PLAN = DiskPlan(
    device="xvda",
    vdi_uuid=uuid(5),
    vdi_ref="V",
    size=20 << 30,
    method="compare",
    reason=Reason.MOVED,
    detail="xvda is another VDI",
)


@pytest.mark.parametrize(
    ("foretold", "amount"),
    [
        (Forecast(PLAN, 20 << 30, 1, at_most=True), "up to 20 GiB"),
        (Forecast(replace(PLAN, method="incremental"), 5 << 20, 7), "5 MiB in 7 extents"),
        (Forecast(replace(PLAN, method="incremental")), "changes"),
        (Forecast(replace(PLAN, method="resume")), "the rest"),
    ],
)
def test_what_there_is_to_read_is_told_as_far_as_it_is_known(
    foretold: Forecast, amount: str
) -> None:
    assert foretold.amount == amount


def test_the_forecast_shows_methods_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    resumed = replace(PLAN, device="xvdb", method="resume", detail="goes on from 4 GiB")
    plan = VMPlan(vm_uuid=uuid(1), vm_ref="M", vm_name="web1", disks=(PLAN, resumed))

    forecast.show(
        [(plan, [Forecast(PLAN, 20 << 30, 1, at_most=True), Forecast(resumed)])], as_json=False
    )

    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        [
            *("web1/xvda", "compare", "moved", "20", "GiB", "up", "to", "20", "GiB"),
            *("xvda", "is", "another", "VDI"),
        ],
        [
            *("web1/xvdb", "resume", "moved", "20", "GiB", "the", "rest"),
            *("goes", "on", "from", "4", "GiB"),
        ],
    ]


def test_vms_of_one_name_are_told_apart_in_the_forecast(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plans = [
        (VMPlan(vm_uuid=key, vm_ref="M", vm_name="web1"), [Forecast(PLAN)])
        for key in ("aaaaaaaa-0000-4000-8000-000000000001", "bbbbbbbb-0000-4000-8000-000000000001")
    ]

    forecast.show(plans, as_json=False)

    told = capsys.readouterr().out
    assert "web1~aaaaaaaa/xvda" in told
    assert "web1~bbbbbbbb/xvda" in told
