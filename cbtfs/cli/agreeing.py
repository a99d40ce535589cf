"""``verify --against-pool``: which images are compared with the pool, and what is told of that."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from cbtfs import agreement, counterpart, errors, progress, units
from cbtfs.agreement import Agreement, Told
from cbtfs.catalogue import Catalogue, DiskPoint, Point, Reference, VMHistory
from cbtfs.counterpart import Missing
from cbtfs.damage import PoolDamage, Scope
from cbtfs.pool import Pool
from cbtfs.progress import Kind, Progress
from cbtfs.store import Store

from . import context as contexts, output, points as listed, running
from .context import Globals

PARTIAL = 3
"""Exit status when some disks could not be compared and others could."""

Verdict = Agreement | Missing | errors.CbtfsError
"""What became of one disk: it was compared, there is nothing to compare it with, or that failed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be compared, and where it is told.

    Attributes:
        store: of the images.
        catalogue: what it holds.
        named: the points that were named; None for the newest that can be compared.
        scope: how much of each disk.
        kind: of progress.
    """

    store: Store
    catalogue: Catalogue
    named: Sequence[Reference] | None
    scope: Scope
    kind: Kind


@dataclass(slots=True)
class Verdicts:
    """What became of each disk.

    Attributes:
        chosen: the points, with the disks of each that were looked at.
        by_disk: of each disk, by the VM's uuid, the point's time and the device.
    """

    chosen: list[tuple[Reference, tuple[DiskPoint, ...]]] = field(
        default_factory=list[tuple[Reference, tuple[DiskPoint, ...]]]
    )
    by_disk: dict[tuple[str, str, str], Verdict] = field(
        default_factory=dict[tuple[str, str, str], Verdict]
    )

    def of(self, point: Point, disk: DiskPoint) -> Verdict | None:
        """Return what became of a disk; None if it was not looked at."""
        return self.by_disk.get((point.vm_uuid, point.time, disk.device))

    @property
    def status(self) -> int:
        """The exit status, differences left aside."""
        verdicts = self.by_disk.values()
        failed = {v.exit_code for v in verdicts if isinstance(v, errors.CbtfsError)}
        if failed and any(isinstance(v, Agreement) for v in verdicts):
            return PARTIAL
        return failed.pop() if len(failed) == 1 else int(bool(failed))

    @property
    def vain(self) -> bool:
        """Whether there was nothing at all to compare with."""
        return all(isinstance(v, Missing) for v in self.by_disk.values())


def run(options: Globals, request: Request) -> Verdicts:
    """Compare images with the pool, one disk after the other, and put on record what differs.

    Raises:
        AuthenticationFailed, PoolUnreachable: of the login.
    """

    async def compare() -> Verdicts:
        async with contexts.opened_pool(options) as pool:
            with progress.open_progress(request.kind, sys.stderr) as view:
                return await _Run(request, pool, view).run()

    return running.run(compare)


class _Run:
    def __init__(self, request: Request, pool: Pool, view: Progress) -> None:
        self._request = request
        self._pool = pool
        self._view = view
        self._verdicts = Verdicts()
        self._hopeless: errors.CbtfsError | None = None

    async def run(self) -> Verdicts:
        chosen = self._verdicts.chosen = await self._chosen()
        for reference, disks in chosen:
            for disk in disks:
                point = reference.point
                verdict = await self._verdict(Reference(reference.history, point, disk), disk)
                self._verdicts.by_disk[point.vm_uuid, point.time, disk.device] = verdict
        return self._verdicts

    async def _chosen(self) -> list[tuple[Reference, tuple[DiskPoint, ...]]]:
        named = self._request.named
        if named is not None:
            return [(r, (r.disk,) if r.disk is not None else r.point.disks) for r in named]
        inventory = await self._pool.inventory()
        found: list[tuple[Reference, tuple[DiskPoint, ...]]] = []
        for history in _in_order(self._request.catalogue.vms):
            by_time: dict[str, tuple[Point, list[DiskPoint]]] = {}
            for point, disk in counterpart.newest(inventory, history):
                by_time.setdefault(point.time, (point, []))[1].append(disk)
            for point, disks in by_time.values():
                found.append((Reference(history, point), tuple(disks)))
        return found

    async def _verdict(self, reference: Reference, disk: DiskPoint) -> Verdict:
        label = listed.label(self._request.catalogue, reference.history)
        key = f"{label}/{reference.point.time}/{disk.device}"
        begun = monotonic()
        try:
            if self._hopeless is not None:
                raise self._hopeless
            verdict = await agreement.compare(
                self._pool,
                self._request.store,
                reference,
                scope=self._request.scope,
                told=Told(self._view, key),
            )
        except errors.ImageDamaged:
            return Missing("its digests are damaged", is_damage=True)
        except errors.CbtfsError as exc:
            path = self._request.store.point_path(reference.history.uuid, reference.point.time)
            if isinstance(exc, errors.StoreError) and not path.exists():
                return Missing("its restore point was removed meanwhile")
            if isinstance(exc, errors.AuthenticationFailed | errors.PoolUnreachable):
                self._hopeless = exc  # another try would only be refused, or wait, again
            self._view.disk_finished(key, None, str(exc))
            if self._request.kind == "silent":
                output.note(f"{key}: {exc}")
            return exc
        if isinstance(verdict, Agreement):
            self._view.disk_finished(key, _told(disk, verdict, monotonic() - begun))
            for warning in verdict.warnings:
                output.note(f"{key}: {warning}")  # even with -q: sync will not know
        return verdict


def _in_order(vms: Mapping[str, VMHistory]) -> list[VMHistory]:
    return sorted(vms.values(), key=lambda history: (history.name, history.uuid))


def _told(disk: DiskPoint, verdict: Agreement, seconds: float) -> DiskPoint:
    return DiskPoint(
        device=disk.device,
        file=disk.file,
        vdi_uuid=disk.vdi_uuid,
        size=disk.size,
        method="compare",
        detail=line(verdict),
        bytes_read=verdict.compared,
        seconds=round(seconds, 3),
    )


# ── what is told ─────────────────────────────────────────────────────────────────────────────


def line(verdict: Verdict) -> str:
    """Return what people are told of a disk."""
    if isinstance(verdict, Missing):
        return f"cannot be compared with the pool: {verdict.why}"
    if isinstance(verdict, errors.CbtfsError):
        return "not compared with the pool, see the error"
    if not verdict.comparable:
        return f"as in the pool, nothing had to be read (no data known in {verdict.how})"
    compared, comparable = map(units.format_size, (verdict.compared, verdict.comparable))
    amount = f"{compared} compared of {comparable} ({verdict.how})"
    if verdict.unseen:
        amount += f", blocks left out that are zeros in the image: {verdict.unseen}"
    if not verdict.found.blocks:
        return f"as in the pool, {amount}"
    return f"NOT AS IN THE POOL: {_amount(verdict.found.blocks, verdict.found.zeros)}, {amount}"


def _amount(blocks: int, zeros: int) -> str:
    told = f"{blocks} blocks differ"
    return f"{told}, {zeros} of them are zeros in the pool now" if zeros else told


def places(verdict: Verdict) -> list[str]:
    """Return where a disk differs, a line for each place."""
    if not isinstance(verdict, Agreement):
        return []
    return [f"not as in the pool: bytes {e.start} to {e.stop}" for e in verdict.found.extents]


def on_record(known: PoolDamage) -> str:
    """Return what people are told of an earlier comparison."""
    return (
        f"but {known.blocks} blocks were not as in the pool when compared {known.found}; sync"
        " makes a point that is, and only verify --against-pool clears this one"
    )


def document(verdict: Verdict | None) -> dict[str, object] | None:
    """Return what JSON says of a disk."""
    if verdict is None:
        return None
    if isinstance(verdict, Missing):
        return {"state": "not-comparable", "why": verdict.why}
    if isinstance(verdict, errors.CbtfsError):
        return {"state": "failed", "why": str(verdict)}
    found = verdict.found
    return {
        "state": "different" if found.blocks else "equal",
        "why": "",
        "with": verdict.how,
        "comparable": verdict.comparable,
        "compared": verdict.compared,
        "sampled": found.sampled,
        "unseen": verdict.unseen,
        "blocks": found.blocks,
        "zeros": found.zeros,
        "extents": [[e.start, e.stop] for e in found.extents],
    }


def record_document(known: PoolDamage | None) -> dict[str, object] | None:
    """Return what JSON says of what is on record."""
    if known is None:
        return None
    return {
        "found": known.found,
        "blocks": known.blocks,
        "zeros": known.zeros,
        "extents": [list(extent) for extent in known.extents],
    }
