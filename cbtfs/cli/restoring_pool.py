"""``restore --to-sr`` and ``--in-place``: a restore point into new disks, or over the old ones."""

import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cbtfs import errors, newdisks, owner, progress, units
from cbtfs.inventory import SR, Inventory
from cbtfs.newdisks import Goal, Images, NewDisks, Restored
from cbtfs.store import Store

from . import context as contexts, output, running
from .context import Globals

_THEN = "nothing of it is left in the pool; run the command again"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options say; ``whole``: all of what was written is read back, not only some."""

    point: str
    to_sr: str = ""
    vm_name: str = ""
    whole: bool = False
    dry_run: bool = False
    json_progress: bool = False


# ── --to-sr ──────────────────────────────────────────────────────────────────────────────────


def to_sr(options: Globals, wish: Wish) -> None:
    """Make new disks on an SR, and a VM of them if wanted."""
    with contexts.opened_store(options) as store:
        goal = _goal(store, wish)
        done = running.run(lambda: _to_sr(options, wish, store, goal), then=_THEN)
    if done is not None:
        _show(options, goal, done)


def _goal(store: Store, wish: Wish) -> Goal:
    point = contexts.catalogue_of(store).resolve(wish.point)
    return Goal(point, owner.run_name(point.point.time, secrets.token_hex(8)), whole=wish.whole)


async def _to_sr(options: Globals, wish: Wish, store: Store, goal: Goal) -> list[Restored] | None:
    async with newdisks.opened(store, goal) as images, contexts.opened_pool(options) as pool:
        inventory = await pool.inventory()
        sr = _find_sr(inventory, wish.to_sr)
        newdisks.check(sr, images)
        await pool.check_nbd()
        if wish.dry_run:
            _show_plan(options, goal, sr, images)
            return None
        with progress.open_progress(_kind(options, wish), sys.stderr) as view:
            new = NewDisks(pool, goal, view)
            async with new.made(images, sr) as disks:
                await new.give_away()
                return disks


def _find_sr(inventory: Inventory, name_or_uuid: str) -> SR:
    srs = inventory.srs.values()
    found = [sr for sr in srs if sr.uuid == name_or_uuid.lower()]
    found = found or [sr for sr in srs if sr.name == name_or_uuid]
    if not found:
        known = ", ".join(sorted({repr(sr.name) for sr in srs if sr.content_type != "iso"}))
        raise errors.NotFound(f"the pool has no SR called {name_or_uuid!r}; it has: {known}")
    if len(found) > 1:
        uuids = ", ".join(sr.uuid for sr in found)
        raise errors.UsageError(
            f"{len(found)} SRs are called {name_or_uuid!r}; use a uuid: {uuids}"
        )
    return found[0]


def _kind(options: Globals, wish: Wish) -> progress.Kind:
    if wish.json_progress:
        return "json"
    return "silent" if options.quiet else progress.kind_for(sys.stderr)


# ── what is told ─────────────────────────────────────────────────────────────────────────────


def _show_plan(options: Globals, goal: Goal, sr: SR, images: Images) -> None:
    if options.json:
        disks = [
            {"device": disk.device, "size": disk.size, "bytes": length}
            for disk, _, length in images.disks
        ]
        output.document({"dry_run": True, "point": goal.label, "sr": sr.uuid, "disks": disks})
        return
    for disk, _, length in images.disks:
        sent, size = units.format_size(length), units.format_size(disk.size)
        where = f"{goal.label}/{disk.device}"
        output.line(output.safe(f"{where}  {sent} of {size} into a new disk on {sr.name}"))


def _show(options: Globals, goal: Goal, done: Sequence[Restored]) -> None:
    if options.json:
        output.document(
            {"vm": None, "disks": [_document(disk) for disk in done], "safety_snapshot": None}
        )
        return
    for disk in done:
        output.line(output.safe(_line(goal, disk)))


def _line(goal: Goal, done: Restored) -> str:
    sent, size = units.format_size(done.sent), units.format_size(done.disk.size)
    return (
        f"{goal.label}/{done.disk.device}  {sent} of {size} in"
        f" {units.format_duration(done.seconds)} into VDI {done.written.uuid}"
        f"  ({units.format_size(done.verified)} read back)"
    )


def _document(done: Restored) -> dict[str, object]:
    return {
        "device": done.disk.device,
        "vdi_uuid": done.written.uuid,
        "size": done.written.size,
        "bytes_sent": done.sent,
        "verified_bytes": done.verified,
        "seconds": round(done.seconds, 3),
    }


# ── --in-place ───────────────────────────────────────────────────────────────────────────────


def in_place(options: Globals, wish: Wish) -> None:
    """Write what differs over the disks that the point is of."""
    raise errors.UsageError("restore --in-place is not in this version of cbtfs")
