"""Failures: how whatever was raised becomes one sentence on stderr and an exit status."""

import signal
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import cast

import typer

from cbtfs import errors
from cbtfs.signals import ONE_SIGNAL

from . import output

UNKNOWN = 1

GLOBAL_OPTIONS = ("--config", "--pool", "--store", "--json", "--quiet", "--verbose", "-q", "-v")


def report(exc: BaseException, *, verbosity: int) -> int:
    """Tell the user what happened and return the exit status; a traceback only from ``-vv`` on."""
    if verbosity >= 2:
        # its messages hold names from the pool
        text = "".join(traceback.format_exception(exc))
        output.complain("\n".join(map(output.safe, text.rstrip("\n").split("\n"))))
    leaf = _worst(exc)
    if isinstance(leaf, typer.TyperException):
        if leaf.format_message():  # no arguments at all: typer has printed the help
            output.note(_usage_sentence(leaf))
        return leaf.exit_code
    if isinstance(leaf, KeyboardInterrupt | typer.Abort):
        leaf = errors.Interrupted(signal.SIGINT)
    if isinstance(leaf, errors.CbtfsError):
        if not isinstance(leaf, output.ReaderGone):
            output.note(str(leaf))
        return leaf.exit_code
    if isinstance(leaf, OSError) and leaf.filename:
        output.note(f"{leaf.filename!s}: {leaf.strerror}")
        return UNKNOWN
    output.note(
        f"this is a mistake in cbtfs: {type(leaf).__name__}: {leaf}; run the command with -vv and"
        " report what it prints"
    )
    return UNKNOWN


def _worst(exc: BaseException) -> BaseException:
    """Return the exception to report of a group: an interruption, else the first that we know."""
    leaves = list(_leaves(exc))
    for kind in (errors.Interrupted, KeyboardInterrupt, errors.CbtfsError):
        for leaf in leaves:
            if isinstance(leaf, kind):
                return leaf
    return leaves[0]


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in cast("BaseExceptionGroup[BaseException]", exc).exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def _usage_sentence(exc: typer.TyperException) -> str:
    """Return the sentence for a command line that typer refused."""
    text = exc.format_message().strip().rstrip(".")
    option = getattr(exc, "option_name", "")
    if option in GLOBAL_OPTIONS:
        return f"{option} goes before the verb: cbtfs {option} VERB …"
    where = getattr(getattr(exc, "ctx", None), "command_path", "cbtfs")
    hint = "" if text.endswith("?") else f"; see '{where} --help'"
    return f"{text[:1].lower()}{text[1:]}{hint}"


def install_signal_handler() -> None:
    """Make SIGTERM an exception as SIGINT is one, so that a command cleans up behind itself.

    Told the same twice at once, as by timeout(1), it is not interrupted in its cleaning up.
    """
    came: list[float] = []

    def interrupt(signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not came or now - came[0] > ONE_SIGNAL:
            came.append(now)
            raise errors.Interrupted(signum)

    signal.signal(signal.SIGTERM, interrupt)
