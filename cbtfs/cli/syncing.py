"""``sync``: restore points for the jobs of the configuration, or for what the options select."""

import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import typer

from cbtfs import config, errors, plan as planning, progress, sync as syncs, units
from cbtfs.catalogue import DiskPoint
from cbtfs.inventory import VM, Inventory
from cbtfs.plan import DiskPlan, VMPlan
from cbtfs.pool import Pool
from cbtfs.progress import Progress
from cbtfs.store import Store
from cbtfs.sync import Outcome, SyncOptions, Target

from . import context as contexts, output, running
from .context import Globals
from .output import Table

PARTIAL = 3
"""Exit status when some disks or VMs failed and others did not."""


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("sync", epilog="Example: cbtfs sync --vm 'web*' -n")(sync)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: where from and to (in ``options``), what, and how; ``name`` is its job's, if any."""

    options: Globals
    name: str = ""
    vms: tuple[str, ...] = ()
    vdis: tuple[str, ...] = ()
    how: SyncOptions = field(default_factory=SyncOptions)


def sync(  # noqa: PLR0913  # one parameter per option
    context: typer.Context,
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="JOB", help="Jobs of the configuration.")
    ] = None,
    *,
    vm: Annotated[
        list[str] | None,
        typer.Option("--vm", metavar="GLOB", help="These VMs: name, uuid, tag:…, sr:…"),
    ] = None,
    vdi: Annotated[
        list[str] | None, typer.Option("--vdi", metavar="UUID", help="This disk by itself.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", metavar="", help="Copy everything again.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("-n", "--dry-run", metavar="", help="Only print what would be done, and why."),
    ] = False,
    json_progress: Annotated[
        bool,
        typer.Option("--json-progress", metavar="", help="Progress as lines of JSON on stderr."),
    ] = False,
) -> None:
    """Make restore points: full the first time, then only what changed."""
    options = contexts.of(context)
    how = SyncOptions(full=full)
    runs = _runs(options, jobs or [], vms=vm or [], vdis=vdi or [], how=how)
    if dry_run:
        plans = running.run(lambda: _plan_all(runs))
        _show_plans(options, plans)
        return
    kind = _progress_kind(options, as_json=json_progress)
    failures = Failures(told=kind != "silent")
    outcomes = running.run(lambda: _run_all(runs, kind, failures))
    _show_outcomes(options, outcomes, failures)
    status = exit_status(outcomes)
    if status:
        raise typer.Exit(status)


# ── What to do ───────────────────────────────────────────────────────────────────────────────


def _runs(
    options: Globals,
    jobs: Sequence[str],
    *,
    vms: Sequence[str],
    vdis: Sequence[str],
    how: SyncOptions,
) -> list[Run]:
    if vms or vdis:
        if jobs:
            raise errors.UsageError("give jobs, or --vm and --vdi, not both")
        return [Run(options, vms=tuple(vms), vdis=tuple(vdis), how=how)]
    configuration = options.configuration()
    names = list(jobs) or list(configuration.jobs)
    if not names:
        raise errors.UsageError(
            "nothing to sync: name a job of the configuration, or select VMs, such as --vm 'web*'"
        )
    runs: list[Run] = []
    for name in names:
        job = config.choose_job(configuration, name)
        chosen = replace(
            options, pool=options.pool or job.pool or None, store=options.store or job.store or None
        )
        runs.append(
            Run(
                chosen,
                name=f"job {name}",
                vms=job.vms or ("*",),
                how=replace(how, exclude_disks=job.exclude_disks),
            )
        )
    for warning in config.warnings(configuration):
        contexts.warn(warning)
    return runs


def _targets(inventory: Inventory, run: Run) -> list[Target]:
    chosen: list[Target] = []
    if run.vms:
        chosen += planning.select_vms(inventory, run.vms)
    chosen += [inventory.vdi_by_uuid(uuid) for uuid in run.vdis]
    return chosen


def _targets_there(inventory: Inventory, run: Run) -> tuple[list[Target], list[Outcome]]:
    """Return what of ``run`` is there, and a failed outcome for each name that is not.

    Raises:
        NotFound: nothing is.
    """
    wanted = [replace(run, vms=(vm,), vdis=()) for vm in run.vms]
    wanted += [replace(run, vms=(), vdis=(vdi,)) for vdi in run.vdis]
    chosen: dict[str, Target] = {}
    missing: list[Outcome] = []
    for one in wanted:
        (name,) = one.vms or one.vdis
        try:
            chosen |= {target.ref: target for target in _targets(inventory, one)}
        except errors.NotFound as exc:
            if one.vdis or not planning.is_open(name):
                missing.append(Outcome("", name, error=exc))
    if not chosen and not missing:
        _targets(inventory, run)  # says that nothing matches
    return list(chosen.values()), missing


