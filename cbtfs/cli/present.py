"""Present: what ``diff POINT VM/now`` compares with, the live disks of a VM."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from cbtfs import divergence, errors, progress
from cbtfs.bitmap import ChangeBitmap
from cbtfs.catalogue import Catalogue, DiskPoint, Reference, VMHistory
from cbtfs.difference import Pair
from cbtfs.divergence import Live, Suspects
from cbtfs.inventory import VDI, Inventory
from cbtfs.pool import Pool
from cbtfs.progress import Kind, Progress
from cbtfs.store import Store

from . import context as contexts, differences, output, points, running
from .context import Globals
from .differences import Side, Sides, View

NOW = "now"

_DISK = "vdi-"

PARTIAL = 3
"""Exit status when some disks could not be read and others could."""


@dataclass(frozen=True, slots=True)
class Present:
    """A VM as it is now, by name or uuid, or the ``device`` of it, "" for all."""

    vm: str
    device: str = ""


def parse(text: str) -> Present | None:
    """Return what ``text`` means if it is ``VM/now`` or ``VM/now/DISK``, else None."""
    vm, _, last = text.rpartition("/")
    if last == NOW and vm:
        return Present(vm)
    vm, _, middle = vm.rpartition("/")
    return Present(vm, last) if middle == NOW and vm and last else None


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be compared, and where it is told.

    Attributes:
        store: of the point.
        catalogue: what it holds.
        point: the point, or one disk of it.
        present: what it is compared with.
        kind: of progress.
    """

    store: Store
    catalogue: Catalogue
    point: Reference
    present: Present
    kind: Kind


def show(options: Globals, request: Request) -> tuple[list[str], int]:
    """Compare a point with the live disks of a VM, and print what differs.

    Returns:
        What is damaged in the store, in sentences; and the exit status, 0 if all could be read.
    """

    async def compare() -> _Run:
        async with contexts.opened_pool(options) as pool:
            with progress.open_progress(request.kind, sys.stderr) as told:
                run = _Run(options, request, pool, told)
                await run.run()
                return run

    done = running.run(compare)
    return done.damaged, done.status


@dataclass(frozen=True, slots=True)
class _Target:
    """A VM, or a disk without one, in the pool.

    Attributes:
        name: what to call it.
        key: name of its directory in a store.
        vdis: its disks, by device.
        history: its restore points; None if there are none.
    """

    name: str
    key: str
    vdis: dict[str, VDI]
    history: VMHistory | None

    def side(self, device: str) -> Side:
        """Return it as one side of a comparison; all of it, or one disk."""
        if device and device not in self.vdis:
            known = ", ".join(self.vdis) or "none"
            raise errors.NotFound(f"{self.name} has no disk {device!r} now; it has: {known}")
        disks = [
            DiskPoint(device=name, file="", vdi_uuid=vdi.uuid, size=vdi.size, vdi_name=vdi.name)
            for name, vdi in self.vdis.items()
            if device in ("", name)
        ]
        return Side(f"{self.name}/{NOW}", disks, self.key, is_one=bool(device))


class _Run:
    """One comparison; a disk that cannot be read does not keep others from it."""

    def __init__(self, options: Globals, request: Request, pool: Pool, told: Progress) -> None:
        self.damaged: list[str] = []
        self._options = options
        self._request = request
        self._pool = pool
        self._told = told
        self._compared = 0
        self._failures: list[errors.CbtfsError] = []

    @property
    def status(self) -> int:
        """The exit status as far as disks could not be read."""
        statuses = {failure.exit_code for failure in self._failures}
        if self._compared and statuses:
            return PARTIAL
        return statuses.pop() if len(statuses) == 1 else int(bool(statuses))

    async def run(self) -> None:
        """Compare, and print."""
        request = self._request
        inventory = await self._pool.inventory()
        target = _target(inventory, request.catalogue, request.present.vm)
        old = differences.side(request.catalogue, request.point)
        sides = differences.paired(old, target.side(request.present.device))
        await self._pool.check_nbd()
        view = differences.view(
            sides, as_json=self._options.json, verbose=self._options.verbosity > 0
        )
        for pair in sides.pairs:
            await self._add(view, sides, target, pair)
        view.end()
        self.damaged = view.problems

    async def _add(self, view: View, sides: Sides, target: _Target, pair: Pair) -> None:
        if sides.only_in(pair) or pair.old is None or pair.new is None:
            view.add(pair, ())
            return
        key = f"{target.name}/{pair.device}"
        vdi = target.vdis[pair.new.device]
        point = self._request.point
        reference = Reference(point.history, point.point, pair.old)
        begun = monotonic()
        try:
            found, blocks = await self._differing(key, reference, target, vdi)
        except (errors.ImageDamaged, errors.PoolError, errors.ExportError) as exc:
            self._told.disk_finished(key, None, str(exc))
            if self._request.kind == "silent":
                output.note(f"{key}: {exc}")
            if not isinstance(exc, errors.ImageDamaged):
                self._failures.append(exc)
            view.add(pair, (), failure=exc)
            return
        self._compared += 1
        told = DiskPoint(
            device=pair.device,
            file="",
            vdi_uuid=vdi.uuid,
            size=vdi.size,
            method="diff",
            detail=found.how,
            bytes_read=found.blocks.changed_bytes,
            seconds=round(monotonic() - begun, 3),
        )
        self._told.disk_finished(key, told)
        view.add(pair, blocks.extents(), how=found.how)

    async def _differing(
        self, key: str, reference: Reference, target: _Target, vdi: VDI
    ) -> tuple[Suspects, ChangeBitmap]:
        for failure in self._failures:
            if isinstance(failure, errors.AuthenticationFailed | errors.PoolUnreachable):
                raise failure  # another try would only be refused, or wait, again
        inventory = await self._pool.inventory()
        now = inventory.vdis.get(vdi.ref)
        if now is None:
            raise errors.PoolError(f"VDI {vdi.uuid} went away meanwhile; {errors.AGAIN}")
        return await divergence.until_now(
            self._pool,
            self._request.store,
            reference,
            Live(inventory, now, target.history),
            started=lambda found: self._told.disk_started(
                key, method="diff", reason=found.how, total=found.blocks.changed_bytes
            ),
            advanced=lambda count: self._told.advanced(key, read=count, written=0),
        )


def _target(inventory: Inventory, catalogue: Catalogue, name: str) -> _Target:
    """Return the VM, or the disk without one, that people call ``name``, in store or pool.

    Raises:
        NotFound: the pool has none, or another than that of the restore points.
        UsageError: several are called so.
    """
    history = None
    with suppress(errors.NotFound):
        history = catalogue.find(name)
    if history is not None and history.uuid.startswith(_DISK):
        vdi = inventory.vdi_by_uuid(history.uuid.removeprefix(_DISK))
        return _Target(points.label(catalogue, history), history.uuid, {"disk": vdi}, history)
    known = {vm.uuid: vm for vm in inventory.live_vms()}
    vm = known.get(history.uuid) if history is not None else None
    if vm is None:
        vm = inventory.find_vm(name)
        if history is not None:  # as after a restore
            raise errors.NotFound(
                f"the VM {name!r} of these restore points, {history.uuid}, is not in the pool, and"
                f" what is called so there is another; write {vm.uuid}/{NOW} to compare with that"
            )
        history = catalogue.vms.get(vm.uuid)
    label = points.label(catalogue, history) if history is not None else vm.name
    vdis = {disk.device: disk.vdi for disk in inventory.disks_of(vm)}
    return _Target(label, vm.uuid, vdis, history)
