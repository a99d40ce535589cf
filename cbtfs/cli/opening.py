"""``open`` and ``close``: the file systems of a restore point, read-only, in a directory."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cbtfs import contents, errors, opened, units
from cbtfs.catalogue import Reference
from cbtfs.contents import Image
from cbtfs.opened import Mount, Opened
from cbtfs.store import Store

from . import context as contexts, output
from .context import Globals
from .output import Table


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command("open", epilog="Example: cbtfs open web1/latest/xvda /mnt/web1")(open_point)
    app.command("close", epilog="Example: cbtfs close /mnt/web1")(close)


def open_point(
    context: typer.Context,
    point: Annotated[str, typer.Argument(metavar="POINT", help="VM/TIME or VM/TIME/DISK.")],
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="An empty directory; made if it is not there.")
    ],
) -> None:
    """Mount the file systems of a restore point read-only, saying each command (needs root)."""
    options = contexts.of(context)
    opened.check_root("open")
    with contexts.opened_store(options) as store:
        reference = contexts.point_of(store, point)
        _check_outside(Path(directory), store)
        for device in sorted(store.damaged(reference.history.uuid, reference.point.time)):
            if reference.disk is None or reference.disk.device == device:
                contexts.warn(
                    f"{point}: {device} is damaged, so what it shows may be wrong; cbtfs verify"
                    " tells where"
                )
        result = opened.open_images(
            _images(store, reference),
            Path(directory),
            point=f"{reference.history.uuid}/{reference.point.time}",
            is_disk=reference.disk is not None,
            tell=_teller(options),
        )
    for warning in result.warnings:
        contexts.warn(warning)
    if options.json:
        output.document(_document(result))
    else:
        _print(result, options)


def close(
    context: typer.Context,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What was given to 'open'.")],
) -> None:
    """Unmount what 'open' mounted at DIR, also after a crash, saying each command."""
    options = contexts.of(context)
    opened.check_root("close")
    result = opened.close(Path(directory), tell=_teller(options))
    if options.json:
        output.document(
            {"dir": result.where, "unmounted": result.unmounted, "commands": result.commands}
        )


def _check_outside(directory: Path, store: Store) -> None:
    if directory.resolve().is_relative_to(store.path.resolve()):
        raise errors.UsageError(f"{directory} is in the store; name a directory elsewhere")


def _images(store: Store, reference: Reference) -> list[Image]:
    """Return the images of the disks that the user means, where their files really are."""
    folder = store.point_path(reference.history.uuid, reference.point.time).resolve()
    disks = (reference.disk,) if reference.disk else reference.point.disks
    return [
        Image(disk.device, Path(disk.file).stem, str(folder / disk.file), disk.size)
        for disk in disks
    ]


def _teller(options: Globals) -> Callable[[str], None]:
    def tell(command: str) -> None:
        if not options.quiet:
            output.complain(f"+ {output.safe(command)}")

    return tell


def _print(result: Opened, options: Globals) -> None:
    table = Table(["WHERE", "TYPE", ">SIZE", "FROM"], flexible=(0,))
    for mount in result.mounts:
        table.add(mount.where, mount.type, units.format_size(mount.region.size), _origin(mount))
    table.print()
    for skipped in result.skipped:
        options.tell(f"left alone: {skipped}")


def _origin(mount: Mount) -> str:
    region = mount.region
    if region.devices:
        return f"{' and '.join(region.devices)}, volume {region.volume}"
    if region.volume:
        return f"{region.image.device}, volume {region.volume}"
    whole = region.partition is None
    return f"{region.image.device}, {'all of it' if whole else f'partition {region.partition}'}"


def _document(result: Opened) -> dict[str, object]:
    return {
        "dir": result.where,
        "mounts": [
            {
                "device": mount.region.image.device,
                "devices": mount.region.devices or [mount.region.image.device],
                "partition": mount.region.partition,
                "volume": mount.region.volume,
                "fstype": mount.type,
                "where": mount.where,
                "source": mount.region.image.path,
                "offset": mount.region.offset,
                "size": mount.region.size,
            }
            for mount in result.mounts
        ],
        "skipped": [
            {
                "device": skipped.device,
                "name": skipped.label,
                "partition": skipped.partition,
                "fstype": skipped.type,
                "why": skipped.why,
                "recipe": f"{contents.RECIPES}: {skipped.recipe}",
            }
            for skipped in result.skipped
        ],
        "warnings": result.warnings,
        "commands": result.commands,
    }
