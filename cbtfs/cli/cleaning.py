"""``clean``: remove what dead runs left in pool and store."""

from typing import Annotated

import typer

from cbtfs import clean as cleans, errors, process, units
from cbtfs.clean import CleanOptions, Done, Report
from cbtfs.leftovers import Thing, Wish
from cbtfs.pool import Pool

from . import context as contexts, output, running
from .context import Globals
from .output import Table

PARTIAL = 3
"""Exit status when some things could not be removed and others could."""


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("clean", epilog="Example: cbtfs clean -n")(clean)


def clean(
    context: typer.Context,
    *,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            metavar="",
            help="Remove partial points that the next sync would go on with, too.",
        ),
    ] = False,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="DURATION", help="As --partial, of older ones only, as 7d."
        ),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            "--host", metavar="NAME", help="What this machine left too: it is gone for good."
        ),
    ] = None,
    unblock: Annotated[
        bool,
        typer.Option(
            "--unblock",
            metavar="",
            help="Let VMs start as they are whose restore --in-place was killed half-way.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("-n", "--dry-run", metavar="", help="Only print what would be removed."),
    ] = False,
) -> None:
    """Remove what killed runs left: partial points, snapshots, disks in control domains, tasks."""
    options = contexts.of(context)
    gone = frozenset(host or [])
    if process.this_process().host in gone:
        raise errors.UsageError(
            "--host is for other machines: of this one it is known which processes are dead"
        )
    age = units.parse_duration(older_than) if older_than is not None else 0.0
    wish = Wish(partial=partial or older_than is not None, older_than=age, unblock=unblock)
    how = CleanOptions(wish=wish, gone_hosts=gone)
    report, problem = running.run(lambda: _clean(options, how, dry_run=dry_run))
    _show(options, report, dry_run=dry_run)
    if problem is not None:
        raise problem
    status = exit_status(report)
    if status:
        raise typer.Exit(status)


async def _clean(
    options: Globals, how: CleanOptions, *, dry_run: bool
) -> tuple[Report, errors.PoolError | None]:
    """Return what was done, and why the pool could not be asked, if it could not."""
    with contexts.store_if_any(options) as store:

        async def work(pool: Pool | None) -> Report:
            if not dry_run:
                return await cleans.run(pool, store, options=how)
            found = await cleans.find(pool, store, options=how)
            return Report(tuple(Done(thing) for thing in found.remove), found.left)

        try:
            async with contexts.opened_pool(options) as pool:
                return await work(pool), None
        except errors.PoolError as exc:
            return await work(None), exc


def exit_status(report: Report) -> int:
    """Return 0 if all is done, 3 if only some is, 1 if nothing is."""
    failed = [done for done in report.done if done.error is not None]
    if not failed:
        return 0
    return PARTIAL if len(failed) < len(report.done) else 1


def _show(options: Globals, report: Report, *, dry_run: bool) -> None:
    for done in report.done:
        if done.error is not None:
            output.note(f"{done.thing.kind} {done.thing.name}: {done.error}")
    if options.json:
        output.document(_document(report, dry_run=dry_run))
        return
    if report.done or report.left:
        _table(report, dry_run=dry_run).print()
    if not report.done:
        output.line("nothing to clean")


def _table(report: Report, *, dry_run: bool) -> Table:
    table = Table(["WHAT", "NAME", "DONE", "WHY"], flexible=(3,))
    for done in report.done:
        thing = done.thing
        did = "failed" if done.error else "would remove" if dry_run else "removed"
        table.add(thing.kind, thing.name, did, thing.why)
    grouped: dict[tuple[str, str], list[Thing]] = {}
    for thing in report.left:
        grouped.setdefault((thing.kind, thing.why), []).append(thing)
    for (kind, why), things in grouped.items():
        name = things[0].name if len(things) == 1 else f"{len(things)} (--json names them)"
        table.add(kind, name, "left", why)
    return table


def _document(report: Report, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "removed": [_thing(done.thing) for done in report.done if done.error is None],
        "failed": [
            {**_thing(done.thing), "error": str(done.error)}
            for done in report.done
            if done.error is not None
        ],
        "left": [_thing(thing) for thing in report.left],
    }


def _thing(thing: Thing) -> dict[str, object]:
    return {"what": thing.kind, "name": thing.name, "why": thing.why}
