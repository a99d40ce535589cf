"""``list`` and ``verify``: what a store has, and whether it is undamaged."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from cbtfs import damage, names, units
from cbtfs.catalogue import Catalogue, Point, Reference, VMHistory
from cbtfs.store import DiskResult, Store, Unlisted, VerifyResult

from . import context as contexts, listing, output
from .output import Table

DAMAGED = 4
"""Exit status when damage was found."""


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("list", epilog="Example: cbtfs --store /srv/backup list --vm 'web*'")(list_points)
    app.command("verify", epilog="Example: cbtfs verify web1/latest")(verify)


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


# ── verify ───────────────────────────────────────────────────────────────────────────────────


def verify(
    context: typer.Context,
    points: Annotated[
        list[str] | None,
        typer.Argument(metavar="POINT", help="VM/TIME or VM/TIME/DISK; nothing: all of them."),
    ] = None,
) -> None:
    """Compare images with their digests; exit status 4 if one is damaged."""
    options = contexts.of(context)
    documents: list[dict[str, object]] = []
    damaged = False
    with contexts.opened_store(options) as store:
        catalogue = contexts.catalogue_of(store)
        references, unlisted = _chosen(store, catalogue, points or [])
        for reference in references:
            result = store.verify(reference)
            name = f"{label(catalogue, reference.history)}/{result.point.time}"
            damaged = damaged or result.damaged
            for warning in result.warnings:
                contexts.warn(f"{name}: {warning}")
            documents.append(_result_document(name, result))
            if not options.json:
                _print_result(name, result)
        for point in unlisted:
            name = f"{_label_of(catalogue, point.vm_uuid)}/{point.time}"
            documents.append(_unlisted_document(name, point))
            if not options.json:
                output.line(output.safe(f"{name}  DAMAGED: {point.why}"))
    if options.json:
        output.document({"damaged": damaged or bool(unlisted), "points": documents})
    if damaged or unlisted:
        raise typer.Exit(DAMAGED)


def _chosen(
    store: Store, catalogue: Catalogue, points: Sequence[str]
) -> tuple[list[Reference], list[Unlisted]]:
    """Return what to verify, and which points meant by ``points`` cannot even be listed."""
    if not points:
        histories = listing.matching(catalogue.vms.values(), [])
        return [Reference(h, point) for h in histories for point in h.points], list(store.unlisted)
    references: list[Reference] = []
    unlisted: list[Unlisted] = []
    for text in points:
        broken = _unlisted_called(store, catalogue, text)
        unlisted += broken
        if not broken:
            references.append(catalogue.resolve(text))
    return references, unlisted


def _unlisted_called(store: Store, catalogue: Catalogue, text: str) -> list[Unlisted]:
    """Return the point that ``text`` names, if it is one that is not listed.

    ``latest`` is the newest directory there is: an older point must not pass for it.
    """
    vm, _, time = text.rpartition("/")
    label = {
        h.uuid: {h.name, h.uuid, *names.spellings(h.name, h.uuid)} for h in catalogue.vms.values()
    }
    found = [p for p in store.unlisted if vm in label.get(p.vm_uuid, {p.vm_uuid})]
    if time != "latest":
        return [point for point in found if point.time == time]
    newest = max((point.time for h in catalogue.vms.values() if vm in label[h.uuid]
                  for point in h.points), default="")  # fmt: skip
    return [p for p in found if p.time > newest and p.time == max(q.time for q in found)]


def _label_of(catalogue: Catalogue, vm_uuid: str) -> str:
    history = catalogue.vms.get(vm_uuid)
    return label(catalogue, history) if history else vm_uuid


def _unlisted_document(name: str, point: Unlisted) -> dict[str, object]:
    return {
        "point": name,
        "vm_uuid": point.vm_uuid,
        "time": point.time,
        "problem": point.why,
        "disks": [],
        "failures": [],
    }


def _print_result(name: str, result: VerifyResult) -> None:
    for disk in result.disks:
        where = output.safe(f"{name}/{disk.disk.device}")
        output.line(f"{where}  {_verdict(disk.damage)}")
        for extent in disk.damage.extents[:10]:
            output.line(f"  damaged: bytes {extent.start} to {extent.stop}")
        if len(disk.damage.extents) > 10:
            output.line(f"  and {len(disk.damage.extents) - 10} more places; --json lists them")
    for failure in result.point.failures:
        output.line(output.safe(f"{name}/{failure.device}  not in this point: {failure.error}"))


def _verdict(found: damage.Damage) -> str:
    checked = units.format_size(found.checked)
    if found.problem:
        return f"DAMAGED: {output.safe(found.problem)}"
    if found.blocks:
        return f"DAMAGED: {found.blocks} blocks differ, {checked} checked"
    return f"ok, {checked} checked"


def _result_document(name: str, result: VerifyResult) -> dict[str, object]:
    return {
        "point": name,
        "vm_uuid": result.point.vm_uuid,
        "time": result.point.time,
        "disks": [_disk_document(disk) for disk in result.disks],
        "failures": _failures(result.point),
    }


def _disk_document(disk: DiskResult) -> dict[str, object]:
    found = disk.damage
    return {
        "device": disk.disk.device,
        "damaged": found.found,
        "problem": found.problem,
        "blocks": found.blocks,
        "checked": found.checked,
        "extents": [[extent.start, extent.stop] for extent in found.extents],
    }


def _failures(point: Point) -> list[object]:
    return [msgspec.to_builtins(failure) for failure in point.failures]
