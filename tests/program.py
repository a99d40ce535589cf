"""``cbtfs`` called in the process of a test, in an environment without configuration."""

import contextlib
import json
import logging
import signal
from collections.abc import Generator
from dataclasses import dataclass

import pytest

from cbtfs import cli


@dataclass(frozen=True)
class Result:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str

    def document(self) -> dict[str, object]:
        """Return what it printed as JSON."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


class Program:
    """Calls ``cbtfs``; options that are always given come first."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *options: str) -> None:
        self._capsys = capsys
        self._options = options

    def __call__(self, *arguments: str) -> Result:
        self._capsys.readouterr()
        status = cli.main([*self._options, *arguments])
        captured = self._capsys.readouterr()
        return Result(status, captured.out, captured.err)

    def json(self, *arguments: str) -> dict[str, object]:
        """Return the document that a command prints; it must succeed."""
        result = self("--json", *arguments)
        assert result.status == 0, result.err
        return result.document()


@contextlib.contextmanager
def untouched_process() -> Generator[None]:
    """Set the log and the signal handlers back as they were."""
    log = logging.getLogger("cbtfs")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)
        signal.signal(signal.SIGTERM, on_sigterm)
