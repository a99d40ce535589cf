"""``mount`` and ``umount``: a pool's disks as files."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import trio
import typer

from cbtfs import errors, mount as mounts
from cbtfs.catalogue import Catalogue
from cbtfs.mount import Backups, MountOptions
from cbtfs.store import is_store, open_store

from . import context as contexts, running
from .context import Globals

Mountpoint = Annotated[str, typer.Argument(metavar="MOUNTPOINT", help="An empty directory.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this module to ``app``."""
    app.command(
        "mount", epilog="Example: cbtfs mount /mnt/pool && cp /mnt/pool/by-vm/web1/xvda.raw ."
    )(mount)
    app.command("umount", epilog="Example: cbtfs umount /mnt/pool")(umount)


def mount(
    context: typer.Context,
    mountpoint: Mountpoint,
    *,
    foreground: Annotated[
        bool,
        typer.Option(
            "-f", "--foreground", metavar="", help="Stay in the foreground (for systemd)."
        ),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            metavar="OPTS",
            help="live=snapshot|off, linger=60s, timeout=2m, cache=96M, connections=8, tune=off, "
            "snapshots (mkdir takes one), allow_other.",
        ),
    ] = None,
) -> None:
    """Show every disk and snapshot of the pool as a file; return when it can be used."""
    options = contexts.of(context)
    text = ",".join(option or [])
    chosen = MountOptions.parse(text)  # a mistake is told here, not in the background
    if not foreground:
        arguments = _arguments(options, mountpoint, text)
        raise typer.Exit(mounts.start_background(arguments, log_file=_log_file(options)))
    running.run(lambda: _serve(options, Path(mountpoint), chosen))


def helper_arguments(words: Sequence[str]) -> list[str]:
    """Return the command line for what mount(8) hands to ``mount.fuse.cbtfs``.

    That is ``POOL DIR [-sfnv] [-o OPTS]``; POOL is ``none`` for the only pool or the environment's.
    ``config=FILE`` and ``store=DIR`` among OPTS become the options of that name.

    Raises:
        UsageError: POOL or DIR is missing.
    """
    plain = [word for word in words if not word.startswith("-")]
    texts = [after for word, after in pairwise(words) if word == "-o"]
    places = [word for word in plain if word not in texts]
    if len(places) != 2:
        raise errors.UsageError("write: mount -t fuse.cbtfs POOL DIR [-o OPTS]")
    known = [option for text in texts for option in text.split(",")]
    ours = [option for option in known if option.startswith(("config=", "store="))]
    rest = [option for option in known if option not in ours]
    found = ["--pool", places[0]] if places[0] != "none" else []
    for option in ours:
        name, _, value = option.partition("=")
        found += [f"--{name}", value]
    return [*found, "mount", *(["-o", ",".join(rest)] if rest else []), "--", places[1]]


def _arguments(options: Globals, mountpoint: str, text: str) -> list[str]:
    """Return the command line of the process in the background: this one's, in the foreground."""
    words = ["-q"] if options.quiet else ["-v"] * options.verbosity
    for name, value in (
        ("--config", options.config),
        ("--pool", options.pool),
        ("--store", options.store),
    ):
        words += [name, value] if value else []
    words += ["mount", "--foreground"]
    words += ["-o", text] if text else []
    return [*words, "--", mountpoint]


def _log_file(options: Globals) -> Path | None:
    """Return where systemd wants logs; None leaves it to the mount."""
    directory = options.environ.get("LOGS_DIRECTORY", "").split(":")[0]
    return Path(directory, "cbtfs.log") if directory else None


async def _serve(options: Globals, mountpoint: Path, chosen: MountOptions) -> None:
    async with contexts.opened_pool(options) as pool:
        backups = await trio.to_thread.run_sync(_backups, options)
        view = await mounts.open_view(pool.feed(), backups=backups)
        for problem in view.inventory.problems:
            contexts.warn(problem)
        await mounts.serve(pool, view=view, mountpoint=mountpoint, options=chosen, maker=pool)


def _backups(options: Globals) -> Backups | None:
    path = options.store_path()
    if path is None:
        return None
    with contexts.store_if_any(options) as store:
        catalogue = contexts.catalogue_of(store)
        exists = store is not None

    def read() -> Catalogue:
        nonlocal exists
        exists = exists or is_store(path)
        if not exists:  # the first sync makes it
            return Catalogue({})
        with open_store(path, create=False) as store:
            return store.catalogue()

    return Backups(catalogue, str(path.absolute()), read)


def umount(mountpoint: Mountpoint) -> None:
    """Unmount; return when connections and temporary snapshots are gone."""
    mounts.umount(Path(mountpoint))
