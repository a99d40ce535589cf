"""``prune``, ``pin`` and ``unpin``: which restore points stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated

import typer

from cbtfs import config, errors, prune as prunes, retention
from cbtfs.catalogue import Catalogue, VMHistory
from cbtfs.config import Config
from cbtfs.retention import Keep, Verdict
from cbtfs.store import Store
from cbtfs.tables import JobTable

from . import context as contexts, listing, output, points
from .context import Globals
from .outcomes import PARTIAL
from .output import Table


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("prune", epilog="Example: cbtfs prune --keep-last 3 --keep-daily 14 -n")(prune)
    app.command("pin", epilog="Example: cbtfs pin web1/20261122T020000Z")(pin)
    app.command("unpin", epilog="Example: cbtfs unpin web1/20261122T020000Z")(unpin)


@dataclass(slots=True)
class _Pruned:
    """What became, or would become, of the points of a VM; ``error`` is why nothing did."""

    history: VMHistory
    keep: Keep
    verdicts: list[Verdict]
    error: errors.CbtfsError | None = None


# ── prune ────────────────────────────────────────────────────────────────────────────────────────


def _keeping(what: str) -> object:
    return typer.Option(f"--keep-{what}", metavar="N", min=0, help=f"Keep N {what} points.")


def prune(  # noqa: PLR0913  # one parameter per option
    context: typer.Context,
    *,
    vm: Annotated[
        list[str] | None,
        typer.Option("--vm", metavar="GLOB", help="Only VMs of this name or uuid."),
    ] = None,
    last: Annotated[int, _keeping("last")] = 0,
    hourly: Annotated[int, _keeping("hourly")] = 0,
    daily: Annotated[int, _keeping("daily")] = 0,
    weekly: Annotated[int, _keeping("weekly")] = 0,
    monthly: Annotated[int, _keeping("monthly")] = 0,
    yearly: Annotated[int, _keeping("yearly")] = 0,
    dry_run: contexts.DryRun = False,
) -> None:
    """Remove the restore points that no rule keeps.

    The rules are those of the jobs in the configuration, or the options'.
    """
    options = contexts.of(context)
    asked = Keep(
        last=last, hourly=hourly, daily=daily, weekly=weekly, monthly=monthly, yearly=yearly
    )
    with contexts.opened_store(options) as store:
        catalogue = contexts.catalogue_of(store)
        histories = listing.matching(catalogue.vms.values(), vm or [])
        keeps = _policies(options, histories, asked)
        for history in histories:
            if history.uuid not in keeps:
                label = points.label(catalogue, history)
                contexts.warn(
                    f"{label}: no job, or not each of them, says what to keep of it, so all of it stays"
                )
        if not keeps:
            raise errors.UsageError(
                "no rule to prune by: give a job keep = { … }, or options such as --keep-daily 14"
            )
        chosen = [history for history in histories if history.uuid in keeps]
        pruned = [_pruned(store, h, keeps[h.uuid], dry_run=dry_run) for h in chosen]
        _show(options, catalogue, pruned, dry_run=dry_run)
    _end(pruned)


def _pruned(store: Store, history: VMHistory, keep: Keep, *, dry_run: bool) -> _Pruned:
    try:
        if dry_run:
            return _Pruned(history, keep, prunes.verdicts(store, history, keep))
        return _Pruned(history, keep, prunes.prune(store, history.uuid, keep))
    except errors.StoreError as exc:
        return _Pruned(history, keep, [], exc)


def _show(
    options: Globals, catalogue: Catalogue, pruned: Sequence[_Pruned], *, dry_run: bool
) -> None:
    if options.json:
        output.document({"dry_run": dry_run, "vms": [_document(vm) for vm in pruned]})
        return
    table = Table(["POINT", "VERDICT", "WHY"], flexible=(0,))
    for vm in pruned:
        label = points.label(catalogue, vm.history)
        for verdict in vm.verdicts:
            why = ", ".join(verdict.reasons) or "no rule keeps it"
            done = "keep" if verdict.kept else "remove" if dry_run else "removed"
            table.add(f"{label}/{verdict.point.time}", done, why)
    if table.rows:
        table.print()
    gone = sum(not verdict.kept for vm in pruned for verdict in vm.verdicts)
    stay = sum(verdict.kept for vm in pruned for verdict in vm.verdicts)
    would = "would be " if dry_run else ""
    options.tell(f"{gone} of {gone + stay} restore points {would}removed")


def _document(vm: _Pruned) -> dict[str, object]:
    return {
        "name": vm.history.name,
        "uuid": vm.history.uuid,
        "keep": vm.keep.rules(),
        "error": str(vm.error) if vm.error is not None else "",
        "points": [
            {"time": v.point.time, "kept": v.kept, "reasons": list(v.reasons)} for v in vm.verdicts
        ],
    }


def _end(pruned: Sequence[_Pruned]) -> None:
    """End with the status of what went wrong, if anything did."""
    failed = [vm for vm in pruned if vm.error is not None]
    for vm in failed[: len(failed) if len(failed) < len(pruned) else -1]:
        contexts.warn(f"{vm.history.name}: {vm.error}")
    if failed and len(failed) < len(pruned):
        raise typer.Exit(PARTIAL)
    for vm in failed[-1:]:
        raise vm.error or errors.StoreError(vm.history.name)


# ── whose rules ──────────────────────────────────────────────────────────────────────────────────


def _policies(options: Globals, histories: Sequence[VMHistory], asked: Keep) -> Mapping[str, Keep]:
    """Return the rules for each VM that has some, by the name of its directory."""
    if asked.rules():
        return {history.uuid: asked for history in histories}
    configuration = options.configuration()
    jobs = _jobs_of_store(options, configuration)
    found: dict[str, Keep] = {}
    for history in histories:
        keeps = [job.keep for name, job in jobs.items() if _is_of(history, name, job)]
        most = retention.most(keeps)
        if most is not None and keeps:
            found[history.uuid] = most
    return found


def _jobs_of_store(options: Globals, configuration: Config) -> dict[str, JobTable]:
    """Return the jobs whose restore points are in the store that was chosen."""
    chosen = options.store_path()
    jobs: dict[str, JobTable] = {}
    for name, job in configuration.jobs.items():
        store = job.store or options.store
        if config.choose_store(configuration, store, environ=options.environ) == chosen:
            jobs[name] = job
    return jobs


def _is_of(history: VMHistory, name: str, job: JobTable) -> bool:
    """Tell whether a job makes points of a VM: one of them says so, or the VM is called so.

    What ``tag:`` and ``sr:`` select only a pool knows, and only at the time of a sync.
    """
    latest = history.latest
    if any(point.job == name for point in history.points):
        return True
    if job.keep is None:
        return False
    return not (latest is not None and latest.job) and any(
        pattern in {history.name, history.uuid} or fnmatchcase(history.name, pattern)
        for pattern in job.vms or ("*",)
    )


# ── pin ──────────────────────────────────────────────────────────────────────────────────────────

_Points = Annotated[list[str], typer.Argument(metavar="POINT...", help="VM/TIME.")]


def pin(context: typer.Context, named: _Points) -> None:
    """Keep restore points whatever the rules say."""
    _pin(context, named, wanted=True)


def unpin(context: typer.Context, named: _Points) -> None:
    """Let the rules decide about restore points again."""
    _pin(context, named, wanted=False)


def _pin(context: typer.Context, named: Sequence[str], *, wanted: bool) -> None:
    options = contexts.of(context)
    documents: list[dict[str, object]] = []
    with contexts.opened_store(options) as store:
        catalogue = contexts.catalogue_of(store)
        chosen = [catalogue.resolve(text) for text in named]
        for text, reference in zip(named, chosen, strict=True):
            if reference.disk is not None:
                raise errors.UsageError(f"{text!r} is a disk; a pin is on a whole restore point")
        for reference in chosen:
            history, time = reference.history, reference.point.time
            changed = store.pin(history.uuid, time, wanted=wanted)
            name = f"{points.label(catalogue, history)}/{time}"
            documents.append({"point": name, "pinned": wanted, "changed": changed})
            if not options.json:
                output.line(output.safe(_told(name, wanted=wanted, changed=changed)))
    if options.json:
        output.document({"points": documents})


def _told(name: str, *, wanted: bool, changed: bool) -> str:
    if wanted:
        return f"{name} is pinned: it stays until unpinned" if changed else f"{name} was pinned"
    return f"{name} is pinned no more" if changed else f"{name} was not pinned"
