"""``restore``: a restore point into files, into new disks of a pool, or over those it is of."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cbtfs import errors

from . import context as contexts, restoring_file, restoring_pool
from .restoring_pool import Wish


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("restore", epilog="Example: cbtfs restore web1/latest/xvda --to /tmp/xvda.raw")(
        restore
    )


def restore(  # noqa: PLR0913  # one parameter per option
    context: typer.Context,
    point: Annotated[str, typer.Argument(metavar="POINT", help="VM/TIME or VM/TIME/DISK.")],
    *,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", metavar="FILE|DEVICE", help="Into a file or device; all disks into a directory."
        ),
    ] = None,
    to_sr: Annotated[
        str | None,
        typer.Option("--to-sr", metavar="SR", help="Make new disks on this SR: name or uuid."),
    ] = None,
    vm_name: Annotated[
        str | None,
        typer.Option("--vm-name", metavar="NAME", help="With --to-sr: a new VM with these disks."),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", metavar="", help="Over the disks it came from; the VM must be halted."
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            metavar="",
            help="Overwrite what a file or device holds, and restore what is on record as damaged.",
        ),
    ] = False,
    verify: Annotated[
        Literal["sample", "full"],
        typer.Option("--verify", help="Read back some of what was written, or all of it."),
    ] = "sample",
    dry_run: contexts.DryRun = False,
    json_progress: contexts.JsonProgress = False,
) -> None:
    """Restore a disk or all disks of a restore point."""
    options = contexts.of(context)
    if [to is not None, to_sr is not None, in_place].count(True) != 1:
        raise errors.UsageError("say where to: one of --to FILE, --to-sr SR and --in-place")
    if vm_name is not None and to_sr is None:
        raise errors.UsageError("--vm-name goes with --to-sr")
    if vm_name is not None and not vm_name.strip():
        raise errors.UsageError("--vm-name is empty; say what the new VM is to be called")
    if to is not None:
        restoring_file.restore(
            options,
            point,
            to,
            force=force,
            whole=verify == "full",
            dry_run=dry_run,
            json_progress=json_progress,
        )
        return
    wish = Wish(
        point=point,
        to_sr=to_sr or "",
        vm_name=vm_name or "",
        forced=force,
        whole=verify == "full",
        dry_run=dry_run,
        json_progress=json_progress,
    )
    if in_place:
        restoring_pool.in_place(options, wish)
    else:
        restoring_pool.to_sr(options, wish)
