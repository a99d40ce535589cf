"""``sync``: restore points for the jobs of the configuration, or for what the options select."""

import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, TypeVar

import typer

from cbtfs import config, errors, progress, selection, sync as syncs, units
from cbtfs.inventory import Inventory
from cbtfs.pool import Pool
from cbtfs.progress import Progress
from cbtfs.store import Store
from cbtfs.sync import Outcome, SyncOptions, Target
from cbtfs.tables import JobTable

from . import context as contexts, forecast, outcomes, running
from .context import Globals
from .forecast import Planned
from .outcomes import Failures, Result

_T = TypeVar("_T")


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("sync", epilog="Example: cbtfs sync --vm 'web*' -n")(sync)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options say of how to sync; None where they say nothing, and a job may."""

    full: bool = False
    limit_rate: int | None = None
    lock_wait: float = 0.0

    def options(self, name: str = "", job: JobTable | None = None) -> SyncOptions:
        """Return how to sync the job ``name``, or without one what the command line selects."""
        job = job or JobTable()
        return SyncOptions(
            full=self.full,
            exclude_disks=job.exclude_disks,
            sample=config.sample_of(job),
            limit_rate=config.rate_of(job) if self.limit_rate is None else self.limit_rate,
            lock_wait=self.lock_wait,
            job=name,
            keep=job.keep,
        )


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
    limit_rate: Annotated[
        str | None,
        typer.Option(
            "--limit-rate",
            metavar="SIZE",
            help="Read at most so many bytes per second, over all disks, such as 50M;"
            " a job's own limit does not count then.",
        ),
    ] = None,
    lock_wait: Annotated[
        str,
        typer.Option(
            "--lock-wait",
            metavar="DURATION",
            help="Wait so long for another run of the same VM, such as 10m; else status 11.",
        ),
    ] = "0",
    dry_run: contexts.DryRun = False,
    json_progress: contexts.JsonProgress = False,
) -> None:
    """Make restore points: full the first time, then only what changed."""
    options = contexts.of(context)
    wish = Wish(
        full,
        contexts.parsed("--limit-rate", units.parse_rate, limit_rate)
        if limit_rate is not None
        else None,
        contexts.parsed("--lock-wait", units.parse_duration, lock_wait),
    )
    runs = _runs(options, jobs or [], vms=vm or [], vdis=vdi or [], wish=wish)
    if dry_run:
        plans, failed = running.run(lambda: _plan_all(runs))
        status = outcomes.exit_status(failed)
        if not plans and len(failed) == 1 and failed[0].error is not None:
            raise failed[0].error
        forecast.show(plans, as_json=options.json)
        for outcome in failed:
            outcomes.note_error(outcome, str(outcome.error))
        if status:
            raise typer.Exit(outcomes.PARTIAL if plans else status)
        return
    kind = contexts.progress_kind(options, as_json=json_progress)
    results = running.run(lambda: _run_all(runs, kind), then=_GOES_ON)
    outcomes.show(options, results)
    status = outcomes.exit_status([result.outcome for result in results])
    if status:
        raise typer.Exit(status)


_GOES_ON = "the next sync goes on from where this one was"


# ── What to do ───────────────────────────────────────────────────────────────────────────────


def _runs(
    options: Globals,
    jobs: Sequence[str],
    *,
    vms: Sequence[str],
    vdis: Sequence[str],
    wish: Wish,
) -> list[Run]:
    if vms or vdis:
        if jobs:
            raise errors.UsageError("give jobs, or --vm and --vdi, not both")
        return [Run(options, vms=tuple(vms), vdis=tuple(vdis), how=wish.options())]
    configuration = options.configuration()
    names = list(jobs) or list(configuration.jobs)
    if not names:
        raise errors.UsageError(
            "nothing to sync: name a job of the configuration, or select VMs, such as --vm 'web*'"
        )
    runs: list[Run] = []
    keeps = {name: job.keep for name, job in configuration.jobs.items()}
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
                how=replace(wish.options(name, job), keeps=keeps),
            )
        )
    for warning in config.warnings(configuration):
        contexts.warn(warning)
    return runs


def _targets(inventory: Inventory, run: Run) -> list[Target]:
    chosen: list[Target] = []
    if run.vms:
        chosen += selection.select_vms(inventory, run.vms)
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
            if one.vdis or not selection.is_open(name):
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


async def _plan_all(runs: Sequence[Run]) -> tuple[Planned, list[Outcome]]:
    """Return what can be planned, and a failed outcome for what cannot, as the run itself would."""
    planned: Planned = []
    failed: list[Outcome] = []
    for run in runs:
        try:
            plans, missing = await _plan(run)
        except errors.CbtfsError as exc:
            plans, missing = [], [Outcome("", run.name, error=exc)]
        planned += plans
        failed += missing
    return planned, failed


async def _plan(run: Run) -> tuple[Planned, list[Outcome]]:
    with contexts.store_if_any(run.options) as store:
        async with _opened(run, store) as (pool, inventory):
            targets, missing = _targets_there(inventory, run)
            plans = syncs.plan(inventory, store, targets, options=run.how)
            return [
                (plan, [await forecast.of_disk(pool, inventory, disk) for disk in plan.disks])
                for plan in plans
            ], missing


# ── The run ──────────────────────────────────────────────────────────────────────────────────


async def _run_all(runs: Sequence[Run], kind: progress.Kind) -> list[Result]:
    results: list[Result] = []
    failures = Failures(told=kind != "silent")
    with progress.open_progress(kind, sys.stderr) as failures.view:
        for run in runs:
            try:
                done = await _run(run, failures)
            except errors.CbtfsError as exc:
                # what other jobs have done, and will do, is not to be lost for this one
                done = [Outcome("", run.name, error=exc)]
            results += [failures.take(outcome) for outcome in done]
    return results


async def _run(run: Run, view: Progress) -> list[Outcome]:
    with contexts.opened_store(run.options, create=True) as store:
        async with _opened(run, store) as (pool, inventory):
            targets, missing = _targets_there(inventory, run)
            done = await syncs.run(pool, store, targets, progress=view, options=run.how)
            return [*missing, *done]
