"""``ls`` and ``info``: what a pool has."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated

import msgspec
import typer

from cbtfs import names, sync as syncs, units
from cbtfs.inventory import VDI, VM, Inventory
from cbtfs.plan import VMPlan
from cbtfs.sync import SyncOptions, Target

from . import context as contexts, listing, output, running
from .context import Globals
from .listing import DiskRow, VMRow
from .output import Table


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("ls", epilog="Example: cbtfs ls --vm 'web*'")(ls)
    app.command("info", epilog="Example: cbtfs info web1/xvda")(info)


# ── ls ───────────────────────────────────────────────────────────────────────────────────────


def ls(
    context: typer.Context,
    *,
    vm: Annotated[
        list[str] | None,
        typer.Option("--vm", metavar="GLOB", help="Only these VMs: name, uuid, tag:…, sr:…"),
    ] = None,
) -> None:
    """List VMs and disks: size, change tracking, last restore point, what sync would do next."""
    options = contexts.of(context)
    inventory = running.run(lambda: _inventory(options))
    rows = _rows(options, inventory, vm or [])
    if options.json:
        output.document(_document(inventory, rows))
    else:
        _print(rows, verbose=options.verbosity > 0)


async def _inventory(options: Globals) -> Inventory:
    async with contexts.opened_pool(options) as pool:
        return await pool.inventory()


def _rows(options: Globals, inventory: Inventory, patterns: Sequence[str]) -> list[VMRow]:
    for problem in inventory.problems:
        contexts.warn(problem)
    if options.store_path() is None:
        return listing.build(inventory, catalogue=None, patterns=patterns)
    with ExitStack() as stack:
        store = stack.enter_context(contexts.store_if_any(options))
        catalogue = contexts.catalogue_of(store)

        def planned(target: Target) -> VMPlan:
            (plan,) = syncs.plan(
                inventory, store, [target], options=SyncOptions(), catalogue=catalogue
            )
            return plan

        return listing.build(inventory, catalogue=catalogue, planner=planned, patterns=patterns)


def _print(rows: Sequence[VMRow], *, verbose: bool) -> None:
    columns = ["DISK", "NAME", ">SIZE", ">USED", "CBT", ">SNAPS", "LAST POINT", "NEXT SYNC"]
    table = Table([*columns, "SR", "UUID"] if verbose else columns, flexible=(0, 1))
    labels = _labels([row.vm for row in rows if row.vm is not None])
    for row in rows:
        label = labels[row.vm.uuid] if row.vm else ""
        for disk in row.disks:
            table.add(*_cells(label or f"vdi-{disk.vdi.uuid}", disk, verbose=verbose))
        if row.vm is not None and not row.disks:
            blank = [""] * (len(table.columns) - 2)
            table.add(label, "(no disks)", *blank)
    table.print()


def _labels(vms: Sequence[VM]) -> dict[str, str]:
    """Return what to call each VM, by uuid: its name, but twins as a sync would call them."""
    times = Counter(vm.name for vm in vms)
    twins = names.safe_names([(vm.uuid, vm.name) for vm in vms], reserved=())
    return {
        vm.uuid: (vm.name or vm.uuid) if times[vm.name] == 1 or not vm.name else twins[vm.uuid]
        for vm in vms
    }


def _cells(owner: str, disk: DiskRow, *, verbose: bool) -> list[str]:
    vdi = disk.vdi
    cells = [
        f"{owner}/{disk.device}",
        vdi.name,
        units.format_size(vdi.size),
        units.format_size(vdi.used),
        disk.cbt,
        str(len(disk.snapshots)),
        disk.last_point or "-",
        disk.intent,
    ]
    return [*cells, disk.sr, vdi.uuid] if verbose else cells


def _document(inventory: Inventory, rows: Sequence[VMRow]) -> dict[str, object]:
    return {
        "pool": {"name": inventory.pool.name, "uuid": inventory.pool.uuid},
        "vms": [
            {
                "name": row.vm.name,
                "uuid": row.vm.uuid,
                "power_state": row.vm.power_state,
                "last_point": row.last_point or None,
                "disks": [_disk_document(disk) for disk in row.disks],
            }
            for row in rows
            if row.vm is not None
        ],
        "detached": [_disk_document(d) for row in rows if row.vm is None for d in row.disks],
    }


def _disk_document(disk: DiskRow) -> dict[str, object]:
    vdi = disk.vdi
    return {
        "device": disk.device,
        "uuid": vdi.uuid,
        "name": vdi.name,
        "sr": disk.sr,
        "size": vdi.size,
        "used": vdi.used,
        "cbt": disk.cbt,
        "snapshots": [_snapshot_document(snapshot) for snapshot in disk.snapshots],
        "last_point": disk.last_point or None,
        "next": _next_document(disk),
    }


def _snapshot_document(vdi: VDI) -> dict[str, object]:
    return {
        "uuid": vdi.uuid,
        "name": vdi.name,
        "time": vdi.snapshot_time.isoformat(),
        "size": vdi.size,
        "used": vdi.used,
    }


def _next_document(disk: DiskRow) -> dict[str, object] | None:
    if disk.next is not None:
        planned = disk.next
        return {"method": planned.method, "reason": planned.reason, "detail": planned.detail}
    return {"method": "skip", "reason": "", "detail": disk.skipped} if disk.skipped else None


# ── info ─────────────────────────────────────────────────────────────────────────────────────


def info(
    context: typer.Context,
    vdi: Annotated[str, typer.Argument(metavar="VDI", help="A uuid, a name, or VM/DEVICE.")],
) -> None:
    """Show all that is known of one disk or snapshot."""
    options = contexts.of(context)
    inventory = running.run(lambda: _inventory(options))
    found = listing.find_disk(inventory, vdi)
    row = _row_of(options, inventory, found)
    facts = _facts(inventory, row)
    if options.json:
        output.document({"vdi": {**facts, "next": _next_document(row)}})
        return
    for key, value in facts.items():
        output.line(f"{key.replace('_', ' ') + ':':<14}{output.safe(_text(value))}")
    if row.next is not None or row.skipped:
        why = f"{row.next.method}: {row.next.detail}" if row.next else f"skip: {row.skipped}"
        output.line(f"{'next sync:':<14}{output.safe(why)}")


def _row_of(options: Globals, inventory: Inventory, vdi: VDI) -> DiskRow:
    for row in _rows(options, inventory, []):
        for disk in row.disks:
            if disk.vdi.ref == vdi.ref:
                return disk
    return listing.disk_row(inventory, vdi, catalogue=None)


def _facts(inventory: Inventory, row: DiskRow) -> dict[str, object]:
    vdi = row.vdi
    origin = inventory.vdis.get(vdi.snapshot_of)
    vbds = [inventory.vbds[ref] for ref in vdi.vbd_refs if ref in inventory.vbds]
    holders = [(inventory.vms.get(vbd.vm_ref), vbd) for vbd in vbds]
    return {
        "uuid": vdi.uuid,
        "name": vdi.name,
        "description": vdi.description,
        "sr": row.sr,
        "type": vdi.type,
        "size": vdi.size,
        "used": vdi.used,
        "cbt": row.cbt,
        "attached_to": [f"{vm.name}/{vbd.device}" for vm, vbd in holders if vm is not None],
        "snapshot_of": origin.uuid if vdi.is_a_snapshot and origin else None,
        "taken": vdi.snapshot_time.isoformat() if vdi.is_a_snapshot else None,
        "snapshots": [
            {"uuid": s.uuid, "taken": s.snapshot_time.isoformat()} for s in row.snapshots
        ],
        "readable": vdi.is_readable,
        "last_point": row.last_point or None,
    }


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{units.format_size(value)} ({value})"
    if isinstance(value, list):
        items = msgspec.convert(value, list[str | dict[str, str]])
        return ", ".join(i if isinstance(i, str) else " ".join(i.values()) for i in items) or "-"
    return str(value) if value else "-"
