"""``restore --to``: disks of a restore point into files, or one onto a device."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import trio
import typer

from cbtfs import errors, progress, restorefile, units
from cbtfs.catalogue import DiskPoint, Reference
from cbtfs.progress import Progress
from cbtfs.restorefile import Restored, Wish
from cbtfs.store import Store, file_names

from . import context as contexts, outcomes, output, running
from .context import Globals

_GOES_ON = "the same command goes on from where this one was"


@dataclass(frozen=True, slots=True)
class _Task:
    """One disk and where it goes."""

    reference: Reference
    disk: DiskPoint
    target: Path
    wish: Wish

    @property
    def point(self) -> str:
        """The point, as a user may write it."""
        return f"{self.reference.history.name}/{self.reference.point.time}"

    @property
    def key(self) -> str:
        """What the disk is called."""
        return f"{self.point}/{self.disk.device}"


@dataclass(slots=True)
class _Told:
    """Passes on what a restore tells, from the thread in which it runs, and ends it if asked to."""

    task: _Task
    view: Progress
    warnings: list[str] = field(default_factory=list[str])

    def begun(self, what: Literal["copy", "verify"], total: int) -> None:
        reason = f"to {self.task.target}"
        method = "restore" if what == "copy" else "read back"
        self.view.disk_started(self.task.key, method=method, reason=reason, total=total)
        trio.from_thread.check_cancelled()

    def advanced(self, read: int, written: int) -> None:
        self.view.advanced(self.task.key, read=read, written=written)
        trio.from_thread.check_cancelled()

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def restore(  # noqa: PLR0913  # one parameter per option
    options: Globals,
    point: str,
    target: Path,
    *,
    force: bool,
    whole: bool,
    dry_run: bool,
    json_progress: bool,
) -> None:
    """Write the disk that ``point`` names into ``target``; all its disks, into a directory."""
    target = _resolved(target)
    with contexts.opened_store(options) as store:
        reference = contexts.point_of(store, point)
        tasks = _tasks(store, reference, target, Wish(forced=force, whole=whole))
        for failure in () if reference.disk else reference.point.failures:
            contexts.warn(f"{point}/{failure.device} is not in this point: {failure.error}")
        if dry_run:
            documents = [_planned(options, store, task) for task in tasks]
        else:
            kind = contexts.progress_kind(options, as_json=json_progress)
            documents = running.run(lambda: _restore(options, store, tasks, kind), then=_GOES_ON)
        failed = sum("error" in document for document in documents)
    if options.json and target.is_dir():
        name = f"{reference.history.name}/{reference.point.time}"
        output.document({"point": name, "target": str(target), "disks": documents})
    elif options.json:
        output.document(documents[0])
    if failed:
        raise typer.Exit(outcomes.PARTIAL)


def _resolved(target: Path) -> Path:
    """Return ``target`` without symbolic links, but a device by the name that was given."""
    if target.is_block_device():
        return target.absolute()
    try:
        return target.resolve()
    except (OSError, RuntimeError):
        raise errors.UsageError(f"{target} is a symbolic link that leads nowhere") from None


def _tasks(store: Store, reference: Reference, target: Path, wish: Wish) -> list[_Task]:
    """Return what goes where.

    Raises:
        UsageError: it is not clear which disk, or a target is none.
    """
    point = reference.point
    disks = (reference.disk,) if reference.disk else point.disks
    damaged = store.damaged(reference.history.uuid, point.time)
    if not disks:
        raise errors.NotFound(f"{reference.history.name}/{point.time} has no disks")
    if target.is_dir():
        wish = replace(wish, among=True)
        targets = [target / file_names(disk.device)[0] for disk in disks]
    elif len(disks) == 1:
        targets = [target]
    else:
        raise errors.UsageError(
            f"{reference.history.name}/{point.time} has the disks"
            f" {', '.join(disk.device for disk in disks)}: name one, such as"
            f" {reference.history.name}/{point.time}/{disks[0].device}, or a directory that exists, for all"
        )
    for one in targets:
        restorefile.check_target(one, store=store.path, wish=wish)
    return [
        _Task(
            reference,
            disk,
            one,
            replace(wish, damaged=disk.device in damaged),
        )
        for disk, one in zip(disks, targets, strict=True)
    ]


# ── -n ───────────────────────────────────────────────────────────────────────────────────────

_HOW = {
    "reflink": "shares the image's extents",
    "copy": "copied",
    "device": "copied, the rest of the disk made zero",
    "compare": "exists; compared with the image",
}


def _planned(options: Globals, store: Store, task: _Task) -> dict[str, object]:
    with store.image_files(task.reference, task.disk) as files:
        plan = restorefile.plan(files, task.disk, task.target, wish=task.wish)
        source = str(files.path)
    if not options.json:
        written, size = (units.format_size(n) for n in (plan.bytes_to_write, task.disk.size))
        resumes = ", goes on with what an earlier run began" if plan.resumes else ""
        text = f"{task.key}  {written} of {size} to write  {_HOW[plan.how]}{resumes}"
        output.line(output.safe(f"{text}  {source} -> {task.target}"))
    return {
        "point": task.point,
        "device": task.disk.device,
        "source": source,
        "target": str(task.target),
        "size": task.disk.size,
        "bytes_to_write": plan.bytes_to_write,
        "how": plan.how,
        "resumes": plan.resumes,
    }


# ── The run ──────────────────────────────────────────────────────────────────────────────────


async def _restore(
    options: Globals, store: Store, tasks: Sequence[_Task], kind: progress.Kind
) -> list[dict[str, object]]:
    """Restore disk after disk; one that fails does not keep the others.

    Raises:
        CbtfsError: none could be restored.
    """
    documents: list[dict[str, object]] = []
    failed: list[errors.CbtfsError] = []
    for task in tasks:
        told = _Told(task, progress.SilentProgress())
        try:
            with progress.open_progress(kind, sys.stderr) as told.view:
                done = await _run(store, task, told)
        except errors.CbtfsError as exc:
            failed.append(exc)
            documents.append(_failure(task, exc))
        else:
            if not options.json:
                output.line(output.safe(_summary(task, done)))
            documents.append(_document(task, done, told.warnings))
            if (done.damaged or task.wish.damaged) and options.quiet:  # whoever uses it must know
                output.note(told.warnings[-1 if done.damaged else 0])
        finally:
            for text in told.warnings:
                contexts.warn(text)
    if len(failed) == len(tasks):
        first = failed.pop(0)
        _tell(failed)
        raise first
    _tell(failed)
    return documents


def _tell(failed: Sequence[errors.CbtfsError]) -> None:
    for error in failed:
        output.note(str(error))


async def _run(store: Store, task: _Task, told: _Told) -> Restored:
    def work() -> Restored:
        with store.image_files(task.reference, task.disk) as files:
            return restorefile.restore(files, task.disk, task.target, wish=task.wish, told=told)

    try:
        done = await trio.to_thread.run_sync(work)
    except errors.CbtfsError as exc:
        # people are told when the command ends with it
        shown = str(exc) if isinstance(told.view, progress.JsonProgress) else ""
        told.view.disk_finished(task.key, None, shown)
        raise
    told.view.disk_finished(task.key, _record(task, done))
    return done


def _record(task: _Task, done: Restored) -> DiskPoint:
    """Return what a view of the progress is told of a disk that is finished."""
    return msgspec.structs.replace(
        task.disk,
        method="restore",
        reason="",
        detail="",
        resumed="restore" if done.resumed else "",
        base="",
        bytes_read=done.verified,
        bytes_written=done.written,
        blocks_sampled=0,
        blocks_mismatched=0,
        seconds=done.seconds,
    )


def _summary(task: _Task, done: Restored) -> str:
    """Return the line that remains.

    ::

        web1/20261122T020000Z/xvda  1.2 GiB of 40 GiB in 14 s  (20 MiB read back)  -> /tmp/xvda.raw
    """
    size, written, verified = (
        units.format_size(n) for n in (task.disk.size, done.written, done.verified)
    )
    how = "shares its extents, " if done.reflinked else "gone on with, " if done.resumed else ""
    return (
        f"{task.key}  {written} of {size} in {units.format_duration(done.seconds)}"
        f"  ({how}{verified} read back)  -> {task.target}"
    )


def _failure(task: _Task, exc: errors.CbtfsError) -> dict[str, object]:
    return {
        "point": task.point,
        "device": task.disk.device,
        "target": str(task.target),
        "error": str(exc),
    }


def _document(task: _Task, done: Restored, warnings: Sequence[str]) -> dict[str, object]:
    return {
        "point": task.point,
        "device": task.disk.device,
        "target": str(task.target),
        "size": task.disk.size,
        "bytes_written": done.written,
        "reflinked": done.reflinked,
        "resumed": done.resumed,
        "verified_bytes": done.verified,
        "damaged_bytes": done.damaged,
        "warnings": list(warnings),
        "seconds": done.seconds,
    }
