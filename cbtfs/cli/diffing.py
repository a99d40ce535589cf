"""``diff``: what changed between two restore points, from each to the next, or until now."""

from collections.abc import Iterator
from typing import Annotated

import typer

from cbtfs import difference, divergence, errors
from cbtfs.catalogue import Catalogue, Reference, VMHistory
from cbtfs.difference import Pair
from cbtfs.extents import Extent
from cbtfs.store import Store

from . import context as contexts, differences, growth, points, present
from .context import Globals

DAMAGED = 4
"""Exit status when digests are not as committed."""


def register(app: typer.Typer) -> None:
    """Add the verb of this module to ``app``."""
    app.command(
        "diff", epilog="Example: cbtfs diff web1/latest~1 web1/latest; diff web1/latest web1/now"
    )(diff)


def diff(
    context: typer.Context,
    a: Annotated[
        str, typer.Argument(metavar="A", help="VM/TIME or VM/TIME/DISK; without B also VM.")
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B]", help="What A is compared with; VM/now or VM/now/DISK: the disks now."
        ),
    ] = None,
    *,
    json_progress: contexts.JsonProgress = False,
) -> None:
    """Show which bytes differ between two restore points, in blocks of 64 KiB.

    Without B: how much each point of a VM differs from the one before. Only digests are read.

    VM/now: live disks are read, where they may have changed; attached ones through a snapshot.
    """
    options = contexts.of(context)
    with contexts.opened_store(options) as store:
        catalogue = contexts.catalogue_of(store)
        history = _vm(catalogue, a) if b is None else None
        status = 0
        if history is not None:
            problems = growth.show(options, store, points.label(catalogue, history), history)
        else:
            one = _point(catalogue, a)
            now = present.parse(b) if b is not None else None
            if now is not None:
                kind = contexts.progress_kind(options, as_json=json_progress)
                request = present.Request(store, catalogue, one, now, kind)
                problems, status = present.show(options, request)
            else:
                problems = _show(options, store, catalogue, one, b)
    for problem in problems:
        contexts.warn(problem)
    if problems or status:
        raise typer.Exit(DAMAGED if problems else status)


def _vm(catalogue: Catalogue, text: str) -> VMHistory | None:
    """Return the VM that ``text`` names, None if it is the name of a point."""
    try:
        return catalogue.find(text)
    except errors.NotFound:
        if "/" not in text:
            raise
        return None


def _point(catalogue: Catalogue, text: str) -> Reference:
    try:
        return catalogue.resolve(text)
    except errors.UsageError:
        if present.parse(text) is not None:
            raise errors.UsageError(
                f"{text!r} can only be what a point is compared with; write cbtfs diff POINT {text}"
            ) from None
        raise


# ── two points ───────────────────────────────────────────────────────────────────────────────


def _show(
    options: Globals, store: Store, catalogue: Catalogue, one: Reference, b: str | None
) -> list[str]:
    """Compare two points; return what cannot be compared, in sentences."""
    if b is None:
        old, new = _before(one), one
    else:
        old, new = one, catalogue.resolve(b)
    sides = differences.paired(differences.side(catalogue, old), differences.side(catalogue, new))
    view = differences.view(sides, as_json=options.json, verbose=options.verbosity > 0)
    for pair in sides.pairs:
        view.add(pair, _between(store, old, new, pair))
    view.end()
    return view.problems


def _before(reference: Reference) -> Reference:
    earlier = [p for p in reference.history.points if p.time < reference.point.time]
    if not earlier:
        raise errors.NotFound(
            f"{reference.history.name} has no restore point before {reference.point.time}; name two"
        )
    return Reference(reference.history, earlier[-1])


def _between(store: Store, old: Reference, new: Reference, pair: Pair) -> Iterator[Extent]:
    """Yield where a disk of two points differs; nothing if only one of them has it."""
    if pair.old is None or pair.new is None:
        return
    with (
        divergence.opened(store, old, pair.old) as before,
        divergence.opened(store, new, pair.new) as after,
    ):
        yield from difference.between(before, after)