@asynccontextmanager
async def _opened(run: Run, store: Store | None) -> AsyncGenerator[tuple[Pool, Inventory]]:
    async with contexts.opened_pool(run.options) as pool:
        inventory = await pool.inventory()
        for problem in (*inventory.problems, *(store.problems if store else ())):
            contexts.warn(problem)
        yield pool, inventory


# ── -n ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a sync would do with a disk, and how much: None where only a snapshot could tell."""

    disk: DiskPlan
    changed: int | None
    extents: int | None


Planned = list[tuple[VMPlan, list[Forecast]]]


async def _plan_all(runs: Sequence[Run]) -> Planned:
    return [planned for run in runs for planned in await _plan(run)]


async def _plan(run: Run) -> Planned:
    with contexts.store_if_any(run.options) as store:
        async with _opened(run, store) as (pool, inventory):
            return [
                (plan, [await _forecast(pool, inventory, disk) for disk in plan.disks])
                for plan in _plans(inventory, store, run)
            ]


def _plans(inventory: Inventory, store: Store | None, run: Run) -> list[VMPlan]:
    targets = _targets(inventory, run)
    if store is not None:
        return syncs.plan(inventory, store, targets, options=run.how)
    return [_plan_of_nothing(inventory, target, run.how) for target in targets]


def _plan_of_nothing(inventory: Inventory, target: Target, how: SyncOptions) -> VMPlan:
    """Return the plan for a store that does not exist yet, which a dry run must not make."""
    if isinstance(target, VM):
        return planning.plan_vm(
            inventory, target, None, store="", full=how.full, exclude=how.exclude_disks
        )
    return planning.plan_vdi(inventory, target, None, store="", full=how.full)


async def _forecast(pool: Pool, inventory: Inventory, disk: DiskPlan) -> Forecast:
    if disk.base is None:
        return Forecast(disk, disk.size, 1)
    vbds = [inventory.vbds.get(ref) for ref in inventory.vdis[disk.vdi_ref].vbd_refs]
    if any(vbd is not None and vbd.currently_attached for vbd in vbds):
        return Forecast(disk, None, None)  # VDI_IN_USE: xapi tells only of a snapshot
    try:
        bitmap = await pool.changed_blocks(disk.base.snapshot_ref, disk.vdi_ref, size=disk.size)
    except errors.ChangesUnknown:  # the sync will find out, and read everything
        return Forecast(disk, None, None)
    return Forecast(disk, bitmap.changed_bytes, bitmap.extent_count())


def _show_plans(options: Globals, plans: Planned) -> None:
    if options.json:
        output.document({"dry_run": True, "vms": [_plan_document(*item) for item in plans]})
        return
    table = Table(["DISK", "METHOD", "REASON", ">SIZE", ">TO READ", "WHY"], flexible=(0, 5))
    for plan, disks in plans:
        for forecast in disks:
            disk = forecast.disk
            table.add(
                f"{plan.vm_name}/{disk.device}",
                disk.method,
                disk.reason,
                units.format_size(disk.size),
                _amount(forecast),
                disk.detail,
            )
        for device, why in plan.skipped:
            table.add(f"{plan.vm_name}/{device}", "skip", "", "", "", why)
    table.print()


def _amount(forecast: Forecast) -> str:
    if forecast.changed is None:
        return "changes"
    size = units.format_size(forecast.changed)
    return size if forecast.disk.base is None else f"{size} in {forecast.extents} extents"


def _plan_document(plan: VMPlan, disks: Sequence[Forecast]) -> dict[str, object]:
    return {
        "vm": plan.vm_name,
        "uuid": plan.vm_uuid,
        "disks": [
            {
                "device": forecast.disk.device,
                "vdi_uuid": forecast.disk.vdi_uuid,
                "method": forecast.disk.method,
                "reason": forecast.disk.reason,
                "detail": forecast.disk.detail,
                "size": forecast.disk.size,
                "base": forecast.disk.base.time if forecast.disk.base else None,
                "bytes_changed": forecast.changed,
                "extents": forecast.extents,
            }
            for forecast in disks
        ],
        "skipped": [{"device": device, "why": why} for device, why in plan.skipped],
    }


# ── The run ──────────────────────────────────────────────────────────────────────────────────


