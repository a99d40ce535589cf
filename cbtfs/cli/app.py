"""App: the command line as a whole: global options, verbs, and the one door for errors.

Only the module of the verb that is called is imported: all of them take 0.15 s more, each time.
"""

import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cbtfs import __version__

from . import failures, output
from .context import Globals

INTERRUPTED = 128 + signal.SIGINT

MOUNT_HELPER = "mount.fuse.cbtfs"

VERBS = {
    "ls": "pools",
    "info": "pools",
    "mount": "mounting",
    "umount": "mounting",
    "sync": "syncing",
    "list": "points",
    "diff": "diffing",
    "verify": "verifying",
    "restore": "restoring",
    "open": "opening",
    "close": "opening",
    "prune": "pruning",
    "pin": "pruning",
    "unpin": "pruning",
    "clean": "cleaning",
    "doctor": "doctoring",
    "demo": "demo",
    "config": "configuring",
    "sim": "simulating",
}
"""The module of each verb, in the order of the help: those with verbs of their own last."""

_WITH_VALUE = ("--config", "--pool", "--store")


def application(verb: str = "") -> typer.Typer:
    """Return the command line with all verbs that the module of ``verb`` has.

    With all there are if it is none: a wrong one is told which are like it.
    """
    app = typer.Typer(
        name="cbtfs",
        help="The disks of a XenServer or XCP-ng pool as plain files, and incremental backups of"
        " them that are plain files too.",
        epilog="Example: cbtfs --config DIR/cbtfs.toml ls    (try it on a simulated pool:"
        " cbtfs demo)",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    chosen = [VERBS[verb]] if verb in VERBS else dict.fromkeys(VERBS.values())
    for name in chosen:
        importlib.import_module(f".{name}", __package__).register(app)
    return app


def verb_of(arguments: Sequence[str]) -> str:
    """Return the first word that is no global option, "" if there is none."""
    words = iter(arguments)
    for word in words:
        if word in _WITH_VALUE:
            next(words, None)
        elif not word.startswith("-"):
            return word
    return ""


def _show_version(value: bool) -> None:
    if value:
        output.line(f"cbtfs {__version__}")
        raise typer.Exit


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
            arguments = _helper_arguments(arguments)
        app = application(verb_of(arguments))
        status = app(arguments, prog_name="cbtfs", standalone_mode=False)
        output.finish()
    except (Exception, KeyboardInterrupt) as exc:
        return failures.report(exc, verbosity=_verbosity(arguments))
    if status == INTERRUPTED:  # typer makes this of a KeyboardInterrupt, and says nothing
        return failures.report(KeyboardInterrupt(), verbosity=0)
    return status if isinstance(status, int) else 0


def _helper_arguments(words: Sequence[str]) -> list[str]:
    arguments: list[str] = importlib.import_module(".mounting", __package__).helper_arguments(words)
    return arguments


def _verbosity(arguments: Sequence[str]) -> int:
    """Return how often ``-v`` was given; an error may come before the options are parsed."""
    return sum(
        1 if word == "--verbose" else word.count("v")
        for word in arguments
        if word == "--verbose" or (word[:1] == "-" and set(word[1:]) == {"v"})
    )
