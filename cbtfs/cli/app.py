"""App: the command line as a whole: global options, verbs, and the one door for errors."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cbtfs import __version__

from . import (
    cleaning,
    configuring,
    demo,
    diffing,
    doctoring,
    failures,
    mounting,
    opening,
    output,
    points,
    pools,
    pruning,
    restoring,
    simulating,
    syncing,
    verifying,
)
from .context import Globals

app = typer.Typer(
    name="cbtfs",
    help="The disks of a XenServer or XCP-ng pool as plain files, and incremental backups of them"
    " that are plain files too.",
    epilog="Example: cbtfs --config DIR/cbtfs.toml ls    (try it on a simulated pool: cbtfs demo)",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 128 + signal.SIGINT

MOUNT_HELPER = "mount.fuse.cbtfs"

for module in (
    *(pools, mounting, syncing, points, diffing, verifying, restoring, opening, pruning, cleaning),
    *(doctoring, configuring, simulating, demo),
):
    module.register(app)


def _show_version(value: bool) -> None:
    if value:
        output.line(f"cbtfs {__version__}")
        raise typer.Exit


@app.callback()
def options(  # noqa: PLR0913  # one parameter per option
    context: typer.Context,
    *,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Configuration file (CBTFS_CONFIG).")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(metavar="NAME", help="Pool of the configuration.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="Where restore points are (CBTFS_STORE).")
    ] = None,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", metavar="", help="Print only results and errors.")
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "-v",
            "--verbose",
            count=True,
            metavar="",
            help="Say more; -vv: tracebacks too.",
            show_default=False,
        ),
    ] = 0,
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON document.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Take the global options, which come before the verb."""
    verbosity = -1 if quiet else verbose
    context.obj = Globals(config=config, pool=pool, store=store, verbosity=verbosity, json=json)
    _start_log(verbosity)


def _start_log(verbosity: int) -> None:
    """Send our own log to stderr.

    Only ours: httpx logs urls, and those of xapi's handlers hold the session.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter("cbtfs: %(levelname)s: %(message)s"))
    log = logging.getLogger("cbtfs")
    log.handlers[:] = [handler]
    log.propagate = False
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    log.setLevel(levels.get(verbosity, logging.DEBUG))


class _SafeFormatter(logging.Formatter):
    """Formats a record as a sentence that cannot drive a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return "\n".join(map(output.safe, super().format(record).split("\n")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; everything that fails passes here.

    Under the name ``mount.fuse.cbtfs`` the program is a helper of mount(8).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    output.prepare()
    failures.install_signal_handler()
    try:
        if Path(sys.argv[0]).name == MOUNT_HELPER:
            arguments = mounting.helper_arguments(arguments)
        status = app(arguments, prog_name="cbtfs", standalone_mode=False)
        output.finish()
    except (Exception, KeyboardInterrupt) as exc:
        return failures.report(exc, verbosity=_verbosity(arguments))
    if status == INTERRUPTED:  # typer makes this of a KeyboardInterrupt, and says nothing
        return failures.report(KeyboardInterrupt(), verbosity=0)
    return status if isinstance(status, int) else 0


def _verbosity(arguments: Sequence[str]) -> int:
    """Return how often ``-v`` was given; an error may come before the options are parsed."""
    return sum(
        1 if word == "--verbose" else word.count("v")
        for word in arguments
        if word == "--verbose" or (word[:1] == "-" and set(word[1:]) == {"v"})
    )