def _progress_kind(options: Globals, *, as_json: bool) -> progress.Kind:
    kind: Literal["bar", "line", "json", "silent"]
    if as_json:
        kind = "json"
    elif options.quiet:
        kind = "silent"
    else:
        kind = "bar" if sys.stderr.isatty() else "line"
    return kind


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

    def take(self, vm_name: str) -> dict[str, str]:
        """Return those of one VM, and forget them: another may have the same name."""
        keys = [key for key in self.disks if key.rpartition("/")[0] == vm_name]
        return {key: self.disks.pop(key) for key in keys}


async def _run_all(runs: Sequence[Run], kind: progress.Kind, failures: Failures) -> list[Outcome]:
    outcomes: list[Outcome] = []
    with progress.open_progress(kind, sys.stderr) as failures.view:
        for run in runs:
            try:
                outcomes += await _run(run, failures)
            except errors.CbtfsError as exc:
                # what other jobs have done, and will do, is not to be lost for this one
                outcomes.append(Outcome("", run.name, error=exc))
    return outcomes


async def _run(run: Run, view: Progress) -> list[Outcome]:
    with contexts.opened_store(run.options, create=True) as store:
        async with _opened(run, store) as (pool, inventory):
            targets, missing = _targets_there(inventory, run)
            done = await syncs.run(pool, store, targets, progress=view, options=run.how)
            return [*missing, *done]


def _show_outcomes(options: Globals, outcomes: Sequence[Outcome], failures: Failures) -> None:
    for outcome in outcomes:
        _show_problems(outcome, failures)
        for device, why in outcome.plan.skipped if outcome.plan else ():
            options.tell(f"{outcome.vm_name}/{device} left out: {why}")
    if options.json:
        output.document({"vms": [outcome_document(outcome) for outcome in outcomes]})
        return
    for outcome in outcomes:
        if outcome.point is not None:
            for disk in outcome.point.disks:
                output.line(output.safe(progress.summary(f"{outcome.vm_name}/{disk.device}", disk)))


def _show_problems(outcome: Outcome, failures: Failures) -> None:
    """Tell on stderr what failed, as far as no view has; errors are told even with ``-q``."""
    disks = failures.take(outcome.vm_name)
    for key, why in () if failures.told else disks.items():
        output.note(f"{key}: {why}")
    if outcome.error is not None:
        text = str(outcome.error)
        if text in disks.values():
            text = "no disk could be copied, so there is no restore point"
        output.note(text if outcome.vm_name in text else f"{outcome.vm_name}: {text}")
    for text in (*outcome.problems, *(outcome.point.warnings if outcome.point else ())):
        contexts.warn(f"{outcome.vm_name}: {text}")


def outcome_document(outcome: Outcome) -> dict[str, object]:
    """Return what ``sync --json`` says of one VM."""
    point = outcome.point
    details = {disk.device: disk.detail for disk in outcome.plan.disks} if outcome.plan else {}
    return {
        "vm": outcome.vm_name,
        "uuid": outcome.vm_uuid,
        "point": point.time if point else None,
        "state": point.state if point else "failed" if outcome.error else "skipped",
        "disks": [
            {
                "device": disk.device,
                "vdi_uuid": disk.vdi_uuid,
                "snapshot_uuid": disk.snapshot_uuid,
                "method": disk.method,
                "reason": disk.reason,
                "detail": details.get(disk.device, ""),
                "base": disk.base or None,
                "size": disk.size,
                "extents": disk.extents,
                "bytes_changed": disk.bytes_changed,
                "bytes_read": disk.bytes_read,
                "bytes_written": disk.bytes_written,
                "seconds": disk.seconds,
            }
            for disk in (point.disks if point else ())
        ],
        "failures": [
            {"device": failure.device, "vdi_uuid": failure.vdi_uuid, "error": failure.error}
            for failure in (point.failures if point else ())
        ],
        "skipped": [
            {"device": device, "why": why}
            for device, why in (outcome.plan.skipped if outcome.plan else ())
        ],
        "error": str(outcome.error) if outcome.error else None,
    }


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return 0 if all is done, 3 if only some is, else the status of what went wrong.

    A VM none of whose disks can be synced is no failure, unless nothing else was asked for.
    """
    failed = [outcome.error for outcome in outcomes if outcome.error is not None]
    partial = any(o.point is not None and o.point.state == "partial" for o in outcomes)
    if partial or (failed and len(failed) < len(outcomes)):
        return PARTIAL
    if outcomes and not any(outcome.point for outcome in outcomes):
        statuses = {error.exit_code for error in failed}
        return statuses.pop() if len(statuses) == 1 else 1
    return 0
