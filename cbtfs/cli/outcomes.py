"""Outcomes: what a sync tells in the end - its lines, its warnings, its document, its status."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cbtfs import progress
from cbtfs.catalogue import DiskPoint
from cbtfs.progress import Progress
from cbtfs.sync import Outcome

from . import context as contexts, output
from .context import Globals

PARTIAL = 3
"""Exit status when some disks or VMs failed and others did not."""


@dataclass(slots=True)
class Failures:
    """The disks that failed, noted on their way to a view; it fits ``Progress``.

    Attributes:
        told: whether the view tells of them, so that nobody else has to.
        disks: why each failed, by its key.
    """

    told: bool
    view: Progress = field(default_factory=progress.SilentProgress)
    disks: dict[str, str] = field(default_factory=dict[str, str])

    def disk_started(self, key: str, *, method: str, reason: str, total: int) -> None:
        """Pass it on."""
        self.view.disk_started(key, method=method, reason=reason, total=total)

    def advanced(self, key: str, *, read: int, written: int) -> None:
        """Pass it on."""
        self.view.advanced(key, read=read, written=written)

    def disk_finished(self, key: str, point: DiskPoint | None, error: str = "") -> None:
        """Note the error, if it is one, and pass it on."""
        if error:
            self.disks[key] = error
        self.view.disk_finished(key, point, error)

    def message(self, text: str) -> None:
        """Pass it on."""
        self.view.message(text)

    def take(self, outcome: Outcome) -> "Result":
        """Return ``outcome`` with its failures, and forget them: another job may have its VM."""
        name = label(outcome)
        keys = [key for key in self.disks if key.rpartition("/")[0] == name]
        failed = {key.rpartition("/")[2]: self.disks.pop(key) for key in keys}
        return Result(outcome, failed, told=self.told)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one VM, and of each of its disks that failed.

    Attributes:
        failed: why, by device.
        told: whether that has been told.
    """

    outcome: Outcome
    failed: Mapping[str, str] = field(default_factory=dict[str, str])
    told: bool = False


def label(outcome: Outcome) -> str:
    """Return what the VM is called: its name, with ``~`` and digits if others have it too."""
    return outcome.label or outcome.vm_name


def show(options: Globals, results: Sequence[Result]) -> None:
    """Print the lines or the document to stdout, and what went wrong to stderr."""
    for result in results:
        _show_problems(result)
        plan = result.outcome.plan
        for device, why in plan.skipped if plan else ():
            options.tell(f"{label(result.outcome)}/{device} left out: {why}")
    if options.json:
        output.document({"vms": [document(result) for result in results]})
        return
    for result in results:
        point = result.outcome.point
        for disk in point.disks if point else ():
            text = progress.summary(f"{label(result.outcome)}/{disk.device}", disk)
            output.line(output.safe(text))
        for time in result.outcome.removed:
            options.tell(f"{label(result.outcome)}/{time} removed: no rule keeps it")


def _show_problems(result: Result) -> None:
    """Tell on stderr what failed, as far as no view has; errors are told even with ``-q``."""
    outcome, name = result.outcome, label(result.outcome)
    if not result.told:
        for device, why in result.failed.items():
            output.note(f"{name}/{device}: {why}")
    if outcome.error is not None:
        text = str(outcome.error)
        if text in result.failed.values():
            text = "no disk could be copied, so there is no restore point"
        note_error(outcome, text)
    for text in outcome.problems:
        contexts.warn(f"{name}: {text}")
    point = outcome.point
    # that the pool's tracking is wrong must be heard by whoever believes in it, so also with -q
    mistrusted = point is not None and any(disk.blocks_mismatched for disk in point.disks)
    tell = output.note if mistrusted else contexts.warn
    for text in point.warnings if point else ():
        of_disk = (
            any(text.startswith(f"{disk.device}: ") for disk in point.disks) if point else False
        )
        tell(f"{name}/{text}" if of_disk else f"{name}: {text}")


def note_error(outcome: Outcome, text: str) -> None:
    """Tell on stderr what went wrong, and with which VM, if ``text`` does not say it."""
    output.note(text if outcome.vm_name in text else f"{label(outcome)}: {text}")


def document(result: Result) -> dict[str, object]:
    """Return what ``sync --json`` says of one VM."""
    outcome, point = result.outcome, result.outcome.point
    planned = {disk.device: disk for disk in outcome.plan.disks} if outcome.plan else {}
    failures = [
        {"device": failure.device, "vdi_uuid": failure.vdi_uuid, "error": failure.error}
        for failure in (point.failures if point else ())
    ]
    if point is None:
        failures = [
            {"device": d, "vdi_uuid": planned[d].vdi_uuid if d in planned else "", "error": why}
            for d, why in result.failed.items()
        ]
    return {
        "vm": outcome.vm_name,
        "uuid": outcome.vm_uuid,
        "point": point.time if point else None,
        "state": point.state if point else "failed" if outcome.error else "skipped",
        "disks": [_disk_document(disk) for disk in (point.disks if point else ())],
        "failures": failures,
        "removed": list(outcome.removed),
        "skipped": [
            {"device": device, "why": why}
            for device, why in (outcome.plan.skipped if outcome.plan else ())
        ],
        "warnings": [*(point.warnings if point else ()), *outcome.problems],
        "error": str(outcome.error) if outcome.error else None,
    }


def _disk_document(disk: DiskPoint) -> dict[str, object]:
    return {
        "device": disk.device,
        "vdi_uuid": disk.vdi_uuid,
        "snapshot_uuid": disk.snapshot_uuid,
        "method": disk.method,
        "reason": disk.reason,
        "detail": disk.detail,
        "resumed": disk.resumed or None,
        "base": disk.base or None,
        "size": disk.size,
        "allocated": disk.allocated if disk.allocated >= 0 else None,
        "extents": disk.extents,
        "bytes_changed": disk.bytes_changed,
        "bytes_read": disk.bytes_read,
        "bytes_written": disk.bytes_written,
        "blocks_sampled": disk.blocks_sampled,
        "blocks_mismatched": disk.blocks_mismatched,
        "seconds": disk.seconds,
    }


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return 0 if all is done, 3 if only some is, else, without any point, that of what went wrong.

    A VM none of whose disks can be synced is no failure, unless nothing else was asked for.
    """
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    partial = any(o.point is not None and o.point.state == "partial" for o in outcomes)
    done = any(outcome.point is not None for outcome in outcomes)
    if partial or (failed and done):
        return PARTIAL
    if outcomes and not done:
        statuses = {error.exit_code for error in failed}
        return statuses.pop() if len(statuses) == 1 else 1
    return 0
