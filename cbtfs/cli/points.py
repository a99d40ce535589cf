"""``list``: what a store has."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from cbtfs import units
from cbtfs.catalogue import Catalogue, Point, VMHistory
from cbtfs.store import Store

from . import context as contexts, listing, output
from .output import Table


def register(app: typer.Typer) -> None:
    """Add the verb of this module to ``app``."""
    app.command("list", epilog="Example: cbtfs --store /srv/backup list --vm 'web*'")(list_points)


# ── list ─────────────────────────────────────────────────────────────────────────────────────


def list_points(
    context: typer.Context,
    *,
    vm: Annotated[
        list[str] | None,
        typer.Option("--vm", metavar="GLOB", help="Only VMs of this name or uuid."),
    ] = None,
) -> None:
    """List the restore points in the store."""
    options = contexts.of(context)
    with contexts.opened_store(options) as store:
        catalogue = contexts.catalogue_of(store)
        histories = listing.matching(catalogue.vms.values(), vm or [])
        if options.json:
            output.document({"store": _store_document(store), "vms": _document(store, histories)})
        else:
            _print(store, catalogue, histories)


def _print(store: Store, catalogue: Catalogue, histories: Sequence[VMHistory]) -> None:
    table = Table(
        ["POINT", ">DISKS", ">SIZE", ">READ", ">WRITTEN", "METHOD", "STATE"], flexible=(0,)
    )
    for history in histories:
        name = label(catalogue, history)
        rows = [_row(store, name, point) for point in history.points]
        rows += [
            (f"{name}/{point.time}", *("-",) * 5, "damaged, see the warning")
            for point in store.unlisted
            if point.vm_uuid == history.uuid
        ]
        for row in sorted(rows):
            table.add(*row)
    table.print()


def _row(store: Store, name: str, point: Point) -> tuple[str, ...]:
    return (
        f"{name}/{point.time}",
        str(len(point.disks)),
        units.format_size(sum(disk.size for disk in point.disks)),
        units.format_size(sum(disk.bytes_read for disk in point.disks)),
        units.format_size(sum(disk.bytes_written for disk in point.disks)),
        ", ".join(sorted({_method(disk.method, disk.reason) for disk in point.disks})),
        _state(store, point),
    )


def _state(store: Store, point: Point) -> str:
    """Return whether all disks are there, and undamaged as far as ``verify`` has looked."""
    state = "pinned, " if store.is_pinned(point.vm_uuid, point.time) else ""
    state += point.state
    if point.failures:
        state += f" (without {', '.join(failure.device for failure in point.failures)})"
    damaged = store.damaged(point.vm_uuid, point.time)
    return f"{state}, damaged: {', '.join(sorted(damaged))}" if damaged else state


def label(catalogue: Catalogue, history: VMHistory) -> str:
    """Return what to write for the VM in a POINT: its name if only it has that name."""
    twins = [h for h in catalogue.vms.values() if h.name == history.name]
    return history.name if len(twins) == 1 else history.uuid


def _method(method: str, reason: str) -> str:
    return method if reason in ("", "changed") else f"{method} ({reason})"


def _store_document(store: Store) -> dict[str, object]:
    return {"path": str(store.path), "uuid": store.uuid}


def _document(store: Store, histories: Sequence[VMHistory]) -> list[dict[str, object]]:
    return [
        {
            "name": history.name,
            "uuid": history.uuid,
            "points": [
                msgspec.to_builtins(point)
                | {
                    "damaged": sorted(store.damaged(point.vm_uuid, point.time)),
                    "pinned": store.is_pinned(point.vm_uuid, point.time),
                }
                for point in history.points
            ],
            "unlisted": [
                {"time": point.time, "why": point.why}
                for point in store.unlisted
                if point.vm_uuid == history.uuid
            ],
        }
        for history in histories
    ]
