"""``verify``: whether what the store has is undamaged, and making it whole again."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Annotated

import msgspec
import typer

from cbtfs import damage, errors, names, progress, repair as repairs, tables, units, verified
from cbtfs.agreement import Agreement
from cbtfs.catalogue import Catalogue, DiskPoint, Reference
from cbtfs.counterpart import Missing
from cbtfs.damage import Damage, PoolDamage, Scope
from cbtfs.progress import Kind, Progress
from cbtfs.repair import Found, Repair
from cbtfs.store import Store, Unlisted

from . import agreeing, context as contexts, listing, output, points as listed
from .agreeing import Verdict, Verdicts
from .context import Globals

DAMAGED = 4
"""Exit status when damage was found, and is there still."""

PARTIAL = 3
"""Exit status when some disks could not be verified and others could."""

SHOWN = 10
"""Places of a disk that are shown to people."""


def register(app: typer.Typer) -> None:
    """Add the verb of this module to ``app``."""
    app.command(
        "verify",
        epilog="Example: cbtfs verify --older-than 30d --repair; verify --against-pool --sample 1%",
    )(verify)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the options say.

    Attributes:
        share: of the blocks to compare, 0 to 1.
        older_than: seconds; disks found whole since are left out. None: none are.
        repair: whether to repair what is damaged.
        dry_run: whether only to say so.
        against_pool: whether to compare with the pool as well.
    """

    share: float = 1.0
    older_than: float | None = None
    repair: bool = False
    dry_run: bool = False
    against_pool: bool = False

    @property
    def scope(self) -> Scope:
        """What of each image to compare."""
        return Scope(share=self.share)


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of one disk.

    Attributes:
        damage: what was found.
        repair: what of it can be repaired, or was.
        repaired: whether it was.
        since: when it was found whole, if it was left out for that.
        on_record: whether damage is on record that this check did not find: it was a sample, or is
            no comparison with the pool.
        by_pool: what is on record of blocks that are not as in the pool.
        verdict: what a comparison with the pool found now, if there was one.
    """

    disk: DiskPoint
    damage: Damage
    repair: Repair = field(default_factory=Repair)
    repaired: bool = False
    since: datetime | None = None
    on_record: bool = False
    by_pool: PoolDamage | None = None
    verdict: Verdict | None = None

    @property
    def left(self) -> Damage:
        """What is damaged now."""
        return self.repair.left if self.repaired else self.damage

    @property
    def damaged(self) -> bool:
        """Whether there is damage now."""
        differs = _differs(self.verdict)
        return self.left.found or self.on_record or differs or _is_damage(self.verdict)


def verify(  # noqa: PLR0913  # one parameter per option
    context: typer.Context,
    points: Annotated[
        list[str] | None,
        typer.Argument(metavar="POINT", help="VM/TIME or VM/TIME/DISK; nothing: all of them."),
    ] = None,
    *,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample",
            metavar="SHARE",
            help="Compare only this share of the blocks, drawn at random, such as 5%; of those that"
            " can be compared with the pool, too.",
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than",
            metavar="DURATION",
            help="Leave out disks that were found whole in that time, such as 30d.",
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", metavar="", help="Repair damaged blocks from other points of the VM."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("-n", "--dry-run", metavar="", help="Only say what would be repaired."),
    ] = False,
    against_pool: Annotated[
        bool,
        typer.Option(
            "--against-pool",
            metavar="",
            help="Compare with what the pool has, too; without POINT the newest points for which it"
            " can tell.",
        ),
    ] = False,
    json_progress: contexts.JsonProgress = False,
) -> None:
    """Compare images with their digests; exit status 4 if one is damaged.

    --against-pool also compares with the disk as it is, as far as that has not changed since.

    What differs there is never a base again: the next sync compares the whole disk.
    """
    options = contexts.of(context)
    wish = Wish(
        contexts.parsed("--sample", _share, sample) if sample is not None else 1.0,
        contexts.parsed("--older-than", units.parse_duration, older_than) if older_than else None,
        repair,
        dry_run,
        against_pool,
    )
    if repair and against_pool:
        raise errors.UsageError(
            "--repair takes blocks from other points, which cannot mend what is not as in the pool;"
            " leave one of the two out: the next cbtfs sync compares the whole disk"
        )
    if dry_run and not repair:
        raise errors.UsageError("-n is for --repair; without it verify changes no image anyway")
    kind = contexts.progress_kind(options, as_json=json_progress)
    with contexts.opened_store(options) as store:
        _Run(options, store, wish, kind).run(points or [])


def _share(text: str) -> float:
    share = tables.parse_share(text)
    if not share:
        raise errors.UsageError(f"{text!r} of the blocks are none; write for example 5%")
    return share


class _Run:
    """One call of the command."""

    def __init__(self, options: Globals, store: Store, wish: Wish, kind: Kind) -> None:
        self._options = options
        self._store = store
        self._wish = wish
        self._kind: Kind = kind
        self._view: Progress = progress.SilentProgress()
        self._verdicts = Verdicts()
        self._damaged = False
        self._verified = 0
        self._failures: list[errors.StoreError] = []
        self._left_out = 0

    def run(self, points: Sequence[str]) -> None:
        catalogue = contexts.catalogue_of(self._store)
        references, unlisted = _chosen(self._store, catalogue, points)
        chosen = [(r, (r.disk,) if r.disk is not None else r.point.disks) for r in references]
        if self._wish.against_pool:
            self._verdicts = agreeing.run(
                self._options,
                agreeing.Request(
                    self._store,
                    catalogue,
                    references if points else None,
                    self._wish.scope,
                    self._kind,
                ),
            )
            chosen = self._verdicts.chosen
        documents: list[dict[str, object]] = []
        with progress.open_progress(self._kind, sys.stderr) as self._view:
            for reference, disks in chosen:
                name = f"{listed.label(catalogue, reference.history)}/{reference.point.time}"
                documents.append(self._point(name, reference, disks))
            for broken in unlisted:
                name = f"{_label_of(catalogue, broken.vm_uuid)}/{broken.time}"
                documents.append(_unlisted_document(name, broken))
                self._print(f"{name}  DAMAGED: {broken.why}")
        self._damaged = self._damaged or bool(unlisted)
        if self._left_out:
            self._options.tell(f"{self._left_out} disks left out, which were found whole lately")
        if self._options.json:
            output.document({"damaged": self._damaged, "points": documents})
        self._end(is_named=bool(points))

    def _end(self, *, is_named: bool) -> None:
        """End with the status that fits."""
        if self._damaged:
            raise typer.Exit(DAMAGED)
        if self._failures:
            raise typer.Exit(PARTIAL if self._verified else self._failures[0].exit_code)
        if self._wish.against_pool:
            if is_named and self._verdicts.vain:
                raise errors.PoolError(
                    "nothing that was named can be compared with the pool; without POINT all that"
                    " can be is"
                )
            if self._verdicts.by_disk and self._verdicts.vain:
                raise errors.PoolError(
                    "no disk of the store can be compared with the pool; see why at each of them"
                )
            if self._verdicts.status:
                raise typer.Exit(self._verdicts.status)

    def _print(self, line: str) -> None:
        if not self._options.json:
            output.line(output.safe(line))

    def _point(
        self, name: str, reference: Reference, disks: Sequence[DiskPoint]
    ) -> dict[str, object]:
        point = reference.point
        results: list[Checked] = []
        unverified: list[dict[str, object]] = []
        for disk in disks:
            key = f"{name}/{disk.device}"
            try:
                result = self._disk(key, Reference(reference.history, point, disk))
            except errors.StoreError as exc:
                if not self._store.point_path(point.vm_uuid, point.time).exists():
                    contexts.warn(f"{key} is gone: its restore point was removed meanwhile")
                    continue
                self._failures.append(exc)
                verdict = self._verdicts.of(point, disk)
                found = isinstance(exc, errors.ImageDamaged) or _differs(verdict)
                self._damaged = self._damaged or found
                unverified.append(
                    {
                        "device": disk.device,
                        "error": str(exc),
                        "pool": agreeing.document(verdict),
                    }
                )
                self._view.disk_finished(key, None, str(exc))
                if self._kind == "silent":
                    output.note(f"{key}: {exc}")
                self._show_verdict(key, verdict)
                continue
            self._verified += 1
            results.append(result)
            self._damaged = self._damaged or result.damaged
            self._show(key, result)
        for failure in point.failures:
            self._print(f"{name}/{failure.device}  not in this point: {failure.error}")
        return {
            "point": name,
            "vm_uuid": point.vm_uuid,
            "time": point.time,
            "disks": [_disk_document(result) for result in results],
            "unverified": unverified,
            "failures": [msgspec.to_builtins(failure) for failure in point.failures],
        }

    # ── one disk ─────────────────────────────────────────────────────────────────────────────

    def _disk(self, key: str, reference: Reference) -> Checked:
        point, disk = reference.point, _only(reference)
        by_pool = self._store.pool_damage(point.vm_uuid, point.time).get(disk.device)
        verdict = self._verdicts.of(point, disk)
        since = None if _is_damage(verdict) else self._whole_since(reference)
        result = self._image(key, reference, since, is_in_doubt=by_pool is not None)
        return replace(result, by_pool=by_pool, verdict=verdict)

    def _image(
        self, key: str, reference: Reference, since: datetime | None, *, is_in_doubt: bool
    ) -> Checked:
        """Compare an image with its digests; ``is_in_doubt`` whatever comes of that.

        It is left out if it was found whole ``since``, and nothing is on record.
        """
        point, disk = reference.point, _only(reference)
        on_record = disk.device in self._store.damaged(point.vm_uuid, point.time)
        if since is not None and not on_record:
            self._left_out += 1
            return Checked(disk, Damage(), since=since)
        found = self._compared(key, reference)
        if on_record and self._is_record_unreadable(reference):
            path = self._store.point_path(point.vm_uuid, point.time) / damage.RECORD
            contexts.warn(
                f"{path} cannot be read, so {key} counts as damaged, and it may not be as in the"
                " pool; remove that file, and run cbtfs verify --against-pool"
            )
            is_in_doubt = True
        if not found.found:
            return Checked(disk, found, on_record=is_in_doubt or (on_record and found.sampled))
        if self._wish.repair and not self._wish.dry_run:
            try:
                with self._store.lock(point.vm_uuid):
                    done = repairs.repair(self._store, reference)
            except errors.StoreError as exc:
                contexts.warn(f"{key} is not repaired: {exc}")
            else:
                return Checked(disk, found, repair=done, repaired=True, on_record=is_in_doubt)
        able = Repair()
        try:
            able = repairs.possible(self._store, reference, found)
        except errors.StoreError as exc:
            contexts.warn(f"what can be repaired of {key} is not known: {exc}")
        return Checked(disk, found, repair=able, on_record=is_in_doubt)

    def _is_record_unreadable(self, reference: Reference) -> bool:
        with self._store.opened_point(reference.history.uuid, reference.point.time) as folder:
            return damage.UNREADABLE in damage.recorded(folder)

    def _whole_since(self, reference: Reference) -> datetime | None:
        """Return when a disk was found whole, if that is so short ago that it is left out."""
        if self._wish.older_than is None:
            return None
        with self._store.opened_point(reference.history.uuid, reference.point.time) as folder:
            since = verified.times(folder).get(_only(reference).device)
        if since is None:
            return None
        age = datetime.now(UTC) - since
        # a time that is yet to come is that of a clock that was wrong
        recent = timedelta(0) <= age < timedelta(seconds=self._wish.older_than)
        return since if recent else None

    def _compared(self, key: str, reference: Reference) -> Damage:
        disk = _only(reference)
        total = round(disk.size * self._wish.share)
        self._view.disk_started(key, method="verify", reason="", total=total)
        begun = monotonic()
        result = self._store.verify(
            reference,
            advanced=lambda count: self._view.advanced(key, read=count, written=0),
            scope=self._wish.scope,
        )
        for warning in result.warnings:
            contexts.warn(f"{key}: {warning}")
        found = result.disks[0].damage
        told = DiskPoint(
            device=disk.device,
            file=disk.file,
            vdi_uuid=disk.vdi_uuid,
            size=disk.size,
            method="verify",
            detail=_verdict(found),
            bytes_read=found.checked,
            seconds=round(monotonic() - begun, 3),
        )
        self._view.disk_finished(key, told)
        return found

    # ── telling people ───────────────────────────────────────────────────────────────────────

    def _show(self, key: str, result: Checked) -> None:
        if result.since is None:
            self._print(f"{key}  {_told(result)}")
            self._show_places(result)
        elif self._options.verbosity > 0:
            self._print(f"{key}  left out, found whole {result.since.isoformat()}")
        self._show_verdict(key, result.verdict)

    def _show_verdict(self, key: str, verdict: Verdict | None) -> None:
        if verdict is not None:
            self._print(f"{key}  {agreeing.line(verdict)}")
            self._show_lines(agreeing.places(verdict))
            if _will_compare(verdict):
                self._print("  the next cbtfs sync compares the whole disk")

    def _show_places(self, result: Checked) -> None:
        done = "repaired" if result.repaired else "damaged"
        left = result.repair.left if result.repair.does_something else result.left
        lines = [f"damaged: bytes {e.start} to {e.stop}" for e in left.extents]
        lines += [f"{done}: {_place(found, result)}" for found in result.repair.found]
        if result.repair.entries:
            what = "were" if result.repaired else "can be"
            lines.append(f"{result.repair.entries} of its digests had changed, and {what} repaired")
        self._show_lines(lines)
        if result.repair.does_something and not result.repaired:
            what = "would repair" if self._wish.dry_run else "repairs"
            self._print(f"  verify --repair {what} {_amount(result)}")

    def _show_lines(self, lines: Sequence[str]) -> None:
        for line in lines[:SHOWN]:
            self._print(f"  {line}")
        if len(lines) > SHOWN:
            self._print(f"  and {len(lines) - SHOWN} more places; --json lists them")


def _told(result: Checked) -> str:
    """Return what people are told of an image by itself."""
    if result.repaired and not result.damaged:
        return f"REPAIRED: {_amount(result)}, {_checked(result.damage)}"
    verdict = _verdict(result.left)
    if result.by_pool is not None:
        compared = isinstance(result.verdict, Agreement) and result.verdict.found.blocks
        return verdict if compared else f"{verdict}, {agreeing.on_record(result.by_pool)}"
    if not result.on_record or result.left.found:
        return verdict
    told = f"{verdict}, but damage is on record"
    return f"{told}; verify all of it" if result.damage.sampled else told


def _differs(verdict: Verdict | None) -> bool:
    """Return whether a comparison with the pool found that an image is not as that."""
    return isinstance(verdict, Agreement) and verdict.found.blocks > 0


def _is_damage(verdict: Verdict | None) -> bool:
    """Return whether a comparison with the pool came upon damage of the image."""
    return isinstance(verdict, Missing) and verdict.is_damage


def _will_compare(verdict: Verdict) -> bool:
    """Return whether the next sync knows that an image is not as in the pool."""
    return isinstance(verdict, Agreement) and verdict.found.blocks > 0 and not verdict.warnings


def _only(reference: Reference) -> DiskPoint:
    if reference.disk is None:
        raise errors.UsageError("name one disk")
    return reference.disk


def _place(found: Found, result: Checked) -> str:
    where = f"bytes {found.extent.start} to {found.extent.stop}"
    if found.time == repairs.ZEROS:
        return f"{where}, which are zeros"
    return f"{where}, from {found.time}" if result.repaired else f"{where}, whole in {found.time}"


def _amount(result: Checked) -> str:
    """Return how much is repaired, or can be."""
    parts = [f"{result.repair.blocks} blocks"] if result.repair.blocks else []
    parts += [f"{result.repair.entries} digests"] if result.repair.entries else []
    return " and ".join(parts) or "nothing"


def _verdict(found: Damage) -> str:
    if found.problem:
        return f"DAMAGED: {found.problem}"
    if found.blocks:
        return f"DAMAGED: {found.blocks} blocks differ, {_checked(found)}"
    return f"ok, {_checked(found)}"


def _checked(found: Damage) -> str:
    checked = f"{units.format_size(found.checked)} checked"
    if found.sampled:
        return f"{checked}, a sample of {units.format_size(found.sampled_of)}"
    return checked


# ── what is meant ────────────────────────────────────────────────────────────────────────────


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
    return listed.label(catalogue, history) if history else vm_uuid


def _unlisted_document(name: str, point: Unlisted) -> dict[str, object]:
    return {
        "point": name,
        "vm_uuid": point.vm_uuid,
        "time": point.time,
        "problem": point.why,
        "disks": [],
        "unverified": [],
        "failures": [],
    }


def _disk_document(result: Checked) -> dict[str, object]:
    found, left = result.damage, result.left
    sources = [[f.extent.start, f.extent.stop, f.time or None] for f in result.repair.found]
    return {
        "device": result.disk.device,
        "damaged": result.damaged,
        "problem": left.problem,
        "blocks": left.blocks,
        "checked": found.checked,
        "sample_of": found.sampled_of if found.sampled else None,
        "extents": [[extent.start, extent.stop] for extent in left.extents],
        "on_record": result.on_record,
        "left_out_since": result.since.isoformat() if result.since else None,
        "repairable": [] if result.repaired else sources,
        "repaired": sources if result.repaired else [],
        "digests": result.repair.entries,
        "pool": agreeing.document(result.verdict),
        "pool_record": agreeing.record_document(result.by_pool),
    }
